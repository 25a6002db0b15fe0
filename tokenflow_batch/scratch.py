"""`run --scratch`: a stage's files on a disk of this machine, written there first and read there.

The work folder stays the only truth. A unit's files are copied back to it before the unit counts as
done, and a file here is used only if it is what the commit record says: so all of this can vanish
at any moment, and any other machine can go on.
"""

from __future__ import annotations

import shutil
import threading
import uuid
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from tokenflow_batch.errors import StoreError
from tokenflow_batch.files import digest

_PREFIX = "tokenflow_batch-"


@contextmanager
def own_folder(parent: Path) -> Iterator[Path]:
    """A folder of this process alone in `parent`, gone afterwards.

    What killed processes have left there goes first: nobody holds its lock.

    Raises:
        StoreError: `parent` can't be written.
    """
    name = f"{_PREFIX}{uuid.uuid4().hex}"
    lock = FileLock(parent / f"{name}.lock")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _sweep(parent)
        lock.acquire()
        (parent / name).mkdir()
    except OSError as error:
        raise StoreError(
            f"--scratch {parent}: {error.strerror}", hint="give a folder that can be written"
        ) from None
    try:
        yield parent / name
    finally:
        shutil.rmtree(parent / name, ignore_errors=True)
        lock.release()
        (parent / f"{name}.lock").unlink(missing_ok=True)


def _sweep(parent: Path) -> None:
    for path in parent.glob(f"{_PREFIX}*.lock"):
        lock = FileLock(path, timeout=0)
        with suppress(Timeout, OSError), lock:  # in use, or somebody else's
            shutil.rmtree(path.with_suffix(""), ignore_errors=True)
            path.unlink(missing_ok=True)


def keep_only(scratch: Path, wanted: Container[Path | None]) -> None:
    """Remove the folders of all other stages and keys: what a job before this one needed."""
    for folder in scratch.glob("*/*"):
        if folder not in wanted:
            shutil.rmtree(folder, ignore_errors=True)


class Copies:
    """The files of one stage in scratch.

    Args:
        folder: their place there; used by this process alone.
        original: the stage's folder.
    """

    def __init__(self, folder: Path, original: Path) -> None:
        self.folder, self._original = folder, original
        self._lock = threading.Lock()  # reads run ahead in threads
        self._units: dict[str, tuple[str, ...]] = {}

    def bring_back(self, unit: str, files: Iterable[Path]) -> list[Path]:
        """Copy a unit's new files to the stage's folder; their places there, in that order."""
        names = tuple(str(path.relative_to(self.folder)) for path in files)
        for name in names:
            target = self._original / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.folder / name, target)
        self._units[unit] = names
        return [self._original / name for name in names]

    def fetch(self, unit: str, name: str, sha256: str) -> bool:
        """Have a committed file here, copied where it is not; False if the original is another."""
        copy = self.folder / name
        with self._lock:
            self._units[unit] = (*self._units.get(unit, ()), name)
            if copy.is_file() and digest(copy) == sha256:
                return True
            copy.parent.mkdir(parents=True, exist_ok=True)
            arriving = copy.with_name(f".{copy.name}.arriving")
            shutil.copyfile(self._original / name, arriving)
            sound = digest(arriving) == sha256
            if sound:
                arriving.replace(copy)
            else:
                arriving.unlink()
        return sound

    def release(self, unit: str) -> None:
        """Remove a unit's files here, if there are any; its originals stay."""
        for name in self._units.pop(unit, ()):
            (self.folder / name).unlink(missing_ok=True)

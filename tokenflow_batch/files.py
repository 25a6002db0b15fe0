"""Durable files: atomic replacement, fsync in the right order, digests and their memory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from tokenflow_batch.errors import StoreError, VideoError


def digest(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_json(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form (sorted keys, no spaces)."""
    return hashlib.sha256(_CANONICAL.encode(value).encode()).hexdigest()


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def at_home(path: str) -> Path:
    """A path with a leading `~` resolved, or as it stands where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def fsync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary file beside `path`; on success it becomes `path` durably, else it goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(
        prefix=f".{path.name}.", suffix=f".tmp{path.suffix}", dir=path.parent
    )
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        fsync(temporary)
        temporary.replace(path)
        fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def tree_bytes(folder: Path) -> int:
    """Bytes of all files in a folder; what others remove meanwhile doesn't count."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(root, name)).st_size  # noqa: PTH118 - many
    return total


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically and durably."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", "utf-8")


class FileMemory:
    """What was found out about large input files, remembered by (path, size, mtime) across runs.

    Any number of processes may add to it at the same time.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, dict[str, Any]] | None = None
        self._read: tuple[int, int] | None = None
        self._new: dict[str, dict[str, Any]] = {}

    def _load(self) -> dict[str, dict[str, Any]]:
        if self._known is None:
            self._read = self._version()
            try:
                known = json.loads(self._path.read_text("utf-8"))
            except (OSError, ValueError):
                known = {}  # only a memory: losing it costs reading the files again
            self._known = known if isinstance(known, dict) else {}
        return self._known

    def _version(self) -> tuple[int, int] | None:
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_ino, stat.st_mtime_ns

    def recall(self, file: Path) -> dict[str, Any] | None:
        """What is remembered of the file, if it is unchanged, without reading it."""
        found = self._recall(file)
        if found is None and self._version() != self._read:  # others have learned something since
            self._known = None
            self._load().update(self._new)
            found = self._recall(file)
        return found

    def _recall(self, file: Path) -> dict[str, Any] | None:
        try:
            entry = self._load()[os.path.realpath(file)]
            return entry if entry["stat"] == _stat(file) else None
        except (OSError, KeyError, TypeError):
            return None

    def keep(self, file: Path, stat: list[int], found: Mapping[str, Any]) -> None:
        """Remember something about a file as it was at `stat`; `save` makes it last."""
        name, entry = os.path.realpath(file), {"stat": stat, **found}
        self._load()[name] = self._new[name] = entry

    def save(self) -> None:
        """Add what is new to the file.

        Raises:
            StoreError: it can't be written.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self._path.with_suffix(".lock")):
                self._known = None  # others may have added theirs since
                self._load().update(self._new)
                write_json(self._path, self._known)
                self._read = self._version()
        except OSError as error:
            raise StoreError(
                f"{self._path}: can't be written: {error.strerror}",
                hint="check that the work folder is a folder that can be written (--workdir)",
            ) from error
        self._new = {}


class DigestMemory(FileMemory):
    """Digests of large input files."""

    def peek(self, file: Path) -> str | None:
        """The digest if the file is remembered and unchanged, without reading it."""
        entry = self.recall(file)
        return None if entry is None or "sha256" not in entry else str(entry["sha256"])

    def sizes(self) -> set[int]:
        """Sizes of all files that are remembered."""
        return {entry["stat"][0] for entry in self._load().values()}

    def digest(self, file: Path, *, save: bool = True) -> str:
        """The digest, from memory or by reading the file.

        Raises:
            VideoError: the file can't be read.
        """
        known = self.peek(file)
        if known is not None:
            return known
        try:
            before = _stat(file)
            value = digest(file)
        except FileNotFoundError:
            raise VideoError(f"{file}: no such file") from None
        except OSError as error:
            raise VideoError(f"{file}: can't be read: {error.strerror}") from None
        self.keep(file, before, {"sha256": value})
        if save:
            self.save()
        return value


def _stat(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]

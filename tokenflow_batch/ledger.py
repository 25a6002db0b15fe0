"""What is done: commit records of units of work, in a stage's folder.

A unit counts only once its record says so. The record is written last: data files are flushed,
then their folders, then the record appears by atomic rename. It lists every file with size and
digest; the first read of a unit in a process compares them.

STAGE/KEY/key.json         what the key stands for
         /numerics.json    device, dtype, backends, threads, library versions
         /commits/*.json   one record a unit; `complete.json` once there is nothing left to do
         /...              the units' files
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tokenflow_batch.ahead import Behind
from tokenflow_batch.clock import Lap
from tokenflow_batch.errors import DamagedUnit, NumericsMismatch, StoreError
from tokenflow_batch.files import digest, digest_json, fsync, write_json
from tokenflow_batch.scratch import Copies

COMPLETE = "complete"
_FREED = "freed"


@dataclass(frozen=True)
class Record:
    """A unit's commit record.

    Attributes:
        files: relative path → (size in bytes, SHA-256).
        facts: what the unit says of itself (UNet rows, seconds, …).
        dropped: the files were removed on purpose since; the work counts as done.
    """

    files: Mapping[str, tuple[int, str]]
    facts: Mapping[str, Any]
    dropped: bool = False

    def to_json(self) -> dict[str, Any]:
        """As stored, with a digest of itself: facts decide results, too (shapes, sizes)."""
        files = {name: list(value) for name, value in self.files.items()}
        content = {"files": files, "facts": dict(self.facts), "dropped": self.dropped}
        return {**content, "sha256": digest_json(content)}

    @classmethod
    def from_json(cls, raw: Any) -> Record:
        """From what `to_json` gave; ValueError, KeyError or TypeError if it isn't that."""
        content = {name: raw[name] for name in ("files", "facts", "dropped")}
        if raw["sha256"] != digest_json(content):
            raise ValueError("not what was written")
        files = {str(k): (int(size), str(sha)) for k, (size, sha) in raw["files"].items()}
        return cls(files, dict(raw["facts"]), bool(raw["dropped"]))


class StageFolder:
    """The folder of one stage with one key.

    Args:
        folder: where it lies.
        stage: its name.
        key: of its result.
        near: a folder on a disk of this machine, where files are written first and read; see
            `scratch`.

    Attributes:
        files: where the files of units are written and read; the folder itself unless `near` is
            given.
        lap: seconds since the unit before, for the next record.
    """

    def __init__(self, folder: Path, stage: str, key: str, near: Path | None = None) -> None:
        self.folder, self.stage, self.key = folder, stage, key
        self.files = near or folder
        self._copies = Copies(near, folder) if near else None
        self._commits = folder / "commits"
        self._checked: set[str] = set()
        self._behind = Behind()
        self.lap = Lap()

    # -- units -------------------------------------------------------------------------------

    def record(self, unit: str) -> Record | None:
        """The unit's record, or None if it has not been committed.

        Raises:
            DamagedUnit: there is a record, but it can't be read.
        """
        self._behind.wait(unit)
        try:
            data = self._record_path(unit).read_bytes()
        except FileNotFoundError:
            return None
        try:
            return Record.from_json(json.loads(data))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise self._damage(unit, "its commit record is not readable") from None

    def committed(self, unit: str) -> bool:
        """Whether the unit's work is done (its files may have been dropped since)."""
        return self.record(unit) is not None

    def refresh(self) -> None:
        """Have the operating system look at the folder anew: other machines may write to it.

        Network file systems remember for a minute that a file was not there; opening its folder
        makes them ask.
        """
        os.close(os.open(self._commits, os.O_RDONLY))

    def available(self, unit: str) -> bool:
        """Whether the unit is done and its files are still kept."""
        record = self.record(unit)
        return record is not None and not record.dropped

    def commit(
        self,
        unit: str,
        files: Iterable[Path],
        facts: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
    ) -> None:
        """Declare a unit done: flush its files, then their folders, then write the record.

        Files in scratch are copied to the folder first. Facts that are a function are asked for
        last.
        """
        written = sorted(files)
        paths = self._copies.bring_back(unit, written) if self._copies else written
        for path in paths:
            fsync(path)
        for folder in sorted(self._folders(paths), key=lambda p: -len(p.parts)):
            fsync(folder)
        listed = {str(p.relative_to(self.files)): (p.stat().st_size, digest(p)) for p in written}
        told = facts() if callable(facts) else facts
        write_json(self._record_path(unit), Record(listed, dict(told or {})).to_json())
        self._checked.add(unit)

    def commit_behind(self, unit: str, work: Callable[[], None], size: int | None = None) -> None:
        """Have `work`, which writes and commits the unit, done while the caller goes on.

        Several small units may be behind, in order. Whoever asks about one waits for it, and
        nothing is dropped, forgotten or declared done before them. An error is raised by the next
        such call, and none of those after it is committed.

        Args:
            unit: its name.
            work: what to do.
            size: bytes held until then; None for one that shall be behind alone.
        """
        self._behind.add(unit, work, size)

    def coming(self, unit: str) -> bool:
        """Whether the unit is behind: computed by this process, and soon committed."""
        return self._behind.pending(unit)

    def trusted(self, unit: str) -> bool:
        """Whether the unit is one that this process has committed, or checked, and not removed."""
        return unit in self._checked

    def settle(self) -> None:
        """Return when nothing is behind; raises what that has raised."""
        self._behind.drain()

    def abandon(self) -> None:
        """Stop working here: returns when a unit that is behind is committed, or has failed."""
        self._behind.abandon()

    def check(self, unit: str) -> Record:
        """Make sure, once per process, that the unit's files are what was committed.

        Raises:
            DamagedUnit: a file is missing, or has another size or digest; or the unit is not there.
        """
        record = self.record(unit)
        if record is None or record.dropped:
            raise self._damage(unit, "it is needed but not there")
        if unit in self._checked:
            return record
        flaw = self._flaw(record)
        if flaw is not None:
            raise self._damage(unit, flaw)
        for name, (_, sha) in record.files.items():
            if not self._sound(unit, name, sha):
                raise self._damage(unit, f"{name} has another digest")
        self._checked.add(unit)
        return record

    def vanished(self, unit: str) -> NoReturn:
        """Say that a unit's files went away after they were checked: removed by another run.

        Raises:
            DamagedUnit: always.
        """
        self._checked.discard(unit)
        raise self._damage(unit, "its files were removed while they were read")

    def _sound(self, unit: str, name: str, sha256: str) -> bool:
        if self._copies:
            return self._copies.fetch(unit, name, sha256)
        return digest(self.folder / name) == sha256

    def release(self, units: Iterable[str]) -> None:
        """Let go of units' copies in scratch, if there are any; the units stay as they are."""
        if self._copies:
            for unit in units:
                self._copies.release(unit)
                self._checked.discard(unit)

    def drop(self, unit: str) -> None:
        """Remove a committed unit's files; its record stays, marked. Safe to repeat."""
        self.settle()
        record = self.record(unit)
        if record is None:
            return
        if not record.dropped:
            marked = Record(record.files, record.facts, dropped=True)
            write_json(self._record_path(unit), marked.to_json())
        for name in record.files:
            (self.folder / name).unlink(missing_ok=True)
        self._checked.discard(unit)
        self.release([unit])

    def forget(self, unit: str) -> None:
        """Make a unit not done again, and with it the stage."""
        self.settle()
        for name in (COMPLETE, unit):
            self._record_path(name).unlink(missing_ok=True)
            self._checked.discard(name)
        if self._commits.is_dir():
            fsync(self._commits)

    def units(self) -> Iterator[str]:
        """Names of all committed units, sorted."""
        self.settle()
        for path in sorted(self._commits.glob("*.json")):
            if path.stem != COMPLETE and not path.name.startswith("."):
                yield path.stem

    # -- the stage ---------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Whether the stage was declared done, whatever has happened to its files since."""
        return self.committed(COMPLETE)

    @property
    def complete(self) -> bool:
        """Whether the stage is done and nothing that it keeps has gone missing (sizes only)."""
        try:
            if not self.finished:
                return False
            if not self.freed:
                self._check_sizes()
        except DamagedUnit:
            return False
        return True

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Declare the stage done."""
        self.settle()
        self.commit(COMPLETE, (), facts)

    @property
    def finished_ns(self) -> int:
        """When the stage was declared done, in nanoseconds of the file system's clock."""
        return self._record_path(COMPLETE).stat().st_mtime_ns

    @property
    def freed(self) -> bool:
        """Whether the data of the finished stage were removed to save space (see `free`)."""
        record = self.record(COMPLETE)
        return record is not None and bool(record.facts.get(_FREED))

    def free(self) -> None:
        """Remove the data of a finished stage; it counts as done all the same. Safe to repeat.

        Data lie in folders. Files beside them (facts of a clip, its timestamps) are small and stay.
        """
        record = self.record(COMPLETE)
        if record is None:
            raise ValueError(f"{self.folder} is not finished")
        if not self.freed:
            facts = {**record.facts, _FREED: True}
            write_json(self._record_path(COMPLETE), Record(record.files, facts).to_json())
        for path in self.folder.iterdir():
            if path.is_dir() and path != self._commits:
                shutil.rmtree(path)
        self._checked.clear()

    def totals(self) -> dict[str, float]:
        """Numeric facts summed over all units (rows, seconds), and the stage's last words."""
        sums: dict[str, float] = {}
        for unit in (*self.units(), COMPLETE):
            record = self.record(unit)
            for name, value in (record.facts if record else {}).items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    sums[name] = sums.get(name, 0) + value
        return sums

    def open(self, described: Mapping[str, Any], numerics: Mapping[str, Any]) -> None:
        """Begin or go on with the stage's work.

        Args:
            described: what the key stands for.
            numerics: device, dtype, backends, threads and versions of this process.

        Raises:
            NumericsMismatch: half-done work was begun under other numerics.
            DamagedUnit: a committed unit has lost a file, or part of one (sizes only).
            StoreError: the folder can't be written.
        """
        try:
            self._commits.mkdir(parents=True, exist_ok=True)
            self.files.mkdir(parents=True, exist_ok=True)
        except (NotADirectoryError, FileExistsError, PermissionError) as error:
            raise StoreError(f"{self.folder}: can't be used as a work folder: {error}") from None
        self.lap = Lap()
        path = self.folder / "numerics.json"
        begun = next(self.units(), None) is not None
        if begun:
            self._same_numerics(path, numerics)
            self._check_sizes()
        else:
            write_json(self.folder / "key.json", described)
            write_json(path, numerics)

    def _same_numerics(self, path: Path, numerics: Mapping[str, Any]) -> None:
        try:
            recorded = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError):
            recorded = {}
        names = sorted(set(recorded) | set(numerics))
        differ = [
            f"{n} was {recorded.get(n)!r} and is {numerics.get(n)!r}"
            for n in names
            if recorded.get(n) != numerics.get(n)
        ]
        if differ:
            raise NumericsMismatch(
                f"{self.stage} {self.key} was begun under other numerics; going on would mix "
                f"results that differ in their bits: {'; '.join(differ)}",
                hint=f"go on in the old environment, or start the stage anew: --force {self.stage}",
            )

    def forget_flawed(self) -> int:
        """Forget every unit whose files are missing or have other sizes; returns how many."""
        found = 0
        for unit in list(self.units()):
            try:
                record = self.record(unit)
                flawed = bool(record and not record.dropped and self._flaw(record))
            except DamagedUnit:
                flawed = True
            if flawed:
                self.forget(unit)
                found += 1
        return found

    def _check_sizes(self) -> None:
        for unit in self.units():
            record = self.record(unit)
            flaw = None if record is None or record.dropped else self._flaw(record)
            if flaw is not None and self.record(unit) == record:  # not dropped meanwhile
                raise self._damage(unit, flaw)

    def _flaw(self, record: Record) -> str | None:
        """What is wrong with a unit's files as far as their sizes tell."""
        for name, (size, _) in record.files.items():
            path = self.folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, not {size}"
        return None

    def _record_path(self, unit: str) -> Path:
        return self._commits / f"{unit}.json"

    def _folders(self, paths: Iterable[Path]) -> set[Path]:
        """Every folder between the files and the stage's, the latter included."""
        folders: set[Path] = set()
        for path in paths:
            for parent in path.parents:
                folders.add(parent)
                if parent == self.folder:
                    break
        return folders

    def _damage(self, unit: str, reason: str) -> DamagedUnit:
        return DamagedUnit(self.stage, self.key, unit, reason)

"""How the processes of a team share a job: unit by unit, each claimed by one.

A stage asks for the units it wants done, in order, and gets those that fall to this process; the
loop ends once all are committed, whoever did it. So a stage reads as if it were alone, and any
number of processes can join it at any moment. Results don't depend on who computed what.

Whoever claims a unit owes it to all others, also to those who wait for it on behalf of another job
of the same clip: it is committed in the end, or its stage is told to have failed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tokenflow_batch.distributed import Team
from tokenflow_batch.errors import DamagedUnit
from tokenflow_batch.ledger import StageFolder

T = TypeVar("T")


class JobOver(Exception):  # noqa: N818 - not an error of this process
    """Another process has given the job up, or finished it.

    Attributes:
        told: what that process said (see `Sharing.fail`); None if it said so of the job as a whole.
    """

    def __init__(self, told: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.told = told


class NothingToDo(Exception):  # noqa: N818
    """What is left of the job is being done by others: a helper may look elsewhere."""


@dataclass(frozen=True)
class Sharing:
    """One process's part in a job.

    Attributes:
        team: the processes.
        over: whether somebody has declared the job finished or failed.
        patience: seconds that a helper waits for others before it looks for other work; None for
            the process that the job belongs to, which sees it through.
    """

    team: Team
    over: Callable[[], bool] = lambda: False
    patience: float | None = None
    _owed: dict[str, set[str]] = field(default_factory=dict, repr=False)

    def share(
        self, folder: StageFolder, units: Mapping[str, T], *, coming: bool = False
    ) -> Iterator[T]:
        """Go through the units that this process is to compute and commit.

        Args:
            folder: the stage's.
            units: unit name → whatever the caller needs to know; later ones may depend on earlier
                ones (see `wait_for`).
            coming: as for `all_there`.

        Yields:
            The values of those that nobody has committed or claimed. Afterwards all are committed.

        Raises:
            JobOver: the job has ended elsewhere, or the stage has failed there.
            NothingToDo: the others take longer than this process's patience.
        """
        yield from self.claimed(folder, units)
        self.all_there(folder, units, coming=coming)

    def claimed(self, folder: StageFolder, units: Mapping[str, T]) -> Iterator[T]:
        """`share` without its end: what others have claimed may not be there yet."""
        for name, item in units.items():
            if folder.committed(name):
                continue
            self._unless_failed(folder)
            if self.team.claim(_scoped(folder, name)):
                self._owe(folder).add(name)
                yield item

    def all_there(self, folder: StageFolder, units: Iterable[str], *, coming: bool = False) -> None:
        """The end of `share`: return when all units are committed. It raises the same.

        Args:
            folder: the stage's.
            units: names.
            coming: what this process itself has behind needn't be committed yet where it is alone:
                for callers that only go on to read.
        """
        if coming and self.team.size == 1:
            units = [unit for unit in units if not folder.coming(unit)]
        self._wait(folder, units, self.over, self.patience)

    def once(self, folder: StageFolder, unit: str, work: Callable[[], None]) -> None:
        """Have one process do `work`, which commits `unit`; returns when it is committed."""
        for _ in self.share(folder, {unit: None}):
            work()

    def wait_for(self, folder: StageFolder, units: Iterable[str]) -> None:
        """Return when all of some units are committed, by whomever.

        For what a claimed unit depends on. Others may be waiting for that one, so it is seen
        through: neither one's patience nor the end of the job it was claimed for counts.

        Raises:
            JobOver: the stage has failed elsewhere.
        """
        self._wait(folder, units, lambda: False, None)

    def _wait(
        self,
        folder: StageFolder,
        units: Iterable[str],
        over: Callable[[], bool],
        patience: float | None,
    ) -> None:
        missing = [unit for unit in units if not folder.committed(unit)]
        if missing and self.team.size == 1:
            raise RuntimeError(f"{folder.stage}: {missing[0]} was not committed by its own work")
        if missing:
            folder.settle()  # others may wait for what is behind, and never come to what we await

        def arrived() -> bool:
            if missing:
                folder.refresh()
            while missing and folder.committed(missing[-1]):
                missing.pop()
            return not missing

        def settled() -> bool:
            return arrived() or self._failed(folder) is not None or over()

        if not self.team.wait(settled, patience):
            raise NothingToDo
        if missing:
            self._unless_failed(folder)
            raise JobOver

    def agree(self, folder: StageFolder, name: str, compute: Callable[[], Any]) -> Any:
        """A JSON value about a stage that the first process to ask computes for all.

        Raises:
            Exception: in the process that computes it, whatever `compute` raises.
            JobOver: in the others, where it has.
        """
        self._unless_failed(folder)
        owed = self._owe(folder)

        def own() -> Any:
            owed.add(name)
            value = compute()
            owed.discard(name)
            return value

        try:
            return self.team.agree(_scoped(folder, name), own)
        except Exception:
            if name in owed:
                raise
        self.team.wait(lambda: self._failed(folder) is not None)  # it says so with all it knows
        raise JobOver(self._failed(folder))

    def mine(self, folder: StageFolder, name: str) -> bool:
        """Whether a chore falls to this process."""
        return self.team.claim(_scoped(folder, name))

    @contextmanager
    def busy(self, folder: StageFolder) -> Iterator[None]:
        """While this lasts nobody declares the stage done (see `quiet`), even if all units are.

        To be entered before the last unit is committed, or before a chore is claimed.
        """
        self.team.count(_scoped(folder, "busy"), 1)
        try:
            yield
        finally:
            self.team.count(_scoped(folder, "busy"), -1)

    def quiet(self, folder: StageFolder) -> None:
        """Return when nobody is busy any more: what they tidy up is gone."""
        self.team.wait(lambda: self.team.count(_scoped(folder, "busy")) == 0)

    def owes(self, folder: StageFolder) -> bool:
        """Whether others may be waiting for what this process has claimed and not committed."""
        if self.team.size == 1 or self._failed(folder) is not None:
            return False
        return any(not _there(folder, name) for name in self._owe(folder))

    def fail(self, folder: StageFolder, told: Mapping[str, Any]) -> None:
        """Tell everybody who waits for this process's units that they will not come.

        Args:
            folder: the stage's.
            told: why, as plain data, for `JobOver`.
        """
        self.team.put(_failure(folder), told)

    def _owe(self, folder: StageFolder) -> set[str]:
        return self._owed.setdefault(_scoped(folder, ""), set())

    def _failed(self, folder: StageFolder) -> Mapping[str, Any] | None:
        # A process alone tries again for the next job: nobody else's claims stand in its way.
        return None if self.team.size == 1 else self.team.get(_failure(folder))

    def _unless_failed(self, folder: StageFolder) -> None:
        told = self._failed(folder)
        if told is not None:
            raise JobOver(told)


def _there(folder: StageFolder, unit: str) -> bool:
    try:
        return folder.committed(unit)
    except DamagedUnit:
        return False


def _scoped(folder: StageFolder, name: str) -> str:
    return f"{folder.stage}/{folder.key}/{name}"


def _failure(folder: StageFolder) -> str:
    return f"failed/{folder.stage}/{folder.key}"

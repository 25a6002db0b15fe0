"""How the processes of a team share a job: unit by unit, each claimed by one.

A stage asks for the units it wants done, in order, and gets those that fall to this process; the
loop ends once all are committed, whoever did it. So a stage reads as if it were alone, and any
number of processes can join it at any moment. Results don't depend on who computed what.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from tokenflow_batch.distributed import Team
from tokenflow_batch.ledger import StageFolder

T = TypeVar("T")


class JobOver(Exception):  # noqa: N818 - not an error of this process
    """Another process has given the job up, or finished it."""


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

    def share(self, folder: StageFolder, units: Mapping[str, T]) -> Iterator[T]:
        """Go through the units that this process is to compute and commit.

        Args:
            folder: the stage's.
            units: unit name → whatever the caller needs to know; later ones may depend on earlier
                ones (see `wait_for`).

        Yields:
            The values of those that nobody has committed or claimed. Afterwards all are committed.

        Raises:
            JobOver: the job has ended elsewhere.
            NothingToDo: the others take longer than this process's patience.
        """
        for name, item in units.items():
            if not folder.committed(name) and self.team.claim(_scoped(folder, name)):
                yield item
        self.wait_for(folder, units)

    def once(self, folder: StageFolder, unit: str, work: Callable[[], None]) -> None:
        """Have one process do `work`, which commits `unit`; returns when it is committed."""
        for _ in self.share(folder, {unit: None}):
            work()

    def wait_for(self, folder: StageFolder, units: Iterable[str]) -> None:
        """Return when all of some units are committed, by whomever.

        Raises:
            JobOver: the job has ended elsewhere.
            NothingToDo: it takes longer than this process's patience.
        """
        missing = [unit for unit in units if not folder.committed(unit)]
        if missing and self.team.size == 1:
            raise RuntimeError(f"{folder.stage}: {missing[0]} was not committed by its own work")

        def arrived() -> bool:
            if missing:
                folder.refresh()
            while missing and folder.committed(missing[-1]):
                missing.pop()
            return not missing

        def settled() -> bool:
            return arrived() or self.over()

        if not self.team.wait(settled, self.patience):
            raise NothingToDo
        if missing:
            raise JobOver

    def agree(self, folder: StageFolder, name: str, compute: Callable[[], Any]) -> Any:
        """A JSON value about a stage that the first process to ask computes for all."""
        return self.team.agree(_scoped(folder, name), compute)

    def mine(self, folder: StageFolder, name: str) -> bool:
        """Whether a chore that nobody waits for falls to this process."""
        return self.team.claim(_scoped(folder, name))


def _scoped(folder: StageFolder, name: str) -> str:
    return f"{folder.stage}/{folder.key}/{name}"

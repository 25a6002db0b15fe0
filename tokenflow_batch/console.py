"""Progress on a terminal, silence when piped: bars of one process, or a table of several."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from tokenflow_batch.distributed import Team
from tokenflow_batch.stages.base import Advance
from tokenflow_batch.stages.base import Progress as ProgressFactory

_PAUSE = 1.0
"""Seconds between two words of a process about its progress."""


@contextmanager
def progress_bars(
    *, shown: bool = True, team: Team | None = None, console: Console | None = None
) -> Iterator[ProgressFactory]:
    """A factory of progress bars on stderr, with time left; log lines appear above them.

    Of several processes one shows a table with a row for each, and the others tell it what they are
    at. Silent where stderr is no terminal, or nothing is to be `shown`.

    Args:
        shown: whether this process may write.
        team: the processes that share the work.
        console: where to; stderr unless given.
    """
    console = console or Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    several = team is not None and team.size > 1
    if not (shown and console.is_terminal):
        yield _Telling(team) if team is not None and several else _silent
        return
    handler = RichHandler(console=console, show_time=False, show_path=False)
    root = logging.getLogger()
    previous, root.handlers = root.handlers, [handler]
    try:
        with Progress(*columns, console=console) as bars:
            if team is not None and several:
                with _table(bars, team):
                    yield _Telling(team)
                return

            @contextmanager
            def bar(what: str, total: int) -> Iterator[Advance]:
                task = bars.add_task(escape(what), total=total or None)
                try:
                    yield lambda n: bars.advance(task, n)
                finally:
                    bars.stop_task(task)

            yield bar
    finally:
        root.handlers = previous


class _Telling:
    """Makes progress that is told to the team, once a second at most."""

    def __init__(self, team: Team) -> None:
        self._team = team

    @contextmanager
    def __call__(self, what: str, total: int) -> Iterator[Advance]:
        done, last = 0, time.monotonic()
        self._team.show([what, 0, total])

        def advance(count: int) -> None:
            nonlocal done, last
            done += count
            if time.monotonic() - last >= _PAUSE:
                last = time.monotonic()
                self._team.show([what, done, total])

        try:
            yield advance
        finally:
            self._team.show(None)


@contextmanager
def _table(bars: Progress, team: Team) -> Iterator[None]:
    """Keeps a row for each process, from what they tell, until it is left."""
    tasks = [bars.add_task(f"process {rank}", total=None) for rank in range(team.size)]
    over = threading.Event()

    def follow() -> None:
        with suppress(RuntimeError):  # the store goes with the launch
            while not over.wait(_PAUSE / 2):
                for rank, (task, told) in enumerate(zip(tasks, team.shown(), strict=True)):
                    what, done, total = told or ("between jobs", 0, 0)
                    text = escape(f"process {rank}: {what}")
                    bars.update(task, description=text, completed=done, total=total or None)

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    try:
        yield
    finally:
        over.set()
        follower.join()


@contextmanager
def _silent(what: str, total: int) -> Iterator[Advance]:  # noqa: ARG001
    yield lambda n: None  # noqa: ARG005

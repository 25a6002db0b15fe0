"""Progress bars on a terminal, silence when piped."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

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

from tokenflow_batch.stages.base import Advance
from tokenflow_batch.stages.base import Progress as ProgressFactory


@contextmanager
def progress_bars(*, shown: bool = True) -> Iterator[ProgressFactory]:
    """A factory of progress bars on stderr, with time left; log lines appear above them.

    Silent where stderr is no terminal, or nothing is to be `shown`.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    if not (shown and console.is_terminal):
        yield _silent
        return
    handler = RichHandler(console=console, show_time=False, show_path=False)
    root = logging.getLogger()
    previous, root.handlers = root.handlers, [handler]
    try:
        with Progress(*columns, console=console) as bars:

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


@contextmanager
def _silent(what: str, total: int) -> Iterator[Advance]:  # noqa: ARG001
    yield lambda n: None  # noqa: ARG005

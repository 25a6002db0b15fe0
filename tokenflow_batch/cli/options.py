"""What commands share: options, reading the manifest, messages instead of tracebacks."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from tokenflow_batch.errors import ManifestError, TokenflowBatchError
from tokenflow_batch.stage_names import STAGES, StageName

if TYPE_CHECKING:
    from tokenflow_batch.config import Batch, Runtime

ManifestArgument = Annotated[
    Path,
    typer.Argument(
        metavar="MANIFEST",
        help="YAML or JSON; CSV with --model.",
        show_default=False,
    ),
]
OutputOption = Annotated[
    Path | None, typer.Option("--output", "-o", help="Output folder instead of the manifest's.")
]
WorkdirOption = Annotated[
    Path | None, typer.Option(help="Folder for intermediate results.  [default: OUTPUT/.work]")
]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; overrides runtime.")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="CPU threads; overrides runtime.")]
OnlyOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN",
        help="Only these jobs: `clip/edit` or `clip`, with * and ?; repeatable.",
    ),
]
ModelOption = Annotated[
    str | None, typer.Option(help="Model of a CSV table of (video, prompt) rows.")
]
DiskBudgetOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Remove intermediates of finished clips while the work folder is larger (20GB).",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")]


def stage_name(text: str) -> StageName:
    """The stage that `text` names.

    Raises:
        typer.BadParameter: there is no such stage.
    """
    for stage in STAGES:
        if stage == text:
            return stage
    raise typer.BadParameter(f"{text!r} is no stage; there are {', '.join(STAGES)}")


def stage_range(first: str, last: str) -> tuple[StageName, ...]:
    """All stages from `first` to `last`, both included.

    Raises:
        typer.BadParameter: one is no stage, or the first comes after the last.
    """
    start, end = STAGES.index(stage_name(first)), STAGES.index(stage_name(last))
    if start > end:
        raise typer.BadParameter(f"--from {first} comes after --until {last}: nothing would run")
    return STAGES[start : end + 1]


def load_batch(
    manifest: Path,
    output: Path | None = None,
    workdir: Path | None = None,
    *,
    device: str | None = None,
    threads: int | None = None,
    only: Sequence[str] | None = None,
    model: str | None = None,
    tolerant: bool = False,
) -> Batch:
    """A manifest as the command line changes it.

    What is wrong with it ends the command; or, if `tolerant`, is told, and what is right goes on.
    """
    from tokenflow_batch.manifest import load

    with messages():
        batch = load(manifest, output=output, workdir=workdir, model=model, tolerant=tolerant)
        for mistake in batch.mistakes if os.environ.get("RANK", "0") == "0" else ():
            typer.echo(f"error: {mistake}", err=True)
        changes: dict[str, Any] = {"device": device, "threads": threads}
        given = {k: v for k, v in changes.items() if v is not None}
        batch = replace(batch, runtime=_overridden(batch.runtime, given))
        try:  # what is wrong elsewhere is no matter of chosen jobs
            return replace(batch.only(only), mistakes=()) if only else batch
        except ValueError as error:
            raise ManifestError(f"--only: {error}") from None


def end(batch: Batch) -> NoReturn:
    """End a command that only looked: with the exit code of mistakes, if there were any.

    Raises:
        typer.Exit: always.
    """
    raise typer.Exit(ManifestError.exit_code if batch.mistakes else 0)


def _overridden(runtime: Runtime, given: dict[str, Any]) -> Runtime:
    from pydantic import ValidationError

    from tokenflow_batch.manifest_words import told

    try:
        return type(runtime).model_validate(runtime.model_dump() | given)
    except ValidationError as error:
        where, what = next(told(error, lambda _: ()))
        raise ManifestError(f"--{where[0]}: {what}") from None


class _Terminated(KeyboardInterrupt):
    """SIGTERM: handled like Ctrl-C, wherever the work is."""


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM raises as SIGINT does, and neither is lost.

    Python drops what a destructor raises, also if that is a signal's doing: then it is sent again.
    """

    def terminate(number: int, frame: object) -> None:  # noqa: ARG001
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one is enough: let the locks be released
        raise _Terminated

    def dropped(unraisable: sys.UnraisableHookArgs) -> None:
        stopped = unraisable.exc_value
        if not isinstance(stopped, KeyboardInterrupt):
            hook(unraisable)
            return
        number = signal.SIGINT
        if isinstance(stopped, _Terminated):
            number = signal.SIGTERM
            signal.signal(number, terminate)
        threading.Timer(0.05, os.kill, (os.getpid(), number)).start()  # once this has returned

    previous, hook = signal.signal(signal.SIGTERM, terminate), sys.unraisablehook
    sys.unraisablehook = dropped
    try:
        yield
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def messages() -> Iterator[None]:
    """Errors of ours as a message and an exit code, never a traceback.

    SIGINT and SIGTERM abandon the unit in flight, which is as safe as a kill, and give 128 plus the
    signal's number, as shells do.
    """
    with _interruptible():
        try:
            yield
        except TokenflowBatchError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt as stopped:
            number = signal.SIGTERM if isinstance(stopped, _Terminated) else signal.SIGINT
            typer.echo(
                f"stopped by {number.name}: what is committed stays, run the same command to go on",
                err=True,
            )
            raise typer.Exit(128 + number) from None

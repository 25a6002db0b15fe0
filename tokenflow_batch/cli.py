"""Command line: parse, call, print. Heavy imports happen inside commands."""

from __future__ import annotations

import json
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from tokenflow_batch.config import STAGES, Batch, StageName
from tokenflow_batch.errors import TokenflowBatchError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Edit long videos by text with a pretrained image diffusion model (TokenFlow).",
    epilog="Exit codes: 0 done, 1 jobs failed for several reasons, 2 manifest or usage, 3 model, "
    "4 video, 6 work folder, 7 disk full, 8 memory, 9 locked, 130 interrupted.",
)

ManifestArgument = Annotated[
    Path, typer.Argument(metavar="MANIFEST", help="YAML or JSON file.", show_default=False)
]
OutputOption = Annotated[
    Path | None, typer.Option("--output", "-o", help="Output folder instead of the manifest's.")
]
WorkdirOption = Annotated[
    Path | None, typer.Option(help="Folder for intermediate results.  [default: OUTPUT/.work]")
]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; overrides runtime.")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="CPU threads; overrides runtime.")]
ForceOption = Annotated[
    list[str] | None, typer.Option(metavar="STAGE", help="Begin this stage anew; repeatable.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")]


def _version(wanted: bool) -> None:
    if wanted:
        from tokenflow_batch import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)


@app.command()
def run(
    manifest: ManifestArgument,
    output: OutputOption = None,
    workdir: WorkdirOption = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    until: Annotated[str, typer.Option(metavar="STAGE", help="Stop after this stage.")] = "report",
    force: ForceOption = None,
    disk_budget: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Remove intermediates of finished clips while the work folder is larger (20GB).",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run every job of a manifest through all stages; what is done is skipped."""
    stages = STAGES[: STAGES.index(_stage_name(until)) + 1]
    batch = _load(manifest, output, workdir, device, threads)
    _run(batch, stages, force or [], as_json, disk_budget)


def _stage_command(stage: StageName, summary: str) -> Callable[..., None]:
    def command(
        manifest: ManifestArgument,
        output: OutputOption = None,
        workdir: WorkdirOption = None,
        device: DeviceOption = None,
        threads: ThreadsOption = None,
        force: Annotated[bool, typer.Option("--force", help="Begin the stage anew.")] = False,
        as_json: JsonOption = False,
    ) -> None:
        batch = _load(manifest, output, workdir, device, threads)
        _run(batch, (stage,), [stage] if force else [], as_json)

    command.__doc__ = f"{summary} (this stage alone; earlier ones must be done)."
    return command


_SUMMARIES: dict[StageName, str] = {
    "encode": "Video file to clean latents",
    "invert": "Clean latents to inverted latents at every sampling step",
    "match": "Inverted latents to correspondences and PnP features",
    "edit": "Inverted latents and prompts to edited latents",
    "render": "Edited latents to video files",
    "report": "Metrics, contact sheet and side-by-side video",
}
for _stage, _summary in _SUMMARIES.items():
    app.command(_stage)(_stage_command(_stage, _summary))


@app.command()
def status(
    manifest: ManifestArgument,
    output: OutputOption = None,
    workdir: WorkdirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show which stages of which jobs are done, begun, waiting or damaged."""
    from tokenflow_batch.status import status as read_status

    with _messages():
        rows = read_status(_load(manifest, output, workdir, None, None))
    if as_json:
        jobs = [
            {
                "clip": row.clip,
                "edit": row.edit,
                "published": row.published,
                "stages": {k: {"state": v.state, "units": v.units} for k, v in row.stages.items()},
            }
            for row in rows
        ]
        typer.echo(json.dumps({"jobs": jobs}, indent=1))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("job", *STAGES, "video")
    marks = {"done": "[green]done", "damaged": "[red]damaged"}
    marks |= {state: f"[dim]{state}" for state in ("waiting", "unknown")}
    for row in rows:
        cells = [marks.get(s.state, f"[yellow]begun ({s.units})") for s in row.stages.values()]
        table.add_row(escape(f"{row.clip}/{row.edit}"), *cells, "yes" if row.published else "no")
    Console().print(table)


@app.command()
def demo(
    folder: Annotated[
        Path, typer.Argument(help="Where to put the clip, the manifest and the results.")
    ] = Path("outputs/demo"),
    frames: Annotated[int, typer.Option(min=1, help="Length of the generated clip.")] = 20,
    seed: Annotated[int, typer.Option(help="Which scene is generated.")] = 0,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Generate a clip and edit it with the small model that comes along; minutes on a CPU."""
    from tokenflow_batch.demo.job import write_demo

    with _messages():
        manifest = write_demo(folder, frames=frames, seed=seed)
    _run(_load(manifest, None, None, None, threads), STAGES, [], as_json)


def _stage_name(text: str) -> StageName:
    for stage in STAGES:
        if stage == text:
            return stage
    raise typer.BadParameter(f"{text!r} is no stage; there are {', '.join(STAGES)}")


def _load(
    manifest: Path,
    output: Path | None,
    workdir: Path | None,
    device: str | None,
    threads: int | None,
) -> Batch:
    from dataclasses import replace

    from tokenflow_batch.manifest import load

    with _messages():
        batch = load(manifest, output=output, workdir=workdir)
        changes: dict[str, Any] = {"device": device, "threads": threads}
        given = {k: v for k, v in changes.items() if v is not None}
        return replace(batch, runtime=batch.runtime.model_copy(update=given))


def _run(
    batch: Batch,
    stages: tuple[StageName, ...],
    force: list[str],
    as_json: bool,
    disk_budget: str | None = None,
) -> None:
    forced = [_stage_name(stage) for stage in force]
    with _messages():
        from tokenflow_batch.disk import parse_size

        budget = None if disk_budget is None else parse_size(disk_budget)
        from tokenflow_batch.console import progress_bars
        from tokenflow_batch.runner import Runner, exit_code

        with progress_bars() as progress:
            results = Runner(batch, progress).run(stages, force=forced, disk_budget=budget)
    if as_json:
        jobs = [
            {
                "clip": r.job.clip,
                "edit": r.job.edit,
                "ran": r.ran,
                "skipped": r.skipped,
                "outputs": [str(path) for path in r.outputs],
                "error": r.error and {"message": r.error.message, "code": r.error.exit_code},
            }
            for r in results
        ]
        typer.echo(json.dumps({"jobs": jobs}, indent=1))
    else:
        for r in results:
            if r.error is None:
                done = f"ran {', '.join(r.ran)}" if r.ran else "nothing to do"
                typer.echo(f"{r.job.name}: {done}")
                for path in r.outputs:
                    typer.echo(f"  {path}")
        failed = sum(r.error is not None for r in results)
        if failed:
            typer.echo(f"{failed} of {len(results)} jobs failed", err=True)
    raise typer.Exit(exit_code(results))


class _Terminated(KeyboardInterrupt):
    """SIGTERM: handled like Ctrl-C, wherever the work is."""


@contextmanager
def _messages() -> Iterator[None]:
    """Errors of ours as a message and an exit code, never a traceback.

    SIGINT and SIGTERM abandon the unit in flight, which is as safe as a kill, and give 128 plus the
    signal's number, as shells do.
    """

    def terminate(number: int, frame: object) -> None:  # noqa: ARG001
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one is enough: let the locks be released
        raise _Terminated

    previous = signal.signal(signal.SIGTERM, terminate)
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
    finally:
        signal.signal(signal.SIGTERM, previous)


def main() -> None:
    """Entry point."""
    app()

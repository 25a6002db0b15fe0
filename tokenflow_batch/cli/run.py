"""`run` and the stage commands."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tokenflow_batch.cli.options import (
    DeviceOption,
    DiskBudgetOption,
    JsonOption,
    ManifestArgument,
    ModelOption,
    OnlyOption,
    OutputOption,
    ThreadsOption,
    WorkdirOption,
    end,
    load_batch,
    messages,
    stage_name,
    stage_range,
)
from tokenflow_batch.cli.work import Costs, costs, show
from tokenflow_batch.cli.work import as_json as work_json
from tokenflow_batch.stage_names import STAGES, StageName

if TYPE_CHECKING:
    from tokenflow_batch.config import Batch
    from tokenflow_batch.results import JobResult

ForceOption = Annotated[
    list[str] | None, typer.Option(metavar="STAGE", help="Begin this stage anew; repeatable.")
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Say what would run and why; compute nothing.")
]
KeepGoingOption = Annotated[
    bool,
    typer.Option("--keep-going/--fail-fast", help="Whether a job's failure stops the others."),
]

_SUMMARIES: dict[StageName, str] = {
    "encode": "Video file to clean latents",
    "invert": "Clean latents to inverted latents at every sampling step",
    "match": "Inverted latents to correspondences and PnP features",
    "edit": "Inverted latents and prompts to edited latents",
    "render": "Edited latents to video files",
    "report": "Metrics, contact sheet and side-by-side video",
}


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("run")(_run)
    for stage, summary in _SUMMARIES.items():
        app.command(stage)(_stage_command(stage, summary))


def _run(
    manifest: ManifestArgument,
    model: ModelOption = None,
    output: OutputOption = None,
    workdir: WorkdirOption = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    only: OnlyOption = None,
    from_: Annotated[
        str, typer.Option("--from", metavar="STAGE", help="Begin with this stage.")
    ] = STAGES[0],
    until: Annotated[str, typer.Option(metavar="STAGE", help="Stop after this stage.")] = STAGES[
        -1
    ],
    force: ForceOption = None,
    dry_run: DryRunOption = False,
    keep_going: KeepGoingOption = True,
    disk_budget: DiskBudgetOption = None,
    scratch: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder on a disk of this machine for the files that are worked on; "
            "all of them are copied to the work folder as they are committed.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run every job of a manifest through all stages; what is done is skipped."""
    stages = stage_range(from_, until)
    batch = load_batch(
        manifest,
        output,
        workdir,
        device=device,
        threads=threads,
        only=only,
        model=model,
        tolerant=True,
    )
    forced = [stage_name(stage) for stage in force or []]
    with messages():
        from tokenflow_batch.disk import parse_size

        budget = None if disk_budget is None else parse_size(disk_budget)
    run_or_tell(
        batch,
        stages,
        forced,
        dry_run=dry_run,
        keep_going=keep_going,
        disk_budget=budget,
        scratch=scratch,
        as_json=as_json,
    )


def _stage_command(stage: StageName, summary: str) -> Callable[..., None]:
    def command(
        manifest: ManifestArgument,
        model: ModelOption = None,
        output: OutputOption = None,
        workdir: WorkdirOption = None,
        device: DeviceOption = None,
        threads: ThreadsOption = None,
        only: OnlyOption = None,
        force: Annotated[bool, typer.Option("--force", help="Begin the stage anew.")] = False,
        dry_run: DryRunOption = False,
        keep_going: KeepGoingOption = True,
        as_json: JsonOption = False,
    ) -> None:
        batch = load_batch(
            manifest,
            output,
            workdir,
            device=device,
            threads=threads,
            only=only,
            model=model,
            tolerant=True,
        )
        run_or_tell(
            batch,
            (stage,),
            [stage] if force else [],
            dry_run=dry_run,
            keep_going=keep_going,
            as_json=as_json,
        )

    command.__doc__ = f"{summary} (this stage alone; earlier ones must be done)."
    return command


def run_or_tell(
    batch: Batch,
    stages: Sequence[StageName],
    force: Sequence[StageName] = (),
    *,
    dry_run: bool = False,
    keep_going: bool = True,
    disk_budget: int | None = None,
    scratch: Path | None = None,
    as_json: bool = False,
) -> None:
    """Run a batch and end with its exit code; or only say what would run.

    Of the processes of a launch, one prints and has the exit code; the others end with 0.

    Raises:
        typer.Exit: always, after a run.
    """
    if dry_run:
        _tell(batch, stages, force, as_json)
        end(batch)
    with messages():
        from tokenflow_batch.console import progress_bars
        from tokenflow_batch.distributed import Team
        from tokenflow_batch.results import exit_code
        from tokenflow_batch.runner import Runner
        from tokenflow_batch.scratch import own_folder

        team = Team.of_launch()
        with (
            nullcontext() if scratch is None else own_folder(scratch) as own,
            progress_bars(shown=team.leads, team=team) as progress,
        ):
            runner = Runner(replace(batch, scratch=own), progress, team)
            results = runner.run(
                stages, force=force, keep_going=keep_going, disk_budget=disk_budget
            )
        team.close()
        if not team.leads:
            raise typer.Exit
    found = costs(runner, results) if tuple(stages) == ("report",) else {}
    if as_json:
        told = {"jobs": [_as_json(r, found) for r in results], "mistakes": batch.mistakes}
        typer.echo(json.dumps(told, indent=1))
    else:
        _print(results, found)
        _print_failed(batch, results)
    if len(results) < len(batch.jobs):
        left = len(batch.jobs) - len(results)
        typer.echo(f"stopped at the first failure: {left} jobs were not begun", err=True)
    raise typer.Exit(exit_code(results, len(batch.mistakes)))


def _as_json(result: JobResult, found: Mapping[str, Costs]) -> dict[str, object]:
    error = result.error
    work = {"work": work_json(found[result.job.name])} if result.job.name in found else {}
    return {
        "clip": result.job.clip,
        "edit": result.job.edit,
        "ran": result.ran,
        "skipped": result.skipped,
        "outputs": [str(path) for path in result.outputs],
        "where": result.job.where,
        "error": error and {"message": error.message, "hint": error.hint, "code": error.exit_code},
        **work,
    }


def _print(results: Sequence[JobResult], found: Mapping[str, Costs]) -> None:
    for r in results:
        if r.error is None:
            done = f"ran {', '.join(r.ran)}" if r.ran else "nothing to do"
            typer.echo(f"{r.job.name}: {done}")
            for path in r.outputs:
                typer.echo(f"  {path}")
            if r.job.name in found:
                show(found[r.job.name])


def _print_failed(batch: Batch, results: Sequence[JobResult]) -> None:
    """What went wrong once more, at the end, where it is seen."""
    failed = [r for r in results if r.error is not None]
    if failed:
        typer.echo(f"{len(failed)} of {len(batch.jobs)} jobs failed:", err=True)
    for result in failed:
        first = result.error.message.splitlines()[0] if result.error else ""
        typer.echo(f"  {result.job.name}: {first}", err=True)
    if batch.mistakes:
        typer.echo(f"{len(batch.mistakes)} mistakes in the manifest:", err=True)
    for mistake in batch.mistakes:
        typer.echo(f"  {mistake}", err=True)


def _tell(
    batch: Batch, stages: Sequence[StageName], force: Sequence[StageName], as_json: bool
) -> None:
    from tokenflow_batch.status import preview

    with messages():
        jobs = preview(batch, stages, force)
    if as_json:
        listed = [
            {
                "clip": job.clip,
                "edit": job.edit,
                "stages": {s: {"does": t.does, "why": t.why} for s, t in steps.items()},
            }
            for job, steps in jobs
        ]
        typer.echo(json.dumps({"jobs": listed}, indent=1))
        return
    for job, steps in jobs:
        typer.echo(job.name)
        for stage, told in steps.items():
            typer.echo(f"  {stage:<7} {told.does:<6} {told.why}")
    total = sum(told.does == "run" for _, steps in jobs for told in steps.values())
    typer.echo(f"{total} stages of {len(jobs)} jobs would run; nothing was computed")

"""`plan`: what a batch will cost."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import typer

from tokenflow_batch.cli.options import (
    JsonOption,
    ManifestArgument,
    ModelOption,
    OnlyOption,
    OutputOption,
    WorkdirOption,
    load_batch,
    messages,
)
from tokenflow_batch.cli.text import columns, duration, size
from tokenflow_batch.config import STAGES
from tokenflow_batch.errors import DiskFullError

if TYPE_CHECKING:
    from tokenflow_batch.forecast import Forecast, JobCost, StageCost


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("plan")(_plan)


def _plan(
    manifest: ManifestArgument,
    model: ModelOption = None,
    output: OutputOption = None,
    workdir: WorkdirOption = None,
    only: OnlyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a run would cost: frames, rows, seconds, bytes; refuse what the disk can't hold."""
    from tokenflow_batch.forecast import forecast

    batch = load_batch(manifest, output, workdir, only=only, model=model)
    with messages():
        found = forecast(batch)
        if as_json:
            typer.echo(json.dumps(_as_json(found), indent=1))
        else:
            _print(found)
        if not found.fits:
            raise _does_not_fit(found)


def _does_not_fit(found: Forecast) -> DiskFullError:
    largest = max(STAGES, key=lambda stage: found.total(stage).bytes)
    return DiskFullError(
        f"the disk can't hold this: {size(found.bytes + found.scratch)} are needed and "
        f"{size(found.free)} are free; {largest} takes {size(found.total(largest).bytes)}",
        hint="lower `steps`, `resolution` or the number of clips at once (--only), give --workdir "
        "on a larger disk, or `technique: sdedit`, which stores no convolution features",
    )


def _as_json(found: Forecast) -> dict[str, Any]:
    jobs = [
        {
            "clip": job.job.clip,
            "edit": job.job.edit,
            "error": job.error,
            "frames": job.clip and job.clip.frames,
            "frames_exact": bool(job.clip and job.clip.exact),
            "stages": {stage: _cost_json(cost) for stage, cost in job.stages.items()},
        }
        for job in found.jobs
    ]
    total = {stage: _cost_json(found.total(stage)) for stage in STAGES}
    for cost in total.values():
        del cost["state"]
    return {
        "jobs": jobs,
        "total": total,
        "disk": {
            "bytes": found.bytes,
            "scratch_bytes": found.scratch,
            "free_bytes": found.free,
            "fits": found.fits,
            "estimated": found.guessed,
        },
    }


def _cost_json(cost: StageCost) -> dict[str, Any]:
    return {
        "state": cost.state,
        "rows": cost.rows,
        "seconds": cost.seconds,
        "bytes": cost.bytes,
        "scratch_bytes": cost.scratch,
    }


def _print(found: Forecast) -> None:
    table = [["job", "frames", *STAGES, "rows", "time", "disk"]]
    table += [_row(job) for job in found.jobs]
    columns(table)
    for job in found.jobs:
        if job.error is not None:
            typer.echo(f"{job.job.name}: {job.error}")
    typer.echo("")
    table = [["in sum", "rows", "time", "disk", "for a while"]]
    for stage in STAGES:
        cost = found.total(stage)
        cells = [str(cost.rows), duration(cost.seconds), size(cost.bytes), size(cost.scratch)]
        table.append([stage, *cells])
    columns(table)
    results = sum(job.published for job in found.jobs)
    about = " (about: correspondences or videos were not measured here yet)" * found.guessed
    typer.echo(f"results: {size(results)}")
    typer.echo(f"disk: {size(found.bytes + found.scratch)} needed, {size(found.free)} free{about}")


def _row(job: JobCost) -> list[str]:
    if job.clip is None:
        return [job.job.name, "?", *["?"] * len(STAGES), "?", "?", "?"]
    costs = job.stages.values()
    known = [c.seconds for c in costs if c.seconds is not None]
    return [
        job.job.name,
        f"{'' if job.clip.exact else '~'}{job.clip.frames}",
        *(cost.state for cost in costs),
        str(sum(c.rows for c in costs)),
        duration(sum(known) if len(known) == len(costs) else None),
        size(sum(c.bytes for c in costs) + job.published),
    ]

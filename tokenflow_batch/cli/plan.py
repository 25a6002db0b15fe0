"""`plan`: what a batch will cost."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenflow_batch.cli.options import (
    JsonOption,
    ManifestArgument,
    ModelOption,
    OnlyOption,
    OutputOption,
    WorkdirOption,
    end,
    load_batch,
    messages,
)
from tokenflow_batch.cli.text import columns, duration, operations, size
from tokenflow_batch.errors import DiskFullError, ModelError, OutOfMemoryError
from tokenflow_batch.stage_names import STAGES

if TYPE_CHECKING:
    from tokenflow_batch.config import Batch
    from tokenflow_batch.costs import Figures
    from tokenflow_batch.forecast import Forecast, JobCost

MANY = 500
"""Jobs up to which a refusal counts the whole batch again with other settings: seconds."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("plan")(_plan)


def _plan(
    manifest: ManifestArgument,
    model: ModelOption = None,
    output: OutputOption = None,
    workdir: WorkdirOption = None,
    only: OnlyOption = None,
    calibrate: Annotated[
        bool,
        typer.Option("--calibrate", help="First measure rates and memory here, in short runs."),
    ] = False,
    memory_budget: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Say which window fits into so much memory (8GB, 500M)."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a run would cost: frames, rows, time, disk, memory; refuse what can't fit."""
    from tokenflow_batch.disk import parse_size
    from tokenflow_batch.forecast import forecast

    with _uncollected():
        batch = load_batch(manifest, output, workdir, only=only, model=model, tolerant=True)
    with messages(), _uncollected():
        budget = None if memory_budget is None else parse_size(memory_budget)
        if calibrate:
            _calibrate(batch)
        found = forecast(batch, budget)
        if as_json:
            typer.echo(json.dumps(_as_json(found), indent=1))
        else:
            _print(found)
        if not found.fits:
            raise _does_not_fit(found, batch)
        if budget is not None and found.heaviest is None and found.window is None:
            raise ModelError(
                "memory was not measured with this model yet, so no window can be chosen",
                hint="give --calibrate too: it takes a minute or two, once",
            )
        if not found.fits_memory and not _only_the_window(found):
            raise _too_little_memory(found)
    end(batch)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without garbage collection.

    A plan of thousands of clips is hundreds of thousands of small objects that all stay; looking
    for garbage among them takes a third of the time.
    """
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def _calibrate(batch: Batch) -> None:
    """Measure every working size of a batch."""
    from tokenflow_batch.calibrate import calibrate
    from tokenflow_batch.forecast import forecast

    jobs = forecast(batch).jobs
    calibrate(batch, [(job.job, job.working) for job in jobs if job.working])


def _only_the_window(found: Forecast) -> bool:
    """Whether all that exceeds the budget are edits, and a smaller window helps."""
    return found.window is not None and all(
        (cost.peak or 0) <= (found.memory or 0)
        for job in found.jobs
        for stage, cost in job.stages.items()
        if stage != "edit"
    )


_SMALLER = {
    "encode": "`vae_batch`",
    "invert": "`unet_batch`",
    "match": "`unet_batch`",
    "edit": "`window_segments`, `anchors` or `segment_length`",
    "render": "`vae_batch`",
    "report": "`resolution`",
}


def _too_little_memory(found: Forecast) -> OutOfMemoryError:
    if found.heaviest is None:
        raise AssertionError("known to be too much")
    job, stage = found.heaviest
    return OutOfMemoryError(
        f"{job.job.name} ({job.job.where}): {stage} takes {size(job.stages[stage].peak or 0)} of "
        f"memory at once, and there are {size(found.memory or 0)}",
        hint=f"lower {_SMALLER[stage]}, or `resolution`",
    )


def _does_not_fit(found: Forecast, batch: Batch) -> DiskFullError:
    from tokenflow_batch.forecast import with_smaller_features

    largest = max(STAGES, key=lambda stage: found.total(stage).bytes)
    smaller = with_smaller_features(batch) if len(batch.jobs) <= MANY else {}
    fitting = [kind for kind, other in smaller.items() if other.fits]
    told = [
        f"`conv_features: {kind}` needs {size(other.needed)}{_more_work(found, other)}"
        for kind, other in smaller.items()
        if other.needed < found.needed
    ]
    if not smaller:
        told = ["`conv_features: store8` halves what `match` takes, `recompute` most of it"]
    usual = (
        "lower `steps`, `resolution` or the number of clips at once (--only), or give --workdir "
        "on a larger disk"
    )
    if fitting:
        usual = f"set `conv_features: {fitting[0]}` under `defaults`, which fits, or {usual}"
    return DiskFullError(
        f"the disk can't hold this: {size(found.needed)} are needed and "
        f"{size(found.free)} are free; {largest} takes {size(found.total(largest).bytes)}",
        hint="\n    ".join([usual, *told]),
    )


def _more_work(found: Forecast, other: Forecast) -> str:
    """By how much another forecast's UNet work exceeds one's."""
    more = other.flops - found.flops
    if not more:
        return " and no more of the UNet"
    return f" and {operations(more)} more of the UNet (+ {more / found.flops:.1%})"


def _as_json(found: Forecast) -> dict[str, Any]:
    jobs = [
        {
            "clip": job.job.clip,
            "edit": job.job.edit,
            "error": job.error,
            "frames": job.clip and job.clip.frames,
            "frames_exact": bool(job.clip and job.clip.exact),
            "stages": {s: {"state": c.state, **_cost_json(c)} for s, c in job.stages.items()},
        }
        for job in found.jobs
    ]
    heaviest = found.heaviest
    return {
        "jobs": jobs,
        "total": {stage: _cost_json(found.total(stage)) for stage in STAGES},
        "disk": {
            "bytes": found.bytes,
            "scratch_bytes": found.scratch,
            "free_bytes": found.free,
            "fits": found.fits,
            "estimated": found.guessed,
        },
        "memory": {
            "peak_bytes": heaviest and heaviest[0].stages[heaviest[1]].peak,
            "job": heaviest and heaviest[0].job.name,
            "stage": heaviest and heaviest[1],
            "available_bytes": found.memory,
            "fits": found.fits_memory,
            "window_segments": found.window,
        },
    }


def _cost_json(cost: Figures) -> dict[str, Any]:
    return {
        "rows": cost.rows,
        "partial_rows": cost.partial_rows,
        "flops": cost.flops,
        "seconds": cost.seconds,
        "bytes": cost.bytes,
        "scratch_bytes": cost.scratch,
        "peak_bytes": cost.peak,
    }


def _print(found: Forecast) -> None:
    table = [["job", "frames", *STAGES, "rows", "time", "disk", "memory"]]
    table += [_row(job) for job in found.jobs]
    columns(table)
    for job in found.jobs:
        if job.error is not None:
            typer.echo(f"{job.job.name}: {job.error}")
    typer.echo("")
    table = [["in sum", "rows", "time", "disk", "for a while"]]
    for stage in STAGES:
        cost = found.total(stage)
        cells = [duration(cost.seconds), size(cost.bytes), size(cost.scratch)]
        table.append([stage, _rows(cost.rows, cost.partial_rows), *cells])
    columns(table)
    results = sum(job.published for job in found.jobs)
    about = " (about: correspondences or videos were not measured here yet)" * found.guessed
    typer.echo(f"results: {size(results)}")
    typer.echo(f"disk: {size(found.bytes + found.scratch)} needed, {size(found.free)} free{about}")
    _print_memory(found)


def _rows(whole: int, partial: int) -> str:
    return f"{whole}+{partial}p" if partial else str(whole)


def _print_memory(found: Forecast) -> None:
    there = "" if found.memory is None else f", {size(found.memory)} there"
    if found.heaviest is None:
        typer.echo("memory: unknown (--calibrate measures it)")
    else:
        job, stage = found.heaviest
        peak = size(job.stages[stage].peak or 0)
        typer.echo(f"memory: {peak} at once ({stage} of {job.job.name}){there}")
    if found.window is not None:
        typer.echo(
            f"window: set `window_segments: {found.window}` under `defaults` "
            f"(at most {found.window} keyframes are edited jointly) to stay within that"
        )


def _row(job: JobCost) -> list[str]:
    if job.clip is None:
        return [job.job.name, "?", *["?"] * len(STAGES), "?", "?", "?", "?"]
    costs = job.stages.values()
    known = [c.seconds for c in costs if c.seconds is not None]
    return [
        job.job.name,
        f"{'' if job.clip.exact else '~'}{job.clip.frames}",
        *(cost.state for cost in costs),
        _rows(sum(c.rows for c in costs), sum(c.partial_rows for c in costs)),
        duration(sum(known) if len(known) == len(costs) else None),
        size(sum(c.bytes for c in costs) + job.published),
        "unknown" if any(c.peak is None for c in costs) else size(max(c.peak or 0 for c in costs)),
    ]

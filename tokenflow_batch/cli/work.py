"""What a job's stages have cost, as a table and as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from tokenflow_batch.cli.text import columns
from tokenflow_batch.clock import KINDS
from tokenflow_batch.errors import TokenflowBatchError
from tokenflow_batch.stage_names import STAGES, StageName

if TYPE_CHECKING:
    from tokenflow_batch.results import JobResult
    from tokenflow_batch.runner import Runner
    from tokenflow_batch.work import Work

Costs = tuple[int, Mapping[StageName, "Work"]]
"""Frames, and what each stage has cost."""

_SHORT = {"correspondence": "matching"}


def costs(runner: Runner, results: Sequence[JobResult]) -> dict[str, Costs]:
    """Of the jobs that are done, by name; a stage that others share has the whole cost."""
    from tokenflow_batch.stages.clip import read_clip
    from tokenflow_batch.work import Work

    found: dict[str, Costs] = {}
    for result in results:
        if result.error is not None:
            continue
        try:
            context = runner.context(result.job)
            work = {stage: Work.of(context.folder(stage)) for stage in STAGES}
            found[result.job.name] = read_clip(context).frames, work
        except (TokenflowBatchError, OSError):
            continue  # freed since, or damaged, which the next run will tell
    return found


def as_json(costs: Costs) -> dict[str, Any]:
    """By stage, and in all."""
    frames, stages = costs
    return {"frames": frames, **{stage: work.to_json(frames) for stage, work in stages.items()}}


def show(costs: Costs) -> None:
    """Print a table: a stage a line, seconds of all threads by kind, and what the model waited."""
    frames, stages = costs
    shown = [kind for kind in KINDS if any(work.seconds[kind] for work in stages.values())]
    kinds = [_SHORT.get(kind, kind) for kind in shown]
    table = [["", "rows", "rows/frame", "GFLOP/frame", "seconds", *kinds, "waited"]]
    for stage, work in stages.items():
        unet = work.rows is not None
        table.append(
            [
                stage,
                str(work.rows) if unet else "",
                f"{(work.rows or 0) / frames:.1f}" if unet else "",
                f"{work.flops / 1e9 / frames:.3g}" if unet else "",
                "" if work.elapsed is None else f"{work.elapsed:.1f}",
                *(f"{work.seconds[kind]:.1f}" if work.seconds[kind] else "" for kind in shown),
                "" if work.share_waited is None else f"{100 * work.share_waited:.1f} %",
            ]
        )
    columns([["  ", *row] for row in table])
    typer.echo("")

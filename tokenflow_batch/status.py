"""What is done, half done or waiting: read from the work folder, without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tokenflow_batch.config import STAGE_INPUTS, STAGES, Batch, Job, StageName
from tokenflow_batch.errors import DamagedUnit
from tokenflow_batch.inputs import Inputs
from tokenflow_batch.ledger import StageFolder

State = Literal["done", "begun", "waiting", "damaged", "unknown"]
"""`unknown`: an input file has changed or was never read, so its digest is not known."""


@dataclass(frozen=True)
class StageStatus:
    """A stage of a job.

    Attributes:
        state: how far it is.
        units: how many units of work are committed.
        key: which result it is; None where that is unknown.
    """

    state: State
    units: int
    key: str | None = None


@dataclass(frozen=True)
class JobStatus:
    """A job's stages in order, and whether its video lies where it belongs."""

    clip: str
    edit: str
    stages: dict[StageName, StageStatus]
    published: bool


def status(batch: Batch) -> list[JobStatus]:
    """The state of every job of a batch.

    Raises:
        ModelError: the model is not on this disk.
    """
    inputs = Inputs.of(batch, download=False)
    found = []
    for job in batch.jobs:
        keys = inputs.known_keys(job)
        stages: dict[StageName, StageStatus] = {}
        for stage in STAGES:
            if keys is None:
                began = inputs.workspace.digests.exists()
                stages[stage] = StageStatus("unknown" if began else "waiting", 0)
            else:
                key = keys[stage].key
                folder = StageFolder(inputs.workspace.stage(stage, key), stage, key)
                stages[stage] = _stage_status(folder)
        video = inputs.workspace.video(job.clip, job.edit)
        published = stages["render"].state == "done" and video.is_file()
        found.append(JobStatus(job.clip, job.edit, stages, published))
    return found


def _stage_status(folder: StageFolder) -> StageStatus:
    units = sum(1 for _ in folder.units())
    if folder.complete:
        return StageStatus("done", units, folder.key)
    try:
        finished = folder.finished
    except DamagedUnit:
        finished = True
    if finished:
        return StageStatus("damaged", units, folder.key)
    return StageStatus("begun" if units else "waiting", units, folder.key)


@dataclass(frozen=True)
class Step:
    """What a run would do with a stage of a job, and why."""

    does: Literal["run", "skip", "fail"]
    why: str


Preview = list[tuple[Job, dict[StageName, Step]]]


def preview(batch: Batch, stages: Sequence[StageName], force: Sequence[StageName] = ()) -> Preview:
    """What a run of these stages would do, without doing it.

    Raises:
        ModelError: the model is not on this disk.
    """
    taken: dict[str, str] = {}
    return [
        (job, _steps(job, found.stages, stages, force, taken))
        for job, found in zip(batch.jobs, status(batch), strict=True)
    ]


def _steps(
    job: Job,
    now: Mapping[StageName, StageStatus],
    stages: Sequence[StageName],
    force: Sequence[StageName],
    taken: dict[str, str],
) -> dict[StageName, Step]:
    """One job's steps; `taken` are the keys that jobs before it would run, with their names."""
    if not job.video.is_file():
        return {stage: Step("fail", f"{job.video}: no such file") for stage in stages}
    first_forced = min((STAGES.index(stage) for stage in force), default=len(STAGES))
    there = {stage for stage in STAGES if now[stage].state == "done"}
    there -= set(STAGES[first_forced:])
    steps: dict[StageName, Step] = {}
    for stage in stages:
        found = now[stage]
        missing = [needed for needed in STAGE_INPUTS[stage] if needed not in there]
        if stage in there:
            steps[stage] = Step("skip", "done")
        elif found.key in taken:
            steps[stage] = Step("skip", f"the same work as {taken[found.key]}, done there")
            there.add(stage)
        elif missing:
            steps[stage] = Step("fail", f"needs {', '.join(missing)}: run that first")
        else:
            anew = STAGES.index(stage) >= first_forced and found.state in ("done", "begun")
            steps[stage] = Step("run", "begun anew, by --force" if anew else _reason(found))
            there.add(stage)
            if found.key is not None:
                taken[found.key] = job.name
    return steps


def _reason(found: StageStatus) -> str:
    return {
        "begun": f"begun: goes on after {found.units} units",
        "damaged": "damaged: what is missing is computed again",
        "unknown": "the video or the model has changed or was not read yet",
    }.get(found.state, "not begun")

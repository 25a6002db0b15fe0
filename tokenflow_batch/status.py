"""What is done, half done or waiting: read from the work folder, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tokenflow_batch.config import STAGES, Batch, StageName
from tokenflow_batch.errors import DamagedUnit
from tokenflow_batch.inputs import Inputs
from tokenflow_batch.ledger import StageFolder

State = Literal["done", "begun", "waiting", "damaged", "unknown"]
"""`unknown`: an input file has changed or was never read, so its digest is not known."""


@dataclass(frozen=True)
class StageStatus:
    """A stage of a job: its state, and how many units of work are committed."""

    state: State
    units: int


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
        return StageStatus("done", units)
    try:
        finished = folder.finished
    except DamagedUnit:
        finished = True
    if finished:
        return StageStatus("damaged", units)
    return StageStatus("begun" if units else "waiting", units)

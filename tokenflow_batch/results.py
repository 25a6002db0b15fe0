"""What becomes of a job: outcome as data, error as a message, files where they belong."""

from __future__ import annotations

import filecmp
import logging
import shutil
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tokenflow_batch.config import Job
from tokenflow_batch.errors import (
    DamagedUnit,
    DiskFullError,
    LockedError,
    ManifestError,
    OutOfMemoryError,
    StoreError,
    TokenflowBatchError,
    disk_full,
    revived,
)
from tokenflow_batch.files import replacing
from tokenflow_batch.joblog import JobLog
from tokenflow_batch.paths import Workspace
from tokenflow_batch.stage_names import StageName
from tokenflow_batch.stages.base import StageContext
from tokenflow_batch.stages.render import VIDEO, VIDEO_FILE
from tokenflow_batch.stages.report import METRICS, REPORT, SHEET, SIDE_BY_SIDE

log = logging.getLogger("tokenflow_batch")

Outcome = dict[str, Any]
"""A job's end as plain data, for every process of a team (`outcome_of`)."""

_NO_MEMORY = "DefaultCPUAllocator: can't allocate memory"  # torch has no class for it


@dataclass
class JobResult:
    """What became of one job.

    Attributes:
        job: which.
        ran: stages that had work to do.
        skipped: stages that were done already.
        outputs: files under the output folder.
        error: why it failed, or None.
    """

    job: Job
    ran: list[StageName] = field(default_factory=list)
    skipped: list[StageName] = field(default_factory=list)
    outputs: list[Path] = field(default_factory=list)
    error: TokenflowBatchError | None = None

    def take(self, told: Outcome) -> None:
        """Take over what the process that ran the job says of it."""
        self.ran += [stage for stage in told["ran"] if stage not in self.ran]
        fresh = [stage for stage in told["skipped"] if stage not in (*self.skipped, *self.ran)]
        self.skipped += fresh
        self.outputs += [Path(p) for p in told["outputs"] if Path(p) not in self.outputs]
        self.error = told["error"] and revived(told["error"], told["message"], told["hint"])


def outcome_of(result: JobResult, workspace: Workspace, error: Exception | None) -> Outcome:
    """A job's end as plain data."""
    return {
        "job": result.job.name,
        "ran": result.ran,
        "skipped": result.skipped,
        "outputs": [str(path) for path in result.outputs],
        **failure(result.job, workspace, error),
    }


def failure(job: Job, workspace: Workspace, error: Exception | None) -> Outcome:
    """The part of an outcome that says why; all of it None or False without an error."""
    told = None if error is None else translate(job, workspace, error)
    damaged = [error.stage, error.key, error.unit] if isinstance(error, DamagedUnit) else None
    return {
        "error": told and type(told).__name__,
        "message": told and told.message,
        "hint": told and told.hint,
        "damaged": damaged,
        "locked": isinstance(error, LockedError),
    }


def publish(context: StageContext, stage: StageName, result: JobResult) -> None:
    """Copy a stage's results to the output folder; each file appears whole or not at all.

    Raises:
        DamagedUnit: a result is not what was committed.
    """
    job, workspace = context.job, context.workspace
    details = workspace.details(job.clip, job.edit)
    wanted: Mapping[StageName, tuple[str, Mapping[str, Path]]] = {
        "render": (VIDEO, {VIDEO_FILE: workspace.video(job.clip, job.edit)}),
        "report": (REPORT, {n: details / n for n in (METRICS, SHEET, SIDE_BY_SIDE)}),
    }
    if stage not in wanted:
        return
    unit, files = wanted[stage]
    folder = context.folder(stage)
    folder.check(unit)
    for name, target in files.items():
        _copy(folder.files / name, target)
        if target not in result.outputs:
            result.outputs.append(target)


def translate(job: Job, workspace: Workspace, error: Exception) -> TokenflowBatchError:
    """Any exception as a message; the traceback of what nobody foresaw goes to a file."""
    if disk_full(error):
        places = [p for p in (workspace.work, workspace.scratch) if p]
        return DiskFullError(
            f"no space left on the device while working on {job.name}",
            hint="free some space and run again: what is committed stays; "
            f"work files lie in {' and '.join(map(str, places))}",
        )
    if isinstance(error, TokenflowBatchError):
        return error
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or _NO_MEMORY in str(error):
        return OutOfMemoryError(
            f"out of memory: {str(error).splitlines()[0] if str(error) else 'host'}",
            hint="lower `vae_batch` (encode, render), `unet_batch` (invert, match), "
            "`window_segments` (edit) or `resolution`",
        )
    if isinstance(error, OSError) and error.filename is not None:
        return StoreError(
            f"{error.filename}: {error.strerror}",
            hint="check that the output and work folders are folders that can be written",
        )
    path = JobLog.of(workspace, job).traceback
    text = "".join(traceback.format_exception(error))
    try:
        with replacing(path) as temporary:
            temporary.write_text(text, "utf-8")
        where = f"the traceback is in {path}"
    except OSError:
        where = "the traceback could not be written"
    return TokenflowBatchError(
        f"unexpected {type(error).__name__}: {error}", hint=f"a bug, please report it; {where}"
    )


def longest_first(jobs: Sequence[Job]) -> list[Job]:
    """Jobs by the size of their videos, so that none is left for last that takes longest.

    Jobs of a clip stay together, in the manifest's order. A missing file is nothing.
    """

    def size(job: Job) -> int:
        try:
            return job.video.stat().st_size
        except OSError:
            return 0

    return sorted(jobs, key=size, reverse=True)


def mendable(outcome: Outcome) -> bool:
    """Whether another round may do what this one could not."""
    return bool(outcome["locked"] or outcome["damaged"])


def say_failed(job: Job, workspace: Workspace, outcome: Outcome) -> None:
    """Tell why a job has failed, with its place in the manifest, and keep it in the job's log."""
    error = revived(outcome["error"], outcome["message"], outcome["hint"])
    log.error("%s (%s): %s", job.name, job.where, error)
    JobLog.of(workspace, job).failed(error)


def _copy(source: Path, target: Path) -> None:
    if not target.exists() or not filecmp.cmp(source, target, shallow=False):
        with replacing(target) as temporary:
            shutil.copyfile(source, temporary)


def exit_code(results: Sequence[JobResult], mistakes: int = 0) -> int:
    """0 if all is well, one failure's own code, or 20 and how many there are (119: 99 or more).

    Args:
        results: of all jobs.
        mistakes: how many more there are in the manifest.
    """
    codes = [result.error.exit_code for result in results if result.error is not None]
    codes += [ManifestError.exit_code] * mistakes
    return sum(codes) if len(codes) < 2 else 20 + min(len(codes), 99)

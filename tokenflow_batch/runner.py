"""Jobs × stages: skip what is done, run what is not, and turn every failure into a message.

The one place that catches a stage's errors. One bad job never stops the batch.
"""

from __future__ import annotations

import filecmp
import logging
import shutil
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from tokenflow_batch.config import STAGES, Batch, Job, StageName
from tokenflow_batch.errors import (
    DamagedUnit,
    DiskFullError,
    LockedError,
    MissingInput,
    OutOfMemoryError,
    StoreError,
    TokenflowBatchError,
    disk_full,
)
from tokenflow_batch.files import replacing
from tokenflow_batch.inputs import Inputs
from tokenflow_batch.joblog import JobLog
from tokenflow_batch.models import Compute, Model, load, resolve
from tokenflow_batch.stages import IMPLEMENTATIONS
from tokenflow_batch.stages.base import Progress, StageContext
from tokenflow_batch.stages.render import VIDEO, VIDEO_FILE
from tokenflow_batch.stages.report import METRICS, REPORT, SHEET, SIDE_BY_SIDE

log = logging.getLogger("tokenflow_batch")

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


class Runner:
    """Runs a batch on this machine, in this process.

    Args:
        batch: the resolved manifest.
        progress: makes progress bars.

    Raises:
        ModelError: the model can't be found, or the runtime section asks for what isn't there.
    """

    def __init__(self, batch: Batch, progress: Progress) -> None:
        self.batch, self.progress = batch, progress
        self.compute: Compute = resolve(batch.runtime)
        self.inputs = Inputs.of(batch)
        self._model: Model | None = None

    def run(
        self,
        stages: Sequence[StageName] = STAGES,
        *,
        force: Sequence[StageName] = (),
        keep_going: bool = True,
    ) -> list[JobResult]:
        """Run the given stages of every job, in order.

        Args:
            stages: which; earlier ones that are left out must be done already.
            force: of these, begin anew even what is done or half done.
            keep_going: whether other jobs are run after one has failed.
        """
        forced: set[Path] = set()
        results = []
        for job in self.batch.jobs:
            result = JobResult(job)
            results.append(result)
            try:
                self._job(result, stages, force, forced)
                self._log(job).succeeded()
            except Exception as error:  # the batch goes on, whatever it was
                result.error = self._translate(job, error)
            if result.error is not None:
                log.error("%s (%s): %s", job.name, job.where, result.error)
                self._log(job).failed(result.error)
                if not keep_going:
                    break
        return results

    def _job(
        self,
        result: JobResult,
        stages: Sequence[StageName],
        force: Sequence[StageName],
        forced: set[Path],
    ) -> None:
        job, context = result.job, self.context(result.job)
        for stage in force:
            self._begin_anew(context, stage, forced)
        seen: set[tuple[str, str]] = set()
        while True:
            try:
                for stage in stages:
                    self._stage(context, stage, result)
                    self._publish(context, stage, result)
                break
            except DamagedUnit as damage:
                if (damage.stage, damage.unit) in seen or damage.stage not in stages:
                    raise
                seen.add((damage.stage, damage.unit))
                folder = context.folder(damage.stage)  # type: ignore[arg-type]
                folder.forget(damage.unit)
                more = folder.forget_flawed()
                what = f"it and {more} more units are" if more else "it is"
                self._log(job).warn(f"{job.name}: {damage.message}; {what} computed again")

    def _stage(self, context: StageContext, stage: StageName, result: JobResult) -> None:
        implementation, folder = IMPLEMENTATIONS[stage], context.folder(stage)
        if folder.complete:
            if stage not in (*result.skipped, *result.ran):
                result.skipped.append(stage)
            return
        for needed in implementation.inputs:
            if not context.folder(needed).complete:
                raise MissingInput(
                    f"{stage} needs {needed}, which is not done",
                    hint=f"run `tokenflow-batch {needed}` first, or `tokenflow-batch run`",
                )
        with self._locked(context, stage):
            told, began = self._log(context.job), time.perf_counter()
            told.event("stage started", stage=stage, key=folder.key)
            folder.open(context.keys[stage].described, self.compute.numerics())
            implementation.run(context, folder)
            folder.finish({})
            seconds = round(time.perf_counter() - began, 3)
            rows = folder.totals().get("rows", 0)
            told.event("stage finished", stage=stage, seconds=seconds, rows=rows)
        if stage not in result.ran:
            result.ran.append(stage)

    @contextmanager
    def _locked(self, context: StageContext, stage: StageName) -> Iterator[None]:
        """Hold the stage's lock, which the operating system releases if this process dies."""
        path = self.inputs.workspace.lock(stage, context.keys[stage].key)
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise LockedError(
                f"{stage} of {context.job.name} is being worked on by another process",
                hint="wait for it, or run again later: nothing is lost",
            ) from None
        try:
            yield
        finally:
            lock.release()

    def _begin_anew(self, context: StageContext, stage: StageName, forced: set[Path]) -> None:
        """Remove a stage's result, and those of later stages, which came from it."""
        for later in STAGES[STAGES.index(stage) :]:
            folder = context.folder(later).folder
            if folder in forced:
                continue
            forced.add(folder)
            with self._locked(context, later):
                if folder.exists():
                    aside = folder.with_name(f"{folder.name}.removed")
                    shutil.rmtree(aside, ignore_errors=True)
                    folder.rename(aside)  # first, so that a kill leaves no half of it
                    shutil.rmtree(aside)

    @property
    def model(self) -> Model:
        """The batch's model, loaded at first use.

        Raises:
            ModelError: it can't be loaded.
        """
        if self._model is None:
            self._model = load(self.inputs.model, self.compute)
        return self._model

    def context(self, job: Job) -> StageContext:
        """What the job's stages work with; also the way to their results.

        Raises:
            VideoError: the video can't be read.
        """
        return StageContext(
            job=job,
            keys=self.inputs.keys(job),
            workspace=self.inputs.workspace,
            compute=self.compute,
            model=lambda: self.model,
            progress=lambda what, total: self.progress(f"{job.name} {what}", total),
            warn=self._log(job).warn,
        )

    def _log(self, job: Job) -> JobLog:
        return JobLog.of(self.inputs.workspace, job)

    def _publish(self, context: StageContext, stage: StageName, result: JobResult) -> None:
        """Copy a stage's results to the output folder; each file appears whole or not at all.

        Raises:
            DamagedUnit: a result is not what was committed.
        """
        job, workspace = context.job, self.inputs.workspace
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
            _copy(folder.folder / name, target)
            if target not in result.outputs:
                result.outputs.append(target)

    def _translate(self, job: Job, error: Exception) -> TokenflowBatchError:
        """Any exception as a message; the traceback of what nobody foresaw goes to a file."""
        if disk_full(error):
            return DiskFullError(
                f"no space left on the device while working on {job.name}",
                hint="free some space and run again: what is committed stays; "
                f"work files lie in {self.inputs.workspace.work}",
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
        path = self._log(job).traceback
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


def _copy(source: Path, target: Path) -> None:
    if not target.exists() or not filecmp.cmp(source, target, shallow=False):
        with replacing(target) as temporary:
            shutil.copyfile(source, temporary)


def exit_code(results: Sequence[JobResult]) -> int:
    """0 if all is well, the failures' own code if they agree, else 1."""
    codes = {result.error.exit_code for result in results if result.error is not None}
    return codes.pop() if len(codes) == 1 else int(bool(codes))

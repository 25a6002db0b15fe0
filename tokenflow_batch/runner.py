"""Jobs × stages: skip what is done, run what is not, and turn every failure into a message.

The one place that catches a stage's errors. One bad job never stops the batch.
"""

from __future__ import annotations

import filecmp
import logging
import shutil
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from pydantic import ByteSize

from tokenflow_batch.config import STAGES, Batch, Job, StageName
from tokenflow_batch.disk import keep_within
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
        disk_budget: int | None = None,
    ) -> list[JobResult]:
        """Run the given stages of every job, in order.

        Args:
            stages: which; earlier ones that are left out must be done already.
            force: of these, begin anew even what is done or half done.
            disk_budget: bytes that the work folder may hold; what no job needs any more goes.
        """
        forced: set[Path] = set()
        results, over = [], 0
        for job in self.batch.jobs:
            result = JobResult(job)
            results.append(result)
            try:
                self._job(result, stages, force, forced)
            except Exception as error:  # the batch goes on, whatever it was
                result.error = self._translate(job, error)
            if result.error is not None:
                log.error("%s (%s): %s", job.name, job.where, result.error)
            over = keep_within(self.inputs, disk_budget) if disk_budget is not None else 0
        if over:
            log.warning(
                "disk budget: the work folder %s is still over it by %s; what is left is needed by "
                "jobs that are not done, or are results",
                self.inputs.workspace.work,
                ByteSize(over).human_readable(),
            )
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
                self._revive(context, stages)
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
                log.warning("%s: %s; %s computed again", job.name, damage.message, what)

    def _stage(self, context: StageContext, stage: StageName, result: JobResult) -> None:
        implementation, folder = IMPLEMENTATIONS[stage], context.folder(stage)
        if folder.complete:
            if stage not in (*result.skipped, *result.ran):
                result.skipped.append(stage)
            return
        for needed in implementation.inputs:
            source = context.folder(needed)
            if not source.complete or source.freed:
                state = "was removed to keep the disk budget" if source.finished else "is not done"
                raise MissingInput(
                    f"{stage} needs {needed}, which {state}",
                    hint=f"run `tokenflow-batch {needed}` first, or `tokenflow-batch run`",
                )
        with self._locked(context, stage):
            folder.open(context.keys[stage].described, self.compute.numerics())
            try:
                implementation.run(context, folder)
                folder.finish({})
            finally:
                folder.abandon()  # before the lock goes
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
            self._remove(context, later)

    def _revive(self, context: StageContext, stages: Sequence[StageName]) -> None:
        """Begin those stages anew whose data were removed to save space and are needed again."""
        wanted: set[StageName] = set()
        for stage in reversed(STAGES):
            folder = context.folder(stage)
            again = stage in wanted and folder.finished and folder.freed
            if again and stage in stages:
                self._remove(context, stage)
            if again or not folder.complete:
                wanted.update(IMPLEMENTATIONS[stage].inputs)

    def _remove(self, context: StageContext, stage: StageName) -> None:
        folder = context.folder(stage).folder
        with self._locked(context, stage):
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
            warn=log.warning,
        )

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
        path = self.inputs.workspace.work / "logs" / f"{job.clip}.{job.edit}.traceback.txt"
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

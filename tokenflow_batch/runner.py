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
from typing import Any, cast

import torch
from filelock import FileLock, Timeout

from tokenflow_batch.config import STAGES, Batch, Job, StageName
from tokenflow_batch.distributed import Team
from tokenflow_batch.errors import (
    DamagedUnit,
    DiskFullError,
    LockedError,
    MissingInput,
    OutOfMemoryError,
    StoreError,
    TokenflowBatchError,
    disk_full,
    revived,
)
from tokenflow_batch.files import replacing
from tokenflow_batch.inputs import Inputs
from tokenflow_batch.ledger import COMPLETE, StageFolder
from tokenflow_batch.models import Compute, Model, load, resolve
from tokenflow_batch.stages import IMPLEMENTATIONS
from tokenflow_batch.stages.base import Progress, StageContext
from tokenflow_batch.stages.render import VIDEO, VIDEO_FILE
from tokenflow_batch.stages.report import METRICS, REPORT, SHEET, SIDE_BY_SIDE
from tokenflow_batch.stages.sharing import JobOver, NothingToDo, Sharing

log = logging.getLogger("tokenflow_batch")

Outcome = dict[str, Any]
"""A job's end as plain data (`Runner._outcome`)."""

_PATIENCE = 5.0
"""Seconds that a helping process waits for others before it looks for another job."""

_LOCKED_PAUSE = 2.0
"""Seconds between two looks at a stage that another run is working on."""

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


class Runner:
    """Runs a batch in this process, or in this process's part of a team.

    Every job belongs to the process that claims it first, longest jobs first. A process that finds
    none left helps with those that others are at, unit by unit. What went wrong in a way that can
    be mended (a damaged unit, a stage locked by another run) is tried again in a further round,
    which begins when all processes have ended the one before.

    Args:
        batch: the resolved manifest.
        progress: makes progress bars.
        team: the processes; this one alone unless given.

    Raises:
        ModelError: the model can't be found, or the runtime section asks for what isn't there.
    """

    def __init__(self, batch: Batch, progress: Progress, team: Team | None = None) -> None:
        self.batch, self.progress = batch, progress
        self.team = team or Team()
        self.compute: Compute = resolve(batch.runtime, self.team.local_rank)
        self.inputs = Inputs.of(batch)
        self._model: Model | None = None
        self._mended: set[tuple[str, ...]] = set()
        self._locks: list[FileLock] = []

    def run(
        self,
        stages: Sequence[StageName] = STAGES,
        *,
        force: Sequence[StageName] = (),
        keep_going: bool = True,
    ) -> list[JobResult]:
        """Run the given stages of every job.

        Args:
            stages: which; earlier ones that are left out must be done already.
            force: of these, begin anew even what is done or half done.
            keep_going: whether other jobs are begun after one has failed.

        Returns:
            What became of the jobs that were begun, in the manifest's order; the same in every
            process of a team.
        """
        failed = self.team.agree("force", lambda: self._force(force)) if force else {}
        results = {job.name: JobResult(job) for job in self.batch.jobs}
        for name, outcome in failed.items():
            results[name].take(outcome)
        todo = [job for job in _longest_first(self.batch.jobs) if job.name not in failed]
        if failed and not keep_going:
            todo = []
        begun = set(failed)
        while todo:
            told = self._round(todo, stages, keep_going=keep_going)
            todo = [job for job in todo if job.name in told]
            begun |= set(told)
            for job in todo:
                results[job.name].take(told[job.name])
            todo = self._again([(job, told[job.name]) for job in todo], stages)
            self.team.next_epoch()
            if any(told[job.name]["locked"] for job in todo):
                time.sleep(_LOCKED_PAUSE)
        return [result for name, result in results.items() if name in begun]

    def _round(
        self, jobs: Sequence[Job], stages: Sequence[StageName], *, keep_going: bool
    ) -> dict[str, Outcome]:
        """Everybody works until every job has an outcome, good or bad, or is not to be begun."""
        for job in jobs:
            if self.team.claim(f"job/{job.name}"):
                stop = self.team.get("stop") is not None
                outcome = {} if stop else self._attempt(job, stages)
                if outcome.get("error") and not keep_going and not _mendable(outcome):
                    self.team.put("stop", job.name)
                self.team.put(f"outcome/{job.name}", outcome)
        while True:
            open_jobs = [job for job in jobs if self.team.get(f"outcome/{job.name}") is None]
            if not open_jobs:
                break
            for job in open_jobs:
                self._help(job, stages, None if len(open_jobs) == 1 else _PATIENCE)
        self.team.barrier("round")
        for lock in self._locks:
            lock.release()
        self._locks.clear()
        told = {job.name: self.team.get(f"outcome/{job.name}") for job in jobs}
        return {name: outcome for name, outcome in told.items() if outcome}

    def _attempt(self, job: Job, stages: Sequence[StageName]) -> Outcome:
        """See a job of one's own through; never raises what the batch should survive."""
        result = JobResult(job)
        trouble = f"trouble/{job.name}"
        sharing = Sharing(self.team, over=lambda: self.team.get(trouble) is not None)
        try:
            context = self.context(job, sharing)
            for stage in stages:
                self._stage(context, stage, result)
                self._publish(context, stage, result)
        except JobOver:
            return cast(Outcome, self.team.get(trouble))
        except Exception as error:  # the batch goes on, whatever it was
            outcome = self._outcome(result, error)
            if not _mendable(outcome):
                _say_failed(job, outcome)
            return outcome
        return self._outcome(result, None)

    def _help(self, job: Job, stages: Sequence[StageName], patience: float | None) -> None:
        """Take part in a job that belongs to another process, as long as there is work."""

        def over() -> bool:
            return self.team.get(f"outcome/{job.name}") is not None

        try:
            context = self.context(job, Sharing(self.team, over, patience))
            for stage in stages:
                if over():
                    return
                self._stage(context, stage, JobResult(job))
        except (JobOver, NothingToDo):
            return
        except Exception as error:  # the owner, who may be waiting for this unit, has to know
            self.team.put(f"trouble/{job.name}", self._outcome(JobResult(job), error))
            patience = None
        self.team.wait(over, patience)  # for the owner's last words

    def _again(
        self, ended: Sequence[tuple[Job, Outcome]], stages: Sequence[StageName]
    ) -> list[Job]:
        """The jobs whose failure another round can mend; prepares it."""
        jobs, earlier = [], frozenset(self._mended)
        for job, outcome in ended:
            if not _mendable(outcome):
                continue
            damage = tuple(outcome["damaged"] or ())
            if damage and (damage in earlier or damage[0] not in stages):
                if self.team.leads:
                    _say_failed(job, outcome)
                continue
            jobs.append(job)
            if damage and damage not in self._mended:
                self._mended.add(damage)
                self._mend(job, outcome)
            elif outcome["locked"] and self.team.leads:
                log.warning("%s: %s; waiting for it", job.name, outcome["message"])
        return jobs

    def _mend(self, job: Job, outcome: Outcome) -> None:
        """Forget a damaged unit, and whatever else of its stage is visibly damaged."""
        stage, key, unit = outcome["damaged"]

        def forget() -> int:
            folder = StageFolder(self.inputs.workspace.stage(stage, key), stage, key)
            folder.forget(unit)
            return folder.forget_flawed()

        more = self.team.agree(f"mend/{stage}/{key}/{unit}", forget)
        if self.team.leads:
            what = f"it and {more} more units are" if more else "it is"
            log.warning("%s: %s; %s computed again", job.name, outcome["message"], what)

    def _outcome(self, result: JobResult, error: Exception | None) -> Outcome:
        """A job's end as plain data, for every process of the team."""
        told = None if error is None else self._translate(result.job, error)
        damaged = [error.stage, error.key, error.unit] if isinstance(error, DamagedUnit) else None
        return {
            "job": result.job.name,
            "ran": result.ran,
            "skipped": result.skipped,
            "outputs": [str(path) for path in result.outputs],
            "error": told and type(told).__name__,
            "message": told and told.message,
            "hint": told and told.hint,
            "damaged": damaged,
            "locked": isinstance(error, LockedError),
        }

    def _stage(self, context: StageContext, stage: StageName, result: JobResult) -> None:
        implementation, folder = IMPLEMENTATIONS[stage], context.folder(stage)
        if folder.complete:
            result.skipped.append(stage)
            return
        for needed in implementation.inputs:
            if not context.folder(needed).complete:
                raise MissingInput(
                    f"{stage} needs {needed}, which is not done",
                    hint=f"run `tokenflow-batch {needed}` first, or `tokenflow-batch run`",
                )
        with self._locked(context, stage):
            if not folder.complete:  # another run may have finished it meanwhile
                folder.open(context.keys[stage].described, self.compute.numerics())
                implementation.run(context, folder)
                context.sharing.once(folder, COMPLETE, lambda: folder.finish({}))
        result.ran.append(stage)

    @contextmanager
    def _locked(self, context: StageContext, stage: StageName) -> Iterator[None]:
        """Keep other runs out of a stage, by a lock that is released if this process dies.

        One process of a team holds it for all, until it leaves the stage: by then it is done.
        """
        key = context.keys[stage].key
        path = self.inputs.workspace.lock(stage, key)
        lock = FileLock(path, timeout=0)

        def acquire() -> bool:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire()
            except Timeout:
                return False
            return True

        if not self.team.agree(f"lock/{stage}/{key}", acquire):
            raise LockedError(
                f"{stage} of {context.job.name} is being worked on by another run",
                hint="wait for it, or run again later: nothing is lost",
            )
        try:
            yield
        except NothingToDo:
            self._locks.append(lock)  # others go on: keep it for them until the round ends
            raise
        except BaseException:
            lock.release()
            raise
        lock.release()

    def _force(self, stages: Sequence[StageName]) -> dict[str, Outcome]:
        """Begin stages of all jobs anew; returns the outcomes of jobs where that failed."""
        forced: set[Path] = set()
        failed = {}
        for job in self.batch.jobs:
            try:
                context = self.context(job)
                for stage in stages:
                    self._begin_anew(context, stage, forced)
            except Exception as error:  # the batch goes on
                failed[job.name] = self._outcome(JobResult(job), error)
                _say_failed(job, failed[job.name])
        return failed

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

    def context(self, job: Job, sharing: Sharing | None = None) -> StageContext:
        """What the job's stages work with; also the way to their results.

        Args:
            job: which.
            sharing: this process's part in it; all of it unless given.

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
            sharing=sharing or Sharing(Team()),
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


def _longest_first(jobs: Sequence[Job]) -> list[Job]:
    """Jobs by the size of their videos, so that none is left for last that takes longest.

    Jobs of a clip stay together, in the manifest's order. A missing file is nothing.
    """

    def size(job: Job) -> int:
        try:
            return job.video.stat().st_size
        except OSError:
            return 0

    return sorted(jobs, key=size, reverse=True)


def _mendable(outcome: Outcome) -> bool:
    return bool(outcome["locked"] or outcome["damaged"])


def _say_failed(job: Job, outcome: Outcome) -> None:
    error = revived(outcome["error"], outcome["message"], outcome["hint"])
    log.error("%s (%s): %s", job.name, job.where, error)


def _copy(source: Path, target: Path) -> None:
    if not target.exists() or not filecmp.cmp(source, target, shallow=False):
        with replacing(target) as temporary:
            shutil.copyfile(source, temporary)


def exit_code(results: Sequence[JobResult]) -> int:
    """0 if all is well, the failures' own code if they agree, else 1."""
    codes = {result.error.exit_code for result in results if result.error is not None}
    return codes.pop() if len(codes) == 1 else int(bool(codes))

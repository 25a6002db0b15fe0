"""Jobs × stages: skip what is done, run what is not, and turn every failure into a message.

The one place that catches a stage's errors. One bad job never stops the batch.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import cast

from filelock import FileLock, Timeout

from tokenflow_batch.config import STAGES, Batch, Job, StageName
from tokenflow_batch.disk import keep_within, warn_if_over
from tokenflow_batch.distributed import Team
from tokenflow_batch.errors import (
    DamagedUnit,
    LockedError,
    MissingInput,
    TokenflowBatchError,
)
from tokenflow_batch.inputs import Inputs
from tokenflow_batch.joblog import JobLog
from tokenflow_batch.ledger import COMPLETE, StageFolder
from tokenflow_batch.models import Compute, Model, load, resolve
from tokenflow_batch.results import (
    JobResult,
    Outcome,
    longest_first,
    mendable,
    publish,
    say_failed,
    translate,
)
from tokenflow_batch.stages import IMPLEMENTATIONS
from tokenflow_batch.stages.base import Progress, StageContext
from tokenflow_batch.stages.memory import MemoryUse
from tokenflow_batch.stages.sharing import JobOver, NothingToDo, Sharing

log = logging.getLogger("tokenflow_batch")

_PATIENCE = 5.0
"""Seconds that a helping process waits for others before it looks for another job."""

_LOCKED_PAUSE = 2.0
"""Seconds between two looks at a stage that another run is working on."""


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
        disk_budget: int | None = None,
    ) -> list[JobResult]:
        """Run the given stages of every job.

        Args:
            stages: which; earlier ones that are left out must be done already.
            force: of these, begin anew even what is done or half done.
            keep_going: whether other jobs are begun after one has failed.
            disk_budget: bytes that the work folder may hold; what no job needs any more goes.

        Returns:
            What became of the jobs that were begun, in the manifest's order; the same in every
            process of a team.
        """
        failed = self.team.agree("force", lambda: self._force(force))
        results = {job.name: JobResult(job) for job in self.batch.jobs}
        for name, outcome in failed.items():
            results[name].take(outcome)
        todo = [job for job in longest_first(self.batch.jobs) if job.name not in failed]
        if failed and not keep_going:
            todo = []
        begun = set(failed)
        while todo:
            self._revive(todo, stages)
            told = self._round(todo, stages, keep_going=keep_going, disk_budget=disk_budget)
            todo = [job for job in todo if job.name in told]
            begun |= set(told)
            for job in todo:
                results[job.name].take(told[job.name])
            todo = self._again([(job, told[job.name]) for job in todo], stages)
            self.team.next_epoch()
            if any(told[job.name]["locked"] for job in todo):
                time.sleep(_LOCKED_PAUSE)
        if disk_budget is not None and self.team.leads:
            warn_if_over(self.inputs, disk_budget)
        return [result for name, result in results.items() if name in begun]

    def _round(
        self,
        jobs: Sequence[Job],
        stages: Sequence[StageName],
        *,
        keep_going: bool,
        disk_budget: int | None,
    ) -> dict[str, Outcome]:
        """Everybody works until every job has an outcome, good or bad, or is not to be begun."""
        for job in jobs:
            if self.team.claim(f"job/{job.name}"):
                stop = self.team.get("stop") is not None
                outcome = {} if stop else self._attempt(job, stages)
                if outcome.get("error") and not keep_going and not mendable(outcome):
                    self.team.put("stop", job.name)
                self.team.put(f"outcome/{job.name}", outcome)
                if disk_budget is not None:
                    keep_within(self.inputs, disk_budget)
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
                publish(context, stage, result)
        except JobOver:
            return cast(Outcome, self.team.get(trouble))
        except Exception as error:  # the batch goes on, whatever it was
            outcome = self._outcome(result, error)
            if not mendable(outcome):
                say_failed(job, self.inputs.workspace, outcome)
            return outcome
        self._log(job).succeeded()
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
            if not mendable(outcome):
                continue
            damage = tuple(outcome["damaged"] or ())
            if damage and (damage in earlier or damage[0] not in stages):
                if self.team.leads:
                    say_failed(job, self.inputs.workspace, outcome)
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
            self._log(job).warn(f"{job.name}: {outcome['message']}; {what} computed again")

    def _outcome(self, result: JobResult, error: Exception | None) -> Outcome:
        """A job's end as plain data, for every process of the team."""
        told = None if error is None else translate(result.job, self.inputs.workspace, error)
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
            source = context.folder(needed)
            if not source.complete or source.freed:
                state = "was removed to keep the disk budget" if source.finished else "is not done"
                raise MissingInput(
                    f"{stage} needs {needed}, which {state}",
                    hint=f"run `tokenflow-batch {needed}` first, or `tokenflow-batch run`",
                )
        with self._locked(context, stage):
            if not folder.complete:  # another run may have finished it meanwhile
                self._work(context, stage)
        result.ran.append(stage)

    def _work(self, context: StageContext, stage: StageName) -> None:
        folder, told, began = context.folder(stage), self._log(context.job), time.perf_counter()
        told.event("stage started", stage=stage, key=folder.key)
        folder.open(context.keys[stage].described, self.compute.numerics())
        used = MemoryUse(self.compute.device, folder)
        try:
            IMPLEMENTATIONS[stage].run(context, folder)
            context.sharing.once(
                folder, COMPLETE, lambda: folder.finish(used.facts(context, stage))
            )
        finally:
            folder.abandon()  # before the lock goes
        seconds = round(time.perf_counter() - began, 3)
        rows = folder.totals().get("rows", 0)
        told.event("stage finished", stage=stage, seconds=seconds, rows=rows)

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
                say_failed(job, self.inputs.workspace, failed[job.name])
        return failed

    def _begin_anew(self, context: StageContext, stage: StageName, forced: set[Path]) -> None:
        """Remove a stage's result, and those of later stages, which came from it."""
        for later in STAGES[STAGES.index(stage) :]:
            folder = context.folder(later).folder
            if folder in forced:
                continue
            forced.add(folder)
            self._remove(context, later)

    def _revive(self, jobs: Sequence[Job], stages: Sequence[StageName]) -> None:
        """Begin those stages anew whose data were removed to save space and are needed again."""

        def revive() -> None:
            for job in jobs:
                with suppress(TokenflowBatchError):  # which the job will meet again, and tell
                    self._revive_job(self.context(job), stages)

        self.team.agree("revive", revive)
        self.team.next_epoch()  # whose locks were free

    def _revive_job(self, context: StageContext, stages: Sequence[StageName]) -> None:
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
            warn=self._log(job).warn,
            sharing=sharing or Sharing(Team()),
        )

    def _log(self, job: Job) -> JobLog:
        return JobLog.of(self.inputs.workspace, job)

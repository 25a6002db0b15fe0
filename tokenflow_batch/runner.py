"""Jobs × stages: skip what is done, run what is not, and turn every failure into a message.

The one place that catches a stage's errors. One bad job never stops the batch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import suppress

from tokenflow_batch.asking import refused
from tokenflow_batch.config import Batch, Job
from tokenflow_batch.disk import keep_within, warn_if_over
from tokenflow_batch.distributed import Team
from tokenflow_batch.errors import LaunchError, VideoError
from tokenflow_batch.inputs import Inputs
from tokenflow_batch.joblog import JobLog
from tokenflow_batch.locks import StageLocks
from tokenflow_batch.models import Compute, Model, resolve
from tokenflow_batch.renewal import Renewal
from tokenflow_batch.results import (
    JobResult,
    Outcome,
    failure,
    longest_first,
    mendable,
    outcome_of,
    publish,
    say_failed,
)
from tokenflow_batch.stage_names import STAGES, StageName
from tokenflow_batch.stage_runs import StageRuns
from tokenflow_batch.stages.base import Beside, Progress, StageContext, clear_scratch
from tokenflow_batch.stages.sharing import JobOver, NothingToDo, Sharing
from tokenflow_batch.store import Reads
from tokenflow_batch.turns import Turns, all_turns, groups, side_by_side

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
        self.batch = batch
        self.team = team or Team()
        self.compute: Compute = resolve(batch.runtime, self.team.local_rank)
        self.inputs = Inputs.of(batch)
        self._mended: set[tuple[str, ...]] = set()
        self._locks = StageLocks(self.team, self.inputs.workspace)
        self._renewal = Renewal(self.inputs, self._locks)
        self._stages = StageRuns(self.inputs, self.compute, self.team, self._locks, progress)

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

        Raises:
            LaunchError: the team's processes would give different bits.
        """
        self._check_team()
        try:
            results = self._rounds(stages, force, keep_going, disk_budget)
        finally:
            self._locks.release()
        if disk_budget is not None and self.team.leads:
            warn_if_over(self.inputs, disk_budget)
        return results

    def _check_team(self) -> None:
        """Processes that share stages must compute alike; each stage's record speaks for all."""
        first, *others = self.team.gather("numerics", self.compute.numerics())
        for rank, other in enumerate(others, 1):
            names = [name for name in first | other if first.get(name) != other.get(name)]
            if names:
                self.team.close()
                differ = "; ".join(f"{n}: {first.get(n)!r}, {other.get(n)!r}" for n in names)
                raise LaunchError(
                    f"processes 0 and {rank} of this launch would give different bits ({differ})",
                    hint="start it on devices of one type and with one installation",
                )

    def _rounds(
        self,
        stages: Sequence[StageName],
        force: Sequence[StageName],
        keep_going: bool,
        disk_budget: int | None,
    ) -> list[JobResult]:
        """Rounds over the jobs, until none is left that another round can mend."""
        failed = self.team.agree("force", lambda: self._renewal.force(self.batch.jobs, force))
        asking = [job for job in self.batch.jobs if job.name not in failed]
        failed |= self.team.agree(
            "asked", lambda: refused(self.inputs, lambda: self.model, asking, stages)
        )
        results = {job.name: JobResult(job) for job in self.batch.jobs}
        for name, outcome in failed.items():
            results[name].take(outcome)
        todo = [job for job in longest_first(self.batch.jobs) if job.name not in failed]
        if failed and not keep_going:
            todo = []
        begun = set(failed)
        while todo:
            told = self._revived(todo, stages, keep_going)
            ready = [job for job in todo if job.name not in told]
            told |= self._round(ready, stages, keep_going=keep_going, disk_budget=disk_budget)
            todo = [job for job in todo if job.name in told]
            begun |= set(told)
            for job in todo:
                results[job.name].take(told[job.name])
            todo = self._again([(results[job.name], told[job.name]) for job in todo], stages)
            self.team.next_epoch()
            if any(told[job.name]["locked"] for job in todo):
                time.sleep(_LOCKED_PAUSE)
        return [result for name, result in results.items() if name in begun]

    def _revived(
        self, jobs: Sequence[Job], stages: Sequence[StageName], keep_going: bool
    ) -> dict[str, Outcome]:
        """Have freed stages begun anew; the outcomes of jobs where that failed."""
        stuck: dict[str, Outcome]
        stuck = self.team.agree("revive", lambda: self._renewal.revive(jobs, stages))
        if not keep_going and not all(map(mendable, stuck.values())):
            self.team.put("stop", "revive")
        return dict(stuck)

    def _round(
        self,
        jobs: Sequence[Job],
        stages: Sequence[StageName],
        *,
        keep_going: bool,
        disk_budget: int | None,
    ) -> dict[str, Outcome]:
        """Everybody works until every job has an outcome, good or bad, or is not to be begun."""
        together = self.batch.runtime.edits_together if keep_going else 1
        for group in groups(jobs, lambda job: job.clip, together, self.team.size):
            if self.team.claim(f"job/{group[0].name}"):
                for part in self.inputs.different(group):
                    self._attempt_all(part, stages, keep_going=keep_going)
                if disk_budget is not None:
                    keep_within(self.inputs, disk_budget)
        while True:
            open_jobs = [job for job in jobs if self.team.get(f"outcome/{job.name}") is None]
            if not open_jobs:
                break
            for job in open_jobs:
                self._help(job, stages, None if len(open_jobs) == 1 else _PATIENCE)
        self.team.barrier("round")
        self._locks.release()
        told = {job.name: self.team.get(f"outcome/{job.name}") for job in jobs}
        return {name: outcome for name, outcome in told.items() if outcome}

    def _attempt_all(
        self, jobs: Sequence[Job], stages: Sequence[StageName], *, keep_going: bool
    ) -> None:
        """See jobs of one clip through, side by side; everybody is told how each ended."""
        beside = Beside(reads=Reads() if len(jobs) > 1 else None)
        with suppress(VideoError):
            clear_scratch(self.inputs.workspace, [self.inputs.keys(job) for job in jobs])

        def attempt(job: Job) -> Turns[None]:
            stop = self.team.get("stop") is not None
            outcome = {} if stop else (yield from self._attempt(job, stages, beside))
            if outcome.get("error") and not keep_going and not mendable(outcome):
                self.team.put("stop", job.name)
            self.team.put(f"outcome/{job.name}", outcome)

        side_by_side([attempt(job) for job in jobs])

    def _attempt(self, job: Job, stages: Sequence[StageName], beside: Beside) -> Turns[Outcome]:
        """See a job of one's own through; never raises what the batch should survive."""
        result, workspace = JobResult(job), self.inputs.workspace
        trouble = f"trouble/{job.name}"
        sharing = Sharing(self.team, over=lambda: self.team.get(trouble) is not None)
        try:
            context = self.context(job, sharing, beside)
            for index, stage in enumerate(stages):
                yield (index,)  # so no stage of one job comes between two turns of another's
                for place in self._stages.turns(context, stage, result):
                    yield (index, *place)
                publish(context, stage, result)
        except JobOver as over:  # another process has failed in what this one waited for
            why = over.told or self.team.get(trouble) or {}
            outcome = {**outcome_of(result, workspace, None), **why}
        except Exception as error:  # the batch goes on, whatever it was
            outcome = outcome_of(result, workspace, error)
        else:
            self._log(job).succeeded()
            return outcome_of(result, workspace, None)
        if not mendable(outcome):
            say_failed(job, workspace, outcome)
        return outcome

    def _help(self, job: Job, stages: Sequence[StageName], patience: float | None) -> None:
        """Take part in a job that belongs to another process, as long as there is work."""

        def over() -> bool:
            return self.team.get(f"outcome/{job.name}") is not None

        try:
            context = self.context(job, Sharing(self.team, over, patience))
            clear_scratch(self.inputs.workspace, [context.keys])
            for stage in stages:
                if over():
                    return
                all_turns(self._stages.turns(context, stage, JobResult(job)))
        except NothingToDo:
            return
        except JobOver:
            pass
        except Exception as error:  # the owner, who may be waiting for this process, has to know
            self.team.put(f"trouble/{job.name}", failure(job, self.inputs.workspace, error))
            patience = None
        self.team.wait(over, patience)  # for the owner's last words

    def _again(
        self, ended: Sequence[tuple[JobResult, Outcome]], stages: Sequence[StageName]
    ) -> list[Job]:
        """The jobs whose failure another round can mend; prepares it."""
        jobs, earlier = [], frozenset(self._mended)
        for result, outcome in ended:
            job = result.job
            if not mendable(outcome):
                continue
            damage = tuple(outcome["damaged"] or ())
            if damage and (damage in earlier or damage[0] not in stages):
                if self.team.leads:
                    say_failed(job, self.inputs.workspace, outcome)
                continue
            if damage and damage not in self._mended:
                if not self._mend(result, outcome):
                    continue
                self._mended.add(damage)
            elif outcome["locked"] and self.team.leads:
                log.warning("%s: %s; waiting for it", job.name, outcome["message"])
            jobs.append(job)
        return jobs

    def _mend(self, result: JobResult, outcome: Outcome) -> bool:
        """Have a damaged unit forgotten; False, and the job has failed, if that can't be done."""
        job, (stage, key, unit) = result.job, outcome["damaged"]

        def forget() -> Outcome:
            try:
                return {"more": self._renewal.mend(stage, key, unit)}
            except OSError as error:
                return failure(job, self.inputs.workspace, error)

        found: Outcome = self.team.agree(f"mend/{stage}/{key}/{unit}", forget)
        if "more" not in found:
            result.take({**outcome, **found})
            if self.team.leads:
                say_failed(job, self.inputs.workspace, found)
            return False
        if self.team.leads:
            what = f"it and {found['more']} more units are" if found["more"] else "it is"
            self._log(job).warn(f"{job.name}: {outcome['message']}; {what} computed again")
        return True

    @property
    def model(self) -> Model:
        """The batch's model, loaded at first use.

        Raises:
            ModelError: it can't be loaded.
        """
        return self._stages.model

    def context(
        self, job: Job, sharing: Sharing | None = None, beside: Beside | None = None
    ) -> StageContext:
        """As `StageRuns.context`."""
        return self._stages.context(job, sharing, beside)

    def _log(self, job: Job) -> JobLog:
        return JobLog.of(self.inputs.workspace, job)

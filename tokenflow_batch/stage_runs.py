"""One stage of one job: what it needs, its lock, its work, and who is told if that fails."""

from __future__ import annotations

import time
from dataclasses import replace

from tokenflow_batch.config import Job
from tokenflow_batch.distributed import Team
from tokenflow_batch.errors import MissingInput, TokenflowBatchError
from tokenflow_batch.inputs import Inputs
from tokenflow_batch.joblog import JobLog
from tokenflow_batch.ledger import COMPLETE
from tokenflow_batch.locks import StageLocks
from tokenflow_batch.models import Compute, Model, load
from tokenflow_batch.plan import hands_over
from tokenflow_batch.results import JobResult, failure
from tokenflow_batch.stage_names import STAGE_DATA, StageName
from tokenflow_batch.stages import IMPLEMENTATIONS
from tokenflow_batch.stages.base import Beside, Progress, StageContext
from tokenflow_batch.stages.memory import MemoryUse
from tokenflow_batch.stages.sharing import JobOver, NothingToDo, Sharing
from tokenflow_batch.store import LAYOUT
from tokenflow_batch.turns import Turns


class StageRuns:
    """Runs stages in this process, or does this process's part of them.

    Args:
        inputs: of the batch.
        compute: device, dtype, backends.
        team: the processes.
        locks: this process's.
        progress: makes progress bars.
    """

    def __init__(
        self, inputs: Inputs, compute: Compute, team: Team, locks: StageLocks, progress: Progress
    ) -> None:
        self.inputs, self.compute, self.team = inputs, compute, team
        self._locks, self._progress = locks, progress
        self._model: Model | None = None

    @property
    def model(self) -> Model:
        """The batch's model, loaded at first use.

        Raises:
            ModelError: it can't be loaded.
        """
        if self._model is None:
            self._model = load(self.inputs.model, self.compute)
        return self._model

    def context(
        self, job: Job, sharing: Sharing | None = None, beside: Beside | None = None
    ) -> StageContext:
        """What the job's stages work with; also the way to their results.

        Args:
            job: which.
            sharing: this process's part in it; all of it unless given.
            beside: what it has in common with jobs that it takes turns with.

        Raises:
            VideoError: the video can't be read.
        """
        return StageContext(
            job=job,
            keys=self.inputs.keys(job),
            workspace=self.inputs.workspace,
            compute=self.compute,
            model=lambda: self.model,
            progress=lambda what, total: self._progress(f"{job.name} {what}", total),
            warn=JobLog.of(self.inputs.workspace, job).warn,
            sharing=sharing or Sharing(Team()),
            beside=beside or Beside(),
        )

    def turns(self, context: StageContext, stage: StageName, result: JobResult) -> Turns[None]:
        """Do a stage unless it is done, in turns with other jobs; `result` is told which it was.

        Raises:
            TokenflowBatchError: anything that the user should know.
            JobOver: another process has given it up.
            NothingToDo: what is left is being done by others.
        """
        implementation, folder = IMPLEMENTATIONS[stage], context.folder(stage)
        if folder.complete:
            result.skipped.append(stage)
            return
        for needed in implementation.inputs:
            source = context.folder(needed)
            gone = source.freed and needed in STAGE_DATA[stage]
            if not source.complete or gone:
                state = "was removed to keep the disk budget" if source.finished else "is not done"
                raise MissingInput(
                    f"{stage} needs {needed}, which {state}",
                    hint=f"run `tokenflow-batch {needed}` first, or `tokenflow-batch run`",
                )
        with self._locks.shared(stage, folder.key, context.job.name):
            if not folder.complete:  # another run may have finished it meanwhile
                yield from self._work(self._handing(context, stage), stage)
        result.ran.append(stage)

    def _handing(self, context: StageContext, stage: StageName) -> StageContext:
        """The same, with `match` open to `invert` where that can do its work on the way."""
        # Compiled parts and those that a hook is on needn't give the same bits.
        if stage != "invert" or not hands_over(context.settings) or self.compute.compile:
            return context
        folder = context.folder("match")
        if folder.complete or not self._locks.take("match", folder.key):
            return context
        try:
            folder.open(context.keys["match"].described, self.compute.numerics())
            if folder.committed(LAYOUT):
                folder.check(LAYOUT)
        except TokenflowBatchError:  # told when it is its turn
            return context
        return replace(context, handed=folder)

    def _work(self, context: StageContext, stage: StageName) -> Turns[None]:
        folder, sharing = context.folder(stage), context.sharing
        told, once = JobLog.of(self.inputs.workspace, context.job), f"{context.job.name}/{stage}"
        if self.team.claim(f"begin/{once}"):  # helpers come and go
            self.team.put(f"began/{once}", time.time())
            told.event("stage started", stage=stage, key=folder.key)
        folder.open(context.keys[stage].described, self.compute.numerics())
        used = MemoryUse(self.compute.device, folder)
        try:
            yield from self._share(context, stage, used)
        except (JobOver, NothingToDo):
            raise
        except Exception as error:
            folder.abandon()
            for begun in filter(None, (folder, context.handed)):
                if sharing.owes(begun):  # to other jobs' processes, too, if they share the stage
                    sharing.fail(begun, failure(context.job, self.inputs.workspace, error))
            raise
        finally:
            folder.abandon()  # before the lock goes
        if self.team.claim(f"end/{once}"):
            seconds = round(time.time() - (self.team.get(f"began/{once}") or time.time()), 3)
            rows = folder.totals().get("rows", 0)
            told.event("stage finished", stage=stage, seconds=seconds, rows=rows)

    def _share(self, context: StageContext, stage: StageName, used: MemoryUse) -> Turns[None]:
        """Do this process's part of a stage."""
        folder, sharing = context.folder(stage), context.sharing
        try:
            for place in IMPLEMENTATIONS[stage].turns(context, folder):
                with folder.lap.paused():  # others' turns
                    yield place
            sharing.quiet(folder)
            folder.settle()  # its waiting is part of the stage
            sharing.once(
                folder,
                COMPLETE,
                lambda: folder.finish({**used.facts(context, stage), **folder.lap.take()}),
            )
        except (JobOver, NothingToDo):
            folder.settle()  # others wait for what is behind: if it fails, that is an error
            raise

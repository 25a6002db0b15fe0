"""What is begun anew: forced stages, freed ones that are needed again, damaged units.

All of it is done by one process between rounds, while the others of its team wait.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from tokenflow_batch.config import Job
from tokenflow_batch.errors import VideoError
from tokenflow_batch.inputs import Inputs
from tokenflow_batch.ledger import StageFolder
from tokenflow_batch.locks import StageLocks
from tokenflow_batch.results import JobResult, Outcome, mendable, outcome_of, say_failed
from tokenflow_batch.stage_names import STAGES, StageName
from tokenflow_batch.status import State, needed_again


class Renewal:
    """Makes done work not done.

    Args:
        inputs: of the batch.
        locks: this process's.
    """

    def __init__(self, inputs: Inputs, locks: StageLocks) -> None:
        self.inputs, self.locks = inputs, locks

    def force(self, jobs: Sequence[Job], stages: Sequence[StageName]) -> dict[str, Outcome]:
        """Begin stages of all jobs anew, and later ones, which came from them.

        Returns:
            The outcomes of jobs where that failed.
        """
        forced: set[Path] = set()
        failed = {}
        for job in jobs:
            try:
                if stages:
                    first = min(map(STAGES.index, stages))
                    self._remove(job, STAGES[first:], forced)
            except Exception as error:  # the batch goes on
                failed[job.name] = outcome_of(JobResult(job), self.inputs.workspace, error)
                say_failed(job, self.inputs.workspace, failed[job.name])
        return failed

    def revive(self, jobs: Sequence[Job], stages: Sequence[StageName]) -> dict[str, Outcome]:
        """Begin those stages anew whose data were removed to save space and are needed again.

        Returns:
            The outcomes of jobs where that failed; where another run is in the way, it is worth
            another try (`results.mendable`).
        """
        failed = {}
        for job in jobs:
            try:
                with suppress(VideoError):  # which the job will meet again, and tell
                    again = self._freed(job)
                    self._remove(job, [s for s in STAGES if s in again and s in stages], set())
            except Exception as error:  # the batch goes on
                failed[job.name] = outcome_of(JobResult(job), self.inputs.workspace, error)
                if not mendable(failed[job.name]):
                    say_failed(job, self.inputs.workspace, failed[job.name])
        return failed

    def mend(self, stage: StageName, key: str, unit: str) -> int:
        """Forget a damaged unit, and whatever else of its stage is visibly damaged.

        Returns:
            How many more units than this one.

        Raises:
            OSError: the folder can't be written.
        """
        folder = StageFolder(self.inputs.workspace.stage(stage, key), stage, key)
        folder.forget(unit)
        return folder.forget_flawed()

    def _freed(self, job: Job) -> set[StageName]:
        keys = self.inputs.keys(job)
        workspace = self.inputs.workspace
        folders = (StageFolder(workspace.stage(s, keys[s].key), s, keys[s].key) for s in STAGES)
        return needed_again({s: _state(f) for s, f in zip(STAGES, folders, strict=True)})

    def _remove(self, job: Job, stages: Sequence[StageName], removed: set[Path]) -> None:
        """Remove stages' results, unless they are among those `removed` already.

        None of them where another run works on one.
        """
        keys = self.inputs.keys(job)
        with ExitStack() as held:
            folders = []
            for stage in stages:
                folder = self.inputs.workspace.stage(stage, keys[stage].key)
                if folder not in removed:
                    held.enter_context(self.locks.alone(stage, keys[stage].key, job.name))
                    folders.append(folder)
            for folder in folders:
                removed.add(folder)
                if folder.exists():
                    aside = folder.with_name(f"{folder.name}.removed")
                    shutil.rmtree(aside, ignore_errors=True)
                    folder.rename(aside)  # first, so that a kill leaves no half of it
                    shutil.rmtree(aside)


def _state(folder: StageFolder) -> State:
    if not folder.complete:
        return "waiting"
    return "freed" if folder.freed else "done"

"""What every stage shares: its place in the chain, its folder, and what a run hands to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import ClassVar

from tokenflow_batch.arrays import ArraySpec
from tokenflow_batch.config import Job, Settings
from tokenflow_batch.distributed import Team
from tokenflow_batch.keys import StageKey
from tokenflow_batch.ledger import StageFolder
from tokenflow_batch.models import Compute, Model
from tokenflow_batch.paths import Workspace
from tokenflow_batch.scratch import keep_only
from tokenflow_batch.stage_names import STAGE_INPUTS, StageName
from tokenflow_batch.stages.sharing import Sharing
from tokenflow_batch.store import LAYOUT, ArrayStore, Reads, lay_out
from tokenflow_batch.turns import Turns

Advance = Callable[[int], None]
"""Tells a progress bar that so many frames (times steps) are done."""

Progress = Callable[[str, int], AbstractContextManager[Advance]]
"""(what, total) → a progress bar."""


@dataclass(frozen=True)
class Beside:
    """What jobs that take turns in a process have in common.

    Attributes:
        folders: of stages; each remembers which of its units were checked.
        reads: stored data of the source at the place where the jobs are; None for a job alone.
    """

    folders: dict[tuple[StageName, str], StageFolder] = field(default_factory=dict, repr=False)
    reads: Reads | None = None


def clear_scratch(workspace: Workspace, jobs: Collection[Mapping[StageName, StageKey]]) -> None:
    """Have scratch hold no files from now on but of jobs with these keys."""
    if workspace.scratch is not None:
        own = {workspace.near(stage, key.key) for keys in jobs for stage, key in keys.items()}
        keep_only(workspace.scratch, own)


@dataclass(frozen=True)
class StageContext:
    """What a stage may use.

    Attributes:
        job: names and settings.
        keys: the keys of all stages of the job.
        workspace: where everything lies.
        compute: device, dtype, backends.
        model: loads the model, once.
        progress: makes a progress bar.
        warn: tells the user something that doesn't stop the job.
        sharing: this process's part in the job.
        beside: what it has in common with jobs that it takes turns with.
        handed: `match`'s folder, open and locked, while `invert` may commit units there, too.
    """

    job: Job
    keys: Mapping[StageName, StageKey]
    workspace: Workspace
    compute: Compute
    model: Callable[[], Model]
    progress: Progress
    warn: Callable[[str], None]
    sharing: Sharing = field(default_factory=lambda: Sharing(Team()))
    beside: Beside = field(default_factory=lambda: Beside())
    handed: StageFolder | None = None

    @property
    def settings(self) -> Settings:
        """The job's settings."""
        return self.job.settings

    def folder(self, stage: StageName) -> StageFolder:
        """The folder of one of the job's stages; it remembers which units were checked."""
        key = self.keys[stage].key
        found = self.beside.folders.get((stage, key))
        if found is None:
            near = self.workspace.near(stage, key)
            found = StageFolder(self.workspace.stage(stage, key), stage, key, near)
            self.beside.folders[stage, key] = found
        return found

    def store(self, folder: StageFolder, specs: Mapping[str, ArraySpec]) -> ArrayStore:
        """A stage's own arrays, laid out if they aren't yet."""
        self.sharing.once(folder, LAYOUT, lambda: lay_out(folder, specs))
        return ArrayStore(folder, specs)

    @property
    def float_dtype(self) -> str:
        """How latents of this run are stored: half precision only if the model computes in it."""
        return "float16" if str(self.compute.dtype) == "torch.float16" else "float32"


class Stage(ABC):
    """One of the six stages.

    Attributes:
        name: what the command line and the work folder call it.
    """

    name: ClassVar[StageName]

    @property
    def inputs(self) -> tuple[StageName, ...]:
        """The stages whose results it reads."""
        return STAGE_INPUTS[self.name]

    @abstractmethod
    def run(self, context: StageContext, folder: StageFolder) -> None:
        """Do what is not committed yet. Units that are committed are not computed again.

        Raises:
            TokenflowBatchError: anything that the user should know.
        """

    def turns(self, context: StageContext, folder: StageFolder) -> Turns[None]:
        """`run` in turns with other jobs of the same clip; by default in a single one."""
        self.run(context, folder)
        yield from ()

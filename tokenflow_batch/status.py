"""What is done, half done or waiting: read from the work folder, without torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tokenflow_batch.arrays import ArraySpec
from tokenflow_batch.config import Batch, Job
from tokenflow_batch.errors import DamagedUnit
from tokenflow_batch.inputs import Inputs, Keys
from tokenflow_batch.joblog import JobLog
from tokenflow_batch.ledger import StageFolder
from tokenflow_batch.paths import Workspace
from tokenflow_batch.stage_names import STAGE_DATA, STAGE_INPUTS, STAGES, StageName

State = Literal["done", "freed", "running", "begun", "waiting", "damaged", "unknown"]
"""`freed`: done, its data removed since to keep the disk budget. `running`: a process of this
machine holds its lock. `unknown`: an input file has changed or was never read, so its digest is not
known."""


@dataclass(frozen=True)
class StageStatus:
    """A stage of a job.

    Attributes:
        state: how far it is.
        units: how many units of work are committed.
        key: which result it is; None where that is unknown.
        total: how many units there are in all, where the stage has begun and counts them.
        where: host and process that is at it, while it is running.
    """

    state: State
    units: int
    key: str | None = None
    total: int | None = None
    where: str | None = None


@dataclass(frozen=True)
class JobStatus:
    """A job's stages in order, whether its video lies where it belongs, and its last error."""

    clip: str
    edit: str
    stages: dict[StageName, StageStatus]
    published: bool
    error: str | None = None

    @property
    def lacking(self) -> set[StageName]:
        """The stages that a run would have to compute."""
        states = {stage: found.state for stage, found in self.stages.items()}
        return {s for s in states if states[s] not in ("done", "freed")} | needed_again(states)


def needed_again(states: Mapping[StageName, State]) -> set[StageName]:
    """Freed stages of a job that stages read which are not done, or are needed again themselves."""
    wanted: set[StageName] = set()
    again: set[StageName] = set()
    for stage in reversed(STAGES):
        if stage in wanted and states[stage] == "freed":
            again.add(stage)
        if stage in again or states[stage] not in ("done", "freed"):
            wanted.update(STAGE_DATA[stage])
    return again


def status(batch: Batch) -> list[JobStatus]:
    """The state of every job of a batch.

    Raises:
        ModelError: the model is not on this disk.
    """
    inputs = Inputs.of(batch, download=False)
    looking = Looking(inputs.workspace)
    found = []
    for job in batch.jobs:
        keys = inputs.known_keys(job)
        stages: dict[StageName, StageStatus] = {}
        for stage in STAGES:
            if keys is None:
                stages[stage] = StageStatus("unknown" if looking.began else "waiting", 0)
            else:
                stages[stage] = _counted(looking, job, stage, keys)
        video = inputs.workspace.video(job.clip, job.edit)
        published = stages["render"].state == "done" and video.is_file()
        error = JobLog.of(inputs.workspace, job).last_error() if looking.logged else None
        found.append(JobStatus(job.clip, job.edit, stages, published, error))
    return found


class Looking:
    """Looks at each stage folder once, and at none that is not there.

    Args:
        workspace: where to look.
    """

    def __init__(self, workspace: Workspace) -> None:
        self.workspace, self.began = workspace, workspace.digests.exists()
        self.logged = workspace.logs.is_dir()
        self._there = {stage: _names(workspace.work / stage) for stage in STAGES}
        self._locks = _held_locks()
        self._seen: dict[tuple[StageName, str], StageStatus] = {}

    def at(self, stage: StageName, key: str) -> StageStatus:
        """The state of a stage folder."""
        if (stage, key) not in self._seen:
            there, found = self._there[stage], StageStatus("waiting", 0, key)
            if key in there:
                found = stage_status(StageFolder(self.workspace.stage(stage, key), stage, key))
            settled = found.state in ("done", "freed")
            if not settled and f"{key}.lock" in there and self._locked(stage, key):
                found = replace(found, state="running", where=self._holder(stage, key))
            self._seen[stage, key] = found
        return self._seen[stage, key]

    def _locked(self, stage: StageName, key: str) -> bool:
        try:
            return self.workspace.lock(stage, key).stat().st_ino in self._locks
        except OSError:
            return False

    def _holder(self, stage: StageName, key: str) -> str | None:
        with suppress(OSError, ValueError, KeyError, TypeError):
            told = json.loads(self.workspace.lock(stage, key).read_text("utf-8"))
            return f"{told['host']}, process {told['pid']}"
        return None


def _counted(looking: Looking, job: Job, stage: StageName, keys: Keys) -> StageStatus:
    """A stage's state and, if it is half done, of how many units."""
    found = looking.at(stage, keys[stage].key)
    if found.state not in ("begun", "running") or stage == "report":
        return found
    sized = "encode" if stage == "render" else stage
    arrays = _arrays(looking.workspace.stage(sized, keys[sized].key))
    s = job.settings
    if not arrays:
        return found
    grid = max(arrays.values(), key=lambda a: (math.prod(a.lead), a.frames))
    total = math.prod(grid.lead) * -(-grid.frames // grid.block_frames)
    if stage == "edit":
        state, windows = arrays["latents"], arrays["noise"].lead[1]
        chunks = -(-state.frames // state.block_frames)
        total = (s.steps - s.first_step) * (chunks + windows)
    kinds = {a.unit for a in arrays.values()} if stage != "render" else {"segment"}
    folder = looking.workspace.stage(stage, keys[stage].key) / "commits"
    units = sum(p.name.partition("-")[0] in kinds for p in folder.glob("[!.]*-*.json"))
    return replace(found, units=units, total=max(total, units))


def _arrays(folder: Path) -> dict[str, ArraySpec]:
    """The arrays that a stage has laid out; none where it has not."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        layout = json.loads((folder / "commits" / "layout.json").read_text("utf-8"))
        arrays = layout["facts"]["arrays"]
        return {name: ArraySpec.from_json(raw) for name, raw in arrays.items()}
    return {}


def _names(folder: Path) -> frozenset[str]:
    return frozenset(path.name for path in folder.iterdir()) if folder.is_dir() else frozenset()


def _held_locks() -> frozenset[int]:
    """Inodes of files locked by processes of this machine.

    Looked up rather than tried: to try a lock is to take it, in the way of a run that starts.
    """
    try:
        lines = Path("/proc/locks").read_text("ascii").splitlines()
    except OSError:
        return frozenset()
    waiting = "->"  # processes that wait for a lock are listed below it
    fields = (line.split() for line in lines if waiting not in line)
    return frozenset(int(f[5].rsplit(":", 1)[1]) for f in fields if len(f) > 5)


def stage_status(folder: StageFolder) -> StageStatus:
    """The state of one stage folder."""
    names = list(folder.units())
    if folder.complete:
        return StageStatus("freed" if folder.freed else "done", len(names), folder.key)
    units = sum("-" in name for name in names)  # numbered: what is there once is no measure
    try:
        finished = folder.finished
    except DamagedUnit:
        finished = True
    if finished:
        return StageStatus("damaged", units, folder.key)
    return StageStatus("begun" if names else "waiting", units, folder.key)


@dataclass(frozen=True)
class Step:
    """What a run would do with a stage of a job, and why."""

    does: Literal["run", "skip", "fail"]
    why: str


Preview = list[tuple[Job, dict[StageName, Step]]]


def preview(batch: Batch, stages: Sequence[StageName], force: Sequence[StageName] = ()) -> Preview:
    """What a run of these stages would do, without doing it.

    Raises:
        ModelError: the model is not on this disk.
    """
    taken: dict[str, str] = {}
    return [
        (job, _steps(job, found.stages, stages, force, taken))
        for job, found in zip(batch.jobs, status(batch), strict=True)
    ]


def _steps(
    job: Job,
    now: Mapping[StageName, StageStatus],
    stages: Sequence[StageName],
    force: Sequence[StageName],
    taken: dict[str, str],
) -> dict[StageName, Step]:
    """One job's steps; `taken` are the keys that jobs before it would run, with their names."""
    if not job.video.is_file():
        return {stage: Step("fail", f"{job.video}: no such file ({job.where})") for stage in stages}
    first_forced = min((STAGES.index(stage) for stage in force), default=len(STAGES))
    states: dict[StageName, State] = {
        stage: "waiting" if index >= first_forced else now[stage].state
        for index, stage in enumerate(STAGES)
    }
    again = needed_again(states)
    there = {s for s in STAGES if states[s] in ("done", "freed") and s not in again}
    steps: dict[StageName, Step] = {}
    for stage in stages:
        found = now[stage]
        missing = [needed for needed in STAGE_INPUTS[stage] if needed not in there]
        if stage in there:
            freed = "done; its data were removed to keep the disk budget"
            steps[stage] = Step("skip", freed if found.state == "freed" else "done")
        elif found.key in taken:
            steps[stage] = Step("skip", f"the same work as {taken[found.key]}, done there")
            there.add(stage)
        elif missing:
            steps[stage] = Step("fail", f"needs {', '.join(missing)}: run that first")
        else:
            begun = found.state in ("done", "freed", "begun")
            anew = STAGES.index(stage) >= first_forced and begun
            steps[stage] = Step("run", "begun anew, by --force" if anew else _reason(found))
            there.add(stage)
            if found.key is not None:
                taken[found.key] = job.name
    return steps


def _reason(found: StageStatus) -> str:
    return {
        "running": "running in another process now",
        "begun": f"begun: goes on after {found.units} units",
        "damaged": "damaged: what is missing is computed again",
        "freed": "needed again: its data were removed to keep the disk budget",
        "unknown": "the video or the model has changed or was not read yet",
    }.get(found.state, "not begun")

"""What a batch will cost before it runs: rows, seconds, bytes on disk, memory; and what is shared.

Without torch. Rows are exact once a clip's frames and shot cuts are known; bytes come from the
stores' own array specs; seconds and memory only from measurements, else they are unknown.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from tokenflow_batch.config import Batch, ConvFeatures, Job
from tokenflow_batch.costs import ClipSize, Figures, JobSizes, Known, alike
from tokenflow_batch.errors import TokenflowBatchError, VideoError
from tokenflow_batch.files import FileMemory
from tokenflow_batch.inputs import Inputs, Keys
from tokenflow_batch.ledger import StageFolder
from tokenflow_batch.measured import Measured, stored_bytes
from tokenflow_batch.model_shape import ModelShape
from tokenflow_batch.ranges import part_frames
from tokenflow_batch.stage_names import STAGES, StageName
from tokenflow_batch.status import Looking, StageStatus, needed_again
from tokenflow_batch.turns import groups

State = Literal["done", "freed", "shared", "begun", "again", "to do"]
"""`freed`: done, its data removed since to keep the disk budget; `again`: so, but needed again."""


@dataclass(frozen=True, kw_only=True)
class StageCost(Figures):
    """What a stage of a job still costs; nothing where it is done or shared.

    Attributes:
        state: done already (freed: and removed since), shared with an earlier job, half done,
            to do (again: its data were removed).
        key: which result it is.
    """

    state: State
    key: str


@dataclass(frozen=True)
class JobCost:
    """A job's costs, or why nothing can be said about it."""

    job: Job
    clip: ClipSize | None = None
    working: tuple[int, int] | None = None
    stages: Mapping[StageName, StageCost] = field(default_factory=dict)
    published: int = 0
    error: str | None = None


@dataclass(frozen=True)
class Forecast:
    """A batch's costs.

    Attributes:
        jobs: one each.
        free: bytes of disk.
        guessed: whether some sizes were not measured.
        memory: bytes of the device that may be used; None where that is unknown.
        window: the most segments a window may have within a memory budget, where one was given.
        together: how many edits of a clip go side by side.
    """

    jobs: list[JobCost]
    free: int
    guessed: bool
    memory: int | None = None
    window: int | None = None
    together: int = 1

    @cached_property
    def bytes(self) -> int:
        """What the batch adds to the disk in the end, results included."""
        kept = sum(stage.bytes for job in self.jobs for stage in job.stages.values())
        return kept + sum(job.published for job in self.jobs)

    @cached_property
    def scratch(self) -> int:
        """The most that is needed for a while on top of it."""
        return max(self._for_a_while.values())

    @cached_property
    def _for_a_while(self) -> dict[StageName, int]:
        """The most that each stage needs for a while; edits side by side need it at once."""
        known = [job for job in self.jobs if job.stages]
        found = {
            stage: max((job.stages[stage].scratch for job in known), default=0) for stage in STAGES
        }
        together = groups(known, lambda job: job.job.clip, self.together)
        sums = (sum(job.stages["edit"].scratch for job in group) for group in together)
        return {**found, "edit": max(sums, default=0)}

    @property
    def needed(self) -> int:
        """The most that is taken at once."""
        return self.bytes + self.scratch

    @property
    def fits(self) -> bool:
        """Whether the disk can hold it."""
        return self.needed <= self.free

    @cached_property
    def flops(self) -> int:
        """Floating-point operations of the UNet."""
        return sum(stage.flops for job in self.jobs for stage in job.stages.values())

    @cached_property
    def heaviest(self) -> tuple[JobCost, StageName] | None:
        """The job and stage that takes most memory of those still to do; None if none is known."""
        found = [(c.peak or 0, i, s) for i, j in enumerate(self.jobs) for s, c in j.stages.items()]
        peak, index, stage = max(found, default=(0, 0, STAGES[0]))
        return (self.jobs[index], stage) if peak else None

    @property
    def fits_memory(self) -> bool:
        """Whether the device has the memory that is needed at once, as far as is known."""
        if self.heaviest is None or self.memory is None:
            return True
        job, stage = self.heaviest
        return (job.stages[stage].peak or 0) <= self.memory

    def total(self, stage: StageName) -> Figures:
        """One stage over all jobs."""
        costs = [job.stages[stage] for job in self.jobs if stage in job.stages]
        known = [c.seconds for c in costs if c.seconds is not None]
        return Figures(
            rows=sum(c.rows for c in costs),
            seconds=sum(known) if len(known) == len(costs) else None,
            bytes=sum(c.bytes for c in costs),
            scratch=self._for_a_while[stage],
            peak=None if any(c.peak is None for c in costs) else _largest(costs),
            partial_rows=sum(c.partial_rows for c in costs),
            flops=sum(c.flops for c in costs),
        )


def _largest(costs: Sequence[StageCost]) -> int:
    return max((cost.peak or 0 for cost in costs), default=0)


def forecast(batch: Batch, memory: int | None = None) -> Forecast:
    """The costs of what is left of a batch.

    Args:
        batch: the resolved manifest.
        memory: bytes of the device that may be used; what it has where None.

    Raises:
        ModelError: the model is not on this disk.
    """
    inputs = Inputs.of(batch, download=False)
    counting = _Counting(inputs, memory)
    jobs = [
        counting.job(job, keys) for job, keys in zip(batch.jobs, inputs.planned_keys(), strict=True)
    ]
    counting.headers_changed()
    free = free_bytes(inputs.workspace.work)
    window = min((n or 0 for n in counting.windows), default=0) or None
    bytes_there = memory or counting.known.measured.device_bytes
    together = batch.runtime.edits_together
    return Forecast(jobs, free, counting.known.guessed, bytes_there, window, together)


def with_smaller_features(batch: Batch, memory: int | None = None) -> dict[ConvFeatures, Forecast]:
    """The costs if convolution features that would be stored in 16 bits were kept otherwise.

    Args:
        batch: the resolved manifest.
        memory: as for `forecast`.

    Returns:
        What takes more disk first.
    """
    kinds: tuple[ConvFeatures, ...] = ("store8", "recompute")
    return {kind: forecast(batch.with_conv_features(kind), memory) for kind in kinds}


def free_bytes(path: Path) -> int:
    """Free bytes on the disk where `path` lies or will lie."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


class _Counting:
    """Adds up a batch, each result once."""

    def __init__(self, inputs: Inputs, budget: int | None) -> None:
        self.inputs, self.workspace = inputs, inputs.workspace
        measured = Measured.of(inputs.workspace, inputs.batch.runtime.device.partition(":")[0])
        self.known = Known(ModelShape.of(inputs.model), measured, _float_dtype(inputs.batch))
        self.headers = FileMemory(inputs.workspace.headers)
        self.windows: list[int | None] = []
        self._edits = Counter(job.clip for job in inputs.batch.jobs)
        self._budget = budget
        self._new_headers = False
        self._taken: set[str] = set()
        self._looking = Looking(inputs.workspace)
        self._counted: dict[tuple[Any, ...], JobSizes] = {}
        self._sizes: dict[str, ClipSize] = {}

    def headers_changed(self) -> None:
        """Make the headers that were read last."""
        if self._new_headers:
            self.headers.save()

    def job(self, job: Job, keys: Keys | None) -> JobCost:
        """The costs of one job that no earlier one has."""
        if keys is None:
            return JobCost(
                job, error=f"{job.video}: no such file, or it can't be read ({job.where})"
            )
        try:
            clip = self._clip(job, keys)
            counted = self._sizes_of(job, clip)
        except TokenflowBatchError as error:
            return JobCost(job, error=error.message)
        except ValueError as error:
            return JobCost(job, error=f"{job.video}: {error} ({job.where})")
        if self._budget is not None:
            self.windows.append(counted.window(keys, self._budget))
        found = {stage: self._looking.at(stage, keys[stage].key) for stage in STAGES}
        again = needed_again({stage: now.state for stage, now in found.items()})
        beside = self.inputs.batch.runtime.edits_together > 1 and self._edits[job.clip] > 1
        fresh = keys["invert"].key not in self._taken
        handed = self._handed(counted, keys, found, again) if fresh else 0.0
        stages = {
            s: self._stage(
                counted, s, keys, found[s], again=s in again, beside=beside, handed=handed
            )
            for s in STAGES
        }
        published = sum(stages[stage].bytes for stage in ("render", "report"))
        return JobCost(job, clip, counted.working, stages, published)

    def _handed(
        self,
        counted: JobSizes,
        keys: Keys,
        now: Mapping[StageName, StageStatus],
        again: Collection[StageName],
    ) -> float:
        """The share of what is left of `match` that `invert` is still to do on its way."""
        if self.inputs.batch.runtime.compile:
            return 0.0
        s, there = counted.settings, dict[StageName, float]()
        sizes: dict[StageName, int] = {"invert": s.inversion_steps, "match": s.steps}
        for stage, steps in sizes.items():
            if stage in again or now[stage].state == "waiting":
                there[stage] = 0.0
            elif now[stage].state in ("done", "freed"):
                there[stage] = 1.0
            else:
                folder = self._folder(stage, keys[stage].key)
                there[stage] = _share_there(folder, steps * counted.chunks)
        left = 1 - there["match"]
        return (1 - max(there.values())) / left if left else 0.0

    def _sizes_of(self, job: Job, clip: ClipSize) -> JobSizes:
        kind = alike(job, clip)
        if kind not in self._counted:
            self._counted[kind] = JobSizes.of(self.known, job, clip)
        return self._counted[kind]

    def _folder(self, stage: StageName, key: str) -> StageFolder:
        return StageFolder(self.workspace.stage(stage, key), stage, key)

    def _stage(
        self,
        counted: JobSizes,
        stage: StageName,
        keys: Keys,
        now: StageStatus,
        *,
        again: bool,
        beside: bool,
        handed: float,
    ) -> StageCost:
        key = keys[stage].key
        if key in self._taken:
            return StageCost(state="shared", key=key)
        if now.state == "freed" and not again:
            return StageCost(state="freed", key=key)  # an edit further down may need it
        self._taken.add(key)
        if now.state == "done":
            return StageCost(state="done", key=key)
        all_of_it = counted.figures(stage, keys, handed, beside=beside)
        if again or not now.units:
            return StageCost(**vars(all_of_it), state="again" if again else "to do", key=key)
        return StageCost(**vars(self._left(counted, stage, key, all_of_it)), state="begun", key=key)

    def _left(self, counted: JobSizes, stage: StageName, key: str, all_of_it: Figures) -> Figures:
        folder, f = self._folder(stage, key), all_of_it
        there = folder.totals().get("rows", 0)
        left = 1 - there / f.rows if f.rows else 1.0
        if stage == "match":  # its units cost little or much
            left = 1 - _share_there(folder, counted.settings.steps * counted.chunks)
        return replace(
            f,
            rows=round(f.rows * left),
            seconds=None if f.seconds is None else f.seconds * left,
            bytes=max(f.bytes - stored_bytes(folder), 0),
            partial_rows=round(f.partial_rows * left),
            flops=round(f.flops * left),
        )

    def _clip(self, job: Job, keys: Keys) -> ClipSize:
        """As encode found it, or as the file's header says.

        Raises:
            VideoError: neither is there.
        """
        key = keys["encode"].key
        if key not in self._sizes:
            self._sizes[key] = self._probed(key) or self._header(job)
        size = self._sizes[key]
        given = job.settings.cuts
        cuts = size.cuts if given == "auto" else () if given == "none" else given
        if job.settings.mode == "official":
            cuts = ()
        return ClipSize(size.frames, size.width, size.height, cuts, size.exact)

    def _probed(self, key: str) -> ClipSize | None:
        folder = self.workspace.stage("encode", key)
        try:
            facts = json.loads((folder / "facts.json").read_text("utf-8"))
            cuts = tuple(json.loads((folder / "cuts.json").read_text("utf-8")))
            return ClipSize(facts["frames"], facts["width"], facts["height"], cuts, exact=True)
        except (OSError, ValueError, KeyError):
            return None

    def _header(self, job: Job) -> ClipSize:
        video = job.video
        known = self.headers.recall(video)
        if known is None:
            from tokenflow_batch.video.headers import read_header

            try:
                stat = video.stat()
            except OSError as error:
                raise VideoError(f"{video}: can't be read: {error.strerror}") from None
            header = read_header(video)
            known = {"frames": header.frames, "width": header.width, "height": header.height}
            known["rate"] = header.rate
            self.headers.keep(video, [stat.st_size, stat.st_mtime_ns], known)
            self._new_headers = True
        frames = known["frames"]
        if job.part is not None:
            frames = part_frames(job.part, frames, known.get("rate", 25.0), video)
        return ClipSize(frames, known["width"], known["height"])


def _share_there(folder: StageFolder, units: int) -> float:
    """Of a stage whose units are (step, chunk), so many, the share that is committed."""
    return sum(name.startswith(f"{folder.stage}-") for name in folder.units()) / units


def _float_dtype(batch: Batch) -> str:
    """How latents will be stored, as far as can be told without torch."""
    runtime = batch.runtime
    if runtime.dtype != "auto":
        return "float16" if runtime.dtype == "fp16" else "float32"
    gpu = runtime.device.startswith("cuda") or Path("/dev/nvidia0").exists()
    return "float16" if gpu and runtime.device != "cpu" else "float32"

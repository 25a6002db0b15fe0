"""What a batch will cost before it runs: rows, seconds, bytes on disk, memory; and what is shared.

Without torch. Rows are exact once a clip's frames and shot cuts are known; bytes come from the
stores' own array specs; seconds and memory only from measurements, else they are unknown.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Literal

from tokenflow_batch.arrays import edit_arrays, encode_arrays, invert_arrays, match_arrays
from tokenflow_batch.config import STAGES, Batch, Job, Settings, StageName
from tokenflow_batch.errors import TokenflowBatchError, VideoError
from tokenflow_batch.files import FileMemory
from tokenflow_batch.geometry import Fit, plan_geometry
from tokenflow_batch.inputs import Inputs, Keys
from tokenflow_batch.ledger import StageFolder
from tokenflow_batch.measured import Measured, stored_bytes
from tokenflow_batch.model_shape import ModelShape
from tokenflow_batch.plan import layout_of, rows, unet_calls
from tokenflow_batch.ranges import part_frames
from tokenflow_batch.status import stage_status
from tokenflow_batch.tokenflow.modes import MODES

RECORD, FILE, STAGE_FILES = 170, 190, 1900
"""Bytes of a commit record, of a file's line in it, of a stage's own JSON files: as written."""
PIXEL_BYTES: Mapping[StageName, float] = {"render": 4.0, "report": 8.0}
"""Video bytes per latent pixel and frame (64 pixels) where nothing was measured: a guess."""
RATIO = 0.5
"""Compressed over plain correspondences where nothing was measured: a guess."""

State = Literal["done", "shared", "begun", "to do"]


@dataclass(frozen=True)
class ClipSize:
    """A clip's length and size as far as known.

    Attributes:
        frames: F.
        width, height: upright source size.
        cuts: first frames of new shots.
        exact: whether encode has counted the frames and looked for cuts; else the header's word.
    """

    frames: int
    width: int
    height: int
    cuts: tuple[int, ...] = ()
    exact: bool = False


@dataclass(frozen=True)
class StageCost:
    """What a stage of a job still costs; nothing where it is done or shared.

    Attributes:
        state: done already, shared with an earlier job, half done, or to do.
        rows: UNet rows.
        seconds: None where no rate is known.
        bytes: what it adds to the work folder and keeps.
        scratch: what it needs for a while on top.
        key: which result it is.
    """

    state: State
    rows: int = 0
    seconds: float | None = 0.0
    bytes: int = 0
    scratch: int = 0
    key: str = ""


@dataclass(frozen=True)
class JobCost:
    """A job's costs, or why nothing can be said about it."""

    job: Job
    clip: ClipSize | None = None
    latent: tuple[int, int] = (0, 0)
    stages: Mapping[StageName, StageCost] = field(default_factory=dict)
    published: int = 0
    error: str | None = None


@dataclass(frozen=True)
class Forecast:
    """A batch's costs."""

    jobs: list[JobCost]
    free: int
    guessed: bool

    @cached_property
    def bytes(self) -> int:
        """What the batch adds to the disk in the end, results included."""
        kept = sum(stage.bytes for job in self.jobs for stage in job.stages.values())
        return kept + sum(job.published for job in self.jobs)

    @cached_property
    def scratch(self) -> int:
        """The most that is needed for a while on top of it."""
        found = (stage.scratch for job in self.jobs for stage in job.stages.values())
        return max(found, default=0)

    @property
    def fits(self) -> bool:
        """Whether the disk can hold it."""
        return self.bytes + self.scratch <= self.free

    def total(self, stage: StageName) -> StageCost:
        """One stage over all jobs."""
        costs = [job.stages[stage] for job in self.jobs if stage in job.stages]
        known = [c.seconds for c in costs if c.seconds is not None]
        return StageCost(
            "to do",
            sum(c.rows for c in costs),
            sum(known) if len(known) == len(costs) else None,
            sum(c.bytes for c in costs),
            max((c.scratch for c in costs), default=0),
        )


def forecast(batch: Batch) -> Forecast:
    """The costs of what is left of a batch.

    Raises:
        ModelError: the model is not on this disk.
    """
    inputs = Inputs.of(batch, download=False)
    counting = _Counting(inputs)
    jobs = [
        counting.job(job, keys) for job, keys in zip(batch.jobs, inputs.planned_keys(), strict=True)
    ]
    counting.headers_changed()
    return Forecast(jobs, free_bytes(inputs.workspace.work), counting.guessed)


def free_bytes(path: Path) -> int:
    """Free bytes on the disk where `path` lies or will lie."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


class _Counting:
    """Adds up a batch, each result once."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs, self.workspace = inputs, inputs.workspace
        self.shape = ModelShape.of(inputs.model)
        self.measured = Measured.of(inputs.workspace)
        self.headers = FileMemory(inputs.workspace.headers)
        self.dtype = _float_dtype(inputs.batch)
        self.guessed = False
        self._new_headers = False
        self._taken: set[str] = set()
        self._sizes: dict[str, ClipSize] = {}

    def headers_changed(self) -> None:
        """Make the headers that were read last."""
        if self._new_headers:
            self.headers.save()

    def job(self, job: Job, keys: Keys | None) -> JobCost:
        """The costs of one job that no earlier one has."""
        if keys is None:
            return JobCost(job, error=f"{job.video}: no such file, or it can't be read")
        s = job.settings
        try:
            clip = self._clip(job, keys)
            size = (clip.width, clip.height)
            working = plan_geometry(size, s.resolution, Fit(s.fit), self.shape.multiple).working
        except TokenflowBatchError as error:
            return JobCost(job, error=error.message)
        except ValueError as error:
            return JobCost(job, error=f"{job.video}: {error} ({job.where})")
        output = size if s.restore_size else working
        frame_shape = self.shape.frame_shape(working)
        pixels = output[0] * output[1] / self.shape.vae_factor**2
        counted = _Job(self, job, clip, frame_shape, pixels)
        stages = {stage: self._stage(counted, stage, keys) for stage in STAGES}
        published = sum(stages[stage].bytes for stage in ("render", "report"))
        return JobCost(job, clip, frame_shape[1:], stages, published)

    def _stage(self, counted: _Job, stage: StageName, keys: Keys) -> StageCost:
        key = keys[stage].key
        if key in self._taken:
            return StageCost("shared", key=key)
        self._taken.add(key)
        folder = StageFolder(self.workspace.stage(stage, key), stage, key)
        now = stage_status(folder)
        if now.state == "done":
            return StageCost("done", key=key)
        cost = counted.cost(stage, keys)
        if not now.units:
            return StageCost("to do", *cost, key)
        work, seconds, kept, scratch = cost
        there = folder.totals().get("rows", 0)
        left = 1 - there / work if work else 1.0
        return StageCost(
            "begun",
            round(work * left),
            None if seconds is None else seconds * left,
            max(kept - stored_bytes(folder), 0),
            scratch,
            key,
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


@dataclass(frozen=True)
class _Job:
    """One job's costs as if nothing were there."""

    counting: _Counting
    job: Job
    clip: ClipSize
    frame_shape: tuple[int, int, int]
    pixels: float

    def cost(self, stage: StageName, keys: Keys) -> tuple[int, float | None, int, int]:
        """Rows, seconds, bytes kept, bytes for a while."""
        work = self._rows.get(stage, 0)
        kept, scratch = getattr(self, f"_{stage}")()
        seconds = self._seconds(stage, work, keys)
        return work, seconds, kept, scratch

    @cached_property
    def _rows(self) -> Mapping[StageName, int]:
        return _rows(_counted(self.job.settings), self.clip.frames, self.clip.cuts)

    def _seconds(self, stage: StageName, work: int, keys: Keys) -> float | None:
        described = keys["encode" if stage in ("encode", "render", "report") else "invert"]
        model = described.described["vae" if described.stage == "encode" else "model"]
        amount = work if stage in ("invert", "match", "edit") else self.clip.frames
        area = self.frame_shape[1] * self.frame_shape[2]
        rate = self.counting.measured.seconds.get((stage, model, area))
        if not amount:
            return 0.0
        return None if rate is None else rate * amount

    @property
    def _grid(self) -> tuple[int, int]:
        return self.clip.frames, self.job.settings.chunk_frames

    @property
    def _chunks(self) -> int:
        return -(-self.clip.frames // self.job.settings.chunk_frames)

    def _encode(self) -> tuple[int, int]:
        (spec,) = encode_arrays(*self._grid, self.frame_shape, self.counting.dtype).values()
        stamps = 128 + 8 * self.clip.frames  # pts.npy
        return spec.stored_bytes() + stamps + _records(self._chunks) + 2 * RECORD, 0

    def _invert(self) -> tuple[int, int]:
        s = self.job.settings
        specs = invert_arrays(
            s.inversion_steps, *self._grid, self.frame_shape, self.counting.dtype
        ).values()
        kept = s.steps + (s.inversion_steps > s.steps)  # and the noisiest
        step = sum(spec.stored_bytes(1) for spec in specs)
        records = _records(s.inversion_steps * self._chunks, 2)
        return kept * step + records, 2 * step if s.inversion_steps > s.steps else 0

    def _match(self) -> tuple[int, int]:
        s, job = self.job.settings, self.job
        if not MODES[s.mode].stored_source:
            return STAGE_FILES, 0
        shape, hw = self.counting.shape, self.frame_shape[1:]
        conv = shape.conv_shape(hw, s.conv_site)
        specs = match_arrays(s.steps, *self._grid, shape.tokens(hw), conv, job.stored_conv_steps)
        total = 0
        for name, spec in specs.items():
            ratio = self.counting.measured.ratio.get(name) if spec.compress else 1.0
            self.counting.guessed |= ratio is None
            total += spec.stored_bytes(ratio=RATIO if ratio is None else ratio)
        return total + _records(s.steps * self._chunks, len(specs)), 0

    def _edit(self) -> tuple[int, int]:
        s = self.job.settings
        layout = layout_of(s, self.clip.frames, self.clip.cuts)
        windows = (len(layout.windows), max(map(len, layout.windows)))
        history = 1 if s.sampler == "dpmsolver++" else 0
        specs = edit_arrays(s.steps, *self._grid, self.frame_shape, windows, history)
        noise = specs.pop("noise").stored_bytes(windows[0])
        state = sum(spec.stored_bytes(1) for spec in specs.values())
        steps = s.steps - s.first_step
        records = _records(steps * self._chunks, len(specs)) + steps * windows[0] * (RECORD + FILE)
        return state + records, state + noise

    def _render(self) -> tuple[int, int]:
        video = self._video("render")
        return video + _records(self._chunks), video  # segments, until they are joined

    def _report(self) -> tuple[int, int]:
        return self._video("report") + STAGE_FILES, 0

    def _video(self, stage: StageName) -> int:
        measured = self.counting.measured.pixel.get(stage)
        self.counting.guessed |= measured is None
        rate = PIXEL_BYTES[stage] if measured is None else measured
        return round(rate * self.pixels * self.clip.frames)


def _records(units: int, files: int = 1) -> int:
    return STAGE_FILES + units * (RECORD + files * FILE)


_ROW_SETTINGS = (
    *("steps", "inversion_steps", "inversion_iterations", "mode", "chunk_frames", "unet_batch"),
    *("keyframe_seed", "segment_length", "window_segments", "window_overlap", "anchors"),
    *("technique", "attn_t", "f_t", "strength"),
)


def _counted(settings: Settings) -> Settings:
    """Only what the number of UNet calls depends on, so that equal counts are made once."""
    return Settings.model_construct(**{name: getattr(settings, name) for name in _ROW_SETTINGS})


@cache
def _rows(settings: Settings, frames: int, cuts: tuple[int, ...]) -> Mapping[StageName, int]:
    return {stage: rows(calls) for stage, calls in unet_calls(settings, frames, cuts).items()}


def _float_dtype(batch: Batch) -> str:
    """How latents will be stored, as far as can be told without torch."""
    runtime = batch.runtime
    if runtime.dtype != "auto":
        return "float16" if runtime.dtype == "fp16" else "float32"
    gpu = runtime.device.startswith("cuda") or Path("/dev/nvidia0").exists()
    return "float16" if gpu and runtime.device != "cpu" else "float32"

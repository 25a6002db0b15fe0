"""One job's costs as if nothing were there: rows, seconds, bytes on disk, memory. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property

from tokenflow_batch.arrays import edit_arrays, encode_arrays, invert_arrays, match_arrays
from tokenflow_batch.config import Job, Settings, StageName
from tokenflow_batch.footprint import Peaks, largest_batches, largest_window, predicted
from tokenflow_batch.inputs import Keys
from tokenflow_batch.measured import Measured
from tokenflow_batch.model_shape import ModelShape
from tokenflow_batch.plan import layout_of, rows, unet_calls
from tokenflow_batch.tokenflow.modes import MODES

RECORD, FILE, STAGE_FILES = 170, 190, 1900
"""Bytes of a commit record, of a file's line in it, of a stage's own JSON files: as written."""
PIXEL_BYTES: Mapping[StageName, float] = {"render": 4.0, "report": 8.0}
"""Video bytes per latent pixel and frame (64 pixels) where nothing was measured: a guess."""
RATIO = 0.5
"""Compressed over plain correspondences where nothing was measured: a guess."""


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


@dataclass
class Known:
    """What the costs of all jobs rest on.

    Attributes:
        shape: the model's sizes.
        measured: on this work folder.
        dtype: of stored latents.
        guessed: whether something that was not measured has been asked for.
    """

    shape: ModelShape
    measured: Measured
    dtype: str
    guessed: bool = False

    def guess(self, value: float | None) -> None:
        """Take note of what was, or was not, measured."""
        self.guessed |= value is None


@dataclass(frozen=True)
class JobSizes:
    """One job's costs as if nothing were there.

    Attributes:
        known: what is the same for all jobs.
        job: which.
        clip: length and size.
        frame_shape: (C, h, w) of the latents.
        pixels: of a frame of the output, in latent pixels.
    """

    known: Known
    job: Job
    clip: ClipSize
    frame_shape: tuple[int, int, int]
    pixels: float

    def cost(self, stage: StageName, keys: Keys) -> tuple[int, float | None, int, int]:
        """Rows, seconds, bytes kept, bytes for a while."""
        work = self._rows.get(stage, 0)
        kept, scratch = getattr(self, f"_{stage}")()
        return work, self._seconds(stage, work, keys), kept, scratch

    def peak(self, stage: StageName, keys: Keys) -> int | None:
        """Bytes of the device at once, None where nothing is known."""
        batches = _batches(_counted(self.job.settings), self.clip.frames, self.clip.cuts)
        return predicted(self._peaks(stage, keys), stage, batches[stage] * self._area)

    def window(self, keys: Keys, budget: int) -> int | None:
        """The largest `window_segments` within so many bytes, None where there is none."""
        s = _counted(self.job.settings)
        longest = min(s.segment_length, self.clip.frames)
        return largest_window(self._peaks("edit", keys), s, longest, self._area, budget)

    def _peaks(self, stage: StageName, keys: Keys) -> Peaks:
        return self.known.measured.peaks.get(_model(stage, keys), {})

    @property
    def _area(self) -> int:
        return self.frame_shape[1] * self.frame_shape[2]

    @cached_property
    def _rows(self) -> Mapping[StageName, int]:
        return _rows(_counted(self.job.settings), self.clip.frames, self.clip.cuts)

    def _seconds(self, stage: StageName, work: int, keys: Keys) -> float | None:
        amount = work if stage in ("invert", "match", "edit") else self.clip.frames
        rate = self.known.measured.seconds.get((stage, _model(stage, keys), self._area))
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
        (spec,) = encode_arrays(*self._grid, self.frame_shape, self.known.dtype).values()
        stamps = 128 + 8 * self.clip.frames  # pts.npy
        return spec.stored_bytes() + stamps + _records(self._chunks) + 2 * RECORD, 0

    def _invert(self) -> tuple[int, int]:
        s = self.job.settings
        specs = invert_arrays(
            s.inversion_steps, *self._grid, self.frame_shape, self.known.dtype
        ).values()
        kept = s.steps + (s.inversion_steps > s.steps)  # and the noisiest
        step = sum(spec.stored_bytes(1) for spec in specs)
        records = _records(s.inversion_steps * self._chunks, 2)
        return kept * step + records, 2 * step if s.inversion_steps > s.steps else 0

    def _match(self) -> tuple[int, int]:
        s, job = self.job.settings, self.job
        if not MODES[s.mode].stored_source:
            return STAGE_FILES, 0
        shape, hw = self.known.shape, self.frame_shape[1:]
        conv = shape.conv_shape(hw, s.conv_site)
        specs = match_arrays(s.steps, *self._grid, shape.tokens(hw), conv, job.stored_conv_steps)
        total = 0
        for name, spec in specs.items():
            ratio = self.known.measured.ratio.get(name) if spec.compress else 1.0
            self.known.guess(ratio)
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
        measured = self.known.measured.pixel.get(stage)
        self.known.guess(measured)
        rate = PIXEL_BYTES[stage] if measured is None else measured
        return round(rate * self.pixels * self.clip.frames)


def _records(units: int, files: int = 1) -> int:
    return STAGE_FILES + units * (RECORD + files * FILE)


_ROW_SETTINGS = (
    *("steps", "inversion_steps", "inversion_iterations", "mode", "chunk_frames", "unet_batch"),
    *("keyframe_seed", "segment_length", "window_segments", "window_overlap", "anchors"),
    *("technique", "attn_t", "f_t", "strength", "vae_batch"),
)


def _counted(settings: Settings) -> Settings:
    """Only what the number of UNet calls depends on, so that equal counts are made once."""
    return Settings.model_construct(**{name: getattr(settings, name) for name in _ROW_SETTINGS})


@cache
def _batches(settings: Settings, frames: int, cuts: tuple[int, ...]) -> Mapping[StageName, int]:
    return largest_batches(settings, frames, cuts)


def _model(stage: StageName, keys: Keys) -> str:
    """The digest of the part of the model that a stage uses."""
    if stage in ("encode", "render", "report"):
        return str(keys["encode"].described["vae"])
    return str(keys["invert"].described["model"])


@cache
def _rows(settings: Settings, frames: int, cuts: tuple[int, ...]) -> Mapping[StageName, int]:
    return {stage: rows(calls) for stage, calls in unet_calls(settings, frames, cuts).items()}

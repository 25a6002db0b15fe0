"""One job's costs as if nothing were there: rows, seconds, bytes on disk, memory. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import Any

from tokenflow_batch.arrays import (
    Specs,
    edit_arrays,
    encode_arrays,
    invert_arrays,
    match_arrays,
)
from tokenflow_batch.config import Job, Settings
from tokenflow_batch.footprint import Peaks, largest_batches, largest_window, predicted
from tokenflow_batch.geometry import Fit, plan_geometry
from tokenflow_batch.inputs import Keys
from tokenflow_batch.measured import Measured
from tokenflow_batch.model_shape import ModelShape
from tokenflow_batch.plan import layout_of
from tokenflow_batch.row_counts import edit_flops, handed_rows, partial_row_count, row_counts
from tokenflow_batch.stage_names import StageName
from tokenflow_batch.tokenflow.modes import MODES

RECORD, FILE, STAGE_FILES = 200, 120, 3700
"""Bytes of a commit record, of a file's line in it, of a stage's own JSON files: as written."""
COUNTED = 140
"""Bytes of what the record of a unit that the model worked on says of that (rows, seconds)."""
PIXEL_BYTES: Mapping[StageName, float] = {"render": 2.0, "report": 3.0}
"""Video bytes per latent pixel and frame (64 pixels) where nothing was measured: a guess."""
SHEET, FIGURES = 420_000, 4400
"""Bytes of a contact sheet where none was made, a guess; of the metrics, as written."""
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
class Figures:
    """What a stage of a job costs.

    Attributes:
        rows: UNet rows, but for partial ones.
        seconds: None where no rate is known.
        bytes: what it adds to the work folder and keeps.
        scratch: bytes that it needs for a while on top.
        peak: the most bytes of its device that it takes at once; None where nothing is known.
        partial_rows: rows that leave the UNet early, after the convolution whose features they are
            for.
        flops: floating-point operations of the UNet.
    """

    rows: int = 0
    seconds: float | None = 0.0
    bytes: int = 0
    scratch: int = 0
    peak: int | None = 0
    partial_rows: int = 0
    flops: int = 0


@dataclass(frozen=True)
class JobSizes:
    """A job's costs as if nothing were there: the same for all jobs that `alike` can't tell apart.

    Attributes:
        known: what is the same for all jobs.
        settings: of the job.
        stored_conv_steps: of how many steps `match` keeps convolution features in 16 bits, and in
            8.
        clip: length and size.
        working: (width, height) in pixels.
    """

    known: Known
    settings: Settings
    stored_conv_steps: tuple[int, int]
    clip: ClipSize
    working: tuple[int, int]

    @classmethod
    def of(cls, known: Known, job: Job, clip: ClipSize) -> JobSizes:
        """Of a job.

        Raises:
            ValueError: the clip can't be brought to the wanted resolution.
        """
        s, size = job.settings, (clip.width, clip.height)
        working = plan_geometry(size, s.resolution, Fit(s.fit), known.shape.multiple).working
        return cls(known, s, _stored(job), clip, working)

    def figures(self, stage: StageName, keys: Keys, handed: float, *, beside: bool) -> Figures:
        """A stage's, for all jobs of a batch that are alike counted once.

        Args:
            stage: which.
            keys: of the job.
            handed: the share of `match` that `invert` is still to do on its way.
            beside: whether several edits of the clip go side by side.
        """
        which = stage, handed, beside
        if which not in self._figures:
            self._figures[which] = self._count(stage, keys, handed, beside=beside)
        return self._figures[which]

    def _count(self, stage: StageName, keys: Keys, handed: float, *, beside: bool) -> Figures:
        rows, partial = self._rows_of(stage, handed), self._partial if stage == "edit" else 0
        kept, scratch = getattr(self, f"_{stage}")()
        seconds = self._seconds(stage, rows + partial * self._partial_share, keys)
        flops = self._edit_flops if stage == "edit" else rows * self._flops()
        peak = self._peak(stage, keys, beside=beside)
        return Figures(rows, seconds, kept, scratch, peak, partial, flops)

    def _rows_of(self, stage: StageName, handed: float) -> int:
        rows = self._rows.get(stage, 0)
        if stage == "match" and handed < 1:
            rows += round((1 - handed) * handed_rows(self.settings, self.clip.frames))
        return rows

    def _peak(self, stage: StageName, keys: Keys, *, beside: bool) -> int | None:
        peaks = self._peaks(stage, keys)
        peak = predicted(peaks, stage, self._batches[stage] * self._area)
        on_host = any(p.device == "cpu" for p in peaks.get(stage, ()))
        held = self.held_beside if beside and on_host and stage == "edit" else 0
        return None if peak is None else peak + held

    @property
    def held_beside(self) -> int:
        """Bytes of the host that edits side by side hold at most: a window's reads of the source.

        What is stored of its frames, its keyframes and its anchors, as it is stored.
        """
        layout = layout_of(self.settings, self.clip.frames, self.clip.cuts)
        once = max(len(w) + len(w.segments) for w in layout.windows) + len(layout.anchors)
        (clean,) = encode_arrays(*self._grid, self._frame_shape, self.known.dtype).values()
        specs = (clean, *self._matched.values())
        return once * sum(spec.frame_bytes for spec in specs)

    def window(self, keys: Keys, budget: int) -> int | None:
        """The largest `window_segments` within so many bytes, None where there is none."""
        s = self.settings
        longest = min(s.segment_length, self.clip.frames)
        return largest_window(self._peaks("edit", keys), s, longest, self._area, budget)

    def _peaks(self, stage: StageName, keys: Keys) -> Peaks:
        found = self.known.measured.peaks.get(_model(stage, keys), {})
        # Passes as large as `invert`'s, which mostly makes them for both.
        return found if found.get("match") else {**found, "match": found.get("invert", ())}

    @cached_property
    def _frame_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the latents."""
        return self.known.shape.frame_shape(self.working)

    @cached_property
    def _pixels(self) -> float:
        """Of a frame of the output, in latent pixels."""
        whole = self.settings.restore_size
        width, height = (self.clip.width, self.clip.height) if whole else self.working
        return width * height / self.known.shape.vae_factor**2

    @property
    def _area(self) -> int:
        return self._frame_shape[1] * self._frame_shape[2]

    @cached_property
    def _figures(self) -> dict[tuple[StageName, float, bool], Figures]:
        """As far as asked for."""
        return {}

    @cached_property
    def _rows(self) -> Mapping[StageName, int]:
        return row_counts(self.settings, self.clip.frames, self.clip.cuts)

    @cached_property
    def _batches(self) -> Mapping[StageName, int]:
        return largest_batches(self.settings, self.clip.frames, self.clip.cuts)

    @cached_property
    def _edit_flops(self) -> int:
        clip, (_, height, width) = self.clip, self._frame_shape
        flops = self.known.shape.flops
        return edit_flops(self.settings, clip.frames, clip.cuts, flops, (height, width))

    @cached_property
    def _partial(self) -> int:
        return partial_row_count(self.settings, self.clip.frames, self.clip.cuts)

    @property
    def _partial_share(self) -> float:
        return self._flops(self.settings.conv_site) / self._flops() if self._partial else 0.0

    def _flops(self, site: str | None = None) -> int:
        height, width = self._frame_shape[1:]
        return self.known.shape.flops.row((height, width), site)

    def _seconds(self, stage: StageName, work: float, keys: Keys) -> float | None:
        amount = work if stage in ("invert", "match", "edit") else self.clip.frames
        if not amount:
            return 0.0
        seconds, which = self.known.measured.seconds, (_model(stage, keys), self._area)
        rate = seconds.get((stage, *which))
        if stage == "match" and rate is None:  # nearly all of it was done on the way of the other
            rate = seconds.get(("invert", *which))
        return None if rate is None else rate * amount

    @property
    def _grid(self) -> tuple[int, int]:
        return self.clip.frames, self.settings.chunk_frames

    @property
    def chunks(self) -> int:
        """Chunks of the clip."""
        return -(-self.clip.frames // self.settings.chunk_frames)

    def _encode(self) -> tuple[int, int]:
        (spec,) = encode_arrays(*self._grid, self._frame_shape, self.known.dtype).values()
        stamps = 128 + 8 * self.clip.frames  # pts.npy
        return spec.stored_bytes() + stamps + _records(self.chunks) + 2 * RECORD, 0

    def _invert(self) -> tuple[int, int]:
        s = self.settings
        specs = invert_arrays(
            s.inversion_steps, *self._grid, self._frame_shape, self.known.dtype
        ).values()
        kept = s.steps + (s.inversion_steps > s.steps)  # and the noisiest
        step = sum(spec.stored_bytes(1) for spec in specs)
        records = _records(s.inversion_steps * self.chunks, 2)
        return kept * step + records, 2 * step if s.inversion_steps > s.steps else 0

    def _match(self) -> tuple[int, int]:
        s, specs = self.settings, self._matched
        if not specs:
            return STAGE_FILES, 0
        total = 0
        for name, spec in specs.items():
            ratio = self.known.measured.ratio.get(name) if spec.compress else 1.0
            self.known.guess(ratio)
            total += spec.stored_bytes(ratio=RATIO if ratio is None else ratio)
        return total + _records(s.steps * self.chunks, len(specs)), 0

    @property
    def _matched(self) -> Specs:
        """What `match` stores."""
        s = self.settings
        if not MODES[s.mode].stored_source:
            return {}
        shape, hw = self.known.shape, self._frame_shape[1:]
        conv = shape.conv_shape(hw, s.conv_site)
        grid = (s.steps, *self._grid)
        return match_arrays(*grid, shape.tokens(hw), conv, *self.stored_conv_steps)

    def _edit(self) -> tuple[int, int]:
        s = self.settings
        layout = layout_of(s, self.clip.frames, self.clip.cuts)
        windows = (len(layout.windows), max(map(len, layout.windows)))
        history = 1 if s.sampler == "dpmsolver++" else 0
        specs = edit_arrays(s.steps, *self._grid, self._frame_shape, windows, history)
        noise = specs.pop("noise").stored_bytes(windows[0])
        state = sum(spec.stored_bytes(1) for spec in specs.values())
        steps = s.steps - s.first_step
        records = _records(steps * windows[0])
        records += steps * self.chunks * (RECORD + len(specs) * FILE)  # where latents advance
        return state + records, state + noise

    def _render(self) -> tuple[int, int]:
        video = self._video("render")
        return video + _records(self.chunks), video  # segments, until they are joined

    def _report(self) -> tuple[int, int]:
        sheet = self.known.measured.sheet
        self.known.guess(sheet)
        sheets = SHEET if sheet is None else round(sheet)
        return self._video("report") + sheets + FIGURES + STAGE_FILES, 0

    def _video(self, stage: StageName) -> int:
        measured = self.known.measured.pixel.get(stage)
        self.known.guess(measured)
        rate = PIXEL_BYTES[stage] if measured is None else measured
        return round(rate * self._pixels * self.clip.frames)


def _records(units: int, files: int = 1) -> int:
    return STAGE_FILES + units * (RECORD + COUNTED + files * FILE)


_COUNTED = attrgetter(
    *("steps", "inversion_steps", "inversion_iterations", "mode", "chunk_frames", "unet_batch"),
    *("keyframe_seed", "segment_length", "window_segments", "window_overlap", "anchors"),
    *(
        "technique",
        "attn_t",
        "f_t",
        "guidance_scale",
        "guidance_interval",
        "guidance_focus",
        "strength",
        "vae_batch",
        "sampler",
        "conv_site",
        "conv_features",
    ),
    *("resolution", "fit", "restore_size"),
)
"""All settings that costs depend on, but for `cuts`, which a clip's size has."""


def alike(job: Job, clip: ClipSize) -> tuple[Any, ...]:
    """What a job's costs follow from: jobs with equal values cost the same."""
    return _COUNTED(job.settings), _stored(job), clip


def _stored(job: Job) -> tuple[int, int]:
    return job.stored_conv_steps, job.stored_conv8_steps


def _model(stage: StageName, keys: Keys) -> str:
    """The digest of the part of the model that a stage uses."""
    if stage in ("encode", "render", "report"):
        return str(keys["encode"].described["vae"])
    return str(keys["invert"].described["model"])

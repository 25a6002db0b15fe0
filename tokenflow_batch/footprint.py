"""Peak memory of stages: what runs have measured, and a straight line through it.

A stage's peak is a fixed part (libraries, weights) and one that grows with the largest batch that
goes through the model at once, counted in rows times latent pixels. Torch-free.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tokenflow_batch.config import Settings
from tokenflow_batch.plan import branches_at, guidance_of
from tokenflow_batch.stage_names import STAGES, StageName
from tokenflow_batch.tokenflow.keyframes import segments


@dataclass(frozen=True)
class Peak:
    """What one run of a stage took.

    Attributes:
        batch: rows times latent pixels of the largest batch.
        peak: bytes.
        base: bytes that were taken when the stage began.
        device: `cpu` or `cuda`: whose memory.
        device_bytes: how much it has.
    """

    batch: int
    peak: int
    base: int
    device: str
    device_bytes: int


Peaks = Mapping[StageName, Sequence[Peak]]
"""Measured with one model on one kind of device."""


def largest_batches(s: Settings, frames: int, cuts: Sequence[int] = ()) -> dict[StageName, int]:
    """Rows of each stage's largest batch.

    Args:
        s: of the job.
        frames: F.
        cuts: first frames of new shots.
    """
    coded, plain = min(s.vae_batch, frames), min(s.unet_batch, s.chunk_frames, frames)
    count = len(segments(frames, s.segment_length, cuts))
    edit = edit_batch(s, count, min(s.segment_length, frames))
    return {
        "encode": coded,
        "invert": plain,
        "match": plain,
        "edit": edit,
        "render": coded,
        "report": 1,
    }


def edit_batch(s: Settings, count: int, longest: int) -> int:
    """Rows of the largest batch of an edit of so many segments, the longest of so many frames."""
    together = count if count <= s.window_segments else s.window_segments + s.anchors
    guidance = guidance_of(s)
    # After each of these, branches only get fewer.
    last = max(guidance.first, guidance.focus, guidance.own)
    steps = {max(s.first_step, step) for step in (0, guidance.first, last)}
    rows = (branches_at(s, step) for step in steps if step < s.steps)
    return max(max(joint * together, spread * longest) for joint, spread in rows)


def predicted(peaks: Peaks, stage: StageName, batch: int) -> int | None:
    """Peak bytes of a stage for a largest batch, None where nothing is known of it.

    Args:
        peaks: what was measured.
        stage: which.
        batch: rows times latent pixels.
    """
    found = peaks.get(stage, ())
    if not found:
        return None
    if len({p.batch for p in found}) > 1:
        slope, fixed = _line([(p.batch, p.peak) for p in found])
        return round(fixed + slope * batch)
    # One size only: the model is in memory when the second stage begins, not before.
    largest = max(found, key=lambda p: p.peak)
    loaded = max((p.base for of in STAGES for p in peaks.get(of, ())), default=0)
    base = min(max(largest.base, loaded), largest.peak)
    return round(base + (largest.peak - base) * batch / largest.batch)


def _line(points: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """Slope and fixed part of the least squares line; more batch never takes less memory."""
    n = len(points)
    mean_x, mean_y = sum(x for x, _ in points) / n, sum(y for _, y in points) / n
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    if slope <= 0:
        return 0.0, float(max(y for _, y in points))
    return slope, mean_y - slope * mean_x


def largest_window(peaks: Peaks, s: Settings, longest: int, area: int, budget: int) -> int | None:
    """The most segments, so keyframes, of a window whose edit stays within `budget` bytes.

    Args:
        peaks: what was measured.
        s: of the job; its window_segments doesn't count.
        longest: frames of the longest segment.
        area: latent pixels of a frame.
        budget: bytes.

    Returns:
        At most 4096; None where not even two segments fit, or nothing is known.
    """

    def fits(size: int) -> bool:
        wanted = s.model_copy(update={"window_segments": size})
        peak = predicted(peaks, "edit", edit_batch(wanted, size + 1, longest) * area)
        return peak is not None and peak <= budget

    low, high = 1, 4096
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low if low >= 2 else None


def host_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

"""What can be measured of an edited video, streaming: pure functions of frames.

Frames are uint8 (H, W, 3) RGB; flow is float32 (H, W, 2), pixels, x then y.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.typing import NDArray

Frame = NDArray[np.uint8]
Flow = NDArray[np.float32]

_AXES = ((1, 0), (0, 1))
_CONSISTENT = 1.0
"""Pixels by which forward and backward flow may disagree before a pixel counts as occluded."""


def psnr(first: Frame, second: Frame, mask: NDArray[np.bool_] | None = None) -> float:
    """Peak signal-to-noise ratio in dB, over the pixels in `mask` (H, W) if one is given."""
    gap = first.astype(np.float64) - second.astype(np.float64)
    if mask is not None:
        gap = gap[mask]
    mse = float(np.mean(gap**2)) if gap.size else float("nan")
    return float("inf") if mse == 0 else 10 * float(np.log10(255**2 / mse))


def warp(frame: NDArray[np.generic], flow: Flow) -> NDArray[np.float32]:
    """Pull `frame` back along `flow`: out[p] = frame[p + flow[p]], bilinear, edges repeated."""
    height, width = flow.shape[:2]
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    warped: NDArray[np.float32] = cv2.remap(
        frame.astype(np.float32),
        x + flow[..., 0],
        y + flow[..., 1],
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REPLICATE,
    )
    return warped


class OpticalFlow:
    """DIS optical flow with a forward-backward check (Kroeger et al. 2016, by OpenCV)."""

    def __init__(self) -> None:
        self._dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)

    def __call__(self, first: Frame, second: Frame) -> tuple[Flow, NDArray[np.bool_]]:
        """Flow from `first` to `second`, and where it can be trusted (seen in both frames)."""
        a, b = (cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) for f in (first, second))
        forward: Flow = self._dis.calc(a, b, None)
        backward: Flow = self._dis.calc(b, a, None)
        gap = np.linalg.norm(forward + warp(backward, forward), axis=-1)
        height, width = a.shape
        x, y = np.meshgrid(np.arange(width), np.arange(height))
        to_x, to_y = x + forward[..., 0], y + forward[..., 1]
        inside = (to_x >= 0) & (to_x <= width - 1) & (to_y >= 0) & (to_y <= height - 1)
        return forward, (gap < _CONSISTENT) & inside


def warp_error(first: Frame, second: Frame, flow: Flow, visible: NDArray[np.bool_]) -> float:
    """Mean squared RGB difference, in [0, 1]², of flow-aligned frames where `visible`.

    The TokenFlow paper's measure of consistency (§5.1), which it quotes in units of 10⁻³.
    NaN where nothing is visible.
    """
    gap = (warp(second, flow) - first.astype(np.float32)) / 255.0
    return float(np.mean(gap[visible] ** 2)) if visible.any() else float("nan")


@dataclass
class Running:
    """A mean that takes numbers one at a time and leaves NaN out."""

    total: float = 0.0
    count: int = 0
    largest: float = field(default=float("-inf"))

    def add(self, value: float) -> None:
        """Take one number."""
        if not np.isnan(value):
            self.total += value
            self.count += 1
            self.largest = max(self.largest, value)

    @property
    def mean(self) -> float | None:
        """The mean so far, None without numbers."""
        return self.total / self.count if self.count else None


def paired(frames: Iterable[tuple[Frame, Frame]]) -> Iterator[tuple[tuple[Frame, Frame], ...]]:
    """Consecutive (source, edited) pairs: ((s₀, e₀), (s₁, e₁)), ((s₁, e₁), (s₂, e₂)), …"""
    previous: tuple[Frame, Frame] | None = None
    for pair in frames:
        if previous is not None:
            yield previous, pair
        previous = pair


@dataclass
class Consistency:
    """Warp errors of a source and its edit along the source's optical flow."""

    source: Running = field(default_factory=Running)
    edited: Running = field(default_factory=Running)

    @classmethod
    def of(cls, frames: Iterable[tuple[Frame, Frame]]) -> Consistency:
        """Measure a stream of (source, edited) frames of equal size; two frames are held."""
        flow, found = OpticalFlow(), cls()
        for (source, edited), (next_source, next_edited) in paired(frames):
            along, visible = flow(source, next_source)
            found.source.add(warp_error(source, next_source, along, visible))
            found.edited.add(warp_error(edited, next_edited, along, visible))
        return found


def look(frame: Frame, mask: NDArray[np.bool_] | None = None) -> NDArray[np.float32]:
    """What a frame looks like as a whole, over the pixels in `mask` (H, W) if one is given.

    Returns:
        (4,) float32: mean CIELAB (L* from 0 to 100, a*, b*), and texture, the mean magnitude of
        the gradient of L* per pixel. NaN where the mask is empty.
    """
    lab = cv2.cvtColor(frame.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    along_x, along_y = (cv2.Sobel(lab[..., 0], cv2.CV_32F, *d, scale=1 / 8) for d in _AXES)
    parts = np.dstack([lab, np.hypot(along_x, along_y)])
    chosen = parts.reshape(-1, 4) if mask is None else parts[mask]
    if not len(chosen):
        return np.full(4, np.nan, np.float32)
    mean: NDArray[np.float32] = chosen.mean(axis=0, dtype=np.float64).astype(np.float32)
    return mean


@dataclass(frozen=True)
class Seams:
    """How much more a video changes across joins than elsewhere, over the same distance.

    Attributes:
        across: mean change over pairs of frames on both sides of a join.
        elsewhere: the same, of pairs with no join between them.
        ratio: across / elsewhere; 1 is invisible.
        low: lower end of its 95 % bootstrap interval over pairs.
        high: upper end.
    """

    across: float
    elsewhere: float
    ratio: float
    low: float
    high: float

    @classmethod
    def of(cls, change: NDArray[np.floating], gap: int, joins: Sequence[int]) -> Seams | None:
        """Compare a video's changes.

        Args:
            change: change from frame t to t + gap, (F - gap,); NaN where it means nothing, such
                as across a shot cut.
            gap: frames between the two.
            joins: where one piece of the video ends and the next begins: first frames of the
                latter.

        Returns:
            None if there is no pair of either kind.
        """
        known = ~np.isnan(change)
        starts = np.arange(len(change))
        near = np.zeros(len(change), bool)
        for join in joins:
            near |= (starts < join) & (join <= starts + gap)
        first, second = change[near & known], change[~near & known]
        if not len(first) or not len(second):
            return None
        rng = np.random.default_rng(0)
        drawn = [_bootstrapped(values, rng) for values in (first, second)]
        low, high = np.quantile(drawn[0] / np.maximum(drawn[1], 1e-12), (0.025, 0.975))
        across, elsewhere = float(first.mean()), float(second.mean())
        return cls(across, elsewhere, across / max(elsewhere, 1e-12), float(low), float(high))


def _bootstrapped(
    values: NDArray[np.floating], rng: np.random.Generator, draws: int = 2000
) -> NDArray[np.float64]:
    """Means of resampled values; a few at a time, so that long videos need no more memory."""
    size = len(values)
    return np.array([values[rng.integers(size, size=size)].mean() for _ in range(draws)])


@dataclass
class Looks:
    """The looks of all frames of a video: 16 bytes a frame."""

    values: array[float] = field(default_factory=lambda: array("f"))

    def add(self, frame: Frame, mask: NDArray[np.bool_] | None = None) -> None:
        """Take one frame."""
        self.values.frombytes(look(frame, mask).tobytes())

    def _looks(self) -> NDArray[np.float64]:
        """(F, 4)."""
        return np.array(self.values, np.float64).reshape(-1, 4)

    def changes(
        self, gap: int, cuts: Sequence[int] = ()
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Change of colour (CIE76 ΔE) and of texture over `gap` frames, (F - gap,) each.

        NaN where a shot cut (first frame of a shot) lies between the two.
        """
        looks = self._looks()
        delta = looks[gap:] - looks[: max(0, len(looks) - gap)]
        starts = np.arange(len(delta))
        for cut in cuts:
            delta[(starts < cut) & (cut <= starts + gap)] = np.nan
        return np.linalg.norm(delta[:, :3], axis=1), np.abs(delta[:, 3])

    def drift(self, frames: int) -> tuple[float, float]:
        """Change of colour (ΔE) and of texture from the first so many frames to the last."""
        looks = self._looks()
        delta = np.nanmean(looks[-frames:], axis=0) - np.nanmean(looks[:frames], axis=0)
        return float(np.linalg.norm(delta[:3])), float(abs(delta[3]))

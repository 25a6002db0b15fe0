"""What can be measured of an edited video, streaming: pure functions of frames.

Frames are uint8 (H, W, 3) RGB; flow is float32 (H, W, 2), pixels, x then y.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.typing import NDArray

Frame = NDArray[np.uint8]
Flow = NDArray[np.float32]

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

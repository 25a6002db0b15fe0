"""Segments of consecutive frames, the keyframe drawn in each, and who looks at whom.

Plain Python on purpose: planning uses it without torch.
"""

from __future__ import annotations

import hashlib
import math
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Final

_ANCHORS: Final = -1
"""In place of a segment where anchors are drawn."""


@dataclass(frozen=True)
class Segment:
    """Frames `start` ≤ i < `stop` that share one keyframe."""

    index: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def segments(frames: int, length: int, cuts: Sequence[int] = ()) -> list[Segment]:
    """Cut `frames` into segments of `length`; no frame is dropped.

    Args:
        frames: F.
        length: B.
        cuts: first frames of all shots but the first, ascending. A segment lies within one shot;
            the last one of each may be shorter.

    Raises:
        ValueError: `frames` or `length` is below 1, or a cut is not inside the clip.
    """
    if frames < 1 or length < 1:
        raise ValueError(f"segments need frames ≥ 1 and length ≥ 1, got {frames} and {length}")
    borders = [0, *cuts, frames]
    if any(a >= b for a, b in pairwise(borders)):
        raise ValueError(f"cuts {list(cuts)} must ascend between 1 and {frames - 1}")
    if not cuts:
        whole = frames // length
        rest = [Segment(whole, whole * length, frames)] if frames % length else []
        return [*_whole_segments(length, 1 << whole.bit_length())[:whole], *rest]
    starts = [
        (s, min(s + length, stop))
        for start, stop in pairwise(borders)
        for s in range(start, stop, length)
    ]
    return [Segment(b, start, stop) for b, (start, stop) in enumerate(starts)]


@lru_cache(maxsize=64)  # most clips have no cuts, and plans are of thousands
def _whole_segments(length: int, count: int) -> tuple[Segment, ...]:
    return tuple(Segment(b, b * length, (b + 1) * length) for b in range(count))


def draw_keyframe(seed: int, step: int, segment: Segment) -> int:
    """The keyframe of `segment` at sampling step `step`: uniform over its frames.

    A pure function of (seed, step, segment), never of call order, library version or platform.
    """
    return segment.start + _draw(seed, step, segment.index, len(segment))


def draw_anchors(seed: int, step: int, segments: int, count: int) -> list[int]:
    """The segments whose keyframes all windows of a long clip attend to at a sampling step.

    Evenly over the clip from one on that is drawn: others at every step, so that in the course of
    the steps every window sees all of the clip. A pure function of its arguments.

    Args:
        seed: as for keyframes.
        step: sampling step.
        segments: how many the clip has.
        count: how many to choose.

    Returns:
        min(count, segments) different indices, ascending.
    """
    count = min(count, segments)
    first = _draw(seed, step, _ANCHORS, segments)
    return sorted((first + i * segments // count) % segments for i in range(count))


def _draw(seed: int, step: int, what: int, count: int) -> int:
    """Uniform in [0, count): 64 bits of BLAKE2b, scaled (bias below 2⁻⁵⁰)."""
    message = struct.pack("<qqq", seed, step, what)
    raw = int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "little")
    return (raw * count) >> 64


def draw_keyframes(seed: int, step: int, segs: Sequence[Segment]) -> list[int]:
    """One keyframe per segment, ascending (paper §4.1: drawn anew at every step)."""
    return [draw_keyframe(seed, step, segment) for segment in segs]


@dataclass(frozen=True)
class Neighbours:
    """Which two keyframes a frame looks at, and how much each counts.

    `first` and `second` are positions in the keyframe list; the propagated token is
    `weight · first + (1 − weight) · second`. `itself`: the frame is that keyframe.
    """

    first: int
    second: int
    weight: float
    itself: bool = False


NeighbourRule = Callable[[int, Sequence[int], int, Sequence[int]], Neighbours]
"""(frame, keyframes, segment length, cuts) → Neighbours."""


def true_neighbours(
    frame: int,
    keyframes: Sequence[int],
    length: int,  # noqa: ARG001
    cuts: Sequence[int] = (),
) -> Neighbours:
    """The nearest keyframes on both sides, k⁻ ≤ i ≤ k⁺, weighted by the true distances.

    Weights are linear, so that a keyframe takes itself alone and the hand-over is continuous.
    Before the first and after the last keyframe of its shot a frame has one neighbour, with
    weight 1.
    """
    after = bisect_left(keyframes, frame)
    before = bisect_right(keyframes, frame) - 1
    shot = bisect_right(cuts, frame)
    has_after = after < len(keyframes) and bisect_right(cuts, keyframes[after]) == shot
    has_before = before >= 0 and bisect_right(cuts, keyframes[before]) == shot
    if not (has_before and has_after):
        only = before if has_before else after
        return Neighbours(only, only, 1.0)
    if before == after:
        return Neighbours(before, before, 1.0, itself=True)
    gap = keyframes[after] - keyframes[before]
    return Neighbours(before, after, (keyframes[after] - frame) / gap)


def published_neighbours(
    frame: int,
    keyframes: Sequence[int],
    length: int,
    cuts: Sequence[int] = (),  # noqa: ARG001 - it knows nothing of shots
) -> Neighbours:
    """What the published code does: the own segment's and the previous one's keyframe.

    Weights come from distances to the segments' centres, through a sigmoid, so they stay
    within [0.62, 0.73] for the own keyframe; the first segment sees its own keyframe only.
    """
    own = min(frame // length, len(keyframes) - 1)
    if own == 0:
        return Neighbours(0, 0, 1.0)
    centre = own * length + length // 2
    d_own, d_previous = abs(frame - centre), abs(frame - (centre - length))
    weight = 1.0 / (1.0 + math.exp(-d_previous / (d_own + d_previous)))
    return Neighbours(own, own - 1, weight)

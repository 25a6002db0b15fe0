"""How a clip is cut for the edit: windows of segments, and the fixed grid of chunks.

A *window* is what one joint keyframe edit covers; its noise predictions are one unit of work.
A *chunk* is a run of frames written at once by every other unit (encode, invert, match, advance,
render). Neither depends on what has been computed before, so any order gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenflow_batch.tokenflow.keyframes import Segment, segments


@dataclass(frozen=True)
class Chunk:
    """Frames `start` ≤ i < `stop`: one shard of every stored array."""

    index: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def frames(self) -> range:
        """The frame indices."""
        return range(self.start, self.stop)


def chunks(frames: int, length: int) -> list[Chunk]:
    """The fixed grid of `length` frames over the clip; the last chunk may be shorter."""
    return [Chunk(s.index, s.start, s.stop) for s in segments(frames, length)]


def batches(items: Sequence[int], size: int) -> list[Sequence[int]]:
    """Cut `items` into runs of `size`, in order: the batch composition that decides bits."""
    return [items[i : i + size] for i in range(0, len(items), size)]


@dataclass(frozen=True)
class Window:
    """Consecutive segments edited jointly."""

    index: int
    segments: tuple[Segment, ...]

    @property
    def start(self) -> int:
        """First frame."""
        return self.segments[0].start

    @property
    def stop(self) -> int:
        """One past the last frame."""
        return self.segments[-1].stop

    def __len__(self) -> int:
        return self.stop - self.start


def plan_windows(frames: int, segment_length: int, cuts: Sequence[int] = ()) -> list[Window]:
    """The clip's windows, in order: for now one over the whole clip, as published."""
    return [Window(0, tuple(segments(frames, segment_length, cuts)))]


def covering(windows: Sequence[Window], chunk: Chunk) -> list[Window]:
    """The windows that hold predictions for some frame of `chunk`, in window order."""
    return [w for w in windows if w.start < chunk.stop and chunk.start < w.stop]

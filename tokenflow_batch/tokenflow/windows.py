"""How a clip is cut for the edit: overlapping windows of segments, and the fixed grid of chunks.

A *window* is what one joint keyframe edit covers; its noise predictions are one unit of work.
A *chunk* is a run of frames written at once by every other unit (encode, invert, match, advance,
render). Neither depends on what has been computed before, so any order gives the same bits.

Neighbouring windows share segments. Within those a frame belongs to a window if both keyframes
that it looks at are the window's; where it belongs to two, their predictions are blended by a ramp.
A few *anchors*, keyframes spread over the clip, others at every step, are attended to by every
window, so that windows far apart agree on what things look like. Each stands for all keyframes that
are nearer to it than to the others, and weighs as much as those that a window doesn't have: so
every window attends, as nearly as it can, to the keyframes of the whole clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Final, TypeVar

from tokenflow_batch.tokenflow.keyframes import (
    NeighbourRule,
    Neighbours,
    Segment,
    draw_anchors,
    segments,
)

T = TypeVar("T")


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


def batches(items: Sequence[T], size: int) -> list[Sequence[T]]:
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


@dataclass(frozen=True)
class Layout:
    """How a clip is cut into windows; of a step once its anchors are drawn (`at`).

    Attributes:
        frames: F.
        length: B, the longest segment.
        cuts: first frames of all shots but the first.
        segments: of the whole clip, in order.
        windows: over the segments, in order; one if the clip is no longer than a window.
        anchors: the segments whose keyframes every window attends to, ascending; none if there is
            one window. Fixed ones until those of a step are drawn.
    """

    frames: int
    length: int
    cuts: tuple[int, ...]
    segments: tuple[Segment, ...]
    windows: tuple[Window, ...]
    anchors: tuple[int, ...]

    @classmethod
    def plan(
        cls,
        frames: int,
        length: int,
        cuts: Sequence[int] = (),
        *,
        size: int = 16,
        overlap: int = 2,
        anchors: int = 4,
    ) -> Layout:
        """Cut a clip.

        Args:
            frames: F.
            length: B.
            cuts: first frames of all shots but the first.
            size: K_w, segments per window.
            overlap: O, segments that neighbouring windows share: at least one, as a frame
                between the last keyframe of one window and the first of the next needs both.
            anchors: how many keyframes every window attends to.

        Raises:
            ValueError: a number is out of range; `overlap` is at most half of `size`.
        """
        if not 1 <= overlap <= size // 2 or anchors < 0:
            raise ValueError(
                f"windows of {size} segments can't share {overlap}, only 1 to {size // 2}"
            )
        segs = tuple(segments(frames, length, cuts))
        if len(segs) <= size:
            return cls(frames, length, tuple(cuts), segs, (Window(0, segs),), ())
        stride = size - overlap
        starts = range(0, max(1, len(segs) - overlap), stride)
        windows = tuple(Window(j, segs[s : s + size]) for j, s in enumerate(starts))
        count = min(anchors, len(segs))
        spread = tuple(sorted({(2 * i + 1) * len(segs) // (2 * count) for i in range(count)}))
        return cls(frames, length, tuple(cuts), segs, windows, spread)

    def at(self, seed: int, step: int) -> Layout:
        """The same with the anchors of a sampling step; see `draw_anchors`."""
        if not self.anchors:
            return self
        drawn = draw_anchors(seed, step, len(self.segments), len(self.anchors))
        return replace(self, anchors=tuple(drawn))

    @property
    def joins(self) -> tuple[int, ...]:
        """Where one window hands over to the next: the middle frames of their overlaps."""
        pairs = pairwise(self.windows)
        return tuple((second.start + first.stop) // 2 for first, second in pairs)

    def neighbours(self, rule: NeighbourRule, drawn: Sequence[int], frame: int) -> Neighbours:
        """Whom a frame looks at, by position among the whole clip's keyframes."""
        return rule(frame, drawn, self.length, self.cuts)

    def own_frames(self, rule: NeighbourRule, drawn: Sequence[int], window: Window) -> range:
        """The frames both of whose keyframes are the window's: what it predicts at this step."""
        first, last = window.segments[0].index, window.segments[-1].index

        def inside(frame: int) -> bool:
            near = self.neighbours(rule, drawn, frame)
            return all(first <= k <= last for k in (near.first, near.second))

        start, stop = window.start, window.stop
        while not inside(start):
            start += 1
        while not inside(stop - 1):
            stop -= 1
        return range(start, stop)

    def moment(self, rule: NeighbourRule, drawn: Sequence[int], window: Window) -> WindowMoment:
        """What a window works on at the step whose keyframes these are.

        Args:
            rule: whom a frame looks at.
            drawn: the keyframes of all segments.
            window: one of `windows`.
        """
        first, last = window.segments[0].index, window.segments[-1].index
        frames = self.own_frames(rule, drawn, window)
        near = (self.neighbours(rule, drawn, f) for f in frames)
        return WindowMoment(
            frames=frames,
            keyframes=tuple(drawn[s.index] for s in window.segments),
            neighbours=tuple(
                replace(n, first=n.first - first, second=n.second - first) for n in near
            ),
            anchors=tuple(drawn[a] for a in self.anchors),
            standing=self._standing(first, last) if self.anchors else UNANCHORED,
        )

    @cached_property
    def _represented(self) -> tuple[int, ...]:
        """Per segment, which of the anchors stands for it: the nearest, of equals the earlier."""
        return tuple(
            min(range(len(self.anchors)), key=lambda i: abs(self.anchors[i] - s.index))
            for s in self.segments
        )

    def _standing(self, first: int, last: int) -> Standing:
        """How many keyframes each stands for that a window of these segments attends to."""
        among = [self._represented.count(i) for i in range(len(self.anchors))]
        inside = self._represented[first : last + 1]
        beyond = [count - inside.count(i) for i, count in enumerate(among)]
        own = [1] * len(inside)
        for i, anchor in enumerate(self.anchors):
            if first <= anchor <= last:
                own[anchor - first] += beyond[i]
                beyond[i] = 0
        return Standing(tuple(among), tuple(beyond), tuple(own))

    def blend(
        self, rule: NeighbourRule, drawn: Sequence[int], chunk: Chunk
    ) -> list[tuple[Window, list[float]]]:
        """How the windows' predictions make up a chunk's, in window order.

        Returns:
            Each window that some frame of the chunk belongs to, with a weight for every frame of
            the chunk; a frame's weights sum to 1, and at most two are above 0.
        """
        near = covering(self.windows, chunk)
        known = {w.index: self.own_frames(rule, drawn, w) for w in near}
        return [
            (window, [_share(known, window.index, frame) for frame in chunk.frames])
            for window in near
        ]


def _share(own: dict[int, range], window: int, frame: int) -> float:
    """Weight of a window for a frame: 1 alone, a ramp where two have it, 0 outside."""
    if frame not in own[window]:
        return 0.0
    for other in (window - 1, window + 1):
        if other in own and frame in own[other]:
            shared = range(
                max(own[window].start, own[other].start), min(own[window].stop, own[other].stop)
            )
            rising = (frame - shared.start + 1) / (len(shared) + 1)
            return rising if other < window else 1 - rising
    return 1.0


@dataclass(frozen=True)
class Standing:
    """How many of the clip's keyframes those stand for that attend to each other in a window.

    Attributes:
        among: per anchor, as the anchors see it: of the whole clip.
        beyond: per anchor, as the window's keyframes see it: of those outside the window; 0 if it
            is one of theirs.
        own: per keyframe of the window: itself, and those beyond if it is an anchor.
    """

    among: tuple[int, ...] = ()
    beyond: tuple[int, ...] = ()
    own: tuple[int, ...] = ()

    @classmethod
    def alone(cls, foreign: Sequence[bool], own: int) -> Standing:
        """Anchors, `foreign` or not, and `own` keyframes that stand for themselves alone."""
        return cls((1,) * len(foreign), tuple(map(int, foreign)), (1,) * own)

    def __len__(self) -> int:
        """Of the anchors."""
        return len(self.among)

    @property
    def foreign(self) -> tuple[bool, ...]:
        """Per anchor, whether it is none of the window's own keyframes."""
        return tuple(count > 0 for count in self.beyond)

    @property
    def seen(self) -> tuple[int, ...]:
        """Of all that the window's keyframes attend to: foreign anchors, then its own."""
        return (*(count for count in self.beyond if count), *self.own)


UNANCHORED: Final = Standing()
"""Of a window without anchors."""


@dataclass(frozen=True)
class WindowMoment:
    """A window at one sampling step.

    Attributes:
        frames: the frames that it predicts.
        keyframes: its segments' keyframes, absolute and ascending.
        neighbours: per frame, positions among `keyframes`.
        anchors: keyframes of the whole clip, absolute, that attend among themselves.
        standing: how many of the clip's keyframes anchors and keyframes stand for; the window's
            attend to those anchors that are `foreign` to it.
    """

    frames: range
    keyframes: tuple[int, ...]
    neighbours: tuple[Neighbours, ...]
    anchors: tuple[int, ...] = ()
    standing: Standing = UNANCHORED

    @classmethod
    def whole(
        cls, frames: int, length: int, rule: NeighbourRule, drawn: Sequence[int]
    ) -> WindowMoment:
        """A clip without cuts as one window, at the step whose keyframes are `drawn`."""
        near = tuple(rule(frame, drawn, length, ()) for frame in range(frames))
        return cls(range(frames), tuple(drawn), near)


def covering(windows: Sequence[Window], chunk: Chunk) -> list[Window]:
    """The windows that hold predictions for some frame of `chunk`, in window order."""
    return [w for w in windows if w.start < chunk.stop and chunk.start < w.stop]

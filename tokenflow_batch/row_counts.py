"""The rows and FLOPs of `plan`'s UNet calls without listing the calls: for thousands of clips.

Torch-free. Listed and counted are the same (tests/test_plan.py compares).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from tokenflow_batch.config import Settings
from tokenflow_batch.plan import (
    branches,
    guidance_of,
    hands_over,
    injection_of,
    inversion_rows,
    layout_of,
    recomputes_conv,
)
from tokenflow_batch.stage_names import StageName
from tokenflow_batch.tokenflow.keyframes import (
    Segment,
    draw_anchors,
    draw_keyframe,
    draw_keyframes,
    segments,
    true_neighbours,
)
from tokenflow_batch.tokenflow.modes import MODES, Mode
from tokenflow_batch.tokenflow.windows import Layout, Window
from tokenflow_batch.unet_flops import UNetFlops

Draws = Sequence[tuple[int, ...]]
"""By segment, its keyframe at every step."""


def handed_rows(settings: Settings, frames: int) -> int:
    """The rows that `match` is spared by an `invert` that hands over all it can."""
    return settings.steps * frames if hands_over(settings) else 0


def row_counts(
    settings: Settings, frames: int, cuts: tuple[int, ...] = (), *, handed: bool = True
) -> dict[StageName, int]:
    """The rows of `unet_calls` alone, without listing the calls: for thousands of clips.

    Args:
        settings: of the job.
        frames: F.
        cuts: first frames of all shots but the first.
        handed: see there.
    """
    s, mode = settings, MODES[settings.mode]
    layout = layout_of(s, frames, cuts)
    match = s.steps * frames + _outside(layout, s.chunk_frames, _draws(s, frames, cuts))
    if handed:
        match -= handed_rows(s, frames)
    edit = _edit_work(s, frames, cuts)
    return {
        "invert": frames * inversion_rows(s),
        "match": match if mode.stored_source else 0,
        "edit": edit.joint + edit.spread,
    }


@dataclass(frozen=True)
class _EditWork:
    """What the edit's UNet calls come to.

    Attributes:
        joint: rows of the keyframe passes.
        pairs: over these rows, how many frames each attends to besides itself.
        spread: rows of the propagation.
        searched: pairs of frames between which correspondences are searched on the way.
        focused: frames for which it is found out where the prompts differ.
        kept: rows of the propagation whose own self-attention is computed.
    """

    joint: int = 0
    pairs: int = 0
    spread: int = 0
    searched: int = 0
    focused: int = 0
    kept: int = 0


@lru_cache(maxsize=16)
def _edit_work(s: Settings, frames: int, cuts: tuple[int, ...]) -> _EditWork:
    mode, layout = MODES[s.mode], layout_of(s, frames, cuts)
    anchors, sizes = len(layout.anchors), [len(window.segments) for window in layout.windows]
    together = sum(anchors + own for own in sizes)
    beside = sum(anchors * (anchors - 1) + own * (own - 1 + anchors) for own in sizes)
    guidance, first = guidance_of(s), s.first_step
    rows = branches(s)[first:]
    predicted = _predicted_by_all(layout, mode, _draws(s, frames, cuts))[first:]
    joint = together * sum(on_keyframes for on_keyframes, _, _ in rows)
    known = _among_their_own(layout, s.keyframe_seed, s.steps)[first:]
    pairs = sum(
        (beside - own) * (1 + guided) for (_, _, guided), own in zip(rows, known, strict=True)
    )
    spread = sum(on_frames * n for (_, on_frames, _), n in zip(rows, predicted, strict=True))
    focused = together * sum(guidance.focused(step) for step in range(first, s.steps))
    focused += sum(n * guidance.returns(step) for step, n in enumerate(predicted, first))
    kept = sum(n * guidance.own_branches(step) for step, n in enumerate(predicted, first))
    searched = 0
    if not mode.stored_source:  # in both keyframes; the clip's first segment has one
        searched = sum(2 * n - len(layout.segments[0]) for n in predicted)
    return _EditWork(joint, pairs, spread, searched, focused, kept)


def partial_row_count(settings: Settings, frames: int, cuts: tuple[int, ...] = ()) -> int:
    """The partial rows of `unet_calls`, all of them the edit's, without listing the calls.

    Args:
        settings: of the job.
        frames: F.
        cuts: first frames of all shots but the first.
    """
    s = settings
    if not recomputes_conv(s):
        return 0
    layout, injection = layout_of(s, frames, cuts), injection_of(s)
    predicted = _predicted_by_all(layout, MODES[s.mode], _draws(s, frames, cuts))
    own = sum(len(window.segments) for window in layout.windows)
    joint = own + len(layout.anchors) * len(layout.windows)
    guidance = guidance_of(s)
    steps = [step for step in range(injection.conv_steps) if not guidance.keeps(step)]
    without_source = sum(step >= injection.qk_steps for step in steps)
    return sum(predicted[step] - own for step in steps) + joint * without_source


def edit_flops(
    settings: Settings,
    frames: int,
    cuts: tuple[int, ...],
    unet: UNetFlops,
    latent_hw: tuple[int, int],
) -> int:
    """Floating-point operations of the edit's UNet calls, without listing them.

    Args:
        settings: of the job.
        frames: F.
        cuts: first frames of all shots but the first.
        unet: the model's arithmetic.
        latent_hw: (h, w) of the latents.
    """
    s, work = settings, _edit_work(settings, frames, cuts)
    total = unet.joint(latent_hw, work.joint, work.pairs)
    total += unet.propagated(latent_hw, work.spread, work.searched, work.kept)
    total += work.focused * unet.focus(latent_hw)
    partial = partial_row_count(s, frames, cuts)
    return total + (partial * unet.row(latent_hw, s.conv_site) if partial else 0)


def _among_their_own(layout: Layout, seed: int, steps: int) -> list[int]:
    """By step, in how many pairs a window's keyframe would see an anchor that is its window's own.

    Those are not attended to twice.
    """
    if not layout.anchors:
        return [0] * steps
    pairs = [0] * len(layout.segments)
    for window in layout.windows:
        for segment in window.segments:
            pairs[segment.index] += len(window.segments)
    count = len(layout.anchors)
    drawn = (draw_anchors(seed, step, len(pairs), count) for step in range(steps))
    return [sum(pairs[anchor] for anchor in anchors) for anchors in drawn]


@lru_cache(maxsize=4)  # rows and FLOPs of a clip are asked for one after the other
def _draws(s: Settings, frames: int, cuts: tuple[int, ...]) -> Draws:
    """By segment, its keyframe at every step; clips without cuts differ in their last one only."""
    segs, seed, steps = layout_of(s, frames, cuts).segments, s.keyframe_seed, range(s.steps)
    if cuts:
        return list(zip(*(draw_keyframes(seed, step, segs) for step in steps), strict=True))
    whole = len(segs) - 1
    many = _whole_draws(seed, s.steps, s.segment_length, 1 << whole.bit_length())
    return [*many[:whole], tuple(draw_keyframe(seed, step, segs[-1]) for step in steps)]


@lru_cache(maxsize=64)
def _whole_draws(seed: int, steps: int, length: int, count: int) -> Draws:
    segs = segments(count * length, length)
    return list(zip(*(draw_keyframes(seed, step, segs) for step in range(steps)), strict=True))


def _predicted_by_all(layout: Layout, mode: Mode, draws: Draws) -> Sequence[int]:
    """How many frames all windows predict together, at every step."""
    windows = layout.windows
    if layout.cuts or mode.neighbours is not true_neighbours:
        steps = zip(*draws, strict=True)
        return [sum(_predicted(layout, mode, d, window) for window in windows) for d in steps]
    # Without shots, what neighbouring windows share lies between two keyframes.
    found = [layout.frames + len(windows) - 1] * len(draws[0])
    for before, after in pairwise(windows):
        first, last = draws[after.segments[0].index], draws[before.segments[-1].index]
        found = [n + stop - start for n, start, stop in zip(found, first, last, strict=True)]
    return found


def _predicted(layout: Layout, mode: Mode, drawn: Sequence[int], window: Window) -> int:
    """How many frames a window predicts: `Layout.own_frames`, counted."""
    if mode.neighbours is not true_neighbours:
        return len(layout.own_frames(mode.neighbours, drawn, window))
    # All of its own but those that look at a keyframe of the same shot in another window.
    first, last = window.segments[0], window.segments[-1]
    start = window.start if _begins_shot(layout, first) else drawn[first.index]
    stop = window.stop if _ends_shot(layout, last) else drawn[last.index] + 1
    return stop - start


def _outside(layout: Layout, chunk_frames: int, draws: Draws) -> int:
    """Over all steps, how many keyframes lie in other chunks than the frames that look at them.

    A keyframe beyond a border of chunks is looked at from the frame at the border if from any,
    unless that frame is a keyframe itself.
    """
    found, segs, steps = 0, layout.segments, len(draws[0])
    starts = [segment.start for segment in segs]
    for border in range(chunk_frames, layout.frames, chunk_frames):
        after = bisect_right(starts, border) - 1
        before = after - (segs[after].start == border)
        ends, begins = _ends_shot(layout, segs[before]), _begins_shot(layout, segs[after])
        left, right = draws[before], draws[after]
        found += sum(k >= border for k in left) if ends else steps - left.count(border - 1)
        found += sum(k < border for k in right) if begins else steps - right.count(border)
    return found


def _begins_shot(layout: Layout, segment: Segment) -> bool:
    return segment.start == 0 or segment.start in layout.cuts


def _ends_shot(layout: Layout, segment: Segment) -> bool:
    return segment.stop == layout.frames or segment.stop in layout.cuts

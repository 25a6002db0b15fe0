"""What a job will cost, before it runs: its UNet calls, from the settings and the frame count.

Torch-free. The stages make exactly these calls (benchmarks/rows.py compares).
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal

from tokenflow_batch.config import Settings
from tokenflow_batch.stage_names import StageName
from tokenflow_batch.tokenflow.keyframes import (
    Segment,
    draw_keyframe,
    draw_keyframes,
    segments,
    true_neighbours,
)
from tokenflow_batch.tokenflow.modes import MODES, Guidance, Injection, Mode, branch_count
from tokenflow_batch.tokenflow.windows import Layout, Window, WindowMoment, batches, chunks
from tokenflow_batch.unet_flops import UNetFlops


@dataclass(frozen=True)
class UNetCall:
    """A kind of UNet evaluation.

    Attributes:
        kind: `plain` self-attention, joint `keyframes`, `propagation`; or `partial`, which leaves
            the UNet after the convolution whose features it is for.
        frames: frames in the batch.
        branches: rows per frame (source, negative, target).
        conv: whether convolution features are injected.
        qk: whether queries and keys are injected.
        searched: keyframes in which correspondences are searched during the call.
        anchors: of a joint call, how many frames in front are anchors, and which of them the
            window's keyframes attend to.
        guided: of the edit's calls, whether a negative branch is among them.
    """

    kind: Literal["plain", "keyframes", "propagation", "partial"]
    frames: int
    branches: int = 1
    conv: bool = False
    qk: bool = False
    searched: int = 0
    anchors: tuple[bool, ...] = ()
    guided: bool = True

    @property
    def rows(self) -> int:
        """Batch rows through the UNet, the noise-free measure of work."""
        return self.frames * self.branches


Calls = Mapping[UNetCall, int]
"""How often each kind of call is made."""


def rows(calls: Calls) -> int:
    """UNet rows in all, but for partial ones."""
    return sum(call.rows * n for call, n in calls.items() if call.kind != "partial")


def partial_rows(calls: Calls) -> int:
    """Rows that leave the UNet early."""
    return sum(call.rows * n for call, n in calls.items() if call.kind == "partial")


def injection_of(settings: Settings) -> Injection:
    """The injection thresholds in steps: none for SDEdit."""
    if settings.technique != "pnp":
        return Injection()
    return Injection.pnp(settings.steps, settings.attn_t, settings.f_t)


def guidance_of(settings: Settings) -> Guidance:
    """The guidance and its interval in steps."""
    return Guidance.within(settings.guidance_scale, settings.steps, settings.guidance_interval)


def branches_at(settings: Settings, step: int) -> tuple[int, int]:
    """Rows per keyframe of the joint pass and per frame of the propagation, at a step."""
    joint, spread, _ = _branches(settings)[step]
    return joint, spread


def _branches(s: Settings) -> Sequence[tuple[int, int, bool]]:
    """`branches_at` every step, and whether it has guidance."""
    return _branches_of(s.mode, injection_of(s), guidance_of(s), s.steps)


@lru_cache(maxsize=64)
def _branches_of(
    mode: str, injection: Injection, guidance: Guidance, steps: int
) -> Sequence[tuple[int, int, bool]]:
    def at(step: int, *, joint: bool) -> int:
        guided = guidance.on(step)
        return branch_count(MODES[mode], injection, step, keyframe_pass=joint, guided=guided)

    return [(at(t, joint=True), at(t, joint=False), guidance.on(t)) for t in range(steps)]


def hands_over(settings: Settings) -> bool:
    """Whether `invert` ends where it has evaluated the model, so that `match` needs little more."""
    return MODES[settings.mode].stored_source and settings.inversion_iterations > 0


def handed_rows(settings: Settings, frames: int) -> int:
    """The rows that `match` is spared by an `invert` that hands over all it can."""
    return settings.steps * frames if hands_over(settings) else 0


def unet_calls(
    settings: Settings, frames: int, cuts: Sequence[int] = (), *, handed: bool = True
) -> dict[StageName, Calls]:
    """Every UNet call of the stages that make any, but for retries.

    Args:
        settings: of the job.
        frames: F.
        cuts: first frames of all shots but the first; known once the clip is encoded.
        handed: whether `invert`, where it `hands_over`, is still to do, so that it does.
    """
    mode, handed = MODES[settings.mode], handed and hands_over(settings)
    match = _match(settings, frames, cuts, handed=handed) if mode.stored_source else Counter()
    return {
        "invert": _invert(settings, frames),
        "match": match,
        "edit": _edit(settings, frames, mode, cuts),
    }


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
        "invert": frames * s.inversion_steps * (1 + s.inversion_iterations),
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
    """

    joint: int = 0
    pairs: int = 0
    spread: int = 0
    searched: int = 0


@lru_cache(maxsize=16)
def _edit_work(s: Settings, frames: int, cuts: tuple[int, ...]) -> _EditWork:
    mode, layout = MODES[s.mode], layout_of(s, frames, cuts)
    anchors = len(layout.anchors)
    sizes = [(len(window.segments), _foreign(layout, window)) for window in layout.windows]
    together = sum(anchors + own for own, _ in sizes)
    beside = sum(anchors * (anchors - 1) + own * (own - 1 + seen) for own, seen in sizes)
    joint = pairs = spread = searched = 0
    counted, branches = _predicted_by_all(layout, mode, _draws(s, frames, cuts)), _branches(s)
    for step in range(s.first_step, s.steps):
        on_keyframes, on_frames, guided = branches[step]
        joint += on_keyframes * together
        pairs += (1 + guided) * beside
        predicted = counted[step]
        spread += on_frames * predicted
        if not mode.stored_source:  # in both keyframes; the clip's first segment has one
            searched += 2 * predicted - len(layout.segments[0])
    return _EditWork(joint, pairs, spread, searched)


def partial_row_count(settings: Settings, frames: int, cuts: tuple[int, ...] = ()) -> int:
    """The partial rows of `unet_calls`, all of them the edit's, without listing the calls.

    Args:
        settings: of the job.
        frames: F.
        cuts: first frames of all shots but the first.
    """
    s, found = settings, 0
    if not recomputes_conv(s):
        return 0
    layout, injection = layout_of(s, frames, cuts), injection_of(s)
    for step in range(injection.conv_steps):
        drawn = _drawn(s.keyframe_seed, step, layout)
        for window in layout.windows:
            found += _predicted(layout, MODES[s.mode], drawn, window) - len(window.segments)
            if step >= injection.qk_steps:
                found += len(window.segments) + len(layout.anchors)
    return found


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
    total += unet.propagated(latent_hw, work.spread, work.searched)
    partial = partial_row_count(s, frames, cuts)
    return total + (partial * unet.row(latent_hw, s.conv_site) if partial else 0)


def _foreign(layout: Layout, window: Window) -> int:
    """How many anchors are none of a window's own keyframes."""
    first, last = window.segments[0].index, window.segments[-1].index
    return sum(not first <= anchor <= last for anchor in layout.anchors)


def recomputes_conv(settings: Settings) -> bool:
    """Whether the edit computes the source's convolution features itself."""
    s = settings
    wanted = s.technique == "pnp" and s.conv_features == "recompute"
    return wanted and MODES[s.mode].stored_source


@lru_cache(maxsize=4)  # rows and FLOPs of a clip are asked for one after the other
def _draws(s: Settings, frames: int, cuts: tuple[int, ...]) -> Sequence[tuple[int, ...]]:
    """By segment, its keyframe at every step; clips without cuts differ in their last one only."""
    segs, seed, steps = layout_of(s, frames, cuts).segments, s.keyframe_seed, range(s.steps)
    if cuts:
        return list(zip(*(draw_keyframes(seed, step, segs) for step in steps), strict=True))
    whole = len(segs) - 1
    many = _whole_columns(seed, s.steps, s.segment_length, 1 << whole.bit_length())
    return [*many[:whole], tuple(draw_keyframe(seed, step, segs[-1]) for step in steps)]


@lru_cache(maxsize=64)
def _whole_columns(seed: int, steps: int, length: int, count: int) -> Sequence[tuple[int, ...]]:
    return list(zip(*(_whole_draws(seed, t, length, count) for t in range(steps)), strict=True))


def _drawn(seed: int, step: int, layout: Layout) -> list[int]:
    """`draw_keyframes`, faster: clips without cuts differ in their last segment only."""
    if layout.cuts:
        return draw_keyframes(seed, step, layout.segments)
    whole = len(layout.segments) - 1
    many = _whole_draws(seed, step, layout.length, 1 << whole.bit_length())
    return [*many[:whole], draw_keyframe(seed, step, layout.segments[-1])]


@lru_cache(maxsize=1024)
def _whole_draws(seed: int, step: int, length: int, count: int) -> list[int]:
    return draw_keyframes(seed, step, segments(count * length, length))


def _predicted_by_all(
    layout: Layout, mode: Mode, draws: Sequence[tuple[int, ...]]
) -> Sequence[int]:
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


def _outside(layout: Layout, chunk_frames: int, draws: Sequence[tuple[int, ...]]) -> int:
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


def _plain(items: Sequence[int], batch: int) -> Counter[UNetCall]:
    return Counter(UNetCall("plain", len(b)) for b in batches(items, batch))


def _times(calls: Calls, count: int) -> Counter[UNetCall]:
    return Counter({call: n * count for call, n in calls.items()})


def _invert(s: Settings, frames: int) -> Counter[UNetCall]:
    evaluations = s.inversion_steps * (1 + s.inversion_iterations)
    total: Counter[UNetCall] = Counter()
    for chunk in chunks(frames, s.chunk_frames):
        total += _times(_plain(chunk.frames, s.unet_batch), evaluations)
    return total


def _match(s: Settings, frames: int, cuts: Sequence[int], *, handed: bool) -> Counter[UNetCall]:
    segs, total = segments(frames, s.segment_length, cuts), Counter[UNetCall]()
    for step in range(s.steps):
        drawn = draw_keyframes(s.keyframe_seed, step, segs)
        for chunk in chunks(frames, s.chunk_frames):
            near = [true_neighbours(f, drawn, s.segment_length, cuts) for f in chunk.frames]
            keyframes = {drawn[k] for n in near for k in (n.first, n.second)}
            outside = keyframes - set(chunk.frames)
            total += Counter([UNetCall("plain", len(outside))] if outside else [])
            if not handed:
                total += _plain(chunk.frames, s.unet_batch)
    return total


def _edit(s: Settings, frames: int, mode: Mode, cuts: Sequence[int]) -> Counter[UNetCall]:
    injection, total = injection_of(s), Counter[UNetCall]()
    layout = layout_of(s, frames, cuts)
    for step in range(s.first_step, s.steps):
        drawn = draw_keyframes(s.keyframe_seed, step, layout.segments)
        conv, qk = step < injection.conv_steps, step < injection.qk_steps
        guided = guidance_of(s).on(step)
        joint, spread = branches_at(s, step)
        for window in layout.windows:
            now = layout.moment(mode.neighbours, drawn, window)
            together = len(now.keyframes) + len(now.anchors)
            call = UNetCall("keyframes", together, joint, conv, qk, 0, now.foreign, guided)
            total[call] += 1
            if conv and recomputes_conv(s):
                total += _partial(s, now, qk=qk)
            for near in batches(now.neighbours, s.segment_length):
                keyframes = {k for n in near for k in (n.first, n.second)}
                searched = 0 if mode.stored_source else len(keyframes)
                call = UNetCall("propagation", len(near), spread, conv, False, searched, (), guided)
                total[call] += 1
    return total


def _partial(s: Settings, now: WindowMoment, *, qk: bool) -> Counter[UNetCall]:
    """The passes for a window's convolution features: of all but its keyframes, batch by batch.

    The keyframes' come from the joint pass where that has a source branch.
    """
    parts = [sum(f not in now.keyframes for f in b) for b in batches(now.frames, s.segment_length)]
    if not qk:
        parts.append(len(now.keyframes) + len(now.anchors))
    return Counter(UNetCall("partial", n) for n in parts if n)


def layout_of(s: Settings, frames: int, cuts: Sequence[int] = ()) -> Layout:
    """The windows of an edit of so many frames."""
    return _layout(
        frames, s.segment_length, tuple(cuts), s.window_segments, s.window_overlap, s.anchors
    )


@lru_cache(maxsize=4)  # whoever plans asks for the same one several times in a row
def _layout(
    frames: int, length: int, cuts: tuple[int, ...], size: int, overlap: int, anchors: int
) -> Layout:
    return Layout.plan(frames, length, cuts, size=size, overlap=overlap, anchors=anchors)

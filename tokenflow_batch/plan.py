"""What a job will cost, before it runs: its UNet calls, from the settings and the frame count.

Torch-free. The stages make exactly these calls (benchmarks/rows.py compares).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from tokenflow_batch.config import Settings
from tokenflow_batch.stage_names import StageName
from tokenflow_batch.tokenflow.keyframes import (
    draw_keyframes,
    segments,
    true_neighbours,
)
from tokenflow_batch.tokenflow.modes import (
    MODES,
    Guidance,
    Injection,
    Mode,
    branch_count,
    inversion_evaluations,
)
from tokenflow_batch.tokenflow.windows import Layout, WindowMoment, batches, chunks


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
        focused: whether it is found out where the prompts differ: for keyframes' target branch, for
            the source branch of propagation.
        own: of propagation, in how many branches self-attention of their own is computed.
    """

    kind: Literal["plain", "keyframes", "propagation", "partial"]
    frames: int
    branches: int = 1
    conv: bool = False
    qk: bool = False
    searched: int = 0
    anchors: tuple[bool, ...] = ()
    guided: bool = True
    focused: bool = False
    own: int = 0

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
    """The guidance, its interval in steps, and from when on it is where the prompts differ.

    That is never so in official mode, nor where there is nothing to compare: no source prompt, or
    the same one.
    """
    s = settings
    comparable = s.source_prompt not in ("", s.prompt) and s.mode != "official"
    focus = s.guidance_focus if comparable else 1.0
    return Guidance.within(s.guidance_scale, s.steps, s.guidance_interval, focus)


def branches_at(settings: Settings, step: int) -> tuple[int, int]:
    """Rows per keyframe of the joint pass and per frame of the propagation, at a step."""
    joint, spread, _ = branches(settings)[step]
    return joint, spread


def branches(settings: Settings) -> Sequence[tuple[int, int, bool]]:
    """`branches_at` every step, and whether it has guidance."""
    s = settings
    return _branches_of(s.mode, injection_of(s), guidance_of(s), s.steps)


@lru_cache(maxsize=64)
def _branches_of(
    mode: str, injection: Injection, guidance: Guidance, steps: int
) -> Sequence[tuple[int, int, bool]]:
    def at(step: int, *, joint: bool) -> int:
        return branch_count(MODES[mode], injection, guidance, step, keyframe_pass=joint)

    return [(at(t, joint=True), at(t, joint=False), guidance.on(t)) for t in range(steps)]


def hands_over(settings: Settings) -> bool:
    """Whether `invert` ends where it has evaluated the model, so that `match` needs little more."""
    return MODES[settings.mode].stored_source and settings.inversion_iterations > 0


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


def recomputes_conv(settings: Settings) -> bool:
    """Whether the edit computes the source's convolution features itself."""
    s = settings
    wanted = s.technique == "pnp" and s.conv_features == "recompute"
    return wanted and MODES[s.mode].stored_source


def _plain(items: Sequence[int], batch: int) -> Counter[UNetCall]:
    return Counter(UNetCall("plain", len(b)) for b in batches(items, batch))


def _times(calls: Calls, count: int) -> Counter[UNetCall]:
    return Counter({call: n * count for call, n in calls.items()})


def inversion_rows(settings: Settings) -> int:
    """UNet rows of a frame's inversion, but for retries."""
    extra = settings.inversion_iterations
    return sum(inversion_evaluations(i, extra) for i in range(settings.inversion_steps))


def _invert(s: Settings, frames: int) -> Counter[UNetCall]:
    total: Counter[UNetCall] = Counter()
    for chunk in chunks(frames, s.chunk_frames):
        total += _times(_plain(chunk.frames, s.unet_batch), inversion_rows(s))
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
    injection, guidance, total = injection_of(s), guidance_of(s), Counter[UNetCall]()
    layout = layout_of(s, frames, cuts)
    for step in range(s.first_step, s.steps):
        drawn = draw_keyframes(s.keyframe_seed, step, layout.segments)
        anchored = layout.at(s.keyframe_seed, step)
        conv, qk = step < injection.conv_steps, step < injection.qk_steps
        guided, focused = guidance.on(step), guidance.focused(step)
        own = guidance.own_branches(step)
        joint, spread = branches_at(s, step)
        for window in layout.windows:
            now = anchored.moment(mode.neighbours, drawn, window)
            together = len(now.keyframes) + len(now.anchors)
            call = UNetCall(
                "keyframes", together, joint, conv, qk, 0, now.standing.foreign, guided, focused
            )
            total[call] += 1
            if conv and recomputes_conv(s) and not own:
                total += _partial(s, now, qk=qk)
            for near in batches(now.neighbours, s.segment_length):
                keyframes = {k for n in near for k in (n.first, n.second)}
                searched = 0 if mode.stored_source else len(keyframes)
                call = UNetCall(
                    "propagation",
                    len(near),
                    spread,
                    conv,
                    searched=searched,
                    guided=guided,
                    focused=guidance.returns(step),
                    own=own,
                )
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

"""Ways of editing one generated clip, in step with each other on the same inverted latents.

All methods take each sampling step together: the source pass at a step (its tokens, its
convolution features) is made once and serves them all, and nothing is written to disk. `default`
and `official` go through `predict_window`, the code that the `edit` stage runs.

Shape suffixes: T steps, F frames, K keyframes, L tokens, C channels, h w latent size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from inverted import BATCH, Prepared, decode
from numpy.typing import NDArray
from torch import Tensor

from tokenflow_batch.demo.job import EDIT
from tokenflow_batch.demo.scenes import Clip
from tokenflow_batch.models import Model
from tokenflow_batch.tokenflow.attention import (
    Hooks,
    attend,
    merge_heads,
    split_heads,
    tokenflow_hooks,
)
from tokenflow_batch.tokenflow.correspondence import match_frames, side_by_side
from tokenflow_batch.tokenflow.ddim import (
    move,
)
from tokenflow_batch.tokenflow.denoise import Denoiser, EditSettings, Prompts, predict_window
from tokenflow_batch.tokenflow.injection import Site
from tokenflow_batch.tokenflow.keyframes import (
    Neighbours,
    draw_keyframes,
    segments,
    true_neighbours,
)
from tokenflow_batch.tokenflow.modes import (
    DEFAULT,
    PUBLISHED,
    Guidance,
    Injection,
    Mode,
    branch_count,
)
from tokenflow_batch.tokenflow.passes import KeyframePass, SourcePass
from tokenflow_batch.tokenflow.propagation import PropagationPass
from tokenflow_batch.tokenflow.windows import WindowMoment, batches


@dataclass(frozen=True)
class Thresholds:
    """What an edit is run with; by default as the demo's.

    Attributes:
        guidance_scale: of the edit.
        attn_t: share of steps with injected queries and keys.
        f_t: share of steps with injected convolution features.
        guidance_focus: share of steps from which the default mode guides where prompts differ.
        segment_length: B, frames per keyframe.
        keyframe_seed: of the keyframe draws.
        conv_site: residual block whose convolution features are injected.
    """

    guidance_scale: float = EDIT.guidance_scale
    attn_t: float = EDIT.attn_t
    f_t: float = EDIT.f_t
    guidance_focus: float = EDIT.guidance_focus
    segment_length: int = 8
    keyframe_seed: int = 0
    conv_site: str = EDIT.conv_site


@dataclass
class Moment:
    """One sampling step of one clip, as every method sees it.

    Attributes:
        step: 0 the noisiest.
        t: its timestep.
        alpha: its ᾱ.
        keyframes: as drawn for this step.
        source: inverted latents, (F, C, h, w).
        clean: VAE latents, (F, C, h, w).
        tokens: per site φ of every source frame, (F, L, C); empty where no method asks for them.
        conv: the source's convolution features, (F, C, h, w).
        prompts: text embeddings.
        thresholds: of the edit.
        steps: T.
        clip: the ground truth.
    """

    step: int
    t: int
    alpha: float
    keyframes: Sequence[int]
    source: Tensor
    clean: Tensor
    tokens: list[Tensor]
    conv: Tensor
    prompts: Prompts
    thresholds: Thresholds
    steps: int
    clip: Clip

    @property
    def frames(self) -> range:
        """All of the clip's."""
        return range(len(self.source))

    def guidance(self, interval: tuple[float, float] = (0.0, 1.0)) -> Guidance:
        """The default mode's."""
        limits = self.thresholds
        return Guidance.within(limits.guidance_scale, self.steps, interval, limits.guidance_focus)

    def branches(self, *, keyframe_pass: bool) -> int:
        """Rows per frame of the default mode's passes."""
        guidance = self.guidance()
        return branch_count(
            DEFAULT, self.injection, guidance, self.step, keyframe_pass=keyframe_pass
        )

    @property
    def injection(self) -> Injection:
        """The thresholds in steps."""
        return Injection.pnp(self.steps, self.thresholds.attn_t, self.thresholds.f_t)


class Method(Protocol):
    """Predicts guided noise for all frames at one step."""

    def __call__(self, denoiser: Denoiser, hooks: Hooks, now: Moment, x: Tensor) -> Tensor:
        """(F, C, h, w) noise for the edited latents x."""


class AloneKeyframePass(KeyframePass):
    """Plug-and-Play on every frame of a batch for itself: no frame sees another."""

    def self_attention(
        self,
        site: Site,
        attn: Any,
        tokens_NLC: Tensor,
        plain: Callable[[], Tensor],
    ) -> Tensor:
        """Self-attention with the source's queries and keys where PnP injects them."""
        if not (self.inject_qk and site.inject_qk):
            return plain()
        q, k, v = (
            split_heads(project(tokens_NLC), attn.heads)
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        frames = len(tokens_NLC) // self.branches
        q, k = (x[:frames].repeat(self.branches, 1, 1, 1) for x in (q, k))
        out = merge_heads(attend(q, k, v, attn.scale, self.attention))
        result: Tensor = attn.to_out[1](attn.to_out[0](out))
        return result


def predict(
    denoiser: Denoiser,
    hooks: Hooks,
    now: Moment,
    active: KeyframePass | PropagationPass,
    x: Tensor,
    frames: list[int],
) -> tuple[Tensor, ...]:
    """Noise of some frames during a pass, (N, C, h, w) for each of its branches."""
    rows = [now.source[frames], x[frames], x[frames]][-active.branches :]
    embeds = [now.prompts.source, now.prompts.negative, now.prompts.target][-active.branches :]
    embeds_NTE = torch.cat([e.expand(len(frames), -1, -1) for e in embeds])
    focus = active.focus if isinstance(active, KeyframePass) else active.source_focus
    with hooks.during(active), focus.watching() if focus else nullcontext():
        return denoiser.noise(torch.cat(rows), now.t, now.alpha, embeds_NTE).chunk(active.branches)


def per_frame(denoiser: Denoiser, hooks: Hooks, now: Moment, x: Tensor) -> Tensor:
    """Plug-and-Play, every frame for itself."""
    found = []
    for batch in batches(now.frames, BATCH):
        qk, conv = now.step < now.injection.qk_steps, now.step < now.injection.conv_steps
        branches = 3 if qk else 2
        active = AloneKeyframePass(
            branches=branches,
            inject_qk=qk,
            inject_conv=conv,
            stored_conv_KChw=now.conv[list(batch)] if conv else None,
            attention=hooks.attention,
        )
        *_, negative, target = predict(denoiser, hooks, now, active, x, list(batch))
        found.append(negative + now.thresholds.guidance_scale * (target - negative))
    return torch.cat(found)


@dataclass
class Inputs:
    """A window's inputs out of memory: see `WindowInputs`."""

    now: Moment
    x: Tensor
    index: list[Tensor]

    def latents(self, frames: Sequence[int]) -> Tensor:
        """See `WindowInputs.latents`."""
        return self.x[list(frames)]

    def source(self, frames: Sequence[int]) -> Tensor:
        """See `WindowInputs.source`."""
        return self.now.source[list(frames)]

    def conv(self, frames: Sequence[int]) -> Tensor:
        """See `WindowInputs.conv`."""
        return self.now.conv[list(frames)]

    def correspondences(self, frames: Sequence[int]) -> list[Tensor]:
        """See `WindowInputs.correspondences`."""
        return [field_F2L[list(frames)] for field_F2L in self.index]


def neighbours(now: Moment) -> list[Neighbours]:
    """Of every frame, by the default rule."""
    length = now.thresholds.segment_length
    return [true_neighbours(f, now.keyframes, length) for f in now.frames]


@dataclass(frozen=True)
class Matches:
    """Where the tokens of every frame lie in its two keyframes.

    Attributes:
        keyframes: frames.
        near: which of them each frame looks at.
        index: γ per site, (F, 2, L).
    """

    keyframes: Sequence[int]
    near: Sequence[Neighbours]
    index: Sequence[Tensor]


def correspondences(now: Moment) -> list[Tensor]:
    """γ of every frame at every site by the default rule, each (F, 2, L)."""
    near, keyframes = neighbours(now), list(now.keyframes)
    fields = {}
    for length in {tokens.shape[1] for tokens in now.tokens}:
        joined = side_by_side([t for t in now.tokens if t.shape[1] == length])
        fields[length] = match_frames(joined, joined[keyframes], near, "torch")
    return [fields[tokens.shape[1]] for tokens in now.tokens]


@dataclass
class TokenFlow:
    """The project's method in one of its modes.

    Attributes:
        mode: default or published.
        keyframes: other keyframes than the drawn ones, from the moment.
        interval: shares of the steps between which there is guidance.
        focus: whether guidance ends where the prompts say the same; published mode knows nothing
            of it.
        detail: whether frames then also take some of their own attention where they differ.
        stronger: whether guidance then goes farther where they do.
        back: whether what is left as it was goes back to the source.
    """

    mode: Mode = DEFAULT
    keyframes: Callable[[Moment], Sequence[int]] | None = None
    interval: tuple[float, float] = (0.0, 1.0)
    focus: bool = True
    detail: bool = True
    stronger: bool = True
    back: bool = True

    def __call__(self, denoiser: Denoiser, hooks: Hooks, now: Moment, x: Tensor) -> Tensor:
        """See `Method`."""
        now = self._seen(now)
        if not self.focus:
            now = replace(now, thresholds=replace(now.thresholds, guidance_focus=1.0))
        index = correspondences(now) if self.mode.stored_source else []
        guidance = now.guidance(self.interval)
        if not self.detail:
            guidance = replace(guidance, detail=now.steps)
        if not self.stronger:
            guidance = replace(guidance, stronger=1.0)
        guidance = replace(guidance, back=self.back)
        settings = EditSettings(
            guidance=guidance,
            injection=now.injection,
            steps=now.steps,
            batch=now.thresholds.segment_length,
            latent_hw=(x.shape[2], x.shape[3]),
            mode=self.mode,
        )
        return predict_window(
            denoiser,
            hooks,
            Inputs(now, x, index),
            now.prompts,
            settings,
            step=now.step,
            t=now.t,
            alpha=now.alpha,
            window=WindowMoment.whole(
                len(x), now.thresholds.segment_length, self.mode.neighbours, now.keyframes
            ),
        )

    def matches(self, now: Moment) -> Matches:
        """Between the source's tokens; those of published mode, which finds its own on the way, as
        they are where nothing has been propagated before."""
        now = self._seen(now)
        if self.mode.stored_source:
            return Matches(now.keyframes, neighbours(now), correspondences(now))
        keyframes, length = list(now.keyframes), now.thresholds.segment_length
        window = WindowMoment.whole(len(now.source), length, self.mode.neighbours, keyframes)
        near = window.neighbours
        index = [match_frames(t, t[keyframes], near, "torch") for t in now.tokens]
        return Matches(keyframes, near, index)

    def _seen(self, now: Moment) -> Moment:
        """With this method's keyframes."""
        return now if self.keyframes is None else replace(now, keyframes=self.keyframes(now))


METHODS: Mapping[str, Method] = {
    "per_frame": per_frame,
    "official": TokenFlow(PUBLISHED, focus=False),
    "default": TokenFlow(),
}


def _source_pass(
    denoiser: Denoiser, hooks: Hooks, now: Moment, embed: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Tokens of every site and convolution features of all frames."""
    seen = []
    for batch in batches(now.frames, BATCH):
        with hooks.during(SourcePass()) as active:
            denoiser.noise(now.source[list(batch)], now.t, now.alpha, embed)
        seen.append(active)
    tokens = [torch.cat(parts) for parts in zip(*(s.tokens for s in seen), strict=True)]
    return tokens, torch.cat([s.conv for s in seen if s.conv is not None])


def edit(
    model: Model,
    prepared: Prepared,
    prompt: str,
    methods: Mapping[str, Method],
    thresholds: Thresholds,
    on_step: Callable[[int], None] = lambda _: None,
    observe: Callable[[Moment], None] = lambda _: None,
) -> dict[str, NDArray[np.uint8]]:
    """Edit a clip by several methods.

    Args:
        model: its UNet has the seams while this runs.
        prepared: the clip.
        prompt: of the edit.
        methods: by name.
        thresholds: of the edit.
        on_step: told 1 after each sampling step.
        observe: shown every step before the methods take it.

    Returns:
        Per method the decoded frames, (F, H, W, 3) uint8.
    """
    schedule, clip = prepared.schedule, prepared.clip
    prompts = Prompts(*(model.embed(p) for p in (clip.caption, "", prompt)))
    denoiser = Denoiser(model.unet, model.prediction_type)
    segs = segments(len(clip), thresholds.segment_length)
    x = dict.fromkeys(methods, prepared.source[0])
    with tokenflow_hooks(model.unet, conv_site=thresholds.conv_site) as hooks:
        for step, (t, alpha) in enumerate(zip(schedule.timesteps, schedule.alphas, strict=True)):
            keyframes = draw_keyframes(thresholds.keyframe_seed, step, segs)
            source = prepared.source[step]
            now = Moment(
                step,
                t,
                alpha,
                keyframes,
                source,
                prepared.clean,
                [],
                source,
                prompts,
                thresholds,
                len(schedule),
                clip,
            )
            now.tokens, now.conv = _source_pass(denoiser, hooks, now, prompts.source.unsqueeze(0))
            observe(now)
            for name, method in methods.items():
                noise = method(denoiser, hooks, now, x[name])
                x[name] = move(x[name], noise, alpha, schedule.alpha_after(step))
            on_step(1)
    return {name: decode(model, latents) for name, latents in x.items()}

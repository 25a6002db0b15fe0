"""One window at one sampling step: joint keyframe edit, propagation, guidance → noise prediction.

Published and default mode are choices in this one path: which keyframes a frame looks at, with
which weights, and where the source's features come from.

Shape suffixes: R branches, N frames in a batch, F frames of the window, K keyframes, C channels,
h w latent size, T prompt tokens, E embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tokenflow_batch.ahead import ahead
from tokenflow_batch.clock import measured
from tokenflow_batch.tokenflow.attention import Hooks
from tokenflow_batch.tokenflow.correspondence import Backend
from tokenflow_batch.tokenflow.ddim import noise_from_prediction
from tokenflow_batch.tokenflow.focus import Focus, guided, returned
from tokenflow_batch.tokenflow.keyframes import Neighbours
from tokenflow_batch.tokenflow.modes import DEFAULT, Guidance, Injection, Mode, branch_count
from tokenflow_batch.tokenflow.passes import Enough, FeaturePass, KeyframePass
from tokenflow_batch.tokenflow.propagation import PropagationPass
from tokenflow_batch.tokenflow.weights import Weights
from tokenflow_batch.tokenflow.windows import WindowMoment


class Denoiser:
    """A UNet as ε(x, t, c): casts, expands the embedding, converts the prediction, counts rows.

    Attributes:
        rows: batch rows sent through the UNet so far, the noise-free measure of work.
        partial_rows: rows of passes that have left it early; not among `rows`.
        work: all of them in whole rows: partial ones by their share of a row's FLOPs.
        flops: floating-point operations in it so far, which count partial passes for what they are.
    """

    def __init__(self, unet: nn.Module, prediction_type: str) -> None:
        self.unet, self.prediction_type = unet, prediction_type
        self.rows = self.partial_rows = self.flops = 0
        self.work = 0.0
        self._weights: dict[tuple[int, ...], Weights] = {}
        parameter = next(unet.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype

    @torch.no_grad()
    def noise(
        self,
        x_NChw: Tensor,
        t: int,
        alpha: float,
        embeds_NTE: Tensor,
        *,
        raw: bool = False,
        active: KeyframePass | PropagationPass | None = None,
    ) -> Tensor:
        """Predicted ε, (N, C, h, w) float32 on the UNet's device.

        Args:
            x_NChw: latents.
            t: timestep.
            alpha: ᾱ at t.
            embeds_NTE: text embeddings, one a row, or one for all.
            raw: take the UNet's output as ε whatever its prediction type, as the published
                inversion does.
            active: the pass that is on, if it changes self-attention; for counting.
        """
        x_NChw = x_NChw.to(self.device, torch.float32)
        self.rows += len(x_NChw)
        self.work += len(x_NChw)
        self.flops += self._weigh(x_NChw, embeds_NTE).of(len(x_NChw), active)
        predicted = self._predicted(x_NChw, t, embeds_NTE)
        kind = "epsilon" if raw else self.prediction_type
        return noise_from_prediction(predicted.float(), x_NChw, alpha, kind)

    @torch.no_grad()
    def until_enough(self, x_NChw: Tensor, t: int, embeds_NTE: Tensor, site: str) -> None:
        """Evaluate the UNet as far as the active pass wants, which leaves it by `Enough`.

        Args:
            x_NChw: latents.
            t: timestep.
            embeds_NTE: text embeddings, one a row, or one for all.
            site: the residual block after whose second convolution it leaves; for counting.
        """
        weights, rows = self._weigh(x_NChw, embeds_NTE), len(x_NChw)
        self.partial_rows += rows
        self.work += rows * weights.until(site) / weights.of(1)
        self.flops += rows * weights.until(site)
        with suppress(Enough):
            self._predicted(x_NChw, t, embeds_NTE)

    def counts(self) -> dict[str, float]:
        """All of these, by name."""
        names = ("rows", "flops", "partial_rows", "work")
        return {name: getattr(self, name) for name in names}

    def _predicted(self, x_NChw: Tensor, t: int, embeds_NTE: Tensor) -> Tensor:
        embeds = embeds_NTE.to(self.device, self.dtype).expand(len(x_NChw), -1, -1)
        timestep, x_NChw = torch.tensor(t, device=self.device), x_NChw.to(self.device, self.dtype)
        with measured("unet"):
            predicted: Any = self.unet(
                x_NChw, timestep, encoder_hidden_states=embeds, return_dict=False
            )[0]
        return predicted

    def _weigh(self, x_NChw: Tensor, embeds_NTE: Tensor) -> Weights:
        height, width, tokens = *x_NChw.shape[-2:], embeds_NTE.shape[-2]
        if (height, width, tokens) not in self._weights:
            weights = Weights(self.unet, (height, width), tokens)
            self._weights[height, width, tokens] = weights
        return self._weights[height, width, tokens]


class WindowInputs(Protocol):
    """What a window needs, by absolute frame index, at the step being computed."""

    def latents(self, frames: Sequence[int]) -> Tensor:
        """Edited latents x_t, (N, C, h, w)."""

    def source(self, frames: Sequence[int]) -> Tensor:
        """Inverted latents at the same timestep, (N, C, h, w)."""

    def conv(self, frames: Sequence[int]) -> Tensor:
        """Stored convolution features of the source, (N, C, h, w); not asked for where they are
        computed again."""

    def correspondences(self, frames: Sequence[int]) -> list[Tensor]:
        """Stored γ per site, each (N, 2, L) int64."""


@dataclass(frozen=True)
class Prompts:
    """Text embeddings, each (T, E)."""

    source: Tensor
    negative: Tensor
    target: Tensor


@dataclass(frozen=True)
class EditSettings:
    """What an edit does at every step.

    Attributes:
        guidance: its scale and steps.
        injection: Plug-and-Play thresholds in steps; zeros for SDEdit.
        steps: T, of the whole schedule.
        batch: ordinary frames per UNet call.
        mode: default or published.
        matching: correspondence backend, where they are found on the way.
        latent_hw: size of the latents.
        recompute_conv: the source's convolution features are not stored: frames go through the UNet
            up to there before each pass that needs them.
    """

    guidance: Guidance
    injection: Injection
    steps: int
    batch: int
    latent_hw: tuple[int, int]
    mode: Mode = DEFAULT
    matching: Backend = "torch"
    recompute_conv: bool = False

    def stores_conv(self, step: int) -> bool:
        """Whether stored convolution features are injected at a step."""
        stored = self.mode.stored_source and not self.recompute_conv
        return stored and self._lacks_conv(step)

    def recomputes_conv(self, step: int) -> bool:
        """Whether convolution features are computed and injected at a step."""
        wanted = self.mode.stored_source and self.recompute_conv
        return wanted and self._lacks_conv(step)

    def _lacks_conv(self, step: int) -> bool:
        """Whether features are injected that no source branch in every batch has."""
        return step < self.injection.conv_steps and not self.guidance.keeps(step)


def predict_window(
    denoiser: Denoiser,
    hooks: Hooks,
    inputs: WindowInputs,
    prompts: Prompts,
    settings: EditSettings,
    *,
    step: int,
    t: int,
    alpha: float,
    window: WindowMoment,
) -> Tensor:
    """Guided noise predictions of a window's frames at one sampling step.

    Args:
        denoiser: the UNet, with `hooks` installed on it.
        hooks: its seams.
        inputs: latents and stored source features.
        prompts: text embeddings.
        settings: the edit.
        step: sampling step, 0 the noisiest, for the injection thresholds.
        t: its timestep.
        alpha: ᾱ at t.
        window: its frames, keyframes and anchors at this step.

    Returns:
        (F, C, h, w) float32 on the CPU.
    """
    together = [*window.anchors, *window.keyframes]
    joint = _keyframe_pass(settings, hooks, inputs, window, step)
    if settings.guidance.focused(step):
        joint.focus = Focus(denoiser.unet, prompts.source, len(together), settings.latent_hw)
    call = _Call(denoiser, hooks, inputs, _texts(prompts, settings.guidance.on(step)), t, alpha)
    recompute = settings.recomputes_conv(step)
    if recompute and joint.branches == joint.edited:  # else they are the batch's own source's
        joint.stored_conv_KChw = call.features(inputs.source(together))
    call.run(joint, call.read(together, joint.branches), len(together))
    where_K1hw = joint.focus.weight()[len(window.anchors) :] if joint.focus else None
    predictions = []

    def passes() -> Iterator[tuple[PropagationPass, _Latents, range, Tensor | None]]:
        for start in range(0, len(window.frames), settings.batch):
            part = slice(start, start + settings.batch)
            batch, near = window.frames[part], window.neighbours[part]
            spread = _propagation_pass(
                settings, hooks, joint, inputs, batch, near, step, where_K1hw
            )
            if settings.guidance.returns(step):
                spread.source_focus = Focus(
                    denoiser.unet, prompts.target, len(batch), settings.latent_hw, of_source=True
                )
            spread.pin(denoiser.device)
            others = [f for f in batch if f not in window.keyframes] if recompute else []
            source = inputs.source(others) if others else None
            yield spread, call.read(batch, spread.branches), batch, source

    for spread, latents, batch, source in ahead(passes(), 1):
        if recompute:
            spread.stored_conv_NChw = call.features_of(batch, joint, window.keyframes, source)
        noise_RNChw = call.run(spread, latents, len(batch))
        noise = combined(noise_RNChw, latents, spread, settings.guidance, step, alpha)
        predictions.append(noise.cpu())
    return torch.cat(predictions)


def combined(
    noise_RNChw: Tensor,
    latents_R: Sequence[Tensor],
    spread: PropagationPass,
    guidance: Guidance,
    step: int,
    alpha: float,
) -> Tensor:
    """The branches' predictions as one, (N, C, h, w): guided, and led back to the source.

    Args:
        noise_RNChw: what a propagation pass has predicted.
        latents_R: from what, (N, C, h, w) a branch.
        spread: that pass. The source is not gone back to where its own frames, or the edited ones,
            are what the prompts differ about: an object may be drawn beside its place.
        guidance: the edit's.
        step: sampling step, 0 the noisiest.
        alpha: ᾱ there.
    """
    noise = noise_RNChw[-1]
    where_N1hw = spread.focus()
    if guidance.on(step):
        noise = guided(noise_RNChw[-2], noise, guidance.scale_at(step), where_N1hw)
    if where_N1hw is not None and spread.source_focus is not None:
        where_N1hw = torch.maximum(where_N1hw, spread.source_focus.weight())
        noise = returned(noise, noise_RNChw[0], latents_R[-1], latents_R[0], alpha, where_N1hw)
    return noise


def _texts(prompts: Prompts, guided: bool) -> tuple[Tensor, ...]:
    """What the branches are told, the source's first."""
    edited = (prompts.negative, prompts.target) if guided else (prompts.target,)
    return (prompts.source, *edited)


def _keyframe_pass(
    settings: EditSettings, hooks: Hooks, inputs: WindowInputs, window: WindowMoment, step: int
) -> KeyframePass:
    conv_on, guided = step < settings.injection.conv_steps, settings.guidance.on(step)
    stored = settings.stores_conv(step)
    return KeyframePass(
        branches=branch_count(
            settings.mode, settings.injection, settings.guidance, step, keyframe_pass=True
        ),
        inject_qk=step < settings.injection.qk_steps,
        inject_conv=conv_on,
        stored_conv_KChw=inputs.conv([*window.anchors, *window.keyframes]) if stored else None,
        attention=hooks.attention,
        keep_tokens=not settings.mode.stored_source,
        standing=window.standing,
        guided=guided,
    )


def _propagation_pass(
    settings: EditSettings,
    hooks: Hooks,
    joint: KeyframePass,
    inputs: WindowInputs,
    batch: range,
    neighbours: Sequence[Neighbours],
    step: int,
    where_K1hw: Tensor | None,
) -> PropagationPass:
    conv_on, hw = step < settings.injection.conv_steps, settings.latent_hw
    stored = settings.mode.stored_source
    return PropagationPass(
        joint,
        neighbours,
        branches=branch_count(
            settings.mode, settings.injection, settings.guidance, step, keyframe_pass=False
        ),
        inject_conv=conv_on,
        stored_conv_NChw=inputs.conv(batch) if settings.stores_conv(step) else None,
        stored_index=inputs.correspondences(batch) if stored else None,
        matching=settings.matching,
        grids=[site.grid(hw) for site in hooks.sites] if stored else None,
        following=settings.mode.following_at(step, settings.steps),
        focus_K1hw=where_K1hw,
        own=settings.guidance.own_branches(step),
    )


_Latents = list[Tensor]
"""One tensor a branch."""


@dataclass(frozen=True)
class _Call:
    """What stays the same over a window's UNet calls."""

    denoiser: Denoiser
    hooks: Hooks
    inputs: WindowInputs
    texts: tuple[Tensor, ...]
    t: int
    alpha: float

    def read(self, frames: Sequence[int], branches: int) -> _Latents:
        """What the branches start from, (N, C, h, w) each."""
        x = self.inputs.latents(frames)
        edited = len(self.texts) - 1
        own = [self.inputs.source(frames).to(x)] if branches > edited else []
        return [*own, *[x] * edited]

    def features(self, source_NChw: Tensor) -> Tensor:
        """Convolution features of source frames, (N, C, h, w), by a pass that ends there."""
        with self.hooks.during(FeaturePass()) as seen:
            self.denoiser.until_enough(source_NChw, self.t, self.texts[0], self.hooks.conv_site)
        assert seen.conv is not None  # noqa: S101 - it has left by its hook
        return seen.conv

    def features_of(
        self,
        batch: Sequence[int],
        joint: KeyframePass,
        keyframes: Sequence[int],
        others_NChw: Tensor | None,
    ) -> Tensor:
        """The same for a batch some of whose frames may be keyframes, whose features are known."""
        assert joint.conv is not None  # noqa: S101 - they were injected
        known = [f for f in batch if f in keyframes]
        found = [joint.conv[[keyframes.index(f) for f in known]]]
        if others_NChw is not None:
            found.append(self.features(others_NChw))
        order = [*known, *(f for f in batch if f not in keyframes)]
        return torch.cat(found)[[order.index(f) for f in batch]]

    def run(
        self,
        active: KeyframePass | PropagationPass,
        latents: _Latents,
        frames: int,
    ) -> Tensor:
        """(R, N, C, h, w) noise, branches in the order of `passes`."""
        embeds = self.texts[-len(latents) :]
        embeds_NTE = torch.cat([e.expand(frames, -1, -1) for e in embeds])
        focus = active.focus if isinstance(active, KeyframePass) else active.source_focus
        with self.hooks.during(active), focus.watching() if focus else nullcontext():
            noise = self.denoiser.noise(
                torch.cat(latents), self.t, self.alpha, embeds_NTE, active=active
            )
        return noise.unflatten(0, (len(latents), frames))

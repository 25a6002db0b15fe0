"""Noise schedule, DDIM steps in both directions, and fixed-point inversion.

Shapes: F frames (a batch), C latent channels, h × w latent size. All arithmetic is float32,
whatever the model computes in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

TOLERANCE = 0.1
"""Residual (RMS, of latents of unit variance) above which an inversion step has not converged.

The demo clip's largest is 0.02; a real video that the demo model was never meant for came to 0.12.
"""

CARRIED_OVER = 0.4
"""How much of a change of the latent comes back as predicted noise, of what noise would at most.

A denoiser takes what lies off its pictures for noise, all of it, and nothing of what lies along
them. With 0.3, 0.4 and 0.5 `benchmarks/inversion.py` had 46.8, 46.9 and 46.2 dB on a demo model.
"""

NoiseFn = Callable[[Tensor, int], Tensor]
"""(x_FChw, timestep) → predicted noise ε, same shape, float32."""


@dataclass(frozen=True)
class Schedule:
    """Sampling timesteps, noisiest first, and the signal level ᾱ at each.

    Attributes:
        timesteps: T timesteps, descending.
        alphas: ᾱ at each timestep, float64 Python numbers.
        final_alpha: ᾱ of a clean latent (`scheduler.final_alpha_cumprod`).
    """

    timesteps: tuple[int, ...]
    alphas: tuple[float, ...]
    final_alpha: float

    def __len__(self) -> int:
        return len(self.timesteps)

    def alpha_after(self, step: int) -> float:
        """ᾱ that sampling step `step` arrives at: the next timestep's, or the clean latent's."""
        return self.alphas[step + 1] if step + 1 < len(self) else self.final_alpha


def move(x_FChw: Tensor, noise_FChw: Tensor, alpha: float, alpha_to: float) -> Tensor:
    """Move a latent from signal level ᾱ `alpha` to `alpha_to` along the given noise (DDIM, η = 0).

    Song et al. 2021, eq. 12, used in both directions:
    x' = √ᾱ' · (x − √(1−ᾱ)·ε)/√ᾱ + √(1−ᾱ')·ε.
    """
    clean = (x_FChw - (1 - alpha) ** 0.5 * noise_FChw) / alpha**0.5
    return alpha_to**0.5 * clean + (1 - alpha_to) ** 0.5 * noise_FChw


def implied_noise(x_FChw: Tensor, x_to_FChw: Tensor, alpha: float, alpha_to: float) -> Tensor:
    """The noise along which `move` takes `x` to `x_to`: its inverse in the second argument."""
    scale = (alpha_to / alpha) ** 0.5
    gain = (1 - alpha_to) ** 0.5 - scale * (1 - alpha) ** 0.5
    return (x_to_FChw - scale * x_FChw) / gain


def renoise(
    clean_FChw: Tensor, noisiest_FChw: Tensor, alpha_noisiest: float, alpha_to: float
) -> Tensor:
    """The published code's start: x₀ brought to ᾱ `alpha_to` along the noisiest latent's noise.

    The noise is what is left of the noisiest inverted latent beside x₀.
    """
    noise = (noisiest_FChw - alpha_noisiest**0.5 * clean_FChw) / (1 - alpha_noisiest) ** 0.5
    return alpha_to**0.5 * clean_FChw + (1 - alpha_to) ** 0.5 * noise


def noise_from_prediction(
    prediction_FChw: Tensor, x_FChw: Tensor, alpha: float, prediction_type: str
) -> Tensor:
    """Turn a UNet's output into ε.

    Raises:
        ValueError: the prediction type is neither `epsilon`, `v_prediction` nor `sample`, or the
            schedule has zero signal here, where ε says nothing about the clean latent.
    """
    if alpha <= 0:
        raise ValueError("the noise schedule has zero terminal signal, which is not supported")
    if prediction_type == "epsilon":
        return prediction_FChw
    if prediction_type == "v_prediction":
        return alpha**0.5 * prediction_FChw + (1 - alpha) ** 0.5 * x_FChw
    if prediction_type == "sample":
        return (x_FChw - alpha**0.5 * prediction_FChw) / (1 - alpha) ** 0.5
    raise ValueError(f"unknown prediction type {prediction_type!r}")


def residual(x_FChw: Tensor, y_FChw: Tensor) -> Tensor:
    """Root-mean-square difference per frame, (F,) float32."""
    return (x_FChw - y_FChw).square().mean(dim=(1, 2, 3)).sqrt()


LOOKED_BACK = 4
"""Latents that `foreseen_noise` has a use for."""


def foreseen_noise(latents: Sequence[Tensor], alphas: Sequence[float]) -> Tensor | None:
    """The noise to start an inversion step along, from those that the steps before went along.

    It changes from step to step by nearly the same again, where a frame's inversion is smooth, and
    back and forth where it is not. So each frame goes on as it has changed last, 2·ε₁ − ε₂, if
    that would have been the better guess a step ago, and along ε₁ itself if not.

    Args:
        latents: before the step, the latest first, each (F, C, h, w): `LOOKED_BACK`, or as many
            as there are from the clean one on.
        alphas: ᾱ of each.

    Returns:
        (F, C, h, w), or None where no step has been made or none went anywhere.
    """
    noises = []
    for (x, alpha), (cleaner, alpha_cleaner) in pairwise(zip(latents, alphas, strict=True)):
        if alpha == alpha_cleaner:  # the first timestep can be the clean latent's own
            break
        noises.append(implied_noise(cleaner, x, alpha_cleaner, alpha))
    if len(noises) < LOOKED_BACK - 1:
        return noises[0] if noises else None
    last, second, third = noises
    better_F = residual(2 * second - third, last) < residual(second, last)
    return torch.where(better_F.view(-1, 1, 1, 1), 2 * last - second, last)


def longer_step(alpha: float, alpha_t: float) -> float:
    """By what the fixed-point iteration's first step is lengthened: over-relaxation.

    x ↦ move(x_s, ε(x, t)) has the slope g·∂ε/∂x with g = √(1−ᾱ_t) − √(ᾱ_t/ᾱ)·√(1−ᾱ). Where a
    denoiser takes a change of x for noise, ∂ε/∂x is 1/√(1−ᾱ_t); where not, 0. So slopes lie between
    0 and s = 1 − √(ᾱ_t/ᾱ)·√((1−ᾱ)/(1−ᾱ_t)), plain iteration comes from one side alone, and at the
    cleanest steps, where s is near 1, slowly. At a slope of c·s, a step 1/(1 − c·s) times as long
    arrives at once; c is `CARRIED_OVER`. It is less than twice as long, so between 0 and s it
    brings every slope nearer.

    Args:
        alpha: ᾱ of the cleaner latent.
        alpha_t: ᾱ of the noisier one.
    """
    steepest = 1 - ((alpha_t / alpha) * (1 - alpha) / (1 - alpha_t)) ** 0.5
    return 1 / (1 - CARRIED_OVER * steepest)


@dataclass(frozen=True)
class Inverted:
    """One inversion step's result.

    Attributes:
        x: latents at the noisier timestep, (F, C, h, w): where the last evaluation was made, so
            that latent, noise and features belong together.
        residual: how far that evaluation would still move the latent, RMS per frame, (F,);
            NaN for a plain step, which never evaluates at its result.
    """

    x: Tensor
    residual: Tensor


def invert_plain(
    noise_fn: NoiseFn, x_FChw: Tensor, t: int, alpha: float, alpha_t: float
) -> Inverted:
    """First-order inversion: the noise at the cleaner latent stands in for the noisier one's.

    One UNet row a frame (Song et al. 2021, §4.3).
    """
    x_t = move(x_FChw, noise_fn(x_FChw, t), alpha, alpha_t)
    return Inverted(x_t, torch.full((len(x_FChw),), torch.nan, device=x_FChw.device))


def invert_fixed_point(
    noise_fn: NoiseFn,
    x_FChw: Tensor,
    t: int,
    alpha: float,
    alpha_t: float,
    *,
    extra: int,
    warm_noise_FChw: Tensor | None = None,
    better: Callable[[Tensor], None] | None = None,
) -> Inverted:
    """Solve x_t = move(x_s, ε(x_t, t)), the sampler's own equation, by `1 + extra` evaluations.

    Starts along `warm_noise` (`foreseen_noise`) or, without one, along the noise at x_s, which
    costs the first evaluation. The first iteration goes `longer_step` times as far as the equation
    says. Of the iterates that were evaluated, each frame keeps the one with the smallest residual:
    on hard frames more iterations can make it worse.
    `1 + extra` UNet rows a frame (cf. Garibi et al., *ReNoise*, 2024).

    Args:
        noise_fn: predicted noise at a latent and a timestep.
        x_FChw: latents at the cleaner timestep.
        t: the noisier timestep.
        alpha: ᾱ of the cleaner one.
        alpha_t: ᾱ of the noisier one.
        extra: evaluations after the first.
        warm_noise_FChw: the noise to start along.
        better: told after an evaluation at an iterate for which frames it is the best so far, (F,)
            bool: theirs is the latent that it was made at.

    Raises:
        ValueError: `extra` is below 1.
    """
    if extra < 1:
        raise ValueError(f"fixed-point inversion needs extra ≥ 1, got {extra}")
    evaluations = 1 + extra
    if warm_noise_FChw is None:
        warm_noise_FChw = noise_fn(x_FChw, t)
        evaluations -= 1
    iterate = move(x_FChw, warm_noise_FChw, alpha, alpha_t)
    further = longer_step(alpha, alpha_t)
    best: Inverted | None = None
    for _ in range(evaluations):
        following = move(x_FChw, noise_fn(iterate, t), alpha, alpha_t)
        found = Inverted(iterate, residual(following, iterate))
        improved_F = _improved(best, found)
        if better is not None:
            better(improved_F)
        best = found if best is None else _chosen(improved_F, found, best)
        iterate = iterate + further * (following - iterate)
        further = 1.0  # more than one would run away from where a model's slopes are negative
    assert best is not None  # noqa: S101 - evaluations ≥ 1
    return best


def converged(found: Inverted) -> Tensor:
    """Which frames solve the sampler's equation to within `TOLERANCE`, (F,) bool; not if NaN."""
    return found.residual <= TOLERANCE


def retry(
    noise_fn: NoiseFn,
    x_FChw: Tensor,
    found: Inverted,
    t: int,
    alpha: float,
    alpha_t: float,
    *,
    evaluations: int = 6,
) -> Inverted:
    """Go on with frames on which the plain iteration swings or runs away, in half steps.

    Averaging an iterate with its successor converges where the iteration's slope is between -3 and
    1 instead of -1 and 1. A frame whose latents are not finite begins anew at the cleaner latent.

    Args:
        noise_fn: as in `invert_fixed_point`.
        x_FChw: latents at the cleaner timestep.
        found: best so far.
        t: the noisier timestep.
        alpha: ᾱ of the cleaner one.
        alpha_t: ᾱ of the noisier one.
        evaluations: UNet rows a frame.

    Returns:
        The best of `found` and all new iterates, per frame.
    """
    usable = torch.isfinite(found.x).flatten(1).all(dim=1).view(-1, 1, 1, 1)
    iterate = torch.where(usable, found.x, (alpha_t / alpha) ** 0.5 * x_FChw)
    best = found
    for _ in range(evaluations):
        following = move(x_FChw, noise_fn(iterate, t), alpha, alpha_t)
        new = Inverted(iterate, residual(following, iterate))
        best = _chosen(_improved(best, new), new, best)
        iterate = (iterate + following) / 2
    return best


def _improved(old: Inverted | None, new: Inverted) -> Tensor:
    """For which frames the new iterate is at least as good, (F,) bool."""
    if old is None:
        return torch.ones_like(new.residual, dtype=torch.bool)
    return (new.residual <= old.residual) | old.residual.isnan()


def _chosen(first_F: Tensor, one: Inverted, other: Inverted) -> Inverted:
    x = torch.where(first_F.view(-1, 1, 1, 1), one.x, other.x)
    return Inverted(x, torch.where(first_F, one.residual, other.residual))

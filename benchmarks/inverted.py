"""A generated clip, inverted: where every method of `methods` starts from.

Shape suffixes: N frames in a batch, C channels, h w latent size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenflow_batch.demo.scenes import Clip
from tokenflow_batch.metrics import psnr
from tokenflow_batch.models import Model
from tokenflow_batch.tokenflow.ddim import (
    LOOKED_BACK,
    Inverted,
    Schedule,
    converged,
    foreseen_noise,
    invert_fixed_point,
    invert_plain,
    move,
    retry,
)
from tokenflow_batch.tokenflow.denoise import Denoiser
from tokenflow_batch.tokenflow.modes import inversion_evaluations

BATCH = 8
"""Frames per UNet call."""

PLAIN_STEPS: Final = (500, 50)
"""Inversion and sampling steps of the published code."""

_PLAIN_FRAMES: Final = 8


@dataclass(frozen=True)
class Prepared:
    """A clip, inverted.

    Attributes:
        clip: the ground truth.
        frames: the clip's own, (F, H, W, 3) uint8.
        clean: VAE latents, (F, C, h, w).
        source: inverted latents at every sampling step, (T, F, C, h, w).
        schedule: the sampling steps.
    """

    clip: Clip
    frames: NDArray[np.uint8]
    clean: Tensor
    source: Tensor
    schedule: Schedule


def invert(
    denoiser: Denoiser, clean: Tensor, embeds: Tensor, schedule: Schedule, extra: int, *, warm: bool
) -> Tensor:
    """Inverted latents at every step of the schedule, noisiest first, (T, F, C, h, w).

    Args:
        denoiser: the model.
        clean: (F, C, h, w).
        embeds: source prompt, one row for all frames.
        schedule: the steps.
        extra: fixed-point iterations; 0 is plain inversion.
        warm: begin each step along the noise that those before went along.
    """
    latents, alphas = [clean], [schedule.final_alpha]  # the latest first
    for i, (t, alpha_t) in enumerate(
        zip(schedule.timesteps[::-1], schedule.alphas[::-1], strict=True)
    ):

        def noise(x_NChw: Tensor, at: int, level: float = alpha_t) -> Tensor:
            return denoiser.noise(x_NChw, at, level, embeds)

        x, alpha = latents[0], alphas[0]
        if extra == 0:
            found = invert_plain(noise, x, t, alpha, alpha_t)
        else:
            start = foreseen_noise(latents[:LOOKED_BACK], alphas[:LOOKED_BACK]) if warm else None
            more = inversion_evaluations(i, extra) - 1
            found = invert_fixed_point(
                noise, x, t, alpha, alpha_t, extra=more, warm_noise_FChw=start
            )
            for n in (~converged(found)).nonzero().flatten().tolist():
                one = slice(n, n + 1)
                part = Inverted(found.x[one], found.residual[one])
                found.x[one] = retry(noise, x[one], part, t, alpha, alpha_t).x
        latents, alphas = [found.x, *latents], [alpha_t, *alphas]
    return torch.stack(latents[:-1])


def sample(denoiser: Denoiser, x: Tensor, embeds: Tensor, schedule: Schedule) -> Tensor:
    """Back to clean latents by DDIM, without guidance."""
    for step, (t, alpha) in enumerate(zip(schedule.timesteps, schedule.alphas, strict=True)):
        x = move(x, denoiser.noise(x, t, alpha, embeds), alpha, schedule.alpha_after(step))
    return x


def prepare(model: Model, clip: Clip, steps: int) -> Prepared:
    """Encode a clip and invert it at the default preset, `BATCH` frames at a time."""
    frames = np.stack(list(clip.frames()))
    clean, schedule = model.encode(frames), model.schedule(steps)
    embeds = model.embed(clip.caption).unsqueeze(0)
    denoiser = Denoiser(model.unet, model.prediction_type)
    source = [invert(denoiser, part, embeds, schedule, 1, warm=True) for part in clean.split(BATCH)]
    return Prepared(clip, frames, clean, torch.cat(source, dim=1), schedule)


def decode(model: Model, latents: Tensor) -> NDArray[np.uint8]:
    """Frames, a few at a time."""
    return np.concatenate([model.decode(part) for part in latents.split(BATCH)])


def reconstructed(model: Model, prepared: Prepared, own: NDArray[np.uint8]) -> dict[str, float]:
    """PSNR in dB of sampling the inverted latents back, against the VAE's reconstruction."""
    denoiser = Denoiser(model.unet, model.prediction_type)
    embeds = model.embed(prepared.clip.caption).unsqueeze(0)
    parts = [
        sample(denoiser, x, embeds, prepared.schedule) for x in prepared.source[0].split(BATCH)
    ]
    values = [psnr(a, b) for a, b in zip(decode(model, torch.cat(parts)), own, strict=True)]
    return {"mean": float(np.mean(values)), "worst": float(np.min(values))}


def compare_inversions(model: Model, clip: Clip) -> dict[str, Any]:
    """Fixed point at 25 × 1 against the published code's many plain steps, on the same frames."""
    chosen = np.unique(np.linspace(0, len(clip) - 1, _PLAIN_FRAMES).round().astype(int))
    frames = np.stack([clip.frame(i) for i in chosen])
    clean = model.encode(frames)
    own, embeds = model.decode(clean), model.embed(clip.caption).unsqueeze(0)
    denoiser = Denoiser(model.unet, model.prediction_type)
    found: dict[str, Any] = {}
    for name, (steps, back, extra) in {
        "fixed point, 25 x 1": (25, 25, 1),
        f"plain, {PLAIN_STEPS[0]} sampled in {PLAIN_STEPS[1]}": (*PLAIN_STEPS, 0),
    }.items():
        inversion, sampling = model.schedule(steps), model.schedule(back)
        latents = invert(denoiser, clean, embeds, inversion, extra, warm=True)
        start = latents[inversion.timesteps.index(sampling.timesteps[0])]
        shown = model.decode(sample(denoiser, start, embeds, sampling))
        values = [psnr(a, b) for a, b in zip(shown, own, strict=True)]
        rows = sum(inversion_evaluations(i, extra) for i in range(steps)) + back
        found[name] = {"mean": float(np.mean(values)), "rows_per_frame": rows}
    return found

"""Stage `vae`: an AutoencoderKL (f = 4, 4 channels, 0.65 M parameters) for the scenes.

Tensor suffixes: N samples, C channels, H and W pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from accelerate import PartialState
from diffusers import AutoencoderKL
from torch import Tensor

from demo_training import linear_codec
from demo_training.data import Stream, generator, images, scene
from demo_training.export import make_readable
from demo_training.loop import LoopConfig, Run
from tokenflow_batch.demo.scenes import Domain, sample
from tokenflow_batch.demo.stills import TRAINED

SCALING_FACTOR: Final = 0.18215
"""Stable Diffusion's, so that code with the number written into it works."""

_KL_WEIGHT: Final = 1e-4


def loop_config(size: int, seed: int, steps: int, batch: int) -> LoopConfig:
    """Schedule of this stage."""
    return LoopConfig(
        data=f"scenes of {size} pixels",
        seed=seed,
        steps=steps,
        batch=batch,
        learning_rate=1e-3,
        hold=0.3,
        floor=0.01,
        warmup=50,
        betas=(0.9, 0.99),
        weight_decay=1e-4,
        ema_decay=0.995,
    )


def build(size: int) -> AutoencoderKL:
    """An untrained AutoencoderKL for images of `size` pixels."""
    channels = (16, 32, 64)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=size,
        scaling_factor=SCALING_FACTOR,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def held_out(seed: int, count: int, size: int, domain: Domain) -> Tensor:
    """Images that training does not see, (N, 3, H, W) float32 in [-1, 1]."""
    return images((scene(seed, Stream.HELD_OUT, i, domain) for i in range(count)), size)


@torch.inference_mode()
def reconstruction_psnr(vae: AutoencoderKL, pixels_NCHW: Tensor) -> float:
    """Mean peak signal-to-noise ratio over images, in dB, of decoding the latents' means."""
    batches = torch.split(pixels_NCHW.to(vae.device), 32)
    errors = [
        (vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1) - x).square()
        for x in batches
    ]
    per_image = torch.cat(errors).mean((1, 2, 3))
    return float((10 * torch.log10(4 / per_image)).mean())


@torch.no_grad()
def fold_whitening(vae: AutoencoderKL, pixels_NCHW: Tensor) -> None:
    """Make scaled latents zero-mean and unit-variance per channel, without changing any image.

    Diffusion wants unit-variance latents, and a scaling factor can only serve all channels at
    once. The two 1 × 1 convolutions at the bottleneck take the rest: z' = (z - mean) · k with
    k = 1 / (deviation · scaling factor), and its inverse.

    Args:
        vae: AutoencoderKL, changed in place.
        pixels_NCHW: images to measure on, float32 in [-1, 1].
    """
    batches = torch.split(pixels_NCHW.to(vae.device), 32)
    latents = torch.cat([vae.encode(x).latent_dist.mode() for x in batches])
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    k = 1 / (deviation * vae.config.scaling_factor)
    channels = len(k)
    to_latent, from_latent = vae.quant_conv, vae.post_quant_conv
    to_latent.weight[:channels] *= k.view(-1, 1, 1, 1)
    to_latent.bias[:channels] = (to_latent.bias[:channels] - mean) * k
    to_latent.bias[channels:] += 2 * k.log()  # log variance of the posterior
    from_latent.bias += from_latent.weight[:, :, 0, 0] @ mean
    from_latent.weight /= k.view(1, -1, 1, 1)


def train(folder: Path, *, seed: int, size: int, steps: int, batch: int) -> None:
    """Train the autoencoder on the full domain and save it, whitened, to `folder`/vae.

    Args:
        folder: work folder; holds the checkpoint and the log, too.
        seed: of initial weights and draws.
        size: side of the images in pixels, a multiple of 4.
        steps: optimizer steps in all.
        batch: images per step and process.
    """
    state = PartialState(cpu=not torch.cuda.is_available())
    torch.manual_seed(seed)
    vae = build(size)
    linear_codec.initialise(vae, held_out(seed + 1, 1000, size, TRAINED))
    vae.to(state.device)
    validation = held_out(seed, 64, size, TRAINED)
    if state.is_main_process:
        print(f"linear codec: {reconstruction_psnr(vae, validation):.2f} dB", flush=True)

    def losses(step: int) -> dict[str, Tensor]:
        rng = generator(seed, Stream.VAE, step, state.process_index)
        pixels = images((sample(rng, TRAINED) for _ in range(batch)), size).to(state.device)
        if rng.random() < 0.5:
            pixels = pixels.flip(3)
        posterior = vae.encode(pixels).latent_dist
        noise = rng.standard_normal(posterior.mean.shape, dtype="float32")
        latents = posterior.mean + posterior.std * torch.from_numpy(noise).to(state.device)
        decoded = vae.decode(latents).sample
        mse = F.mse_loss(decoded, pixels)
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        loss = F.l1_loss(decoded, pixels) + mse + _KL_WEIGHT * kl
        return {"loss": loss, "mse": mse, "kl": kl}

    run = Run(list(vae.parameters()), loop_config(size, seed, steps, batch), state, folder, "vae")
    run.fit(losses, evaluate=lambda: {"psnr": reconstruction_psnr(vae, validation)})
    run.use_average()
    if state.is_main_process:
        fold_whitening(vae, held_out(seed + 2, 256, size, TRAINED))
        print(f"moving average: {reconstruction_psnr(vae, validation):.2f} dB", flush=True)
        vae.save_pretrained(folder / "vae")
        make_readable(folder / "vae")
    state.wait_for_everyone()

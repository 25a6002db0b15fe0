"""Stage `unet`: text encoder and UNet, trained together on cached latents.

Tensor suffixes: N samples, C channels, h and w latent pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from accelerate import PartialState
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from demo_training.data import LatentCache, Stream, generator
from demo_training.export import save_pipeline
from demo_training.loop import LoopConfig, Run
from demo_training.tokenizer import MAX_TOKENS
from tokenflow_batch.demo.scenes import caption

TEXT_WIDTH: Final = 96
EMPTY_CAPTIONS: Final = 0.1
"""Share of samples trained without their caption, for classifier-free guidance."""

WEIGHT_CAP: Final = 6.0
"""Largest loss weight, at the noisiest timesteps."""

OBJECT_WEIGHT: Final = 4.0
"""Loss weight of latent pixels that an object covers or touches, where bare ground counts 1.

Objects fill a tenth of a picture, and their outlines are what is learned last.
"""


def loop_config(
    cache: LatentCache,
    seed: int,
    steps: int,
    batch: int,
    learning_rate: float,
    hold: float,
    save_every: int,
) -> LoopConfig:
    """Schedule of this stage."""
    return LoopConfig(
        data=cache.describe(),
        seed=seed,
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        hold=hold,
        floor=0.03,
        warmup=60,
        betas=(0.9, 0.98),
        weight_decay=1e-2,
        ema_decay=0.998,
        save_every=save_every,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained CLIPTextModel: width 96, 2 layers, 4 heads, 24 positions."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=256,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet(latent_size: int) -> UNet2DConditionModel:
    """An untrained UNet of Stable Diffusion 1.x's block types, 5.6 M parameters."""
    unet = UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64, 96, 96),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(2, 4, 4, 4),
        norm_num_groups=16,
    )
    # Stable Diffusion began with every residual branch at zero; diffusers leaves that out.
    nn.init.zeros_(unet.conv_out.weight)
    for module in unet.modules():
        kind = type(module).__name__
        if kind == "ResnetBlock2D":
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
        elif kind == "Transformer2DModel":
            nn.init.zeros_(module.proj_out.weight)
            nn.init.zeros_(module.proj_out.bias)
    return unet


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule, as a DDIMScheduler."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def stratified_timesteps(rng: np.random.Generator, count: int, steps: int = 1000) -> Tensor:
    """One timestep from each of `count` equal parts of the schedule, (N,) int64 in [0, steps).

    Losses differ by orders of magnitude between timesteps: strata take that out of the gradient's
    variance.
    """
    drawn = (np.arange(count) + rng.random(count)) / count * steps
    return torch.from_numpy(drawn).long().clamp(0, steps - 1)


def loss_weights(alphas_cumprod: Tensor) -> Tensor:
    """Loss weight per timestep for noise prediction, 1 / √SNR up to a cap, with mean 1.

    Plain noise prediction, and min-SNR weights too, spend most of the gradient on texture that
    can't be predicted; shapes are decided at high noise, where errors of ε are small numbers
    (Yu et al. 2023, on the bias of the usual loss).
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    weights = (1 / snr.sqrt()).clamp(max=WEIGHT_CAP)
    return weights / weights.mean()


def object_weights(share_Nhw: Tensor) -> Tensor:
    """Loss weight per latent pixel, from the share of it that objects cover.

    Args:
        share_Nhw: (N, h, w) float32 in [0, 1].

    Returns:
        (N, 1, h, w) float32: 1 on bare ground, `OBJECT_WEIGHT` on objects and a pixel around them.
    """
    around = functional.max_pool2d(share_Nhw.unsqueeze(1), 3, stride=1, padding=1)
    return 1 + (OBJECT_WEIGHT - 1) * around


@dataclass
class Denoising:
    """The loss of a step: noise prediction on a batch that depends on (seed, step, rank) alone.

    Attributes:
        unet: in training mode, like the text encoder.
        text_encoder: trained with it.
        tokenizer: of the captions.
        cache: the latents and what they show.
        alphas_cumprod: of the noise schedule, (1000,) float32 on the models' device.
        seed: of the draws.
        rank: of this process.
        batch: samples per step and process.
    """

    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    cache: LatentCache
    alphas_cumprod: Tensor
    seed: int
    rank: int
    batch: int

    def __post_init__(self) -> None:
        self.latents_NChw = self.cache.array()
        self.share_Nhw = self.cache.cover()
        self.weights = loss_weights(self.alphas_cumprod)

    def __call__(self, step: int) -> dict[str, Tensor]:
        """Weighted loss and plain mean squared error, scalars."""
        rng = generator(self.seed, Stream.UNET, step, self.rank)
        device = self.alphas_cumprod.device
        indices = rng.integers(0, self.cache.count, self.batch)
        tokens = self._tokens(rng, indices.tolist()).to(device)
        clean = torch.from_numpy(self.latents_NChw[indices]).to(device)
        t = stratified_timesteps(rng, self.batch).to(device)
        noise = torch.from_numpy(rng.standard_normal(clean.shape, dtype=np.float32)).to(device)

        signal = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        noisy = signal.sqrt() * clean + (1 - signal).sqrt() * noise
        text = self.text_encoder(tokens).last_hidden_state
        predicted = self.unet(noisy, t, encoder_hidden_states=text).sample
        error = (predicted - noise).square()
        share_Nhw = torch.from_numpy(self.share_Nhw[indices]).to(device).float() / 255
        weighted = (error * object_weights(share_Nhw)).mean((1, 2, 3))
        return {"loss": (weighted * self.weights[t]).mean(), "mse": error.mean()}

    def _tokens(self, rng: np.random.Generator, indices: list[int]) -> Tensor:
        captions = [
            "" if rng.random() < EMPTY_CAPTIONS else caption(self.cache.scene(index), rng)
            for index in indices
        ]
        tokens: Tensor = self.tokenizer(
            captions,
            padding="max_length",
            max_length=MAX_TOKENS,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return tokens


def _models(
    tokenizer: CLIPTokenizer, latent_size: int, init: Path | None
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """UNet and text encoder, float32: untrained, or those of a pipeline."""
    if init is None:
        return build_unet(latent_size), build_text_encoder(tokenizer)
    unet = UNet2DConditionModel.from_pretrained(init, subfolder="unet", variant="fp16")
    unet.register_to_config(sample_size=latent_size)
    text_encoder = CLIPTextModel.from_pretrained(init, subfolder="text_encoder", variant="fp16")
    return unet.float(), text_encoder.float()


def train(
    folder: Path,
    cache: LatentCache,
    out: Path,
    *,
    seed: int,
    steps: int,
    batch: int,
    learning_rate: float,
    hold: float,
    save_every: int,
    init: Path | None = None,
) -> None:
    """Train text encoder and UNet and save the whole pipeline.

    Args:
        folder: work folder with `tokenizer` and `vae`; gets the checkpoint and the log, which are
            named after `out`.
        cache: the latents.
        out: folder of the pipeline, half precision.
        seed: of initial weights and draws.
        steps: optimizer steps in all.
        batch: samples per step and process.
        learning_rate: peak.
        hold: share of the steps before the learning rate begins to fall.
        save_every: steps between checkpoints.
        init: pipeline to start from, such as one of a lower resolution; None starts afresh.
    """
    state = PartialState(cpu=not torch.cuda.is_available())
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    unet, text_encoder = _models(tokenizer, cache.array().shape[-1], init)
    unet.to(memory_format=torch.channels_last)  # a tenth faster on a CPU
    for model in (unet, text_encoder):
        model.to(state.device).train()
    scheduler = build_scheduler()
    losses = Denoising(
        unet,
        text_encoder,
        tokenizer,
        cache,
        scheduler.alphas_cumprod.to(state.device),
        seed=seed,
        rank=state.process_index,
        batch=batch,
    )
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    config = loop_config(cache, seed, steps, batch, learning_rate, hold, save_every)
    run = Run(parameters, config, state, folder, out.name)
    run.fit(losses)
    run.use_average()
    if state.is_main_process:
        save_pipeline(
            out,
            vae=AutoencoderKL.from_pretrained(folder / "vae"),
            text_encoder=text_encoder.eval(),
            tokenizer=folder / "tokenizer",
            unet=unet.eval(),
            scheduler=scheduler,
        )
    state.wait_for_everyone()

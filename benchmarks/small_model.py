"""Random models of diffusers' own classes, for benchmarks that are not about pictures.

Stable Diffusion's layout: a VAE of factor 8 with four latent channels, a UNet of four levels with
text and self-attention, a CLIP text encoder.

small: narrow, and without attention at the finest level, where the joint attention of a window's
keyframes would take nearly all of the time.
mid: all levels and blocks as in Stable Diffusion 1.x, a fifth as wide (about 1/25 of its FLOPs).
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tokenflow_batch.model_files import DEMO

_WIDTH = 32


def write_small_model(folder: Path, *, mid: bool = False) -> Path:
    """Save a model in diffusers' layout; returns `folder`."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(DEMO / "tokenizer")
    vae, unet = _vae(), _mid_unet() if mid else _unet()
    text_encoder = random_text_encoder(tokenizer, width=_WIDTH, inner=64, layers=2, heads=2)
    pipeline = in_layout(vae, unet, text_encoder, tokenizer)
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def in_layout(
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
) -> StableDiffusionPipeline:
    """Parts as a pipeline with Stable Diffusion's noise schedule."""
    return StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _unet() -> UNet2DConditionModel:
    unet = UNet2DConditionModel(
        sample_size=32,
        layers_per_block=1,
        block_out_channels=(16, 16, 32, 32),
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 2, "DownBlock2D"),
        up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * 2, "UpBlock2D"),
        cross_attention_dim=_WIDTH,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    # A gentle prediction, or the inversion would not converge and frames be retried.
    unet.conv_out.weight.data.mul_(0.1)
    return unet


def _mid_unet() -> UNet2DConditionModel:
    unet = UNet2DConditionModel(
        sample_size=32,
        layers_per_block=2,
        block_out_channels=(64, 128, 256, 256),
        down_block_types=(*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
        cross_attention_dim=_WIDTH,
        attention_head_dim=8,
    )
    unet.conv_out.weight.data.mul_(0.1)  # as above
    return unet


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=256,
        mid_block_add_attention=False,
    )


def random_text_encoder(
    tokenizer: CLIPTokenizer, *, width: int, inner: int, layers: int, heads: int
) -> CLIPTextModel:
    """For a tokenizer; `inner` is the width between the two layers of a feed-forward block."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=tokenizer.model_max_length,
            projection_dim=width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )

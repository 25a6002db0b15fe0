"""A Stable Diffusion model in miniature, random, made by the libraries' own classes.

Chosen so that nothing fits who assumes the usual: three latent channels, a VAE factor of 4, prompts
of 13 tokens, width 16.
"""

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tokenflow_batch.model_files import DEMO

CHANNELS, FACTOR, PROMPT_TOKENS, WIDTH = 3, 4, 13, 16
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def tiny_unet(seed=0, channels=CHANNELS, **changes):
    """A UNet of the SD 1.x layout whose attention and text really matter to its output."""
    torch.manual_seed(seed)
    config = {
        "sample_size": 16,
        "in_channels": channels,
        "out_channels": channels,
        "layers_per_block": 2,
        "block_out_channels": (16, 16, 32, 32),
        "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
        **changes,
    }
    unet = UNet2DConditionModel(**config).eval().requires_grad_(False)
    for name, weight in unet.named_parameters():
        if "attn1" in name and name.endswith("weight"):
            weight.mul_(2)
    return unet


def tiny_vae(seed=1):
    torch.manual_seed(seed)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=4,
        sample_size=32,
        mid_block_add_attention=False,
        scaling_factor=4.0,
    ).eval()


def tiny_text_encoder(seed=2):
    torch.manual_seed(seed)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=373,
            hidden_size=WIDTH,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=PROMPT_TOKENS,
            projection_dim=WIDTH,
            bos_token_id=371,
            eos_token_id=372,
            pad_token_id=372,
            initializer_factor=5.0,
        )
    ).eval()


def tiny_pipeline(*, prediction_type="epsilon", **unet_changes):
    tokenizer = CLIPTokenizer.from_pretrained(DEMO / "tokenizer", model_max_length=PROMPT_TOKENS)
    return StableDiffusionPipeline(
        vae=tiny_vae(),
        unet=tiny_unet(**unet_changes),
        text_encoder=tiny_text_encoder(),
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(**SCHEDULER, prediction_type=prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def copied(model: Path, to: Path) -> Path:
    """A model folder to spoil."""
    shutil.copytree(model, to)
    return to


def edit_json(path: Path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

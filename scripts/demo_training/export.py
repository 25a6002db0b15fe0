"""Saving what is released: a Stable Diffusion pipeline folder in half precision."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTokenizer


def make_readable(folder: Path) -> None:
    """Give every file below a folder mode 0644: some libraries save with 0600."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o644)


def save_pipeline(
    folder: Path,
    *,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: Path,
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
) -> None:
    """Save a text-to-image pipeline with fp16 weights (`variant="fp16"`, safetensors).

    Args:
        folder: destination; files of the same names are replaced.
        vae: turns latents into images; like the other models it is cast to float16 in place.
        text_encoder: turns tokens into the UNet's conditions.
        tokenizer: folder of the CLIPTokenizer; its files are copied as they are.
        unet: predicts noise.
        scheduler: of the sampling; its noise schedule must be the training's.
    """
    for model in (vae, unet):  # where training had them from is nobody's business
        model.register_to_config(_name_or_path="")
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(tokenizer),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(torch.float16)
    pipeline.save_pretrained(folder, variant="fp16", safe_serialization=True)
    # Saving again would leave out what earlier versions of transformers read.
    shutil.copytree(tokenizer, folder / "tokenizer", dirs_exist_ok=True)
    make_readable(folder)


@torch.no_grad()
def average_pipelines(folders: Sequence[Path], out: Path) -> None:
    """Save the mean of pipelines' UNets and text encoders.

    A network that went on from another's weights mostly stays in the same basin, so that the mean
    keeps what all can do (Wortsman et al. 2022, weight-space ensembles of a network and what was
    fine-tuned from it; model soups).

    Args:
        folders: saved pipelines with fp16 weights, each trained from one before; autoencoder,
            tokenizer and scheduler are the first's.
        out: folder of the mean.
    """
    kept, *others = (
        StableDiffusionPipeline.from_pretrained(
            folder, variant="fp16", safety_checker=None, dtype=torch.float32
        )
        for folder in folders
    )
    for name in ("unet", "text_encoder"):
        theirs = [getattr(other, name).state_dict() for other in others]
        for key, value in getattr(kept, name).named_parameters():
            value.copy_(torch.stack([value, *(weights[key] for weights in theirs)]).mean(dim=0))
    save_pipeline(
        out,
        vae=kept.vae,
        text_encoder=kept.text_encoder,
        tokenizer=folders[0] / "tokenizer",
        unet=kept.unet,
        scheduler=kept.scheduler,
    )

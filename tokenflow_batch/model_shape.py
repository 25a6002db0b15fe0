"""A model's sizes, read from its configuration files: what a plan needs, without torch."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenflow_batch.errors import ModelError
from tokenflow_batch.model_files import ModelFiles
from tokenflow_batch.unet_flops import UNetFlops, each

Config = dict[str, Any]


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Stable Diffusion 1.x / 2.x model.

    Attributes:
        latent_channels: C.
        vae_factor: pixels per latent in each direction.
        widths: channels of the UNet's levels, finest first.
        sites: level → number of self-attentions.
        flops: the UNet's arithmetic.
    """

    latent_channels: int
    vae_factor: int
    widths: tuple[int, ...]
    sites: dict[int, int]
    flops: UNetFlops

    @classmethod
    def of(cls, files: ModelFiles) -> ModelShape:
        """Read it from the model's folder, or the base configuration of a single file.

        Raises:
            ModelError: a configuration can't be read.
        """
        root = files.path if files.base_config is None else files.base_config
        unet, vae = (_read(root / part / "config.json") for part in ("unet", "vae"))
        try:
            return cls(
                int(vae["latent_channels"]),
                2 ** (len(vae["block_out_channels"]) - 1),
                tuple(unet["block_out_channels"]),
                _sites(unet),
                UNetFlops.of(unet, _text_tokens(root)),
            )
        except (KeyError, TypeError, IndexError) as error:
            raise ModelError(f"{root}: its configuration lacks {error}") from None

    @property
    def multiple(self) -> int:
        """What working width and height must be multiples of."""
        return self.vae_factor * 2 ** (len(self.widths) - 1)

    def frame_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a frame of (width, height) pixels."""
        width, height = size
        return self.latent_channels, height // self.vae_factor, width // self.vae_factor

    def tokens(self, latent_hw: tuple[int, int]) -> dict[int, int]:
        """Token count → number of sites, for latents of (h, w)."""
        found: Counter[int] = Counter()
        for level, count in self.sites.items():
            h, w = (-(-side // 2**level) for side in latent_hw)
            found[h * w] += count
        return dict(found)

    def conv_shape(self, latent_hw: tuple[int, int], site: str) -> tuple[int, int, int]:
        """(C, h, w) of the features of `up_blocks.N.resnets.M`, for latents of (h, w)."""
        level = max(len(self.widths) - 1 - int(site.split(".")[1]), 0)
        h, w = (-(-side // 2**level) for side in latent_hw)
        return self.widths[level], h, w


def _read(path: Path) -> Config:
    try:
        found: Config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: can't be read: {error}") from None
    return found


def _text_tokens(root: Path) -> int:
    """Tokens of a text embedding: every prompt is padded to that many."""
    length = int(_read(root / "text_encoder" / "config.json").get("max_position_embeddings", 77))
    path = root / "tokenizer" / "tokenizer_config.json"
    own = _read(path).get("model_max_length") if path.is_file() else None
    return min(length, int(own)) if own else length


def _sites(unet: Config) -> dict[int, int]:
    """Self-attentions per level: each transformer layer of a cross-attention block has one."""
    levels = len(unet["block_out_channels"])
    layers = each(unet.get("layers_per_block", 2), levels)
    deep = each(unet.get("transformer_layers_per_block") or 1, levels)
    found: Counter[int] = Counter()
    for level, kind in enumerate(unet["down_block_types"]):
        if "CrossAttn" in kind:
            found[level] += layers[level] * deep[level]
    for position, kind in enumerate(unet["up_block_types"]):
        level = levels - 1 - position
        if "CrossAttn" in kind:
            found[level] += (layers[level] + 1) * deep[level]
    if "CrossAttn" in (unet.get("mid_block_type") or "UNetMidBlock2DCrossAttn"):
        found[levels - 1] += deep[-1]
    return dict(found)

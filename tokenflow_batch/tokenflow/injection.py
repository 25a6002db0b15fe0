"""Where the method touches a Stable Diffusion UNet: the attention sites and the PnP sites.

Plug-and-Play (Tumanyan et al., CVPR 2023) injects the source's convolution features at
`up_blocks[1].resnets[1]` (another residual block can be chosen) and its queries and keys at the
decoder's self-attentions from `up_blocks[1].attentions[1]` on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

CONV_SITE = "up_blocks.1.resnets.1"
"""The residual block whose second convolution's output is injected, as published."""

QK_PREFIXES = (
    "up_blocks.1.attentions.1",
    "up_blocks.1.attentions.2",
    "up_blocks.2.attentions.0",
    "up_blocks.2.attentions.1",
    "up_blocks.2.attentions.2",
    "up_blocks.3.attentions.0",
    "up_blocks.3.attentions.1",
    "up_blocks.3.attentions.2",
)


@dataclass(frozen=True)
class Site:
    """One self-attention (`attn1`) of the UNet.

    Attributes:
        index: position in `attention_sites`.
        name: module path.
        level: resolution level; tokens are ⌈h/2^level⌉ × ⌈w/2^level⌉.
        inject_qk: whether PnP copies the source's queries and keys here.
    """

    index: int
    name: str
    level: int
    inject_qk: bool

    def grid(self, latent_hw: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of this site's tokens for latents of (h, w)."""
        h, w = (-(-side // 2**self.level) for side in latent_hw)
        return h, w

    def tokens(self, latent_hw: tuple[int, int]) -> int:
        """Tokens of this site for latents of (h, w)."""
        return math.prod(self.grid(latent_hw))


def _level(name: str, levels: int) -> int:
    part, position = name.split(".")[:2]
    if part == "mid_block":
        return levels - 1
    return int(position) if part == "down_blocks" else levels - 1 - int(position)


def attention_sites(unet: nn.Module) -> tuple[Site, ...]:
    """Every `attn1` of the UNet, in module order.

    Raises:
        ValueError: the UNet has none (not a Stable Diffusion UNet).
    """
    levels = len(_config(unet)["block_out_channels"])
    names = [n for n, _ in unet.named_modules() if n.endswith(".attn1")]
    if not names:
        raise ValueError("the UNet has no self-attention: not a Stable Diffusion 1.x / 2.x model")
    return tuple(
        Site(i, name, _level(name, levels), name.startswith(QK_PREFIXES))
        for i, name in enumerate(names)
    )


def conv_module(unet: nn.Module, site: str = CONV_SITE) -> nn.Module:
    """The second convolution of the residual block `site`.

    Raises:
        ValueError: the UNet lacks that layer.
    """
    try:
        return unet.get_submodule(f"{site}.conv2")
    except AttributeError:
        raise ValueError(f"the UNet has no {site}: PnP needs the SD 1.x / 2.x layout") from None


def conv_shape(
    unet: nn.Module, latent_hw: tuple[int, int], site: str = CONV_SITE
) -> tuple[int, int, int]:
    """(C, h, w) of the convolution features at `site`, for latents of (h, w).

    Raises:
        ValueError: the UNet lacks that layer.
    """
    conv = conv_module(unet, site)
    level = _level(site, len(_config(unet)["block_out_channels"]))
    h, w = (-(-side // 2**level) for side in latent_hw)
    return int(conv.out_channels), h, w  # type: ignore[arg-type]


def _config(unet: nn.Module) -> Mapping[str, Any]:
    config: Mapping[str, Any] = unet.config  # type: ignore[assignment]
    return config

"""Floating-point operations of a row through the UNet, counted from its configuration.

Multiplications and additions of convolutions, projections and attention, two for each pair, as
torch's counter has them; what is done value by value doesn't count. Without torch, so that `plan`
can weigh a pass that leaves the UNet early against a whole one.

The order is that of diffusers' `UNet2DConditionModel` in Stable Diffusion's layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

CORE = "core"
"""What `attn1` takes between its projections: queries times keys, weights times values."""

Operations = Iterator[tuple[str, int]]
"""In the order of evaluation, a module's name and what it takes."""


def focus_sites(names: Iterable[str]) -> list[str]:
    """The cross-attentions in which a pass looks for where two prompts differ (`focus`).

    Those of the two finest blocks on the way up that have any: coarser ones don't tell places
    apart, and on the way down they say less.

    Args:
        names: module paths of all of a UNet's `attn2`.
    """
    up = [name for name in names if name.startswith("up_blocks.")]
    finest = sorted({int(name.split(".")[1]) for name in up})[-2:]
    return [name for name in up if int(name.split(".")[1]) in finest]


@dataclass(frozen=True)
class UNetFlops:
    """A UNet's arithmetic.

    Attributes:
        widths: channels of the levels, finest first.
        latent_channels: C of the latents.
        layers: residual blocks on the way down, by level.
        deep: transformer layers of a block, by level.
        down, up: by position, whether a block has attention.
        mid: whether the middle has.
        text_width: of the text embeddings.
        text_tokens: T.
    """

    widths: tuple[int, ...]
    latent_channels: int
    layers: tuple[int, ...]
    deep: tuple[int, ...]
    down: tuple[bool, ...]
    up: tuple[bool, ...]
    mid: bool
    text_width: int
    text_tokens: int

    @classmethod
    def of(cls, config: Mapping[str, Any], text_tokens: int) -> UNetFlops:
        """From the UNet's configuration.

        Args:
            config: its `config.json`.
            text_tokens: length of the text embeddings.

        Raises:
            KeyError: something is not in there.
        """
        widths = tuple(config["block_out_channels"])
        width = config["cross_attention_dim"]
        return cls(
            widths,
            int(config["in_channels"]),
            each(config.get("layers_per_block", 2), len(widths)),
            each(config.get("transformer_layers_per_block") or 1, len(widths)),
            tuple("CrossAttn" in kind for kind in config["down_block_types"]),
            tuple("CrossAttn" in kind for kind in config["up_block_types"]),
            "CrossAttn" in (config.get("mid_block_type") or "UNetMidBlock2DCrossAttn"),
            width if isinstance(width, int) else width[0],
            text_tokens,
        )

    def row(self, latent_hw: tuple[int, int], site: str | None = None) -> int:
        """FLOPs of one row with plain self-attention.

        Args:
            latent_hw: (h, w) of the latents.
            site: a residual block, to leave the UNet after its second convolution; None for all.

        Raises:
            ValueError: there is no such block.
        """
        return _row(self, latent_hw, site)

    def joint(self, latent_hw: tuple[int, int], rows: int, pairs: int) -> int:
        """FLOPs of joint passes over keyframes.

        Args:
            latent_hw: (h, w) of the latents.
            rows: how many.
            pairs: over these rows, how many frames each attends to besides itself.
        """
        return rows * self.row(latent_hw) + pairs * self._core(latent_hw)

    def propagated(
        self, latent_hw: tuple[int, int], rows: int, searched: int = 0, kept: int = 0
    ) -> int:
        """FLOPs of propagation: rows whose self-attention is replaced.

        Args:
            latent_hw: (h, w) of the latents.
            rows: how many.
            searched: in how many pairs of frames correspondences are searched on the way.
            kept: how many of the rows keep their own.
        """
        core = self._core(latent_hw)
        attention = _total(self, latent_hw, ".attn1") + core
        # A search is a product, attention is two.
        whole = rows * self.row(latent_hw) + searched * core // 2
        return whole - (rows - kept) * attention

    def focus(self, latent_hw: tuple[int, int]) -> int:
        """FLOPs of finding out where two prompts differ, a frame."""
        return _focus(self, latent_hw)

    def _core(self, latent_hw: tuple[int, int]) -> int:
        return _total(self, latent_hw, f".{CORE}")

    def operations(self, latent_hw: tuple[int, int]) -> Operations:
        """All of a row."""
        widths, last = self.widths, len(self.widths) - 1
        areas = [latent_hw]
        for _ in range(last):
            h, w = areas[-1]
            areas.append((-(-h // 2), -(-w // 2)))
        pixels = [h * w for h, w in areas]
        yield "time_embedding", 2 * widths[0] * 4 * widths[0] + 2 * (4 * widths[0]) ** 2
        yield "conv_in", _conv(self.latent_channels, widths[0], pixels[0])
        before = widths[0]
        for level, width in enumerate(widths):
            name = f"down_blocks.{level}"
            for i in range(self.layers[level]):
                yield from self._resnet(f"{name}.resnets.{i}", before, width, pixels[level])
                if self.down[level]:
                    yield from self._transformer(f"{name}.attentions.{i}", level, pixels[level])
                before = width
            if level < last:
                yield f"{name}.downsamplers.0", _conv(width, width, pixels[level + 1])
        yield from self._resnet("mid_block.resnets.0", before, before, pixels[last])
        if self.mid:
            yield from self._transformer("mid_block.attentions.0", last, pixels[last])
        yield from self._resnet("mid_block.resnets.1", before, before, pixels[last])
        for position in range(last + 1):
            yield from self._up(position, before, pixels)
            before = widths[last - position]
        yield "conv_out", _conv(widths[0], self.latent_channels, pixels[0])

    def _up(self, position: int, before: int, pixels: list[int]) -> Operations:
        """A block on the way up; each residual block takes what its mirror image has left."""
        level, name = len(self.widths) - 1 - position, f"up_blocks.{position}"
        width, below = self.widths[level], self.widths[max(level - 1, 0)]
        count = self.layers[level] + 1
        for i in range(count):
            skip = below if i == count - 1 else width
            inputs = (before if i == 0 else width) + skip
            yield from self._resnet(f"{name}.resnets.{i}", inputs, width, pixels[level])
            if self.up[position]:
                yield from self._transformer(f"{name}.attentions.{i}", level, pixels[level])
        if level > 0:
            yield f"{name}.upsamplers.0", _conv(width, width, pixels[level - 1])

    def _resnet(self, name: str, inputs: int, width: int, pixels: int) -> Operations:
        yield f"{name}.conv1", _conv(inputs, width, pixels)
        yield f"{name}.time_emb_proj", 2 * 4 * self.widths[0] * width
        yield f"{name}.conv2", _conv(width, width, pixels)
        if inputs != width:
            yield f"{name}.conv_shortcut", 2 * inputs * width * pixels

    def _transformer(self, name: str, level: int, tokens: int) -> Operations:
        width = self.widths[level]
        square = 2 * tokens * width * width
        yield f"{name}.proj_in", square
        text = 4 * self.text_tokens * self.text_width * width  # its keys and values
        for i in range(self.deep[level]):
            block = f"{name}.transformer_blocks.{i}"
            yield f"{block}.attn1", 4 * square
            yield f"{block}.attn1.{CORE}", 4 * tokens * tokens * width
            yield f"{block}.attn2", 2 * square + text + 4 * tokens * self.text_tokens * width
            yield f"{block}.ff", (8 + 4) * square
        yield f"{name}.proj_out", square


@lru_cache(maxsize=256)
def _row(unet: UNetFlops, latent_hw: tuple[int, int], site: str | None) -> int:
    total = 0
    for name, flops in unet.operations(latent_hw):
        total += flops
        if name == f"{site}.conv2":
            return total
    if site is not None:
        raise ValueError(f"the UNet has no {site}")
    return total


@lru_cache(maxsize=256)
def _total(unet: UNetFlops, latent_hw: tuple[int, int], end: str) -> int:
    """Of all operations whose name ends so."""
    return sum(flops for name, flops in unet.operations(latent_hw) if name.endswith(end))


@lru_cache(maxsize=256)
def _focus(unet: UNetFlops, latent_hw: tuple[int, int]) -> int:
    told = {n: flops for n, flops in unet.operations(latent_hw) if n.endswith(".attn2")}
    return sum(told[name] for name in focus_sites(told))


def _conv(inputs: int, outputs: int, pixels: int) -> int:
    """A 3 × 3 convolution with so many pixels of output."""
    return 2 * 9 * inputs * outputs * pixels


def each(value: Any, levels: int) -> tuple[int, ...]:
    """A number for all levels, or one for each."""
    return (value,) * levels if isinstance(value, int) else tuple(value)

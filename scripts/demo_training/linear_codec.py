"""Start an AutoencoderKL as a linear codec: principal components of 4 × 4 pixel patches.

A default initialisation spends its first minutes finding out that latents are small pictures, and
may lose hues for good. This one writes the answer into the weights: residual branches are off,
downsamplers move 2 × 2 pixels into channels (the second one applies the principal components),
upsamplers interpolate the latents, and the last layers map them to colours.

What stands in the way is the GroupNorm and SiLU before each `conv_out`. Channels come in pairs
(x, -x), and silu(x) - silu(-x) = x exactly. Each group also holds a constant pair (K, -K), which
dominates its deviation: the norm then divides by nearly a constant, undone by `conv_out`.

Only for three levels (f = 4), one layer per block, four norm groups and no attention.
"""

from __future__ import annotations

import itertools
import math
from typing import Final

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import Decoder, Encoder
from torch import Tensor, nn

PATCH: Final = 4
_ENCODER_PAIR: Final = 6.0
_DECODER_PAIR: Final = 2.0
_PATCH_SAMPLE: Final = 40_000
# What `conv_out` had at random is kept at this size, to give all channels a gradient.
_RESIDUE: Final = 0.02


def _identity(conv: nn.Conv2d, count: int) -> None:
    """Pass the first `count` channels on, whatever the kernel size."""
    conv.weight[:count] = 0
    assert conv.bias is not None  # noqa: S101 - narrows the type
    conv.bias[:count] = 0
    centre = conv.kernel_size[0] // 2
    for channel in range(count):
        conv.weight[channel, channel, centre, centre] = 1


def principal_components(pixels_NCHW: Tensor, latent_channels: int) -> tuple[Tensor, ...]:
    """Whitened principal components of the patches of images.

    Args:
        pixels_NCHW: images, float32 in [-1, 1], sides multiples of 4.
        latent_channels: how many components.

    Returns:
        (encode, decode, mean): (L, 48), (L, 48) and (48,) float32. `encode @ (patch - mean)` has
        unit variance, `decode` is its least-squares inverse. Patches run over (y, x, colour).
    """
    n, c, height, width = pixels_NCHW.shape
    grid = pixels_NCHW.reshape(n, c, height // PATCH, PATCH, width // PATCH, PATCH)
    patches = grid.permute(0, 2, 4, 3, 5, 1).reshape(-1, PATCH * PATCH * c)
    mean = patches.mean(0)
    chosen = torch.randperm(len(patches))[:_PATCH_SAMPLE]
    _, _, rows = torch.linalg.svd((patches - mean)[chosen], full_matrices=False)
    rows = rows[:latent_channels]
    deviation = ((patches - mean) @ rows.T).std(0)[:, None]
    return rows / deviation, rows * deviation, mean


def _init_encoder(encoder: Encoder, encode: Tensor, mean: Tensor) -> None:
    latents = len(encode)
    _identity(encoder.conv_in, 3)
    to_depth = encoder.down_blocks[0].downsamplers[0].conv
    to_depth.weight[:12] = 0
    to_depth.bias[:12] = 0
    for y, x, color in itertools.product(range(2), range(2), range(3)):
        to_depth.weight[3 * (2 * y + x) + color, color, y, x] = 1
    _identity(encoder.down_blocks[1].resnets[0].conv_shortcut, 12)

    project = encoder.down_blocks[1].downsamplers[0].conv
    project.weight[:latents] = 0
    project.bias[:latents] = -(encode @ mean)
    components = encode.reshape(latents, PATCH, PATCH, 3)
    for y, x, color in itertools.product(range(PATCH), range(PATCH), range(3)):
        channel = 3 * (2 * (y % 2) + x % 2) + color
        project.weight[:latents, channel, y // 2, x // 2] = components[:, y, x, color]

    pairs = encoder.down_blocks[2].resnets[0].conv_shortcut
    group = pairs.weight.shape[0] // encoder.conv_norm_out.num_groups
    pairs.weight[:group] = 0
    pairs.bias[:group] = 0
    for channel in range(latents):
        pairs.weight[2 * channel, channel] = 1
        pairs.weight[2 * channel + 1, channel] = -1
    pairs.bias[2 * latents] = _ENCODER_PAIR
    pairs.bias[2 * latents + 1] = -_ENCODER_PAIR

    deviation = math.sqrt((2 * latents + 2 * _ENCODER_PAIR**2) / group)
    out = encoder.conv_out
    out.weight *= _RESIDUE
    out.bias.zero_()
    for channel in range(latents):
        out.weight[channel, 2 * channel, 1, 1] += deviation
        out.weight[channel, 2 * channel + 1, 1, 1] -= deviation
    out.weight[latents:] = 0
    out.bias[latents:] = -6  # log variance: hardly any noise to begin with


def _init_decoder(decoder: Decoder, decode: Tensor, mean: Tensor) -> None:
    latents = len(decode)
    _identity(decoder.conv_in, latents)
    *inner, last = decoder.up_blocks
    for block in inner:
        for resnet in block.resnets:
            if resnet.conv_shortcut is not None:
                _identity(resnet.conv_shortcut, latents)
        smooth = block.upsamplers[0].conv
        smooth.weight[:latents] = 0
        smooth.bias[:latents] = 0
        binomial = torch.tensor([0.25, 0.5, 0.25])
        for channel in range(latents):
            smooth.weight[channel, channel] = binomial[:, None] * binomial

    # From here on a patch's mean colour; detail within it is left to training.
    to_color = decode.reshape(latents, -1, 3).mean(1)
    offset = mean.reshape(-1, 3).mean(0)
    pairs = last.resnets[0].conv_shortcut
    group = pairs.weight.shape[0] // decoder.conv_norm_out.num_groups
    deviation = math.sqrt((2 * 0.25 + 2 * _DECODER_PAIR**2) / group)
    out = decoder.conv_out
    out.weight *= _RESIDUE
    out.bias.zero_()
    for color in range(3):
        first = color * group
        pairs.weight[first : first + 4] = 0
        pairs.weight[first, :latents, 0, 0] = to_color[:, color]
        pairs.weight[first + 1, :latents, 0, 0] = -to_color[:, color]
        pairs.bias[first : first + 4] = torch.tensor(
            [offset[color], -offset[color], _DECODER_PAIR, -_DECODER_PAIR]
        )
        out.weight[color, first, 1, 1] += deviation
        out.weight[color, first + 1, 1, 1] -= deviation


@torch.no_grad()
def initialise(vae: AutoencoderKL, pixels_NCHW: Tensor) -> None:
    """Set an autoencoder's weights, in place, to the linear codec of some images.

    Args:
        vae: AutoencoderKL of the kind that the module describes.
        pixels_NCHW: a few hundred images, float32 in [-1, 1], sides multiples of 4.
    """
    encode, decode, mean = principal_components(pixels_NCHW, vae.config.latent_channels)
    for module in vae.modules():
        if type(module).__name__ == "ResnetBlock2D":
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
    _init_encoder(vae.encoder, encode, mean)
    _init_decoder(vae.decoder, decode, mean)
    for conv in (vae.quant_conv, vae.post_quant_conv):
        _identity(conv, conv.weight.shape[0])

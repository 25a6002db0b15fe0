"""Eight bits for convolution features, with a scale for every frame and channel.

Plug-and-Play copies features of the source, so what is stored of them is what the edit sees. A
channel's largest magnitude becomes 127; each value is off by half a step, 1/254 of that, at most.

Shapes: N frames, C channels, h w feature map size.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 127


def quantise(features_NChw: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric 8-bit quantisation, a scale per frame and channel.

    A channel of zeros stays one (scale 0); a constant channel comes back but for rounding.

    Args:
        features_NChw: of any float type.

    Returns:
        (N, C, h, w) int8 in ±127 and the scales, (N, C) float32.

    Raises:
        ValueError: a value is not finite: it would take its whole channel along.
    """
    x_NChw = features_NChw.float()
    scale_NC = x_NChw.abs().amax(dim=(-2, -1)) / LEVELS
    if not bool(torch.isfinite(scale_NC).all()):
        raise ValueError("features that are not finite can't be quantised")
    steps_NChw = x_NChw / scale_NC[..., None, None]
    steps_NChw = torch.where(scale_NC[..., None, None] > 0, steps_NChw, 0)
    return steps_NChw.round().clamp(-LEVELS, LEVELS).to(torch.int8), scale_NC


def dequantise(steps_NChw: Tensor, scale_NC: Tensor) -> Tensor:
    """The features that `quantise` was given, but for its error, (N, C, h, w) float32.

    Args:
        steps_NChw: int8.
        scale_NC: float32.
    """
    return steps_NChw.float() * scale_NC[..., None, None]

"""Which keyframes of a long clip every window attends to: those that differ most in look.

Shape letters: N frames, K segments, A anchors, C h w latent channels and size, D numbers that make
up a look.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def look_of(latents_NChw: Tensor) -> Tensor:
    """What a frame looks like, coarsely: its clean latents averaged over an 8 × 8 grid.

    Args:
        latents_NChw: (N, C, h, w).

    Returns:
        (N, 64 C) float64; so little that a clip's segments can all be held at once.
    """
    return functional.adaptive_avg_pool2d(latents_NChw.double(), 8).flatten(1)


def spread_by_look(looks_KD: Tensor, count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The segments that differ most in look: farthest-point sampling (Gonzalez, 1985).

    The first is the one most like all others; every next is the one farthest from its nearest among
    those chosen, the earliest of equals.

    Args:
        looks_KD: (K, D) float64, one row a segment; see `look_of`.
        count: how many.

    Returns:
        min(count, K) different indices, ascending; and for every segment which of them, by
        position, is the most like it: an anchor itself, else the earliest of equals.
    """
    looks = looks_KD.cpu()
    chosen: list[int] = []
    start = (looks - looks.mean(dim=0)).square().sum(dim=1)
    nearest = torch.full((len(looks),), torch.inf, dtype=looks.dtype)
    while len(chosen) < min(count, len(looks)):
        chosen.append(int(nearest.argmax() if chosen else start.argmin()))
        nearest = nearest.minimum((looks - looks[chosen[-1]]).square().sum(dim=1))
        nearest[chosen] = -1.0  # those never again, even among equals
    if not chosen:
        return (), ()
    chosen.sort()
    apart_KA = torch.stack([(looks - looks[c]).square().sum(dim=1) for c in chosen], dim=1)
    apart_KA[chosen] = 1.0 - torch.eye(len(chosen), dtype=looks.dtype)
    return tuple(chosen), tuple(apart_KA.argmin(dim=1).tolist())

"""The motion that a token's neighbourhood agrees on: correspondences, seen as a smooth field.

A search for each token alone finds what looks alike, on the finest grid often another place than
the one that the token went to. What it says of most tokens around is right, though. So a token's
motion is the mean shift mode (Comaniciu and Meer, PAMI 2002) of its neighbours' motions, sought
from the coarser grid's on: the coarse grids know roughly, the fine ones precisely.

It is as steady as the exact flow, and like it carries a keyframe's faults along whole. So it is for
the first steps, which settle what is where; later ones add up what the 3 × 3 around say each for
itself (`voted`), which averages faults out and keeps detail.

Both follow from the stored correspondences, so nothing more is kept.

Shape suffixes: N frames in a batch, 2 their sides, M = 2·N, L tokens of a grid, h w its rows and
columns, V candidates, Z the parts of a motion: down, to the right, in tokens of the grid.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

Grid = tuple[int, int]
"""Rows and columns of tokens."""

_AROUND = 2
"""Tokens to each side whose motions count: 5 × 5 of them."""

_SPREAD = 2.0
"""Standard deviation, in tokens, with which neighbours count less the farther they are."""

_TOLERANCES = (2.0, 1.0)
"""Standard deviations, in tokens, of motions that agree: of one step of mean shift after the
other."""

_NOBODY = 1e-6
"""Weight of all neighbours together below which none of them agrees."""

_COARSER = 0.1
"""How much the coarser grid's motion counts beside them, the token itself being 1."""


def agreed_motion(index_N2L: Tensor, grid: Grid, coarser: Tensor | None) -> Tensor:
    """How far a token has moved, as most of those around it say, (M, Z, h, w) float32.

    Args:
        index_N2L: γ of N frames into two keyframes, int64.
        grid: of the tokens.
        coarser: this function's result for the next coarser grid; None for the coarsest, where the
            search begins at the neighbours' median.
    """
    found = _displacement(index_N2L, grid)
    start = None if coarser is None else _refined(coarser, grid)
    motion = _median(found) if start is None else start
    for tolerance in _TOLERANCES:
        weight = motion.new_full((len(motion), 1, *grid), 0 if start is None else _COARSER)
        total = torch.zeros_like(motion) if start is None else _COARSER * start
        for (dy, dx), beside, present_11hw in _neighbourhood(found):
            far_M1hw = (beside - motion).square().sum(dim=1, keepdim=True)
            exponent_M1hw = far_M1hw / tolerance**2 + (dy * dy + dx * dx) / _SPREAD**2
            share_M1hw = torch.exp(exponent_M1hw / -2) * present_11hw
            total = total + share_M1hw * beside
            weight = weight + share_M1hw
        # Where nobody is near to what was thought, that stands.
        motion = torch.where(weight > _NOBODY, total / weight.clamp(min=_NOBODY), motion)
    return motion


def between_tokens(motion_MZhw: Tensor) -> tuple[Tensor, Tensor]:
    """The four tokens between which each motion ends, and their bilinear weights.

    Args:
        motion_MZhw: from `agreed_motion`.

    Returns:
        (N, 2, L, 4) int64 and float32; a motion off the grid ends at its border.
    """
    rows, columns = motion_MZhw.shape[2:]
    y_h1, x_w = _places((rows, columns), motion_MZhw.device)
    to_y = (y_h1 + motion_MZhw[:, 0]).clamp(0, rows - 1)
    to_x = (x_w + motion_MZhw[:, 1]).clamp(0, columns - 1)
    top, left = to_y.floor(), to_x.floor()
    down, right = to_y - top, to_x - left
    top, left = top.long(), left.long()
    bottom, beyond = (top + 1).clamp(max=rows - 1), (left + 1).clamp(max=columns - 1)
    corners = (
        (top, left, (1 - down) * (1 - right)),
        (top, beyond, (1 - down) * right),
        (bottom, left, down * (1 - right)),
        (bottom, beyond, down * right),
    )
    index_MhwV = torch.stack([y * columns + x for y, x, _ in corners], dim=-1)
    weight_MhwV = torch.stack([weight for *_, weight in corners], dim=-1)
    index, weight = (x.flatten(1, 2).unflatten(0, (-1, 2)) for x in (index_MhwV, weight_MhwV))
    return index, weight


def voted(index_N2L: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The tokens that the 3 × 3 around say, and how much each counts: 1-2-1 both ways.

    If the token at p + δ corresponds to q, then p should correspond to q − δ. What leads off the
    grid doesn't count.

    Args:
        index_N2L: γ of N frames into two keyframes, int64.
        grid: of the tokens.

    Returns:
        (N, 2, L, 9) int64 and float32, which sums to 1 over the nine.
    """
    rows, columns = grid
    y_h1, x_w = _places(grid, index_N2L.device)
    candidates, weights = [], []
    for dy, dx in itertools.product((-1, 0, 1), repeat=2):
        y, x = y_h1 + dy, x_w + dx
        present_hw = (y >= 0) & (y < rows) & (x >= 0) & (x < columns)
        beside_L = (y.clamp(0, rows - 1) * columns + x.clamp(0, columns - 1)).flatten()
        match_N2L = index_N2L[..., beside_L]
        to_y, to_x = match_N2L // columns - dy, match_N2L % columns - dx
        inside = (to_y >= 0) & (to_y < rows) & (to_x >= 0) & (to_x < columns)
        counts_N2L = present_hw.flatten() & inside
        candidates.append(torch.where(counts_N2L, to_y * columns + to_x, 0))
        weights.append(counts_N2L * float((2 - abs(dy)) * (2 - abs(dx))))
    weight_N2LV = torch.stack(weights, dim=-1)
    return torch.stack(candidates, dim=-1), weight_N2LV / weight_N2LV.sum(dim=-1, keepdim=True)


def _places(grid: Grid, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows (h, 1) and columns (w,)."""
    rows, columns = (torch.arange(side, device=device) for side in grid)
    return rows.unsqueeze(1), columns


def _displacement(index_N2L: Tensor, grid: Grid) -> Tensor:
    """(M, Z, h, w) float32."""
    y_h1, x_w = _places(grid, index_N2L.device)
    there_Mhw = index_N2L.flatten(0, 1).unflatten(1, grid)
    apart = (there_Mhw // grid[1] - y_h1, there_Mhw % grid[1] - x_w)
    return torch.stack(apart, dim=1).float()


def _neighbourhood(found_MZhw: Tensor) -> Iterator[tuple[tuple[int, int], Tensor, Tensor]]:
    """By (dy, dx), the motions found there, and whether there is a token, (1, 1, h, w) float32."""
    rows, columns = found_MZhw.shape[2:]
    border = (_AROUND,) * 4
    padded = functional.pad(found_MZhw, border)
    present = functional.pad(torch.ones_like(found_MZhw[:1, :1]), border)
    for dy, dx in itertools.product(range(2 * _AROUND + 1), repeat=2):
        part = (..., slice(dy, dy + rows), slice(dx, dx + columns))
        yield (dy - _AROUND, dx - _AROUND), padded[part], present[part]


def _median(found_MZhw: Tensor) -> Tensor:
    """Of the neighbours' motions, by row and column; the lower of two in the middle."""
    around, here = [], []
    for _, beside, present_11hw in _neighbourhood(found_MZhw):
        around.append(beside.masked_fill(present_11hw == 0, torch.inf))
        here.append(present_11hw)
    middle_11hw = (torch.stack(here).sum(dim=0).long() - 1) // 2
    ordered_VMZhw = torch.stack(around).sort(dim=0).values
    return ordered_VMZhw.gather(0, middle_11hw.expand(1, *found_MZhw.shape)).squeeze(0)


def _refined(coarse_MZhw: Tensor, grid: Grid) -> Tensor:
    """A coarser grid's motion in a finer grid's tokens."""
    fine = functional.interpolate(coarse_MZhw, size=grid, mode="bilinear", align_corners=False)
    factors = [new / old for new, old in zip(grid, coarse_MZhw.shape[2:], strict=True)]
    return fine * fine.new_tensor(factors).view(1, 2, 1, 1)

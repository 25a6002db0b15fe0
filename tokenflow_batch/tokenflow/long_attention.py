"""Softmax attention to long sequences on a CPU, at more of the machine's matmul rate than SDPA.

A flash kernel goes over each tile of scores for its maximum, its exponentials and its sum, and
rescales what it had whenever the maximum grows. None of that is needed when a bound of a row's
scores is known before: |q·k| ≤ |q| max|k| (Cauchy-Schwarz). Softmax doesn't change when a row is
shifted by the bound instead of the maximum, and the shift and the sum can be left to the two matrix
products: queries and keys get one more channel, −|q| max|k| and 1, values a column of ones. What is
left per tile is product, exponential, product.

Where the bound is so far from a row's scores that too little is left of their exponentials, that
block of queries goes to SDPA.

Shape suffixes: N batch rows, H heads, L queries, M keys, D channels per head; G blocks side by
side, R their queries, T keys of a tile; W is D + 1, V that rounded up to what a vector unit takes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

LONG = 4096
"""Keys from which it is worth it."""

_ROWS, _KEYS = 1024, 384
"""Of a tile: its scores stay in a core's cache."""
_LEAST = 1e-20
"""The least sum of a row's exponentials. A float holds 1e-38: all that counts is in."""
_VECTOR = 16


def fits(q_NHLD: Tensor, k_NHMD: Tensor, v_NHMD: Tensor) -> bool:
    """Whether this is the kernel to take."""
    on_cpu = q_NHLD.device.type == "cpu" and q_NHLD.dtype == torch.float32
    needed = any(x.requires_grad for x in (q_NHLD, k_NHMD, v_NHMD))  # gradients: not from here
    return on_cpu and k_NHMD.shape[2] >= LONG and not needed


def attend_long(
    q_NHLD: Tensor, k_NHMD: Tensor, v_NHMD: Tensor, scale: float, counts_M: Tensor | None = None
) -> Tensor:
    """softmax(scale · q kᵀ + log counts) v, (N, H, L, D).

    Holds, besides the result, one head's keys and values and a tile of scores per thread.

    Args:
        q_NHLD: queries, float32, on the CPU.
        k_NHMD: keys.
        v_NHMD: values.
        scale: of the scores.
        counts_M: how often each key is there, as it were; once, if not given.
    """
    n, heads, length, width = q_NHLD.shape
    out_NHLD = q_NHLD.new_empty(n, length, heads, width).transpose(1, 2)
    for row in range(n):
        for head in range(heads):
            q_LD, k_MD, v_MD = (x[row, head] for x in (q_NHLD, k_NHMD, v_NHMD))
            _one_head(q_LD, k_MD, v_MD, scale, counts_M, out_NHLD[row, head])
    return out_NHLD


def _one_head(
    q_LD: Tensor,
    k_MD: Tensor,
    v_MD: Tensor,
    scale: float,
    counts_M: Tensor | None,
    out_LD: Tensor,
) -> None:
    width, side_by_side = q_LD.shape[1], torch.get_num_threads()
    k_MW, v_MV = _with_ones(k_MD, width + 1), _with_ones(v_MD, -(-(width + 1) // _VECTOR) * _VECTOR)
    if counts_M is not None:  # in the sums above and below the line
        v_MV *= counts_M.unsqueeze(-1)
    longest = k_MD.norm(dim=-1).max()
    scores = q_LD.new_empty(side_by_side * _ROWS * _KEYS)
    for start in range(0, len(q_LD), side_by_side * _ROWS):
        rows = slice(start, start + side_by_side * _ROWS)
        q_RD = q_LD[rows] * scale
        q_RW = torch.cat([q_RD, q_RD.norm(dim=-1, keepdim=True) * -longest], dim=-1)
        blocks = side_by_side if len(q_RW) % side_by_side == 0 else 1
        sums_RV = _summed(q_RW.unflatten(0, (blocks, -1)), k_MW, v_MV, scores)
        total_R1 = sums_RV[:, width : width + 1]
        if total_R1.min() < _LEAST:
            q, k, v = (x[None, None] for x in (q_LD[rows], k_MD, v_MD))
            mask = None if counts_M is None else counts_M.log().expand(1, 1, len(q_RD), -1)
            out_LD[rows] = functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=scale
            )
        else:  # what is no number, too: SDPA would make zeros of it
            out_LD[rows] = sums_RV[:, :width] / total_R1


def _summed(q_GRW: Tensor, k_MW: Tensor, v_MV: Tensor, scores: Tensor) -> Tensor:
    """Σ exp(q·k) v over all keys, (G · R, V); `scores` is room for a tile of them."""
    blocks, rows, _ = q_GRW.shape
    sums_GRV = v_MV.new_zeros(blocks, rows, v_MV.shape[1])
    for k_TW, v_TV in zip(k_MW.split(_KEYS), v_MV.split(_KEYS), strict=True):
        tile_GRT = scores[: blocks * rows * len(k_TW)].view(blocks, rows, -1)
        torch.bmm(q_GRW, k_TW.t().expand(blocks, -1, -1), out=tile_GRT)
        sums_GRV.baddbmm_(tile_GRT.exp_(), v_TV.expand(blocks, -1, -1))
    return sums_GRV.flatten(0, 1)


def _with_ones(x_MD: Tensor, width: int) -> Tensor:
    """Channels up to `width`: ones first, then zeros."""
    wide = x_MD.new_zeros(len(x_MD), width)
    wide[:, : x_MD.shape[1]] = x_MD
    wide[:, x_MD.shape[1]] = 1
    return wide

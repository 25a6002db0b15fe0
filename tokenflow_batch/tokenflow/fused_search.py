"""Normalisation, matrix product and argmax of the correspondence search in one Triton kernel.

No similarity ever reaches the GPU's memory, and tokens may come as they are: in half precision,
which tensor cores multiply exactly and sum in float32, and of any length, as only the candidates'
lengths matter to an argmax and those are summed up, in float32, along with the products.

Shapes: N query tokens, M candidate tokens, C channels. Importable only where Triton is installed;
with TRITON_INTERPRET=1 the kernel runs on a CPU, for tests.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"
# ruff: noqa: ANN001, ANN202 - Triton looks up every name in its functions, annotations too
from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

_QUERIES: Final = 64
_CANDIDATES: Final = 128
_CHANNELS: Final = 32
"""Sizes of a tile. Fixed, not tuned as it runs: the order of a sum decides its last bit."""

_PROGRAMS: Final = 256
"""Programs to keep a GPU busy: where queries make fewer, the candidates are cut into parts."""


@triton.jit
def _search(
    query_ptr,
    candidates_ptr,
    similar_ptr,
    index_ptr,
    n,
    m,
    width,
    part,
    queries: tl.constexpr,
    candidates: tl.constexpr,
    channels: tl.constexpr,
    precision: tl.constexpr,
):
    rows = tl.program_id(0) * queries + tl.arange(0, queries)
    first = tl.program_id(1) * part
    last = tl.minimum(first + part, m)
    inside = tl.arange(0, channels)
    best = tl.full((queries,), float("-inf"), tl.float32)
    index = tl.full((queries,), 0, tl.int32) + first
    for start in range(first, last, candidates):
        columns = start + tl.arange(0, candidates)
        dot = tl.zeros((queries, candidates), tl.float32)
        square = tl.zeros((candidates,), tl.float32)
        for c in range(0, width, channels):
            channel = c + inside
            q = tl.load(
                query_ptr + rows[:, None].to(tl.int64) * width + channel[None, :],
                mask=(rows[:, None] < n) & (channel[None, :] < width),
                other=0.0,
            )
            k = tl.load(
                candidates_ptr + columns[:, None].to(tl.int64) * width + channel[None, :],
                mask=(columns[:, None] < last) & (channel[None, :] < width),
                other=0.0,
            )
            dot = tl.dot(q, tl.trans(k), dot, input_precision=precision)
            wide = k.to(tl.float32)
            square += tl.sum(wide * wide, axis=1)
        similar = dot / tl.maximum(tl.sqrt(square), 1e-12)[None, :]
        similar = tl.where(columns[None, :] < last, similar, float("-inf"))
        found, where = tl.max(similar, axis=1, return_indices=True)  # the first of equals
        better = found > best
        best = tl.where(better, found, best)
        index = tl.where(better, start + where, index)
    place = tl.program_id(1).to(tl.int64) * n + rows
    tl.store(similar_ptr + place, best, mask=rows < n)
    tl.store(index_ptr + place, index, mask=rows < n)


def nearest_fused(query_NC: Tensor, candidates_MC: Tensor) -> Tensor:
    """γ[n] = argmax_m cos(query_n, candidate_m), the first of equals.

    Args:
        query_NC: tokens in float32, float16 or bfloat16, normalised or not.
        candidates_MC: of the same dtype, on the same device.

    Returns:
        (N,) int64 indices into the candidates, on the queries' device.
    """
    query_NC, candidates_MC = query_NC.contiguous(), candidates_MC.contiguous()
    (n, width), m = query_NC.shape, len(candidates_MC)
    tiles = triton.cdiv(m, _CANDIDATES)
    rows = triton.cdiv(n, _QUERIES)
    part = triton.cdiv(tiles, max(1, min(tiles, _PROGRAMS // rows))) * _CANDIDATES
    parts = triton.cdiv(m, part)
    similar_SN = torch.empty(parts, n, dtype=torch.float32, device=query_NC.device)
    index_SN = torch.empty(parts, n, dtype=torch.int32, device=query_NC.device)
    _search[(rows, parts)](
        query_NC,
        candidates_MC,
        similar_SN,
        index_SN,
        n,
        m,
        width,
        part,
        queries=_QUERIES,
        candidates=_CANDIDATES,
        channels=_CHANNELS,
        precision=_precision(query_NC),
        num_warps=4,
        num_stages=3,
    )
    if parts == 1:
        return index_SN[0].long()
    best_N = similar_SN.argmax(dim=0, keepdim=True)
    return index_SN.gather(0, best_N)[0].long()


def _precision(tokens: Tensor) -> str:
    """How float32 is multiplied: three passes of tensor cores, exact to a few units in the last
    place, where there are such; half precision needs no such choice."""
    tensor_cores = tokens.is_cuda and torch.cuda.get_device_capability(tokens.device) >= (8, 0)
    return "tf32x3" if tensor_cores else "ieee"

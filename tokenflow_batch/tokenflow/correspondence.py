"""Inter-frame correspondences: for each token the most similar token of another frame.

Shapes: N query tokens, M candidate tokens, C channels. Similarity is the cosine, so the search is
an exact inner product on normalised float32 tokens. FAISS, its torch twin and the fused Triton
kernel return the same indices save ties within float32's rounding.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from tokenflow_batch.clock import measured
from tokenflow_batch.tokenflow.keyframes import Neighbours

Backend = Literal["faiss", "torch", "triton"]

_TILE = 1 << 22
"""Similarities held at once by the torch twin (16 MB in float32)."""

_FAISS_BYTES = 1 << 28
"""What FAISS keeps on a GPU to compute in."""

_BLOCK = 64
"""Candidates whose largest similarity is found in one go."""


@cache
def faiss_available(device_type: str) -> bool:
    """Whether FAISS is installed, and works on a GPU if that is asked: tried, not guessed.

    On a GPU that it has no code for FAISS ends the process, so it is tried in another one.
    """
    if importlib.util.find_spec("faiss") is None:
        return False
    if device_type == "cuda":
        probe = [sys.executable, "-c", f"from {__name__} import _try_faiss; _try_faiss()"]
        return subprocess.run(probe, capture_output=True, check=False).returncode == 0
    try:
        import faiss  # noqa: F401
    except Exception:  # without its libraries: it has its own ways to say so
        return False
    return True


def _try_faiss() -> None:
    unit_NC = torch.eye(40, device="cuda")
    if _nearest_faiss(unit_NC.flip(0), unit_NC).tolist() != list(range(39, -1, -1)):
        raise SystemExit(1)


@cache
def triton_works(device_type: str) -> bool:
    """Whether Triton is installed and its kernel gives what it should here: tried, not guessed."""
    if device_type != "cuda":
        return False
    try:
        from tokenflow_batch.tokenflow.fused_search import nearest_fused

        tokens_NC = torch.eye(160, 40, device="cuda") + 0.1
        found = nearest_fused(tokens_NC[:40].flip(0), tokens_NC)
        return found.tolist() == list(range(39, -1, -1))
    except Exception:  # no compiler, no driver, a Triton for another torch: it fails in many ways
        return False


def choose_backend(wanted: str, device_type: str) -> Backend:
    """Resolve `auto`: on a GPU Triton's kernel, else FAISS, as far as they work; the torch twin
    elsewhere.

    On a CPU the twin is faster than FAISS from 256 tokens on (benchmarks/kernels.py).

    Raises:
        ValueError: a backend was asked for that isn't there for this device.
    """
    if wanted == "auto":
        if triton_works(device_type):
            return "triton"
        return "faiss" if device_type == "cuda" and faiss_available(device_type) else "torch"
    if wanted == "faiss" and not faiss_available(device_type):
        raise ValueError(f"FAISS has no support for {device_type} in this installation")
    if wanted == "triton" and not triton_works(device_type):
        raise ValueError(f"Triton's kernel doesn't work on {device_type} here")
    return cast(Backend, wanted)


def normalise(tokens_NC: Tensor) -> Tensor:
    """Unit-length tokens in float32 (half precision would overflow in the sum of squares)."""
    return torch.nn.functional.normalize(tokens_NC.float(), dim=-1)


def _as_they_are(tokens_NC: Tensor) -> Tensor:
    return tokens_NC


@measured("correspondence")
def side_by_side(tokens: Sequence[Tensor]) -> Tensor:
    """Tokens of several sites with one grid as one: their cosine is the mean of the sites'.

    Args:
        tokens: per site, φ (N, L, C of the site).

    Returns:
        (N, L, sum of C) float32, every site's part of unit length.
    """
    return torch.cat([normalise(site) for site in tokens], dim=-1)


def nearest(query_NC: Tensor, candidates_MC: Tensor, backend: Backend) -> Tensor:
    """γ[n] = argmax_m cos(query_n, candidate_m); both already normalised.

    Args:
        query_NC: float32 unit tokens.
        candidates_MC: float32 unit tokens.
        backend: `triton` takes tokens that are not normalised, and in half precision, too.

    Returns:
        (N,) int64 indices into the candidates, on the queries' device.
    """
    if backend == "faiss":
        return _nearest_faiss(query_NC, candidates_MC)
    if backend == "triton":
        from tokenflow_batch.tokenflow.fused_search import nearest_fused

        return nearest_fused(query_NC, candidates_MC)
    rows = min(len(query_NC), max(1, _TILE // len(candidates_MC)))
    tile = query_NC.new_empty(rows, len(candidates_MC))  # one for all: fresh memory costs more
    return torch.cat(
        [
            first_largest(torch.mm(q, candidates_MC.T, out=tile[: len(q)]))
            for q in query_NC.split(rows)
        ]
    )


def first_largest(similar_NM: Tensor) -> Tensor:
    """`argmax(dim=1)`, the first of equals, as fast as memory on a CPU too.

    Torch's argmax goes through a row one value at a time there, its maximum sixteen at a time. So
    the blocks' maxima are found first, then the place within the first block that has the largest.
    """
    n, m = similar_NM.shape
    if similar_NM.device.type != "cpu" or m % _BLOCK:
        return similar_NM.argmax(dim=1)
    blocks_NBm = similar_NM.view(n, m // _BLOCK, _BLOCK)
    best_N = blocks_NBm.amax(dim=2).argmax(dim=1)
    inside_N = blocks_NBm[torch.arange(n), best_N].argmax(dim=1)
    return best_N * _BLOCK + inside_N


def _nearest_faiss(query_NC: Tensor, candidates_MC: Tensor) -> Tensor:
    import faiss

    if query_NC.device.type == "cuda":
        import faiss.contrib.torch_utils  # lets knn_gpu take torch tensors in place

        _, index = faiss.knn_gpu(
            _gpu_resources(query_NC.device.index or 0),
            query_NC.contiguous(),
            candidates_MC.contiguous(),
            1,
            metric=faiss.METRIC_INNER_PRODUCT,
            device=query_NC.device.index or 0,
        )
        found_N: Tensor = index[:, 0]
        return found_N
    _, found = faiss.knn(
        np.ascontiguousarray(query_NC.numpy()),
        np.ascontiguousarray(candidates_MC.numpy()),
        1,
        metric=faiss.METRIC_INNER_PRODUCT,
    )
    return torch.from_numpy(found[:, 0])


@cache
def _gpu_resources(device: int) -> Any:
    import faiss

    resources = faiss.StandardGpuResources()
    resources.setTempMemory(_FAISS_BYTES)  # it would keep 1.5 GB
    resources.setDefaultNullStreamAllDevices()
    del device  # one set of resources per device: the cache key
    return resources


@measured("correspondence")
def match_frames(
    tokens_NLC: Tensor,
    keyframe_tokens_KLC: Tensor,
    neighbours: Sequence[Neighbours],
    backend: Backend,
) -> Tensor:
    """Correspondences of a batch of frames to their two neighbouring keyframes (paper eq. 5).

    Args:
        tokens_NLC: source tokens φ of N frames, L tokens each.
        keyframe_tokens_KLC: source tokens φ of the keyframes.
        neighbours: per frame, which keyframes it looks at. A frame that *is* its keyframe gets
            the identity, which an argmax could miss on repeated tokens.
        backend: of the search.

    Returns:
        (N, 2, L) int64: γ into the first and the second neighbour.
    """
    n_frames, n_tokens, _ = tokens_NLC.shape
    index_N2L = torch.arange(n_tokens, device=tokens_NLC.device).repeat(n_frames, 2, 1)
    ready = _as_they_are if backend == "triton" else normalise  # its kernel sees to it
    unit_NLC = ready(tokens_NLC)
    wanted: dict[int, list[tuple[int, int]]] = {}
    for n, near in enumerate(neighbours):
        if near.itself:
            continue
        wanted.setdefault(near.first, []).append((n, 0))
        if near.second != near.first:
            wanted.setdefault(near.second, []).append((n, 1))
    for k, places in wanted.items():
        queries = torch.cat([unit_NLC[n] for n, _ in places])
        found = nearest(queries, ready(keyframe_tokens_KLC[k]), backend)
        for (n, side), index_L in zip(places, found.split(n_tokens), strict=True):
            index_N2L[n, side] = index_L
    for n, near in enumerate(neighbours):
        if near.second == near.first:
            index_N2L[n, 1] = index_N2L[n, 0]
    return index_N2L

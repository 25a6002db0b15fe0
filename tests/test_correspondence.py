"""Nearest neighbours by cosine: FAISS and its torch twin under one suite, against brute force."""

import importlib.util

import numpy as np
import pytest
import torch
from devices import place_of

from tokenflow_batch.arrays import index_dtype
from tokenflow_batch.tokenflow import correspondence
from tokenflow_batch.tokenflow.correspondence import (
    choose_backend,
    first_largest,
    normalise,
    side_by_side,
)
from tokenflow_batch.tokenflow.keyframes import Neighbours, true_neighbours

GPU = torch.cuda.is_available()
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed (its wheels are part of torch's for CUDA)",
)
TRITON = pytest.param("triton", marks=needs_triton)
backends = pytest.mark.parametrize("backend", ["faiss", "torch", TRITON])
SIZES = [(1, 1, 1), (5, 3, 2), (128, 128, 16), (300, 70, 40), (64, 513, 320)]


def tokens(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def to_device(backend, *tensors):
    return [t.to(place_of(backend)) for t in tensors]


def nearest(query, candidates, backend):
    return correspondence.nearest(*to_device(backend, query, candidates), backend).cpu()


def match_frames(frames, keyframes, near, backend):
    on = to_device(backend, frames, keyframes)
    return correspondence.match_frames(*on, near, backend).cpu()


def cosines(query, candidates):
    """(N, M), float64, written out."""
    q, c = query.double().numpy(), candidates.double().numpy()
    q /= np.sqrt((q**2).sum(-1, keepdims=True))
    c /= np.sqrt((c**2).sum(-1, keepdims=True))
    return np.einsum("nc,mc->nm", q, c)


@backends
@pytest.mark.parametrize(("n", "m", "width"), SIZES)
def test_each_token_finds_the_one_with_the_largest_cosine(backend, n, m, width):
    query, candidates = tokens(0, n, width), tokens(1, m, width) * 7
    found = nearest(normalise(query), normalise(candidates), backend)
    assert found.shape == (n,)
    assert found.dtype == torch.int64
    similar = cosines(query, candidates)
    best = similar.max(axis=1)
    assert (similar[np.arange(n), found.numpy()] >= best - 1e-6).all()
    runner_up = np.sort(similar, axis=1)[:, -2] if m > 1 else np.full(n, -np.inf)
    clear = best - runner_up > 1e-6
    assert clear.mean() > 0.9 or width == 1
    assert np.array_equal(found.numpy()[clear], similar.argmax(axis=1)[clear])


@pytest.mark.parametrize("other", ["faiss", TRITON])
@pytest.mark.parametrize(("n", "m", "width"), SIZES)
def test_all_backends_find_the_same(n, m, width, other):
    query, candidates = normalise(tokens(2, n, width)), normalise(tokens(3, m, width))
    first, second = (nearest(query, candidates, b) for b in (other, "torch"))
    tied = (query * (candidates[first] - candidates[second])).sum(-1).abs() < 1e-6
    assert torch.equal(first[~tied], second[~tied])
    assert (first == second).float().mean() > 0.99 or width == 1


@backends
def test_every_token_finds_itself(backend):
    unit = normalise(tokens(4, 200, 32))
    assert torch.equal(nearest(unit, unit, backend), torch.arange(200))
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    assert torch.equal(order[nearest(unit, unit[order], backend)], torch.arange(200))


@backends
def test_length_does_not_matter_only_direction(backend):
    query = torch.tensor([[1.0, 0.1], [0.0, 1.0]])
    candidates = torch.tensor([[0.001, 0.0], [100.0, 99.0], [0.0, 0.002]])
    found = nearest(normalise(query), normalise(candidates), backend)
    assert found.tolist() == [0, 2]


@backends
def test_negative_similarities_have_a_largest_one_too(backend):
    query = normalise(torch.tensor([[1.0, 0.0]]))
    candidates = normalise(torch.tensor([[-1.0, 0.0], [-1.0, 1.0], [-1.0, 0.5]]))
    assert nearest(query, candidates, backend).tolist() == [1]


@pytest.mark.parametrize("tile", [1, 7, 64, 10_000])
def test_the_twin_s_tiles_do_not_show(tile, monkeypatch):
    query, candidates = normalise(tokens(5, 37, 8)), normalise(tokens(6, 41, 8))
    whole = nearest(query, candidates, "torch")
    monkeypatch.setattr(correspondence, "_TILE", tile)
    assert torch.equal(nearest(query, candidates, "torch"), whole)


@pytest.mark.parametrize("width", [1, 63, 64, 128, 640])
def test_of_equal_similarities_the_first_is_taken(width):
    generator = torch.Generator().manual_seed(9)
    similar = torch.randint(-2, 3, (50, width), generator=generator).float()
    similar[1] = -7
    similar[2, width // 2] = float("nan")
    assert torch.equal(first_largest(similar), similar.argmax(dim=1))
    assert first_largest(similar)[0] == similar[0].tolist().index(similar[0].max())


@backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_tokens_of_any_magnitude_are_compared_rightly(backend, dtype):
    direction = tokens(7, 50, 24)
    for scale in (6e4, 1.0, 1e-3):  # 6e4² overflows half precision
        query = (direction / direction.abs().max() * scale).to(dtype)
        unit = normalise(query)
        assert unit.dtype == torch.float32
        torch.testing.assert_close(unit.norm(dim=-1), torch.ones(50))
        assert torch.equal(nearest(unit, unit, backend), torch.arange(50))


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_fused_kernel_normalises_tokens_of_any_length(dtype):
    if dtype == torch.bfloat16 and not GPU:
        pytest.skip("Triton's interpreter can't multiply bfloat16")
    length = torch.linspace(0.01, 100, 300).view(-1, 1)
    query, candidates = tokens(10, 70, 40).to(dtype), (tokens(11, 300, 40) * length).to(dtype)
    exact = nearest(normalise(query), normalise(candidates), "torch")
    similar = cosines(query.float(), candidates.float())
    assert torch.equal(nearest(query, candidates, "triton"), exact)
    assert np.array_equal(exact.numpy(), similar.argmax(axis=1))
    assert nearest(torch.zeros(3, 40), candidates.float(), "triton").tolist() == [0, 0, 0]


@needs_triton
@pytest.mark.parametrize("programs", [1, 3, 1000])
def test_parts_of_the_candidates_do_not_show(programs, monkeypatch):
    fused = importlib.import_module("tokenflow_batch.tokenflow.fused_search")
    monkeypatch.setattr(fused, "_PROGRAMS", programs)
    unit, repeated = normalise(tokens(12, 100, 16)), normalise(tokens(13, 130, 16))
    candidates = torch.cat([repeated, repeated, repeated])
    found = nearest(unit, candidates, "triton")
    assert torch.equal(found, nearest(unit, candidates, "torch"))
    assert found.max() < 130


def test_a_zero_token_is_no_nan():
    assert normalise(torch.zeros(2, 3)).tolist() == [[0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("count", "dtype"),
    [
        (1, "uint8"),
        (256, "uint8"),
        (257, "uint16"),
        (65536, "uint16"),
        (65537, "uint32"),
        (2**32, "uint32"),
    ],
)
def test_the_smallest_type_that_holds_every_index(count, dtype):
    assert index_dtype(count) == dtype
    assert np.asarray([count - 1]).astype(dtype)[0] == count - 1


def test_more_tokens_than_any_index_can_say():
    with pytest.raises(ValueError, match="do not fit"):
        index_dtype(2**32 + 1)


@backends
@pytest.mark.parametrize("drawn", [[0], [6], [3], [1, 5], [0, 2, 6], [4, 5]])
def test_a_frame_is_matched_with_both_of_its_keyframes(backend, drawn):
    frames = tokens(8, 7, 12, 10)
    near = [true_neighbours(f, drawn, 8) for f in range(7)]
    index = match_frames(frames, frames[drawn], near, backend)
    assert index.shape == (7, 2, 12)
    assert index.dtype == torch.int64
    for f in range(7):
        for side, k in enumerate((near[f].first, near[f].second)):
            expected = cosines(frames[f], frames[drawn[k]]).argmax(axis=1)
            assert index[f, side].tolist() == expected.tolist()


@backends
def test_a_keyframe_s_own_correspondence_is_the_identity_even_of_repeated_tokens(backend):
    flat = torch.ones(2, 9, 4)
    near = [Neighbours(0, 0, 1.0, itself=True), Neighbours(0, 0, 1.0)]
    index = match_frames(flat, flat[:1], near, backend)
    assert index[0].tolist() == [list(range(9))] * 2
    assert (index[1] < 9).all()


@backends
def test_cutting_frames_into_batches_changes_no_correspondence(backend):
    frames, drawn = tokens(9, 9, 20, 16), [2, 7]
    near = [true_neighbours(f, drawn, 5) for f in range(9)]
    whole = match_frames(frames, frames[drawn], near, backend)
    for size in (1, 2, 4):
        parts = [
            match_frames(frames[i : i + size], frames[drawn], near[i : i + size], backend)
            for i in range(0, 9, size)
        ]
        assert torch.equal(torch.cat(parts), whole)


def test_which_backend_is_taken_where():
    assert choose_backend("auto", "cpu") == "torch"
    assert choose_backend("torch", "cuda") == "torch"
    assert choose_backend("faiss", "cpu") == "faiss"
    if correspondence.faiss_available("cuda"):
        assert choose_backend("faiss", "cuda") == "faiss"
    else:
        with pytest.raises(ValueError, match="FAISS has no support for cuda"):
            choose_backend("faiss", "cuda")
    with pytest.raises(ValueError, match="Triton's kernel doesn't work on cpu"):
        choose_backend("triton", "cpu")


@pytest.mark.parametrize(
    ("triton", "faiss", "taken"),
    [(True, True, "triton"), (False, True, "faiss"), (False, False, "torch")],
)
def test_on_a_gpu_what_works_is_taken(triton, faiss, taken, monkeypatch):
    monkeypatch.setattr(correspondence, "triton_works", lambda _: triton)
    monkeypatch.setattr(correspondence, "faiss_available", lambda _: faiss)
    assert choose_backend("auto", "cuda") == taken


# -- sites together --------------------------------------------------------------------------


def test_tokens_side_by_side_have_the_mean_cosine_of_their_sites():
    sites = [tokens(seed, 2, 6, width) for seed, width in enumerate((3, 8, 5))]
    joined = normalise(side_by_side(sites))
    assert joined.shape == (2, 6, 16)
    cosines = [normalise(t[0]) @ normalise(t[1]).T for t in sites]
    torch.testing.assert_close(joined[0] @ joined[1].T, torch.stack(cosines).mean(0))


def test_a_site_that_is_loud_counts_no_more_than_one_that_is_quiet():
    quiet, loud = tokens(0, 1, 5, 4), tokens(1, 1, 5, 4)
    torch.testing.assert_close(
        side_by_side([quiet, 100 * loud]), side_by_side([quiet, loud]), atol=1e-6, rtol=1e-5
    )

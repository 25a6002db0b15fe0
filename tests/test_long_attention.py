"""Attention to long sequences on a CPU against its formula in float64."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from tokenflow_batch.tokenflow import long_attention
from tokenflow_batch.tokenflow.attention import attend, merge_heads, split_heads, with_bias
from tokenflow_batch.tokenflow.long_attention import LONG, attend_long, fits

HEADS, WIDTH = 3, 8


def heads_of(seed, tokens, rows=1, width=WIDTH):
    generator = torch.Generator().manual_seed(seed)
    return split_heads(torch.randn(rows, tokens, HEADS * width, generator=generator), HEADS)


def formula(q, k, v, scale):
    q, k, v = (x.double() for x in (q, k, v))
    return torch.softmax(scale * q @ k.mT, dim=-1) @ v


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    ("queries", "keys", "rows", "width"),
    [(1, 1, 1, 8), (5, 7, 2, 16), (2049, 700, 1, 40), (300, LONG + 7, 2, 15), (4096, 512, 1, 64)],
)
def test_it_is_softmax_attention(queries, keys, rows, width, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        q, k, v = (heads_of(s, n, rows, width) for s, n in enumerate((queries, keys, keys)))
        got = attend_long(q, k, v, 0.4)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(got.double(), formula(q, k, v, 0.4), atol=2e-5, rtol=2e-5)
    assert merge_heads(got).data_ptr() == got.data_ptr()


def test_rows_far_below_their_bound_are_left_to_sdpa(monkeypatch):
    """A long key that no query looks at makes the bound useless; a block without it is not slow."""
    monkeypatch.setattr(long_attention, "_ROWS", 4)
    q, k, v = (heads_of(s, 12) for s in range(3))
    k[0, 1, 5] = 0
    k[0, 1, 5, 0] = 1e4
    q[0, 1, :, 0] = 0
    q[0, 1, 8:] *= 1e-4  # short queries have a near bound whatever the keys
    called = []

    def counted(q, k, v, **how):
        called.append(tuple(q.shape))
        return sdpa(q, k, v, **how)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    got = attend_long(q, k, v, 0.4)
    assert called == [(1, 1, 4, WIDTH)] * 2
    torch.testing.assert_close(got.double(), formula(q, k, v, 0.4), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("scale", [0.4, 30.0])
def test_sharp_attention_is_as_exact_as_sdpa(scale):
    """All weight on the token itself, as in a keyframe: exponents far apart."""
    q, v = heads_of(0, 200), heads_of(1, 200)
    got, usual = attend_long(q, q, v, scale), sdpa(q, q, v, scale=scale)
    exact = formula(q, q, v, scale)
    allowed = 4 * (usual - exact).abs().max() + 1e-6
    assert (got - exact).abs().max() <= allowed


def test_what_is_no_number_stays_none():
    q, k, v = (heads_of(s, 9) for s in range(3))
    q[0, 0, 3, 2] = float("nan")
    got = attend_long(q, k, v, 0.4)
    assert got[0, 0, 3].isnan().all()
    assert got[0, 1:].isfinite().all()


def test_only_long_sequences_in_float32_on_a_cpu_without_gradients_go_there():
    q, k = heads_of(0, 3), heads_of(1, LONG)
    assert fits(q, k, k)
    assert not fits(q, k[:, :, 1:], k[:, :, 1:])
    assert not fits(q.half(), k.half(), k.half())
    assert not fits(*(x.to("meta") for x in (q, k, k)))
    assert not fits(q, k, k.clone().requires_grad_())
    assert torch.equal(attend(q, k, k, 0.4, "sdpa"), attend_long(q, k, k, 0.4))
    short = k[:, :, 1:]
    assert torch.equal(attend(q, short, short, 0.4, "sdpa"), sdpa(q, short, short, scale=0.4))


@pytest.mark.parametrize("keys", [50, LONG + 3])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_a_key_that_counts_three_times_is_as_three_keys(backend, keys):
    q, k, v = (heads_of(s, n, 2) for s, n in enumerate((20, keys, keys)))
    counts = torch.randint(1, 40, (keys,), generator=torch.Generator().manual_seed(5))
    got = attend(q, k, v, 0.4, backend, counts.float())
    many = (x.repeat_interleave(counts, dim=2) for x in (k, v))
    torch.testing.assert_close(got.double(), formula(q, *many, 0.4), atol=2e-5, rtol=2e-5)


def test_counts_hold_where_rows_are_left_to_sdpa():
    q, k, v = (heads_of(s, 12) for s in range(3))
    k[0, 1, 5] = 0
    k[0, 1, 5, 0] = 1e4
    q[0, 1, :, 0] = 0
    counts = torch.arange(1, 13)
    got = attend_long(q, k, v, 0.4, counts.float())
    many = (x.repeat_interleave(counts, dim=2) for x in (k, v))
    torch.testing.assert_close(got.double(), formula(q, *many, 0.4), atol=2e-5, rtol=2e-5)


def test_a_channel_more_is_a_bias_of_the_keys():
    """What GPUs' kernels are given, by the formula."""
    q, k, v = (heads_of(s, n) for s, n in enumerate((20, 50, 50)))
    counts = torch.randint(1, 40, (50,), generator=torch.Generator().manual_seed(5))
    wide = with_bias(q, k, v, counts.log() / 0.4)
    got = formula(*wide, 0.4)
    assert not got[..., WIDTH:].any()
    many = (x.repeat_interleave(counts, dim=2) for x in (k, v))
    torch.testing.assert_close(got[..., :WIDTH], formula(q, *many, 0.4), atol=2e-5, rtol=2e-5)

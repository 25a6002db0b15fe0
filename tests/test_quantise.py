"""Eight-bit convolution features: the formula in float64, and what holds for all features."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from unet_probe import normal

from tokenflow_batch.tokenflow.quantise import LEVELS, dequantise, quantise

SIDES = st.integers(1, 4)
SHAPES = st.tuples(st.integers(1, 3), SIDES, SIDES, SIDES)
# Down to where float32 has all its digits, and up to where it ends.
MAGNITUDES = st.floats(2.0**-100, 2.0**127, width=32)
VALUES = st.one_of(st.just(0.0), MAGNITUDES, MAGNITUDES.map(lambda x: -x))
FEATURES = SHAPES.flatmap(lambda shape: arrays(np.float32, shape, elements=VALUES))


def in_float64(x):
    """The definition, a channel at a time."""
    steps, scales = np.zeros(x.shape, np.int8), np.zeros(x.shape[:2])
    for n, c in np.ndindex(*x.shape[:2]):
        scales[n, c] = np.abs(x[n, c].astype(np.float64)).max() / 127
        if scales[n, c] > 0:
            steps[n, c] = np.rint(x[n, c].astype(np.float64) / scales[n, c])
    return steps, scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_it_is_the_formula(dtype):
    x = (normal(0, 3, 5, 7, 6) * torch.logspace(-2, 2, 5).view(1, 5, 1, 1)).to(dtype)
    steps, scale = quantise(x)
    expected, scales = in_float64(x.float().numpy())
    assert (steps.dtype, scale.dtype) == (torch.int8, torch.float32)
    np.testing.assert_allclose(scale.numpy(), scales, rtol=1e-6)
    # But for values in the middle between two steps, where float32's rounding decides.
    off = np.abs(steps.numpy().astype(int) - expected)
    assert off.max() <= 1
    assert (off > 0).mean() < 0.01
    back = steps.numpy() * scales[..., None, None]
    np.testing.assert_allclose(dequantise(steps, scale).numpy(), back, rtol=1e-6)


@settings(max_examples=40)
@given(FEATURES)
def test_no_value_is_off_by_more_than_half_a_step(x):
    steps, scale = quantise(torch.from_numpy(x))
    back = dequantise(steps, scale).numpy()
    assert steps.abs().max() <= LEVELS
    peak = np.abs(x.astype(np.float64)).max(axis=(2, 3), keepdims=True)
    assert (np.abs(back - x.astype(np.float64)) <= peak / 254 * (1 + 1e-4)).all()
    assert (back[x == 0] == 0).all()
    assert (np.sign(back) * np.sign(x) >= 0).all()


@settings(max_examples=40)
@given(FEATURES)
def test_frames_and_channels_do_not_see_each_other(x):
    steps, scale = quantise(torch.from_numpy(x))
    for n, c in np.ndindex(*x.shape[:2]):
        alone, own = quantise(torch.from_numpy(x[n : n + 1, c : c + 1]))
        assert torch.equal(alone[0, 0], steps[n, c])
        assert torch.equal(own[0, 0], scale[n, c])


@settings(max_examples=40)
@given(FEATURES)
def test_what_came_out_goes_in_and_comes_out_again(x):
    first = dequantise(*quantise(torch.from_numpy(x)))
    again = dequantise(*quantise(first))
    torch.testing.assert_close(again, first, rtol=1e-6, atol=0)


def test_zeros_stay_and_constants_come_back():
    x = torch.zeros(1, 4, 2, 3)
    x[0, 1], x[0, 2], x[0, 3] = 0.3, -1e4, 1e-45  # the last has no scale in float32
    steps, scale = quantise(x)
    assert steps[0, :, 0, 0].tolist() == [0, 127, -127, 0]
    assert scale[0, 0] == scale[0, 3] == 0
    torch.testing.assert_close(dequantise(steps, scale)[:, :3], x[:, :3], rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(bad):
    x = normal(0, 2, 3, 4, 4)
    x[1, 2, 3, 0] = bad
    with pytest.raises(ValueError, match="not finite"):
        quantise(x)

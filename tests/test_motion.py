"""The motion that neighbours agree on: the formula, and what it makes of good and bad matches."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference_tokenflow import agreed, bilinear, enlarged

from tokenflow_batch.demo.scenes import Clip
from tokenflow_batch.tokenflow.motion import agreed_motion, between_tokens, voted


def matches(seed, frames, grid, wrong=1.0, shift=(0, 0)):
    """γ by a shift, but for a share of wrong ones."""
    rows, columns = grid
    draw, count = np.random.default_rng(seed), rows * columns
    y, x = np.divmod(np.arange(count), columns)
    right = np.clip(y + shift[0], 0, rows - 1) * columns + np.clip(x + shift[1], 0, columns - 1)
    index = np.broadcast_to(right, (frames, 2, count)).copy()
    bad = draw.random(index.shape) < wrong
    index[bad] = draw.integers(0, count, bad.sum())
    return torch.from_numpy(index)


@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (3, 2), (5, 7)])
@pytest.mark.parametrize("coarse", [None, (2, 3)])
def test_against_the_formula_in_float64(grid, coarse):
    index, before, start = matches(0, 2, grid, wrong=0.5), None, None
    if coarse is not None:
        before = agreed_motion(matches(1, 2, coarse, wrong=0.5), coarse, None)
    motion = agreed_motion(index, grid, before)
    candidates, weight = between_tokens(motion)
    assert motion.shape == (4, 2, *grid)
    for n, side in itertools.product(range(2), range(2)):
        m = 2 * n + side
        if before is not None:
            start = enlarged(before[m].double().flatten(1).T.tolist(), coarse, grid)
        expected = agreed(index[n, side].tolist(), *grid, start)
        got = motion[m].flatten(1).T
        torch.testing.assert_close(got.double(), torch.tensor(expected).double(), atol=1e-4, rtol=0)
        dense = torch.zeros(got.shape[0], got.shape[0]).scatter_add(
            1, candidates[n, side], weight[n, side]
        )
        torch.testing.assert_close(dense.double(), bilinear(got.tolist(), *grid), atol=1e-5, rtol=0)


def test_a_few_wrong_matches_change_nothing():
    """A shift of 3 down and 2 to the left, with every fifth match anywhere."""
    found = agreed_motion(matches(0, 3, (16, 16), wrong=0.2, shift=(3, -2)), (16, 16), None)
    inside = found[:, :, 2:11, 4:14]
    assert (inside[:, 0] - 3).abs().max() < 0.5
    assert (inside[:, 1] + 2).abs().max() < 0.5


def test_what_the_coarse_grid_knows_the_fine_one_finds_among_mostly_wrong_matches():
    coarse = agreed_motion(matches(0, 1, (8, 8), wrong=0.1, shift=(1, 0)), (8, 8), None)
    fine = matches(1, 1, (16, 16), wrong=0.7, shift=(2, 0))
    errors = {}
    for name, start in (("alone", None), ("from coarse", coarse)):
        inside = agreed_motion(fine, (16, 16), start)[:, :, 2:12, 2:14]
        errors[name] = (inside - torch.tensor([2.0, 0.0]).view(1, 2, 1, 1)).norm(dim=1).mean()
    assert errors["from coarse"] < 0.5
    assert errors["from coarse"] < errors["alone"] / 2


def test_a_border_between_two_motions_stays_sharp():
    """Left half still, right half two down: nobody is moved by the mean of the two."""
    index = matches(0, 1, (12, 12), wrong=0.0)
    y, x = np.divmod(np.arange(144), 12)
    index[:] = torch.from_numpy(np.where(x < 6, y, np.clip(y + 4, 0, 11)) * 12 + x)
    down = agreed_motion(index, (12, 12), torch.zeros(2, 2, 6, 6))[0, 0, 2:6]
    assert down[:, :5].abs().max() < 0.2
    known = torch.zeros(2, 2, 6, 6)
    known[:, 0, :, 3:] = 2
    down = agreed_motion(index, (12, 12), known)[0, 0, 2:6]
    assert down[:, :5].abs().max() < 0.5
    assert (down[:, 7:] - 4).abs().max() < 0.5


@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 2**31), st.booleans())
def test_weights_sum_to_one_on_the_grid_whatever_the_matches(rows, columns, seed, coarse):
    grid = (rows, columns)
    before = agreed_motion(matches(seed, 1, (1, 2)), (1, 2), None) if coarse else None
    index, weight = between_tokens(agreed_motion(matches(seed, 1, grid), grid, before))
    assert index.shape == weight.shape == (1, 2, rows * columns, 4)
    assert index.min() >= 0
    assert index.max() < rows * columns
    assert weight.min() >= 0
    torch.testing.assert_close(weight.sum(-1), torch.ones(1, 2, rows * columns))


def test_a_frame_that_is_its_keyframe_stays_where_it_is_to_the_bit():
    coarse, fine = matches(0, 1, (3, 4), wrong=0.0), matches(0, 1, (6, 8), wrong=0.0)
    motion = agreed_motion(fine, (6, 8), agreed_motion(coarse, (3, 4), None))
    index, weight = between_tokens(motion)
    assert not motion.any()
    own = index == torch.arange(48).view(1, 1, 48, 1)
    assert torch.equal((weight * own).sum(-1), torch.ones(1, 2, 48))


def test_frames_are_each_for_themselves():
    """The same bits beside other frames: windows and batches may be cut anywhere."""
    together = matches(4, 5, (9, 7), wrong=0.6)
    whole = agreed_motion(together, (9, 7), None)
    for n in range(5):
        alone = agreed_motion(together[n : n + 1], (9, 7), None)
        assert torch.equal(alone, whole[2 * n : 2 * n + 2])


def test_it_is_nearer_to_the_exact_flow_than_the_matches_are():
    """A generated clip whose every third match is wrong."""
    clip, grid = Clip.random(3, 12, 64), (16, 16)
    flow = clip.flow(2, 8)[2::4, 2::4].reshape(-1, 2) / 4
    seen = ~clip.occluded(2, 8)[2::4, 2::4].reshape(-1)
    own = np.arange(256)
    y = np.clip(own // 16 + np.rint(flow[:, 1]), 0, 15)
    x = np.clip(own % 16 + np.rint(flow[:, 0]), 0, 15)
    draw = np.random.default_rng(0)
    index = np.where(draw.random(256) < 1 / 3, draw.integers(0, 256, 256), y * 16 + x)
    given_N2L = torch.from_numpy(index.astype(np.int64)).expand(1, 2, -1)
    motion = agreed_motion(given_N2L, grid, None)[0].flatten(1).T.numpy()
    matched = np.stack([index // 16 - own // 16, index % 16 - own % 16], axis=1)
    errors = [np.linalg.norm(m - flow[:, ::-1], axis=1)[seen].mean() for m in (matched, motion)]
    assert errors[1] < errors[0] / 2


def numbered(rows, width):
    return np.arange(rows * width).reshape(rows, width)


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (1, 5), (4, 1), (3, 3), (5, 8)])
def test_votes_of_a_smooth_field_are_unanimous(rows, width):
    places = numbered(rows, width)
    identity = torch.from_numpy(places.reshape(1, 1, -1).repeat(2, 1).copy())
    index, weight = voted(identity, (rows, width))
    assert index.shape == weight.shape == (1, 2, rows * width, 9)
    torch.testing.assert_close(weight.sum(-1), torch.ones(1, 2, rows * width))
    chosen = torch.where(weight > 0, index, identity.unsqueeze(-1))
    assert torch.equal(chosen, identity.unsqueeze(-1).expand_as(index))


def test_a_token_alone_with_its_match_is_outvoted():
    places = numbered(5, 5)
    field = places.copy()
    field[2, 2] = 0  # should be 12
    index, weight = voted(torch.from_numpy(np.stack([field.ravel()] * 2)[None]), (5, 5))
    share = weight[0, 0, 12][index[0, 0, 12] == 12].sum()
    assert share == pytest.approx(12 / 16)
    # Its wrong match proposes places near 0 to its neighbours; off the grid they don't count.
    assert weight[0, 0, 7].sum() == pytest.approx(1)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**31))
def test_votes_stay_on_the_grid_and_keep_the_own_match(rows, width, seed):
    count = rows * width
    field = np.random.default_rng(seed).integers(0, count, (3, 2, count))
    index, weight = voted(torch.from_numpy(field), (rows, width))
    assert index.min() >= 0
    assert index.max() < count
    torch.testing.assert_close(weight.sum(-1), torch.ones(3, 2, count))
    own = (index == torch.from_numpy(field).unsqueeze(-1)) * weight
    assert (own.sum(-1) >= 4 / 16 - 1e-6).all()

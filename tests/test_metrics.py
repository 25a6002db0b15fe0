"""Metrics against cases whose value is known."""

import math

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenflow_batch.metrics import (
    Consistency,
    Looks,
    OpticalFlow,
    Running,
    Seams,
    look,
    psnr,
    warp,
    warp_error,
)

shifts = st.tuples(st.integers(-6, 6), st.integers(-6, 6))
seeds = st.integers(0, 2**32 - 1)


def texture(seed, size=96):
    """Smooth random texture that optical flow can hold on to."""
    rng = np.random.default_rng(seed)
    spectrum = np.fft.rfft2(rng.standard_normal((size, size, 3)), axes=(0, 1))
    fy, fx = np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None]
    smooth = np.fft.irfft2(spectrum * np.exp(-400 * (fx**2 + fy**2))[..., None], axes=(0, 1))
    low, high = smooth.min(), smooth.max()
    return ((smooth - low) / (high - low) * 255).astype(np.uint8)


def panning(frame, shift, count):
    """The tileable texture moved by `shift` a frame, and the exact flow and what stays visible."""
    x, y = shift
    video = [np.roll(frame, (i * y, i * x), (0, 1)) for i in range(count)]
    flow = np.broadcast_to(np.float32([x, y]), (*frame.shape[:2], 2)).copy()
    visible = np.zeros(frame.shape[:2], bool)
    height, width = visible.shape
    visible[max(0, -y) : height - max(0, y), max(0, -x) : width - max(0, x)] = True
    return video, flow, visible


@given(seeds, shifts)
@settings(max_examples=25)
def test_a_perfectly_warped_video_has_no_error_and_a_shuffled_one_a_large_one(seed, shift):
    video, flow, visible = panning(texture(seed, 48), shift, 2)
    assert warp_error(video[0], video[1], flow, visible) == 0
    other = texture(seed + 1, 48)
    assert warp_error(video[0], other, flow, visible) > 5e-3


@given(seeds, shifts)
@settings(max_examples=25)
def test_a_wrong_flow_costs(seed, shift):
    video, flow, visible = panning(texture(seed, 48), shift, 2)
    assert warp_error(video[0], video[1], flow + np.float32([3, 0]), visible) > 1e-4


@given(st.integers(0, 200), st.integers(1, 55))
def test_psnr_of_a_constant_difference_is_known(level, gap):
    first = np.full((5, 7, 3), level, np.uint8)
    second = np.full((5, 7, 3), level + gap, np.uint8)
    expected = 20 * math.log10(255 / gap)
    assert psnr(first, second) == pytest.approx(expected)
    assert psnr(second, first) == pytest.approx(expected)
    assert psnr(first, first) == math.inf


def test_psnr_looks_inside_its_mask_only():
    first = np.zeros((4, 4, 3), np.uint8)
    second, mask = first.copy(), np.zeros((4, 4), bool)
    second[0, 0] = 255
    mask[1:] = True
    assert psnr(first, second, mask) == math.inf
    assert psnr(first, second, ~mask) == pytest.approx(10 * math.log10(4))
    assert math.isnan(psnr(first, second, np.zeros((4, 4), bool)))


def test_warp_error_is_in_squares_of_the_unit_range():
    black, white = np.zeros((6, 6, 3), np.uint8), np.full((6, 6, 3), 255, np.uint8)
    still, everywhere = np.zeros((6, 6, 2), np.float32), np.ones((6, 6), bool)
    assert warp_error(black, white, still, everywhere) == 1
    assert warp_error(black, white // 2, still, everywhere) == pytest.approx((127 / 255) ** 2)
    assert math.isnan(warp_error(black, white, still, ~everywhere))


def test_warp_pulls_back_with_bilinear_weights():
    ramp = np.arange(8, dtype=np.float32)[None, :, None].repeat(8, 0)
    flow = np.zeros((8, 8, 2), np.float32)
    flow[..., 0] = 0.25
    np.testing.assert_allclose(warp(ramp, flow)[:, :7], ramp[:, :7, 0] + 0.25)


@pytest.mark.parametrize("shift", [(0, 0), (2, 0), (-3, 1), (4, -4)])
def test_optical_flow_finds_a_pan_and_what_leaves_the_picture(shift):
    video, flow, _ = panning(texture(3), shift, 2)
    found, trusted = OpticalFlow()(*video)
    middle = np.s_[12:-12, 12:-12]
    assert trusted[middle].mean() > 0.98
    assert np.abs(found - flow)[middle][trusted[middle]].mean() < 0.25
    x = np.arange(trusted.shape[1]) + found[..., 0]
    gone = (x < 0) | (x > trusted.shape[1] - 1)
    assert not trusted[gone].any()


def test_consistency_tells_a_steady_edit_from_a_flickering_one():
    video, _, _ = panning(texture(5), (2, 1), 6)
    steady = [255 - frame for frame in video]
    rng = np.random.default_rng(0)
    flickering = [np.clip(f + rng.integers(-40, 41), 0, 255).astype(np.uint8) for f in steady]
    found = {
        name: Consistency.of(iter(zip(video, edit, strict=True)))
        for name, edit in (("steady", steady), ("flickering", flickering))
    }
    assert found["steady"].source.count == 5
    assert found["steady"].edited.mean < 5e-4
    assert found["steady"].edited.mean == pytest.approx(found["steady"].source.mean, rel=0.3)
    assert found["flickering"].edited.mean > 10 * found["steady"].edited.mean


def test_a_mean_leaves_out_what_is_no_number():
    mean = Running()
    assert mean.mean is None
    for value in (1.0, math.nan, 4.0):
        mean.add(value)
    assert (mean.mean, mean.count, mean.largest) == (2.5, 2, 4.0)


# -- seams ---------------------------------------------------------------------------------------


def drifting(frames, step=0.0, joins=(), seed=0):
    """A video of noise around a colour, which moves by `step` (of 255) at every join."""
    rng = np.random.default_rng(seed)
    level, video = 100.0, []
    for i in range(frames):
        level += step if i in joins else 0.0
        base = np.array([level + 3 * math.sin(0.7 * i), 90, 60])
        video.append(np.clip(base + rng.normal(0, 4, (24, 24, 3)), 0, 255).astype(np.uint8))
    return video


def looks_of(video):
    looks = Looks()
    for frame in video:
        looks.add(frame)
    return looks


JOINS = (20, 40, 60, 80)


def test_a_video_without_seams_has_a_ratio_around_one():
    colour, texture_change = looks_of(drifting(100)).changes(8)
    for change in (colour, texture_change):
        seam = Seams.of(change, 8, JOINS)
        assert seam.low < 1 < seam.high


def test_a_step_at_the_joins_shows():
    change, _ = looks_of(drifting(100, 6, JOINS)).changes(8)
    seam = Seams.of(change, 8, JOINS)
    assert seam.low > 1.3
    # Elsewhere there is no such step.
    assert Seams.of(change, 8, tuple(j + 10 for j in JOINS)).ratio < 0.8


def test_a_change_over_a_cut_is_no_seam():
    looks = looks_of(drifting(100, 60, (50,)))
    assert Seams.of(looks.changes(8)[0], 8, (50,)).ratio > 5
    assert Seams.of(looks.changes(8, cuts=(50,))[0], 8, (50,)) is None


def test_without_joins_or_with_nothing_else_there_is_no_ratio():
    change, _ = looks_of(drifting(12)).changes(8)
    assert Seams.of(change, 8, ()) is None
    assert Seams.of(change, 8, (8,)) is None
    assert looks_of(drifting(3)).changes(8)[0].shape == (0,)


def test_drift_is_the_distance_of_first_and_last():
    assert looks_of(drifting(60)).drift(20)[0] < 1
    assert looks_of(drifting(60, 20, (30,))).drift(20)[0] > 5


@given(st.integers(0, 255), st.integers(0, 255), st.integers(0, 255))
@settings(max_examples=25)
def test_a_look_is_lab_and_flat_colour_has_no_texture(red, green, blue):
    frame = np.full((6, 5, 3), (red, green, blue), np.uint8)
    lab = cv2.cvtColor(frame[:1, :1].astype(np.float32) / 255, cv2.COLOR_RGB2LAB)[0, 0]
    assert np.allclose(look(frame), [*lab, 0], atol=1e-3)


def test_a_look_sees_what_the_mask_shows():
    frame = np.zeros((8, 8, 3), np.uint8)
    frame[:, 4:] = 255
    mask = np.zeros((8, 8), bool)
    mask[:, 6:] = True
    assert look(frame, mask)[0] == pytest.approx(100, abs=0.1)
    assert look(frame)[3] > 5  # a step from 0 to 100 over two of eight columns
    assert np.isnan(look(frame, mask & False)).all()

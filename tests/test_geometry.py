"""The size rule: working sizes, what is cut or padded, and the way back."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenflow_batch.geometry import Fit, plan_geometry


def noise(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("source", "fit", "working"),
    [
        ((101, 60), Fit.CROP, (96, 56)),
        ((101, 60), Fit.PAD, (104, 64)),
        ((101, 60), Fit.RESIZE, (104, 64)),
        ((99, 59), Fit.RESIZE, (96, 56)),
        ((5, 3), Fit.CROP, (8, 8)),
        ((5, 3), Fit.PAD, (8, 8)),
        ((5, 3), Fit.RESIZE, (8, 8)),
    ],
)
def test_without_a_resolution_the_source_size_is_kept_as_far_as_possible(source, fit, working):
    assert plan_geometry(source, None, fit, 8).working == working


@pytest.mark.parametrize("fit", Fit)
def test_a_frame_of_the_working_size_passes_through_untouched(fit):
    frame = noise((64, 48))
    for resolution in (None, (64, 48)):
        geometry = plan_geometry((64, 48), resolution, fit, 16)
        assert np.array_equal(geometry.apply(frame), frame)
        assert np.array_equal(geometry.undo(frame), frame)
        assert geometry.describe() == "64×48 of 64×48: unchanged"


def test_cropping_without_a_resolution_resamples_nothing():
    frame = noise((70, 50))
    geometry = plan_geometry((70, 50), None, Fit.CROP, 16)
    assert np.array_equal(geometry.apply(frame), frame[1:49, 3:67])
    assert np.array_equal(geometry.undo(geometry.apply(frame), frame), frame)


def test_padding_without_a_resolution_repeats_edges_and_comes_off_again():
    frame = noise((70, 50))
    geometry = plan_geometry((70, 50), None, Fit.PAD, 16)
    padded = geometry.apply(frame)
    assert padded.shape == (64, 80, 3)
    assert np.array_equal(padded[:7, 5:75], np.repeat(frame[:1], 7, axis=0))
    assert np.array_equal(geometry.undo(padded), frame)


def test_a_crop_is_centred_has_the_working_shape_and_goes_back_where_it_came_from():
    geometry = plan_geometry((128, 72), (64, 64), Fit.CROP, 32)
    assert geometry.region == (28, 0, 100, 72)
    assert geometry.describe() == "64×64 of 128×72: centre 72×72 cut out, resized to 64×64"
    frame = noise((128, 72))
    black = np.zeros((64, 64, 3), np.uint8)
    whole = geometry.undo(black, frame)
    assert not whole[:, 28:100].any()
    assert np.array_equal(whole[:, :28], frame[:, :28])
    assert np.array_equal(whole[:, 100:], frame[:, 100:])
    assert np.array_equal(frame, noise((128, 72)))
    with pytest.raises(ValueError, match="needs the source frame"):
        geometry.undo(black)


def test_padding_to_a_resolution_keeps_the_shape():
    geometry = plan_geometry((128, 72), (64, 64), Fit.PAD, 32)
    assert geometry.inner == (0, 14, 64, 50)
    assert geometry.describe() == (
        "64×64 of 128×72: resized to 64×36, padded by repeating the edges"
    )


def test_resizing_stretches_and_says_what_shape_pixels_have_then():
    geometry = plan_geometry((128, 72), (64, 64), Fit.RESIZE, 32)
    assert geometry.describe() == "64×64 of 128×72: resized to 64×64"
    assert geometry.working_aspect(Fraction(1)) == Fraction(16, 9)
    padded = plan_geometry((128, 72), (64, 64), Fit.PAD, 32)
    assert padded.working_aspect(Fraction(4, 3)) == Fraction(4, 3)


def test_a_resolution_that_is_no_multiple_names_its_neighbours():
    with pytest.raises(ValueError, match=r"multiples of 64.* 512×256 and 512×320"):
        plan_geometry((1280, 720), (512, 288), Fit.RESIZE, 64)
    with pytest.raises(ValueError, match="8×8 and 8×8"):
        plan_geometry((1280, 720), (0, 3), Fit.RESIZE, 8)
    with pytest.raises(ValueError, match="positive"):
        plan_geometry((0, 720), None, Fit.RESIZE, 8)


def test_wrong_frames_are_refused():
    geometry = plan_geometry((64, 48), (32, 32), Fit.RESIZE, 16)
    with pytest.raises(ValueError, match="source frame must be uint8 of 64×48"):
        geometry.apply(noise((48, 64)))
    with pytest.raises(ValueError, match="working frame must be uint8"):
        geometry.undo(noise((32, 32)).astype(np.float32))


sides = st.integers(1, 70)


@given(
    source=st.tuples(sides, sides),
    cells=st.none() | st.tuples(st.integers(1, 5), st.integers(1, 5)),
    fit=st.sampled_from(Fit),
    multiple=st.sampled_from([1, 8, 16]),
)
def test_there_and_back_again(source, cells, fit, multiple):
    resolution = cells and (cells[0] * multiple, cells[1] * multiple)
    geometry = plan_geometry(source, resolution, fit, multiple)
    width, height = geometry.working
    assert width % multiple == height % multiple == 0
    assert geometry.working == (resolution or geometry.working)
    frame = noise(source)
    there = geometry.apply(frame)
    back = geometry.undo(there, frame)
    assert there.shape == (height, width, 3)
    assert back.shape == frame.shape
    assert there.flags.c_contiguous
    assert back.flags.c_contiguous
    assert there.flags.writeable
    assert np.array_equal(there, geometry.apply(frame))
    # One flat colour survives any scaling.
    flat = np.full_like(frame, 77)
    assert (geometry.apply(flat) == 77).all()
    assert (geometry.undo(geometry.apply(flat), flat) == 77).all()

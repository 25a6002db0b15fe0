"""Segments, keyframe draws, neighbours, windows, chunks, batches: no frame lost, no surprise."""

import subprocess
import sys
from bisect import bisect_right
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tokenflow_batch.tokenflow.keyframes import (
    Segment,
    draw_keyframe,
    draw_keyframes,
    published_neighbours,
    segments,
    true_neighbours,
)
from tokenflow_batch.tokenflow.windows import batches, chunks

counts = st.integers(1, 400)
lengths = st.integers(1, 40)
seeds = st.integers(-(2**63), 2**63 - 1)


@given(counts, lengths)
def test_every_frame_lies_in_exactly_one_segment_whatever_the_length(frames, length):
    cut = segments(frames, length)
    assert [f for s in cut for f in range(s.start, s.stop)] == list(range(frames))
    assert [s.index for s in cut] == list(range(len(cut)))
    assert [len(s) for s in cut[:-1]] == [length] * (len(cut) - 1)
    assert 1 <= len(cut[-1]) <= length


@pytest.mark.parametrize(("frames", "length"), [(0, 8), (-1, 8), (8, 0), (8, -2)])
def test_there_are_no_segments_of_nothing(frames, length):
    with pytest.raises(ValueError, match="frames ≥ 1 and length ≥ 1"):
        segments(frames, length)


@given(seeds, st.integers(0, 1000), counts, lengths)
def test_each_segment_s_keyframe_is_one_of_its_frames(seed, step, frames, length):
    cut = segments(frames, length)
    drawn = draw_keyframes(seed, step, cut)
    assert all(s.start <= k < s.stop for k, s in zip(drawn, cut, strict=True))
    assert all(a < b for a, b in pairwise(drawn))


@given(seeds, st.integers(0, 1000), counts, lengths, st.randoms())
def test_a_draw_does_not_depend_on_what_else_is_drawn(seed, step, frames, length, order):
    cut = segments(frames, length)
    drawn = draw_keyframes(seed, step, cut)
    shuffled = list(cut)
    order.shuffle(shuffled)
    alone = {s.index: draw_keyframe(seed, step, s) for s in shuffled}
    assert [alone[i] for i in range(len(cut))] == drawn
    # A longer clip has the same keyframes where its segments are the same.
    longer = draw_keyframes(seed, step, segments(frames + 3 * length, length))
    assert longer[: len(cut) - 1] == drawn[:-1]


# Recorded; a change of any of them changes every user's results.
DRAWS = {
    (0, 0): [1, 13, 21, 28, 34],
    (0, 1): [3, 11, 19, 25, 35],
    (1, 0): [2, 12, 18, 30, 36],
    (-1, 24): [2, 9, 23, 31, 32],
    (2**63 - 1, 999): [1, 12, 21, 28, 35],
}


@pytest.mark.parametrize(("seed", "step"), DRAWS)
def test_draws_are_these_numbers_for_ever(seed, step):
    assert draw_keyframes(seed, step, segments(38, 8)) == DRAWS[seed, step]


def test_another_process_draws_the_same():
    code = (
        "from tokenflow_batch.tokenflow.keyframes import draw_keyframes, segments\n"
        "print(draw_keyframes(0, 1, segments(38, 8)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == str(DRAWS[0, 1])


@pytest.mark.parametrize("varied", ["seed", "step", "segment"])
@pytest.mark.parametrize("length", [2, 7, 8])
def test_draws_are_uniform_along_every_argument(varied, length):
    n = 4000
    found = [0] * length
    for i in range(n):
        seed, step, index = (i if varied == name else 5 for name in ("seed", "step", "segment"))
        segment = Segment(index, 100, 100 + length)
        found[draw_keyframe(seed, step, segment) - 100] += 1
    chi2 = sum((f - n / length) ** 2 / (n / length) for f in found)
    assert chi2 < {1: 10.8, 6: 22.5, 7: 24.3}[length - 1]  # p = 0.001


def test_draws_of_consecutive_steps_and_segments_are_independent():
    # 8 × 8 table of (this draw, the next one) along steps and along segments.
    for along in ("step", "segment"):
        table = [[0] * 8 for _ in range(8)]
        at = [
            draw_keyframe(
                3, i if along == "step" else 2, Segment(4 if along == "step" else i, 0, 8)
            )
            for i in range(6400)
        ]
        for a, b in pairwise(at):
            table[a][b] += 1
        chi2 = sum((cell - 6399 / 64) ** 2 / (6399 / 64) for row in table for cell in row)
        assert chi2 < 103.4  # 63 degrees of freedom, p = 0.001


ascending = st.lists(st.integers(0, 300), min_size=1, max_size=20, unique=True).map(sorted)


@given(ascending, st.integers(0, 310))
def test_a_frame_looks_at_the_nearest_keyframe_on_either_side(keyframes, frame):
    near = true_neighbours(frame, keyframes, 8)
    before = [k for k in keyframes if k <= frame]
    after = [k for k in keyframes if k >= frame]
    assert keyframes[near.first] == (before[-1] if before else after[0])
    assert keyframes[near.second] == (after[0] if after else before[-1])
    assert 0 <= near.weight <= 1
    assert near.itself == (frame in keyframes)
    if near.itself or not before or not after:
        assert (near.first, near.weight) == (near.second, 1)
    else:
        first, second = keyframes[near.first], keyframes[near.second]
        assert near.weight * first + (1 - near.weight) * second == pytest.approx(frame)


@given(ascending, st.integers(1, 309))
def test_the_weight_of_a_keyframe_changes_by_one_over_the_gap_from_frame_to_frame(keyframes, frame):
    assume(keyframes[0] <= frame - 1)
    assume(frame <= keyframes[-1])

    def weights(at):
        near = true_neighbours(at, keyframes, 8)
        shares = [0.0] * len(keyframes)
        shares[near.first] += near.weight
        shares[near.second] += 1 - near.weight
        return shares

    i = max(i for i, k in enumerate(keyframes) if k < frame)
    gap = keyframes[i + 1] - keyframes[i]
    jump = [b - a for a, b in zip(weights(frame - 1), weights(frame), strict=True)]
    expected = [0.0] * len(keyframes)
    expected[i], expected[i + 1] = -1 / gap, 1 / gap
    assert jump == pytest.approx(expected)


def test_published_weights_are_those_of_the_published_code():
    # Worked out by hand from distances to centres 4, 12 and 20 of three segments of 8 frames.
    def sigmoid(d_own, d_previous):
        return 1 / (1 + 2.718281828459045 ** (-d_previous / (d_own + d_previous)))

    expected = {
        0: (0, 0, 1.0),
        7: (0, 0, 1.0),
        8: (1, 0, sigmoid(4, 4)),
        12: (1, 0, sigmoid(0, 8)),
        15: (1, 0, sigmoid(3, 11)),
        16: (2, 1, sigmoid(4, 4)),
        23: (2, 1, sigmoid(3, 11)),
        25: (2, 1, sigmoid(5, 13)),  # a tail belongs to the last segment
    }
    for frame, (first, second, weight) in expected.items():
        near = published_neighbours(frame, [5, 9, 22], 8)
        assert (near.first, near.second, near.itself) == (first, second, False)
        assert near.weight == pytest.approx(weight)
    assert sigmoid(4, 4) == pytest.approx(0.6225, abs=1e-4)
    assert sigmoid(0, 8) == pytest.approx(0.7311, abs=1e-4)


@given(st.integers(2, 40), st.integers(2, 12), st.data())
def test_published_weights_stay_within_sigmoid_of_a_half_and_of_one(length, count, data):
    frame = data.draw(st.integers(length, length * count - 1))
    near = published_neighbours(frame, list(range(0, length * count, length)), length)
    assert (near.first, near.second) == (frame // length, frame // length - 1)
    assert 0.6224 < near.weight <= 0.7311


@given(counts, lengths)
def test_chunks_are_a_fixed_grid_over_all_frames(frames, length):
    grid = chunks(frames, length)
    assert [f for c in grid for f in c.frames] == list(range(frames))
    assert all(c.start == c.index * length for c in grid)
    assert [len(c) for c in grid] == [c.stop - c.start for c in grid]
    # What comes later doesn't move what was there.
    assert chunks(frames + 50, length)[: len(grid) - 1] == grid[:-1]


@given(st.lists(st.integers(), max_size=60), lengths)
def test_batches_keep_every_item_in_order(items, size):
    cut = batches(items, size)
    assert [i for batch in cut for i in batch] == items
    assert all(len(batch) == size for batch in cut[:-1])
    assert all(1 <= len(batch) <= size for batch in cut)


cut_clips = st.integers(1, 90).flatmap(
    lambda frames: st.tuples(
        st.just(frames),
        st.sets(st.integers(1, max(1, frames - 1)), max_size=4).map(sorted)
        if frames > 1
        else st.just([]),
    )
)


@given(cut_clips, st.integers(1, 12), st.integers(0, 50))
def test_nothing_reaches_across_a_cut(clip, length, step):
    frames, cuts = clip
    segs = segments(frames, length, cuts)
    assert [f for s in segs for f in range(s.start, s.stop)] == list(range(frames))
    assert set(cuts) <= {s.start for s in segs}
    assert max(map(len, segs)) <= length
    drawn = draw_keyframes(0, step, segs)
    for frame in range(frames):
        near = true_neighbours(frame, drawn, length, cuts)
        for k in (near.first, near.second):
            assert bisect_right(cuts, drawn[k]) == bisect_right(cuts, frame)
        assert 0 <= near.weight <= 1
        shot = [k for k in drawn if bisect_right(cuts, k) == bisect_right(cuts, frame)]
        before = [k for k in shot if k <= frame]
        after = [k for k in shot if k >= frame]
        wanted = {(before or after)[-1 if before else 0], (after or before)[0 if after else -1]}
        assert {drawn[near.first], drawn[near.second]} == wanted


def test_without_cuts_nothing_changes():
    assert segments(21, 8, ()) == segments(21, 8)
    assert true_neighbours(9, [3, 12, 17], 8, ()) == true_neighbours(9, [3, 12, 17], 8)


@pytest.mark.parametrize("cuts", [[0], [5, 5], [7, 3], [10], [-1]])
def test_cuts_outside_the_clip_or_out_of_order_are_refused(cuts):
    with pytest.raises(ValueError, match="cuts"):
        segments(10, 4, cuts)

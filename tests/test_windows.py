"""Windows: every frame has its share of predictions, whatever the clip and however it is cut."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jobs import clip, edited_latents, folder_of, quick_first, run_one, write_manifest
from tiny_model import CHANNELS

from tokenflow_batch.stages.edit import _Editing
from tokenflow_batch.tokenflow.attention import tokenflow_hooks
from tokenflow_batch.tokenflow.keyframes import draw_anchors, draw_keyframes
from tokenflow_batch.tokenflow.modes import MODES
from tokenflow_batch.tokenflow.passes import KeyframePass
from tokenflow_batch.tokenflow.windows import Chunk, Layout, Standing, chunks

RULES = [mode.neighbours for mode in MODES.values()]


@st.composite
def layouts(draw, *, cut=True):
    frames, length = draw(st.integers(1, 260)), draw(st.integers(1, 9))
    size = draw(st.integers(2, 9))
    overlap = draw(st.integers(1, size // 2))
    inner = st.integers(1, frames - 1) if frames > 1 else st.nothing()
    cuts = sorted(draw(st.sets(inner, max_size=4))) if cut and frames > 1 else []
    anchors = draw(st.integers(0, 5))
    return Layout.plan(frames, length, cuts, size=size, overlap=overlap, anchors=anchors)


def moments(layout, rule, step):
    drawn = draw_keyframes(0, step, layout.segments)
    return drawn, [layout.moment(rule, drawn, w) for w in layout.windows]


def rules(layout):
    return RULES if not layout.cuts else RULES[:1]  # the published rule knows no cuts


@given(layouts(), st.integers(0, 40), st.integers(1, 70))
def test_weights_sum_to_one_and_lie_where_the_window_predicts(layout, step, chunk_frames):
    for rule in rules(layout):
        drawn, found = moments(layout, rule, step)
        for chunk in chunks(layout.frames, chunk_frames):
            blend = layout.blend(rule, drawn, chunk)
            assert [w.index for w, _ in blend] == sorted(w.index for w, _ in blend)
            weights = np.array([share for _, share in blend])
            assert weights.shape == (len(blend), len(chunk))
            np.testing.assert_allclose(weights.sum(axis=0), 1, atol=1e-12)
            assert (weights >= 0).all()
            assert ((weights > 0).sum(axis=0) <= 2).all()
            for window, share in blend:
                used = {f for f, w in zip(chunk.frames, share, strict=True) if w > 0}
                assert used <= set(found[window.index].frames)


@given(layouts(), st.integers(0, 40))
def test_a_window_predicts_the_frames_whose_keyframes_are_its_own(layout, step):
    for rule in rules(layout):
        drawn, found = moments(layout, rule, step)
        assert {f for now in found for f in now.frames} == set(range(layout.frames))
        for window, now in zip(layout.windows, found, strict=True):
            assert len(now.frames) == len(now.neighbours) > 0
            assert set(now.keyframes) <= set(range(window.start, window.stop))
            own = range(window.segments[0].index, window.segments[-1].index + 1)
            for frame in range(window.start, window.stop):
                near = layout.neighbours(rule, drawn, frame)
                inside = near.first in own and near.second in own
                assert inside == (frame in now.frames)
            for frame, near in zip(now.frames, now.neighbours, strict=True):
                wanted = layout.neighbours(rule, drawn, frame)
                assert now.keyframes[near.first] == drawn[wanted.first]
                assert now.keyframes[near.second] == drawn[wanted.second]
                assert (near.weight, near.itself) == (wanted.weight, wanted.itself)


@given(layouts(cut=False), st.integers(0, 40))
def test_windows_hand_over_gradually(layout, step):
    drawn = draw_keyframes(0, step, layout.segments)
    blend = layout.blend(RULES[0], drawn, Chunk(0, 0, layout.frames))
    for (window, share), (following, _) in pairwise(blend):
        shared = set(layout.own_frames(RULES[0], drawn, window))
        shared &= set(layout.own_frames(RULES[0], drawn, following))
        assert shared  # at least the keyframe of the one segment they share
        last = np.diff(share[min(shared) :])
        assert last.max(initial=0) <= 1e-12
        assert -last.min(initial=0) <= 1 / (len(shared) + 1) + 1e-12


@given(layouts(), st.integers(0, 40), st.data())
def test_a_frame_s_shares_do_not_depend_on_the_chunk_it_is_in(layout, step, data):
    drawn = draw_keyframes(0, step, layout.segments)
    frame = data.draw(st.integers(0, layout.frames - 1))
    start = data.draw(st.integers(0, frame))
    stop = data.draw(st.integers(frame + 1, layout.frames))

    def shares(chunk):
        blend = layout.blend(RULES[0], drawn, chunk)
        return {w.index: s[frame - chunk.start] for w, s in blend if s[frame - chunk.start]}

    assert shares(Chunk(0, start, stop)) == shares(Chunk(0, frame, frame + 1))


@pytest.mark.parametrize("frames", [1, 7, 8 * 16 - 1, 8 * 16])
def test_a_short_clip_is_one_window_without_anchors(frames):
    layout = Layout.plan(frames, 8)
    assert len(layout.windows) == 1
    assert layout.anchors == ()
    drawn, (now,) = moments(layout, RULES[0], 3)
    assert now.frames == range(frames)
    assert now.keyframes == tuple(drawn)


def test_one_frame_more_makes_a_second_window_with_anchors():
    layout = Layout.plan(8 * 16 + 1, 8)
    assert [(w.start, w.stop) for w in layout.windows] == [(0, 128), (112, 129)]
    assert layout.anchors == (2, 6, 10, 14)
    _, (first, second) = moments(layout, RULES[0], 0)
    assert first.standing.foreign == (False,) * 4
    assert second.standing.foreign == (True, True, True, False)


@given(layouts(), st.integers(0, 40))
def test_those_attended_to_stand_for_the_whole_clip(layout, step):
    count, layout = len(layout.segments), layout.at(0, step)
    _, found = moments(layout, RULES[0], 1)
    for window, now in zip(layout.windows, found, strict=True):
        standing, own = now.standing, {s.index for s in window.segments}
        assert len(standing) == len(now.anchors) == len(layout.anchors)
        if not layout.anchors:
            assert standing == Standing()
            continue
        assert sum(standing.among) == sum(standing.seen) == count
        assert len(standing.own) == len(now.keyframes)
        assert standing.foreign == tuple(a not in own for a in layout.anchors)
        assert all(
            n == 1
            for s, n in zip(sorted(own), standing.own, strict=True)
            if s not in layout.anchors
        )


@pytest.mark.parametrize(("size", "overlap"), [(4, 0), (4, 3), (1, 1), (3, 2)])
def test_an_overlap_of_nothing_or_of_more_than_half_is_refused(size, overlap):
    with pytest.raises(ValueError, match="can't share"):
        Layout.plan(100, 2, size=size, overlap=overlap)


# -- which keyframes are anchors -------------------------------------------------------------


@given(st.integers(0, 9), st.integers(1, 200), st.integers(1, 12))
def test_anchors_are_spread_evenly_and_come_to_all_of_the_clip(seed, count, wanted):
    seen = set()
    for step in range(40):
        drawn = draw_anchors(seed, step, count, wanted)
        assert drawn == sorted(set(drawn)) == draw_anchors(seed, step, count, wanted)
        assert len(drawn) == min(count, wanted)
        apart = {b - a for a, b in pairwise([*drawn, drawn[0] + count])}
        assert apart <= {count // len(drawn), -(-count // len(drawn))}
        seen.update(drawn)
    expected = 1 - (1 - min(1, wanted / count)) ** 40  # of the segments, by chance
    assert len(seen) >= 0.7 * expected * count


def test_the_anchors_of_steps_and_seeds_are_these():
    """Literal: what was computed in part must go on with the same anchors."""
    drawn = [draw_anchors(0, step, 20, 4) for step in range(3)]
    assert drawn == [[0, 5, 10, 15], [4, 9, 14, 19], [0, 5, 10, 15]]
    assert draw_anchors(1, 0, 20, 4) == [1, 6, 11, 16]


def test_a_layout_at_a_step_differs_in_its_anchors_alone():
    layout = Layout.plan(200, 4, size=8)
    now = layout.at(3, 5)
    assert list(now.anchors) == draw_anchors(3, 5, 50, 4)
    assert replace(now, anchors=layout.anchors) == layout
    short = Layout.plan(20, 4, size=8)
    assert short.at(3, 5) is short


# -- anchors in the keyframe pass ------------------------------------------------------------


def joint(unet, x, branches, standing):
    active = KeyframePass(
        branches=branches,
        inject_qk=False,
        inject_conv=False,
        stored_conv_KChw=None,
        attention="eager",
        keep_tokens=branches == 3,
        standing=standing,
    )
    text = torch.randn(len(x), 5, 16, generator=torch.Generator().manual_seed(1))
    with tokenflow_hooks(unet, "eager") as hooks, hooks.during(active), torch.no_grad():
        noise = unet(x, 421, encoder_hidden_states=text[:1].expand(len(x), -1, -1)).sample
    return active, noise.unflatten(0, (branches, -1))


def frames_of(seed, count):
    return torch.randn(count, CHANNELS, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("branches", [2, 3])
def test_anchors_come_out_the_same_in_every_window(unet, branches):
    anchors = frames_of(0, 2)
    outcomes = []
    for seed, foreign in ((1, (True, True)), (2, (True, False))):
        rows = torch.cat([anchors, frames_of(seed, 3)]).repeat(branches, 1, 1, 1)
        active, noise = joint(unet, rows, branches, Standing.alone(foreign, 3))
        assert all(out.shape[:2] == (branches, 3) for out in active.outputs.values())
        outcomes.append(noise[:, :2])
    torch.testing.assert_close(*outcomes, atol=1e-5, rtol=1e-4)


def test_a_window_attends_to_foreign_anchors_and_to_no_other(unet):
    own = frames_of(1, 3)

    def last(anchors, foreign):
        rows = torch.cat([anchors, own]).repeat(2, 1, 1, 1)
        return joint(unet, rows, 2, Standing.alone(foreign, 3))[1][:, -3:]

    plain = joint(unet, own.repeat(2, 1, 1, 1), 2, Standing())[1]
    none = last(frames_of(0, 2), (False, False))
    torch.testing.assert_close(none, plain, atol=1e-5, rtol=1e-4)
    seen = last(frames_of(0, 2), (True, False))
    assert (seen - plain).abs().max() > 1e-3
    changed = frames_of(0, 2)
    changed[1] = 0
    # The second anchor is not attended to, but the first one attends to it.
    assert (last(changed, (True, False)) - seen).abs().max() > 1e-4
    alone = last(frames_of(0, 1), (True,))
    assert (alone - seen).abs().max() > 1e-4


def test_an_anchor_that_stands_for_three_is_as_three_of_it(unet):
    own, (first, second) = frames_of(1, 3), frames_of(0, 2).split(1)

    def last(anchors, standing):
        rows = torch.cat([anchors, own]).repeat(2, 1, 1, 1)
        return joint(unet, rows, 2, standing)[1][:, -3:]

    one = last(torch.cat([first, second]), Standing((3, 1), (3, 1), (1, 1, 1)))
    three = last(torch.cat([first, first, first, second]), Standing.alone((True,) * 4, 3))
    torch.testing.assert_close(one, three, atol=1e-5, rtol=1e-4)
    alike = last(torch.cat([first, second]), Standing.alone((True, True), 3))
    assert (one - alike).abs().max() > 1e-3


# -- whole jobs ------------------------------------------------------------------------------

LONG = {"window_segments": 3, "window_overlap": 1, "anchors": 2, "steps": 2}


@pytest.mark.parametrize(
    ("mode", "frames"),
    quick_first([("default", 9), ("default", 16), ("official", 10)], [("default", 9)]),
)
def test_windows_in_any_order_give_the_same_bits(tiny_model, tmp_path, monkeypatch, mode, frames):
    clip(tmp_path / "clip.mp4", frames)
    settings = {**LONG, "mode": mode}
    if mode == "official":
        settings |= {"inversion_iterations": 0, "inversion_steps": 2}
    manifest = write_manifest(tmp_path, tiny_model, **settings)
    run_one(manifest)
    forward = edited_latents(manifest)
    records = [u for u in folder_of(manifest, "edit").units() if u.startswith("window-00001-")]
    assert len(records) == {9: 1, 10: 2, 16: 3}[frames], records

    whole = _Editing._window
    pending = []

    def postponed(self, step, window, drawn):
        pending.append((step, window, drawn))
        if len(pending) == len(self.layout.windows):
            for call in reversed(pending):
                whole(self, *call)
            pending.clear()

    monkeypatch.setattr(_Editing, "_window", postponed)
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "clip.mp4").write_bytes((tmp_path / "clip.mp4").read_bytes())
    again = write_manifest(tmp_path / "again", tiny_model, **settings)
    run_one(again)
    assert np.array_equal(edited_latents(again), forward)


def test_settings_of_windows_do_not_touch_a_clip_that_is_one_window(tiny_model, tmp_path):
    clip(tmp_path / "clip.mp4", 9)
    found = []
    for size in (3, 5):
        manifest = write_manifest(tmp_path, tiny_model, **{**LONG, "window_segments": size})
        run_one(manifest)
        found.append(edited_latents(manifest))
    assert np.array_equal(*found)

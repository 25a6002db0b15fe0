"""The seams benchmark: jumps are found where they are, and each way of cutting is its own."""

import sys
from pathlib import Path

import numpy as np
import pytest

from tokenflow_batch.demo.scenes import Clip, recoloured
from tokenflow_batch.model_files import locate
from tokenflow_batch.models import load

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import inverted
import joins
import methods
import seams
from quality_scenes import Scene


def video(frames=64, jump=0.0, at=32, noise=0.2, seed=0, error=1.0):
    """Looks that flicker a little, and change by `jump` ΔE of the object at one frame."""
    looks = np.random.default_rng(seed).normal(0, noise, (frames, 2, 4)) + 50
    looks[at:, 0, 1] += jump
    errors = np.full(frames - 1, 1.0)
    errors[at - 1] = error
    return joins.Joined(looks, np.full_like(looks, 50), errors)


def test_a_jump_is_seen_across_its_join_alone():
    calm, jumping = video(), video(jump=3, error=5)
    across, elsewhere = jumping.at(32, 8, 8), jumping.at(16, 8, 8)
    assert across["tone_object"] == pytest.approx(3, abs=0.3)
    assert across["tone_ground"] == calm.at(32, 8, 8)["tone_ground"]
    assert across["error"] == pytest.approx((15 + 5) / 16)
    assert elsewhere == calm.at(16, 8, 8)
    assert jumping.drift(8, 8)["object"] == pytest.approx(3, abs=0.5)
    assert jumping.drift(8, 8)["ground"] < 0.5


def test_excess_leaves_out_what_the_perfect_edit_does_too():
    seen = video(jump=3)
    truth = np.full_like(seen.looks, 50)
    truth[32:, 0, 1] += 3
    followed = joins.Joined(seen.looks, truth, seen.errors).at(32, 8, 8)
    assert followed["tone_object"] == pytest.approx(3, abs=0.3)
    assert followed["excess"] == pytest.approx(video().at(32, 8, 8)["excess"], abs=1e-9)


def test_a_hidden_region_counts_where_it_is_seen():
    seen = video(jump=3)
    seen.looks[30:34, 0] = np.nan
    assert seen.at(32, 8, 8)["tone_object"] == pytest.approx(3, abs=0.5)
    seen.looks[:, 0] = np.nan
    hidden = seen.at(32, 8, 8)
    assert np.isnan(hidden["tone_object"])
    assert hidden["tone"] == hidden["tone_ground"]


def test_ratios_are_paired():
    below = [1.0, 10.0, 100.0]
    found = joins.ratio([1.1 * b for b in below], below)
    assert found == pytest.approx({"ratio": 1.1, "low": 1.1, "high": 1.1})


def test_hues_turn_in_every_other_run():
    frames = np.full((10, 4, 4, 3), (200, 40, 40), np.uint8)
    turned = seams.turn_hue(frames, [3, 6])
    changed = [i for i in range(10) if not np.array_equal(turned[i], frames[i])]
    assert changed == [3, 4, 5]
    assert np.abs(turned[4].astype(int) - frames[4]).max() < 30


@pytest.fixture(scope="module")
def edited(tiny_model, compute):
    """All ways of cutting a clip of 7 segments, on random weights."""
    model, clip = load(locate(str(tiny_model)), compute), Clip.random(3, 53, 32)
    prepared = inverted.prepare(model, clip, steps=3)
    videos = methods.edit(model, prepared, "a red ball", seams.WAYS, methods.Thresholds())
    return Scene(3, "color", clip, recoloured(clip, color="white")), videos


def test_every_way_edits_every_frame_its_own_way(edited):
    scene, videos = edited
    assert {len(frames) for frames in videos.values()} == {len(scene.clip)}
    kinds = list(videos)
    same = [(a, b) for a in kinds for b in kinds if a < b and np.array_equal(videos[a], videos[b])]
    assert same == []


def test_verdicts_of_the_benchmark_name_every_way(edited):
    scene, videos = edited
    videos = {**videos, "hue step": seams.turn_hue(videos["windows"], seams.plan(53).joins)}
    measured = {"ways": seams.figures(videos, scene)}
    found = joins.judge([measured])
    assert found["joins"] == len(seams.plan(53).joins) == 2
    assert set(found["against_one_window"]) == set(seams.WAYS) - {"one window"} | {"hue step"}
    assert all(np.isfinite(row["value"]) for row in found["bounds"])


def test_no_frame_is_left_without_a_prediction_at_a_join(edited):
    _, videos = edited
    apart = np.abs(videos["keyframes overlap"].astype(int) - videos["windows"]).mean(axis=(1, 2, 3))
    assert apart.max() < 20, apart  # a frame that keeps its noise is far from both

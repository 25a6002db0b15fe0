"""The quality benchmark: its measures know the truth, its methods are what they say."""

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tokenflow_batch.demo.scenes import Clip, recoloured
from tokenflow_batch.model_files import locate
from tokenflow_batch.models import load
from tokenflow_batch.tokenflow.injection import Site
from tokenflow_batch.tokenflow.keyframes import Neighbours

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import beyond
import classifier
import inverted
import methods
import options
import quality
import quality_scenes
import tables
import truth


@pytest.fixture(scope="module")
def model(tiny_model, compute):
    return load(locate(str(tiny_model)), compute)


def edited(model, clip, chosen, **thresholds):
    prepared = inverted.prepare(model, clip, steps=2)
    settings = methods.Thresholds(segment_length=3, **thresholds)
    return methods.edit(model, prepared, "a red ball", chosen, settings)


@pytest.mark.parametrize("frames", [1, 3, 7])
def test_the_default_rebuilt_from_parts_is_the_default(model, frames):
    clip = Clip.random(2, frames, 32)
    found = edited(model, clip, {"default": methods.TokenFlow(), "parts": options.PLAIN})
    gap = np.abs(found["default"].astype(int) - found["parts"])
    assert gap.max() <= 1
    assert (gap > 0).mean() < 1e-3  # a missing part of the method changes fifteen times as many
    assert found["default"].std() > 1


def test_every_option_changes_something_and_keeps_every_frame(model):
    clip = Clip.random(2, 7, 32)
    chosen = {"default": methods.TokenFlow(), **options.OPTIONS, **beyond.BEYOND}
    found = edited(model, clip, chosen, attn_t=0.5)
    for name, frames in found.items():
        assert frames.shape == found["default"].shape, name
    same = [name for name, x in found.items() if np.array_equal(x, found["default"])]
    assert same == ["default"], same


@pytest.mark.parametrize(
    "options_",
    [
        {},
        {"candidates": 3, "following": "own"},
        {"reach": 0},
        {"radius": 0.3},
        {"following": "own"},
        {"following": "voted"},
    ],
)
def test_weights_of_a_field_sum_to_one(options_):
    tokens = [torch.randn(7, 16, 4, generator=torch.Generator().manual_seed(0))]
    now = methods.Moment(
        0,
        1,
        0.5,
        [1, 4],
        torch.zeros(7, 3, 4, 4),
        torch.zeros(7, 3, 4, 4),
        tokens,
        torch.zeros(1),
        None,
        methods.Thresholds(segment_length=3),
        2,
        Clip.random(0, 7, 32),
    )
    (field,) = options.Building(**options_).fields(now)
    torch.testing.assert_close(field.weight.sum(dim=(1, 3)), torch.ones(7, 16))
    for keyframe in now.keyframes:
        own = field.index[keyframe] == torch.arange(16).view(1, 16, 1)
        assert (field.weight[keyframe] * ~own).sum() == 0


def test_exact_correspondences_have_no_endpoint_error_but_rounding():
    clip = Clip.random(3, 12, 64)
    flow, hidden = clip.flow(2, 8), clip.occluded(2, 8)
    centre = flow[2::4, 2::4].reshape(-1, 2) / 4
    own = np.arange(256)
    exact = (own // 16 + np.rint(centre[:, 1])) * 16 + own % 16 + np.rint(centre[:, 0])
    inside = (exact >= 0) & (exact < 256) & ~hidden[2::4, 2::4].reshape(-1)
    index = torch.from_numpy(np.where(inside, exact, 0).astype(np.int64))
    errors = options._endpoint(index, flow, hidden)
    assert np.quantile(errors, 0.9) <= 0.5**0.5 + 1e-6
    assert options._endpoint((index + 3) % 256, flow, hidden).median() > 2


@pytest.mark.parametrize("texture", ["solid", "striped", "checkered", "dotted"])
def test_the_perfect_edit_is_in_place_and_the_source_is_not(texture):
    clip = recoloured(Clip.random(5, 6), color="blue", texture=texture)
    wanted = recoloured(clip, color="red")
    for i in range(6):
        assert truth.in_place(wanted.frame(i), clip.mask(i), "red", texture)
        assert not truth.in_place(clip.frame(i), clip.mask(i), "red", texture)
        without = clip.frame(i).copy()
        without[:] = without[0, 0]
        assert not truth.in_place(without, clip.mask(i), "red", texture)


def test_warp_error_of_the_truth_is_small_and_of_shuffled_frames_large():
    clip = Clip.random(6, 8)
    frames = list(clip.frames())
    true = truth.warp_errors(frames, clip)
    assert true["ground"] < 0.5  # pixels of the outline mix both
    assert true["object"] < 2
    shuffled = truth.warp_errors([frames[i] for i in (4, 0, 7, 2, 5, 1, 6, 3)], clip)
    assert shuffled["all"] > 10 * true["all"]


def test_blur_lowers_gradient_energy_and_background_psnr_ignores_the_object():
    clip = recoloured(Clip.random(7, 1), texture="striped")
    frame, mask = clip.frame(0), clip.mask(0)
    blurred = frame.copy()
    for _ in range(8):
        blurred = (
            (blurred.astype(int) + np.roll(blurred, 1, 0) + np.roll(blurred, 1, 1)) // 3
        ).astype(np.uint8)
    assert truth.gradient_energy(blurred, mask) < 0.6 * truth.gradient_energy(frame, mask)
    painted = frame.copy()
    painted[mask] = 0
    assert truth.background_psnr(painted, frame, mask) == np.inf


def scene_row(kind, default, official, per_frame):
    """A measured scene with these whole-frame warp errors and otherwise equal figures."""
    rest = {"warp_ground": 1.0, "gradient": 1.0, "success": 1.0, "background": 20.0}
    values = {"default": default, "official": official, "per_frame": per_frame}
    rows = {name: {**rest, "warp_all": value} for name, value in values.items()}
    rows["default"] = {**rows["default"], "warp_ground": 0.3, "background": 22.0}
    rows["perfect"] = {**rest, "warp_all": 0.1, "gradient": 0.5}
    return {"kind": kind, "rows": rows, "inversion": {"mean": 45.5}}


def verdicts(scenes):
    """By the first word of what is asked and its bound."""
    found = tables.bounds(scenes, {"first_scene": None})
    return {row["what"]: row["holds"] for row in found}


def test_bounds_are_judged_in_the_mean_and_in_the_worst_scene():
    good = [scene_row("color", 1, 1.2, 2.5), scene_row("texture", 1, 1.0, 9)]
    assert all(verdicts(good).values())
    one_bad = [*good, scene_row("ground", 1.3, 1.0, 9), scene_row("ground", 1, 1.2, 9)]
    assert [what for what, holds in verdicts(one_bad).items() if not holds] == [
        "the same, worst scene"
    ]
    # Only colour edits count against per-frame editing of the whole frame.
    assert not verdicts([scene_row("color", 1, 1.2, 1.5)])["colour edits: warp error, / per frame"]


def test_sharpness_stands_beside_what_the_perfect_edit_has():
    found = tables.bounds([scene_row("color", 1, 1, 2)] * 2, {"first_scene": None})
    assert [(row["value"], row["perfect"]) for row in found if "perfect" in row] == [(1.0, 0.5)]


def test_methods_that_there_are_not_are_named(monkeypatch, capsys):
    assert quality.method_names("all") == tuple(quality.ALL)
    assert quality.method_names("default,no own detail") == ("default", "no own detail")
    monkeypatch.setattr(sys, "argv", ["quality.py", "--methods", "default,magic"])
    with pytest.raises(SystemExit):
        quality.parse()
    assert "no method 'magic'" in capsys.readouterr().err


def test_kinds_that_there_are_not_are_named():
    assert quality.kinds("ground,color") == ("ground", "color")
    with pytest.raises(argparse.ArgumentTypeError, match="no kind 'colour'"):
        quality.kinds("colour")


def test_what_is_not_known_is_left_out_and_not_judged(capsys):
    known, unknown = scene_row("color", 1, 2, 2), scene_row("color", 1, 2, 2)
    unknown["rows"]["default"]["warp_all"] = float("nan")
    assert tables.ratio([known, unknown], "warp_all", "default", "official")["scenes"] == 1
    found = tables.bounds([unknown], {"first_scene": None})
    assert found[0]["holds"] is None
    tables.print_bounds(found)
    assert "nan" not in capsys.readouterr().out


def test_tables_are_whole_where_there_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    tables.print_table({"a method": {f"figure number {n}": 1.0 for n in range(7)}})
    assert "figure number 6" in capsys.readouterr().out


def test_matches_that_are_the_exact_flow_have_no_end_point_error():
    clip = Clip.random(2, 3, 32)
    near = [Neighbours(0, 0, 1.0), Neighbours(0, 0, 1.0), Neighbours(0, 1, 0.5)]
    grid = (32, 32)  # a token a pixel, so that rounding is all that is left
    site = Site(0, "up", 0, inject_qk=False)
    index = torch.zeros(3, 2, 1024, dtype=torch.int64)
    own = torch.arange(1024)
    for f in range(3):
        for side, to in enumerate((0, 2 if f == 2 else 0)):
            flow = torch.from_numpy(clip.flow(f, to)).reshape(-1, 2).round().long()
            column = (own % 32 + flow[:, 0]).clamp(0, 31)
            index[f, side] = (own // 32 + flow[:, 1]).clamp(0, 31) * 32 + column
    assert site.grid(grid) == grid
    matches = methods.Matches([0, 2], near, [index])
    right = options.endpoint_errors(matches, clip, [site])["up"]
    index[0], index[1, 1], index[2, 1] = 0, 0, 0  # keyframes, and a neighbour that counts already
    assert options.endpoint_errors(matches, clip, [site])["up"] == right
    still = methods.Matches([0, 2], near, [own.expand(3, 2, -1)])
    assert right < 0.5 < options.endpoint_errors(still, clip, [site])["up"]


def test_of_two_objects_the_first_is_the_one_that_is_edited():
    params = Clip.random(3, 1, 32, two=True).params(0)
    seen = [(thing.shape, thing.color, thing.texture) for thing in params.objects]
    other = ("star", "none of these", seen[0][2])
    ground = params.ground
    swapped = classifier.Reading(tuple(seen[::-1]), ground)
    assert classifier.agreement(swapped, params)["color"] == 1
    assert classifier.first_right(swapped, params)["first_color"] == 1
    wrong = classifier.Reading((other, seen[1]), ground)
    assert classifier.agreement(wrong, params)["color"] == 0.5
    assert classifier.first_right(wrong, params)["first_color"] == 0
    assert classifier.first_right(classifier.Reading((), ground), params)["first_shape"] == 0


def every_fifth(domain):
    return [
        quality_scenes.draw_scene(
            5 * number, seed, 2, quality_scenes.DOMAINS[domain], quality_scenes.KINDS
        )
        for seed in range(3)
        for number in range(3)
    ]


def test_every_fifth_scene_has_ground_that_repeats():
    for scene in every_fifth("full"):
        assert scene.clip.scene.ground == "brick"
        assert (scene.wanted.scene.ground == "brick") == (scene.kind != "ground")


def test_a_domain_without_such_ground_keeps_what_was_drawn():
    grounds = {scene.clip.scene.ground for scene in every_fifth("first")}
    assert len(grounds) > 1
    assert grounds <= set(quality_scenes.DOMAINS["first"].grounds)


def test_options_are_measured_on_the_first_scenes_alone():
    scenes = [scene_row("color", 1, 1, 2), scene_row("color", 2, 2, 4)]
    scenes[0]["rows"]["gate"] = {**scenes[0]["rows"]["default"], "warp_all": 0.5}
    table = tables.means(scenes, ["default", "gate", "soft"])
    assert table["default"]["warp_all"] == 1.5
    assert (table["gate"]["warp_all"], table["gate"]["scenes"]) == (0.5, 1)
    assert "soft" not in table
    assert tables.ratio(scenes, "warp_all", "gate", "default")["ratio"] == 0.5

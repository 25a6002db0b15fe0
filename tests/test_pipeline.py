"""All six stages on real clips with a tiny model: what comes out, and what is done again."""

import json
import os
from fractions import Fraction

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from jobs import (
    EDIT,
    SETTINGS,
    SIZE,
    clip,
    command,
    copy_of,
    edited_latents,
    folder_of,
    outcome,
    published,
    quick_first,
    run,
    run_one,
    same,
    snapshot,
    write_manifest,
)
from safetensors.torch import load_file, save_file
from tiny_model import CHANNELS, FACTOR, copied, edit_json
from video_files import TICK, VFR, frames_of, make, packets_of

from tokenflow_batch.manifest import load as load_manifest
from tokenflow_batch.model_files import locate
from tokenflow_batch.models import load
from tokenflow_batch.row_counts import row_counts
from tokenflow_batch.stage_names import STAGES
from tokenflow_batch.status import status
from tokenflow_batch.store import ArrayStore
from tokenflow_batch.video import probe

LUMA = np.array([0.2126, 0.7152, 0.0722])


@pytest.fixture(scope="module")
def done(tmp_path_factory, tiny_model):
    """A finished job's folder, to be copied."""
    folder = tmp_path_factory.mktemp("done")
    clip(folder / "clip.mp4", 9)
    run_one(write_manifest(folder, tiny_model))
    return folder


@pytest.fixture
def manifest(done, tmp_path):
    """The manifest of a copy of it."""
    return copy_of(done, tmp_path / "copy")


# -- what comes out --------------------------------------------------------------------------


def test_report_tells_what_each_stage_has_cost(manifest):
    done = command("report", manifest, "--json")
    assert done.exit_code == 0, done.output
    work = json.loads(done.stdout)["jobs"][0]["work"]
    assert work.pop("frames") == 9
    assert list(work) == list(STAGES)
    planned = row_counts(load_manifest(manifest).jobs[0].settings, 9)
    assert {stage: work[stage]["unet_rows"] for stage in planned} == planned
    for stage, told in work.items():
        rows, seconds = told["unet_rows"], told["seconds"]
        assert told["unet_rows_per_frame"] == rows / 9
        assert (told["gflop_per_frame"] > 0) == (rows > 0)
        # What little match needs, invert does on its way.
        assert (seconds["unet"] > 0) == (stage in ("invert", "edit"))
        assert 0 <= told["waited_share"] < 1
        assert 0 <= told["waited_seconds"] < told["elapsed_seconds"]
        assert (seconds["video"] > 0) == (stage in ("encode", "render", "report"))
        assert (seconds["vae"] > 0) == (stage in ("encode", "render"))
        assert (seconds["attention"] > 0) == (stage == "edit")
        assert (seconds["correspondence"] > 0) == (stage in ("invert", "edit"))  # handed to match
        assert (seconds["store"] > 0) == (stage != "report")
    table = command("report", manifest).stdout.splitlines()
    head = next(n for n, line in enumerate(table) if "GFLOP/frame" in line)
    assert [line.split()[0] for line in table[head + 1 : head + 7]] == list(STAGES)
    edit = table[head + 4].split()
    assert edit[1:3] == [str(planned["edit"]), f"{planned['edit'] / 9:.1f}"]


@pytest.mark.parametrize("frames", quick_first([1, 7, 8, 9, 17], [1, 9]))
def test_every_frame_comes_out_at_its_time_whatever_their_number(tmp_path, tiny_model, frames):
    if frames == len(VFR):
        source = make(tmp_path / "clip.mp4", VFR, TICK, size=SIZE, sound=["aac", "aac"])
    else:
        source = clip(tmp_path / "clip.mp4", frames)
    manifest = write_manifest(tmp_path, tiny_model, steps=2)
    result = run_one(manifest)
    assert result.ran == list(STAGES)
    assert result.skipped == []
    names = ["blue.mp4", *(f"blue/{n}" for n in ("contact_sheet.png", "metrics.json"))]
    assert published(tmp_path) == [f"clip/{n}" for n in [*names, "blue/side_by_side.mp4"]]
    assert sorted(str(p.relative_to(tmp_path / "out")) for p in result.outputs) == published(
        tmp_path
    )

    before, after = probe(source), probe(tmp_path / "out" / "clip" / "blue.mp4")
    assert after.frames == before.frames == frames
    assert (after.width, after.height) == SIZE
    times = [[int(t) * f.time_base for t in f.pts] for f in (before, after)]
    assert [t - times[0][0] for t in times[0]] == [t - times[1][0] for t in times[1]]
    assert after.duration == before.duration
    assert len(after.audio) == len(before.audio)
    for old, new in zip(before.audio, after.audio, strict=True):
        assert packets_of(source, old.index) == packets_of(result.outputs[0], new.index)

    latents, (width, height) = edited_latents(manifest), SIZE
    assert latents.shape == (frames, CHANNELS, height // FACTOR, width // FACTOR)
    assert np.isfinite(latents).all()
    assert latents.std() > 0.1
    side = probe(tmp_path / "out" / "clip" / "blue" / "side_by_side.mp4")
    assert (side.frames, side.width, side.height) == (frames, 2 * width, height)
    metrics = json.loads((tmp_path / "out" / "clip" / "blue" / "metrics.json").read_text())
    assert metrics["frames"] == frames
    assert (metrics["warp_error"]["edited"] is None) == (frames == 1)
    assert metrics["unet_rows"]["invert"] == (2 * 2 + 1) * frames
    assert metrics["work"]["invert"]["unet_rows_per_frame"] == 2 * 2 + 1
    assert metrics["work"]["edit"]["gflop_per_frame"] > 0


def test_frames_whose_inversion_does_not_converge_are_retried_and_named(
    tmp_path, tiny_model, caplog
):
    model = copied(tiny_model, tmp_path / "model")
    (weights,) = (model / "unet").glob("*.safetensors")
    tensors = load_file(weights)
    tensors["conv_out.weight"] *= 30  # noise that changes wildly with the latent
    save_file(tensors, weights, metadata={"format": "pt"})
    clip(tmp_path / "clip.mp4", 5)
    manifest = write_manifest(tmp_path, model, steps=2)
    run_one(manifest)
    metrics = json.loads((tmp_path / "out" / "clip" / "blue" / "metrics.json").read_text())
    found = metrics["inversion_residual"]
    assert found["unconverged"] > 0
    assert found["largest"] > 0.1
    assert metrics["unet_rows"]["retried"] > 0
    assert metrics["unet_rows"]["invert"] == (2 * 2 + 1) * 5
    assert f"the worst is frame {found['worst_frame']} " in caplog.text


def test_the_video_is_the_decoded_latents(manifest, tiny_model, compute):
    write_manifest(manifest.parent, tiny_model, crf=1)
    assert run_one(manifest).ran == ["render", "report"]
    latents, video, _ = outcome(manifest)
    decoded = load(locate(str(tiny_model)), compute).decode(torch.from_numpy(latents))
    luma = [v @ LUMA for v in (video, decoded)]
    for i, frame in enumerate(luma[0]):
        gaps = [np.abs(frame - other).mean() for other in luma[1]]
        assert gaps[i] == min(gaps) < 2


@torch.no_grad()
def sampled(model_folder, compute, x, prompt, negative, guidance, steps, last=1000):
    """Plain DDIM sampling by diffusers alone, the last steps of `steps`."""
    model = load(locate(str(model_folder)), compute)
    unet = UNet2DConditionModel.from_pretrained(model_folder / "unet").eval()
    scheduler = DDIMScheduler.from_pretrained(model_folder / "scheduler")
    scheduler.set_timesteps(steps)
    text = [model.embed(p).expand(len(x), -1, -1) for p in (negative, prompt)]
    for t in scheduler.timesteps[-last:]:
        without, with_prompt = (unet(x, t, encoder_hidden_states=e).sample for e in text)
        x = scheduler.step(without + guidance * (with_prompt - without), t, x).prev_sample
    return x


# The random model's noise changes so fast with the latent that ε at the noisiest step, where the
# step is longest, would take many more iterations.
@pytest.mark.parametrize(("kind", "start"), [("epsilon", 1), ("v_prediction", 2)])
def test_the_inverted_latents_are_those_that_sample_back_to_the_clean_ones(
    tmp_path, tiny_model, compute, kind, start
):
    model = copied(tiny_model, tmp_path / "model")
    edit_json(model / "scheduler" / "scheduler_config.json", prediction_type=kind)
    clip(tmp_path / "clip.mp4", 2)
    manifest = write_manifest(tmp_path, "model", inversion_iterations=30)
    run_one(manifest, ("encode", "invert"))
    clean = ArrayStore.open(folder_of(manifest, "encode")).read("latents", ())
    store = ArrayStore.open(folder_of(manifest, "invert"))
    assert max(store.read("residual", (step,)).max() for step in range(start + 1)) < 1e-5
    noisy = torch.from_numpy(store.read("latents", (start,)))
    prompt = SETTINGS["source_prompt"]
    back = sampled(model, compute, noisy, prompt, prompt, 1.0, 3, last=start + 1)
    np.testing.assert_allclose(back.numpy(), clean, atol=1e-4)
    assert np.abs(noisy.numpy() - clean).max() > 0.5


def test_one_frame_s_sdedit_is_plain_guided_sampling_by_diffusers(tmp_path, tiny_model, compute):
    clip(tmp_path / "clip.mp4", 1)
    plain = {"technique": "sdedit", "strength": 1.0, "guidance_focus": 1.0}
    manifest = write_manifest(tmp_path, tiny_model, **plain)
    run_one(manifest, STAGES[:4])
    x = ArrayStore.open(folder_of(manifest, "invert")).read("latents", (2,))
    expected = sampled(
        tiny_model, compute, torch.from_numpy(x), EDIT["prompt"], EDIT["negative_prompt"], 3.0, 3
    )
    np.testing.assert_allclose(edited_latents(manifest), expected.numpy(), atol=1e-3)
    assert np.abs(edited_latents(manifest) - x).max() > 0.1


def test_how_a_clip_is_cut_into_chunks_changes_no_bit(tmp_path, tiny_model):
    # Where batches are single frames: their composition decides bits too.
    found = []
    for chunk_frames in (2, 5):
        folder = tmp_path / str(chunk_frames)
        folder.mkdir()
        clip(folder / "clip.mp4", 7)
        manifest = write_manifest(
            folder, tiny_model, chunk_frames=chunk_frames, unet_batch=1, vae_batch=1, steps=2
        )
        run_one(manifest, STAGES[:4])
        found.append(edited_latents(manifest))
    assert np.array_equal(found[0], found[1])


# Every one must differ from the usual edit of these seven frames.
VARIANTS = {
    "sdedit": {"technique": "sdedit", "strength": 0.5},
    "dpmsolver++": {"sampler": "dpmsolver++", "steps": 3},
    "official with a tail": {"mode": "official"},
    "plain inversion": {"inversion_steps": 8, "steps": 4, "inversion_iterations": 0},
    "thresholds 0": {"attn_t": 0.0, "f_t": 0.0},
    "thresholds 1": {"attn_t": 1.0, "f_t": 1.0},
    "segments longer than the clip": {"segment_length": 100},
    "segments of one frame": {"segment_length": 1},
    "other working size": {"resolution": [32, 96]},
}


@pytest.fixture(scope="module")
def usual(tmp_path_factory, tiny_model):
    """Final latents of an edit with the usual settings."""
    folder = tmp_path_factory.mktemp("usual")
    clip(folder / "clip.mp4", 7)
    run_one(write_manifest(folder, tiny_model, steps=2), STAGES[:4])
    return edited_latents(folder / "manifest.yaml")


@pytest.mark.parametrize(
    "name", quick_first(VARIANTS, ["sdedit", "dpmsolver++", "official with a tail", "thresholds 1"])
)
def test_every_kind_of_edit_runs_through_and_is_an_edit_of_its_own(
    tmp_path, tiny_model, usual, name
):
    clip(tmp_path / "clip.mp4", 7)
    manifest = write_manifest(tmp_path, tiny_model, **{"steps": 2, **VARIANTS[name]})
    run_one(manifest)
    latents = edited_latents(manifest)
    assert np.isfinite(latents).all()
    assert probe(tmp_path / "out" / "clip" / "blue.mp4").frames == 7
    assert usual.shape != latents.shape or np.abs(usual - latents).max() > 1e-4


def test_plain_inversion_keeps_the_sampling_timesteps_and_the_noisiest(tmp_path, tiny_model):
    clip(tmp_path / "clip.mp4", 5)
    manifest = write_manifest(tmp_path, tiny_model, **VARIANTS["plain inversion"])
    run_one(manifest, ("encode", "invert"))
    folder = folder_of(manifest, "invert")
    kept = [u for u in folder.units() if u.startswith("invert") and folder.available(u)]
    # 8 steps at 1, 126, …, 876; sampling in 4 takes every other one from the first on.
    assert kept == [f"invert-{i:05d}-{c:05d}" for i in (0, 2, 4, 6, 7) for c in (0, 1)]


@pytest.mark.parametrize("fit", quick_first(["crop", "pad", "resize"], ["pad"]))
def test_the_source_s_size_comes_back_if_asked_and_what_was_cropped_from_the_source(
    tmp_path, tiny_model, fit
):
    source = clip(tmp_path / "clip.mp4", 5, size=(100, 70))
    manifest = write_manifest(tmp_path, tiny_model, fit=fit, restore_size=True, crf=1, steps=2)
    run_one(manifest)
    restored = frames_of(tmp_path / "out" / "clip" / "blue.mp4")
    original = frames_of(source)
    assert restored.shape == original.shape == (5, 70, 100, 3)
    if fit == "crop":  # 96 × 64 in the middle are edited
        margin = np.ones((70, 100), bool)
        margin[3:67, 2:98] = False
        # In luma: colours are stored at half the resolution and bleed over the border.
        gap = np.abs((restored.astype(float) - original) @ LUMA).mean(axis=0)
        assert gap[margin].mean() < 1.5
        assert gap[~margin].mean() > 15
    smaller = write_manifest(tmp_path, tiny_model, fit=fit, steps=2)
    assert run_one(smaller).ran == ["render", "report"]
    height, width = {"crop": (64, 96), "pad": (96, 128), "resize": (64, 96)}[fit]
    assert frames_of(tmp_path / "out" / "clip" / "blue.mp4").shape == (5, height, width, 3)


def test_stage_by_stage_is_the_same_as_all_at_once(done, tmp_path, tiny_model):
    clip(tmp_path / "clip.mp4", 9)
    manifest = write_manifest(tmp_path, tiny_model)
    for stage in STAGES:
        answer = command(stage, manifest, "--json")
        assert answer.exit_code == 0, answer.output
        (job,) = json.loads(answer.stdout)["jobs"]
        assert (job["ran"], job["error"]) == ([stage], None)
    assert same(outcome(manifest), outcome(done / "manifest.yaml"))
    assert published(tmp_path) == published(done)


# -- what is done again ----------------------------------------------------------------------


def test_a_second_run_does_nothing(manifest):
    run_one(manifest)  # takes note of where the copy lies
    before = snapshot(manifest.parent)
    result = run_one(manifest)
    assert (result.ran, result.skipped) == ([], list(STAGES))
    assert snapshot(manifest.parent) == before
    (row,) = status(load_manifest(manifest))
    assert {s.state for s in row.stages.values()} == {"done"}
    assert row.published


CHANGES = {
    "prompt": ({}, {"prompt": "a green ball"}, "edit"),
    "negative prompt": ({}, {"negative_prompt": "water"}, "edit"),
    "guidance": ({"guidance_scale": 4.0}, {}, "edit"),
    "keyframe seed": ({"keyframe_seed": 1}, {}, "match"),
    "source prompt": ({"source_prompt": "a ball"}, {}, "invert"),
    "iterations": ({"inversion_iterations": 2}, {}, "invert"),
    "resolution": ({"resolution": [32, 32]}, {}, "encode"),
    "crf": ({"crf": 30}, {}, "render"),
    "audio": ({"audio": False}, {}, "render"),
}


@pytest.mark.parametrize(
    "what", quick_first(CHANGES, CHANGES.keys() - {"iterations", "resolution", "guidance"})
)
def test_a_change_redoes_what_depends_on_it_and_nothing_else(manifest, tiny_model, what):
    settings, edit, first = CHANGES[what]
    before = snapshot(manifest.parent / "out" / ".work")
    write_manifest(
        manifest.parent,
        tiny_model,
        clips=[{"video": "clip.mp4", "edits": [{**EDIT, **edit}]}],
        **settings,
    )
    result = run_one(manifest)
    assert result.ran == list(STAGES[STAGES.index(first) :])
    after = snapshot(manifest.parent / "out" / ".work")
    grows = {name for name in before if name == "digests.json" or name.startswith("logs/")}
    assert all(after[name] == old for name, old in before.items() if name not in grows)
    # And back: both results are kept.
    write_manifest(manifest.parent, tiny_model)
    assert run_one(manifest).ran == []


@pytest.mark.parametrize(
    "what", ["renamed", "touched", "moved clip", "renamed edit", "model moved"]
)
def test_what_does_not_change_the_result_redoes_nothing(manifest, tiny_model, tmp_path, what):
    folder, model, clips = manifest.parent, tiny_model, [{"video": "clip.mp4", "edits": [EDIT]}]
    before = outcome(manifest)
    if what == "renamed":
        (folder / "clip.mp4").rename(folder / "other name.mp4")
        clips[0]["video"] = "other name.mp4"
    elif what == "touched":
        os.utime(folder / "clip.mp4")
    elif what == "moved clip":
        clips[0]["name"] = "another"
    elif what == "renamed edit":
        clips[0]["edits"] = [{**EDIT, "name": "bleu"}]
    else:
        model = copied(tiny_model, tmp_path / "elsewhere")
    write_manifest(folder, model, clips=clips)
    assert run_one(manifest).ran == []
    assert same(outcome(manifest), before)


def test_two_edits_share_everything_up_to_the_match(manifest, tiny_model):
    edits = [EDIT, {"name": "star", "prompt": "a red star", "technique": "sdedit"}]
    write_manifest(manifest.parent, tiny_model, clips=[{"video": "clip.mp4", "edits": edits}])
    first, second = run(manifest)
    assert (first.error, second.error) == (None, None)
    assert first.ran == []
    assert second.ran == ["edit", "render", "report"]


def test_a_stage_by_force_is_done_again_and_gives_the_same(manifest):
    before = outcome(manifest)
    result = run_one(manifest, force=["edit"])
    assert result.ran == ["edit", "render", "report"]  # what came from it goes too
    assert same(outcome(manifest), before)


def test_the_tail_s_time_is_the_source_s(tmp_path, tiny_model):
    source = make(tmp_path / "clip.mp4", [0, 1, 2, 9], Fraction(1, 10), size=SIZE)
    run_one(write_manifest(tmp_path, tiny_model, steps=2))
    assert probe(tmp_path / "out" / "clip" / "blue.mp4").duration == probe(source).duration

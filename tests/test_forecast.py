"""`plan` against reality: what it says before a run is what the run then does and leaves."""

import json
from pathlib import Path

import pytest
from jobs import clip, command, run, write_manifest
from tiny_model import tiny_unet

from tokenflow_batch.inputs import Inputs
from tokenflow_batch.ledger import StageFolder
from tokenflow_batch.manifest import load
from tokenflow_batch.model_files import DEMO, locate
from tokenflow_batch.model_shape import ModelShape
from tokenflow_batch.stage_names import STAGES
from tokenflow_batch.tokenflow.injection import attention_sites, conv_shape

EDITS = [
    {"name": "blue", "prompt": "a blue ball"},
    {"name": "star", "prompt": "a red star", "technique": "sdedit", "strength": 0.7},
    {"name": "late", "prompt": "a red ball", "sampler": "dpmsolver++", "f_t": 1.0},
]
CLIPS = [
    {"video": "clip.mp4", "edits": EDITS[:1]},
    {"video": "copy.mp4", "edits": EDITS[1:]},
    {"video": "long.mp4", "edits": EDITS[:1]},
]


def planned(manifest, *options):
    answer = command("plan", manifest, "--json", *options)
    assert answer.exit_code == 0, answer.output
    return json.loads(answer.stdout)


def size_of(folder):
    return sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())


@pytest.fixture(scope="module")
def batch(tmp_path_factory, tiny_model):
    """Three clips, two of them the same file; the plan before, a run, what it left."""
    folder = tmp_path_factory.mktemp("plan")
    clip(folder / "clip.mp4", 5, size=(96, 64))
    (folder / "copy.mp4").write_bytes((folder / "clip.mp4").read_bytes())
    clip(folder / "long.mp4", 9, size=(96, 64), sound=False)
    manifest = write_manifest(
        folder, tiny_model, clips=CLIPS, steps=3, window_segments=2, window_overlap=1, anchors=2
    )
    before = planned(manifest)
    assert all(result.error is None for result in run(manifest))
    return manifest, before


def folders(manifest):
    """Every stage folder of a manifest once, by stage."""
    loaded = load(manifest)
    inputs = Inputs.of(loaded)
    found = {stage: {} for stage in STAGES}
    for job in loaded.jobs:
        for stage, key in inputs.keys(job).items():
            folder = inputs.workspace.stage(stage, key.key)
            found[stage][key.key] = StageFolder(folder, stage, key.key)
    return {stage: list(f.values()) for stage, f in found.items()}


def test_rows_are_those_of_the_run(batch):
    manifest, before = batch
    for stage in ("invert", "match", "edit"):
        ran = sum(folder.totals().get("rows", 0) for folder in folders(manifest)[stage])
        assert before["total"][stage]["rows"] == ran > 0


@pytest.mark.parametrize("stage", ["encode", "invert", "edit"])
def test_bytes_are_those_of_the_run(batch, stage):
    manifest, before = batch
    real = sum(size_of(f.folder) for f in folders(manifest)[stage])
    assert before["total"][stage]["bytes"] == pytest.approx(real, rel=0.05)


@pytest.mark.slow
def test_once_measured_all_bytes_are_those_of_the_run(batch, tmp_path):
    """Compression and video rates are measured on one run; another of the same kind fits them."""
    manifest, _ = batch
    text = manifest.read_text().replace("source_prompt: a red ball", "source_prompt: a star")
    other = manifest.with_name("other.yaml")
    other.write_text(text.replace("output: out/", f"output: {tmp_path}/other/"))
    work = manifest.parent / "out" / ".work"
    again = planned(other, "--workdir", work)
    assert not again["disk"]["estimated"]
    assert all(again["total"][s]["seconds"] > 0 for s in STAGES if s != "encode")
    done = size_of(work)
    answer = command("run", other, "--workdir", work, "--json")
    assert answer.exit_code == 0
    grown = size_of(work) - done + size_of(tmp_path / "other")
    # Such short clips are mostly contact sheets, whose size follows from the picture.
    assert again["disk"]["bytes"] == pytest.approx(grown, rel=0.1)


def test_shared_work_is_counted_once_even_under_two_names(batch):
    _, before = batch
    states = {
        j["edit"]: {k: v["state"] for k, v in j["stages"].items()} for j in before["jobs"][:3]
    }
    assert set(states["blue"].values()) == {"to do"}
    assert states["star"]["invert"] == states["late"]["invert"] == "shared"
    assert states["star"]["edit"] == states["late"]["edit"] == "to do"
    # The second clip's edits need features of more steps than the first one's.
    assert (states["star"]["match"], states["late"]["match"]) == ("to do", "shared")


def test_what_is_done_costs_nothing(batch):
    manifest, _ = batch
    after = planned(manifest)
    assert after["disk"]["bytes"] == 0
    states = {v["state"] for job in after["jobs"] for v in job["stages"].values()}
    assert states <= {"done", "shared"}
    assert all(job["frames_exact"] for job in after["jobs"])
    assert [job["frames"] for job in after["jobs"]] == [5, 5, 5, 9]


def test_a_plan_that_the_disk_cannot_hold_is_refused(batch, monkeypatch, tmp_path):
    manifest, before = batch
    largest = max(STAGES, key=lambda stage: before["total"][stage]["bytes"])
    monkeypatch.setattr("tokenflow_batch.forecast.free_bytes", lambda _path: 1000)
    answer = command("plan", manifest, "-o", tmp_path / "new")
    assert answer.exit_code == 7
    assert "the disk can't hold this" in answer.output
    assert f"{largest} takes" in answer.output
    assert "--workdir" in answer.output


def test_without_measurements_time_is_unknown(batch, tmp_path):
    manifest, before = batch
    assert all(before["total"][stage]["seconds"] is None for stage in ("invert", "match", "edit"))
    answer = command("plan", manifest, "-o", tmp_path / "new")
    assert answer.exit_code == 0
    assert "unknown" in answer.stdout


def test_a_missing_video_is_that_jobs_line(tmp_path, tiny_model):
    clip(tmp_path / "clip.mp4", 2)
    clips = [{"video": n, "edits": EDITS[:1]} for n in ("none.mp4", "clip.mp4")]
    manifest = write_manifest(tmp_path, tiny_model, clips=clips)
    missing, there = planned(manifest)["jobs"]
    assert "no such file" in missing["error"]
    assert there["error"] is None
    assert "none.mp4: no such file" in command("plan", manifest).stdout


@pytest.mark.parametrize("model", ["demo", "tiny"])
def test_sizes_read_from_files_are_the_models(model, tiny_model):
    files = locate("demo" if model == "demo" else str(tiny_model))
    shape = ModelShape.of(files)
    if model == "demo":
        from diffusers import UNet2DConditionModel

        unet = UNet2DConditionModel.from_pretrained(DEMO / "unet", variant="fp16")
    else:
        unet = tiny_unet()
    for hw in ((8, 16), (6, 10)):
        tokens = [site.tokens(hw) for site in attention_sites(unet)]
        assert shape.tokens(hw) == {n: tokens.count(n) for n in set(tokens)}
        for site in ("up_blocks.0.resnets.2", "up_blocks.1.resnets.1", "up_blocks.3.resnets.0"):
            assert shape.conv_shape(hw, site) == conv_shape(unet, hw, site)

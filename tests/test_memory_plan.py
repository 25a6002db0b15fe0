"""Memory in plans: a line through measured peaks, windows from budgets, calibration, reality."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jobs import clip, command, write_manifest
from test_forecast import planned, size_of

from tokenflow_batch.config import Settings
from tokenflow_batch.footprint import Peak, edit_batch, largest_batches, largest_window, predicted
from tokenflow_batch.plan import unet_calls

GB = 10**9


def peaks(*points, base=0):
    return [Peak(batch, peak, base, "cpu", 64 * GB) for batch, peak in points]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mode": "official"},
        {"technique": "sdedit"},
        {"attn_t": 0.0},
        {"attn_t": 0.0, "source_prompt": "a", "prompt": "b", "guidance_focus": 0.25},
        {"window_segments": 4, "anchors": 3, "window_overlap": 1},
        {"segment_length": 32, "window_segments": 2, "window_overlap": 1, "anchors": 0},
        {"unet_batch": 200, "chunk_frames": 32},
    ],
)
@pytest.mark.parametrize("frames", [1, 9, 130])
def test_the_largest_batches_are_those_of_the_planned_calls(settings, frames):
    s = Settings(steps=4, inversion_steps=4, **settings)
    found = largest_batches(s, frames)
    for stage, calls in unet_calls(s, frames).items():
        if calls:
            largest = max(call.rows for call in calls)
            # How many frames of a chunk are no keyframes is drawn: match may stay below.
            assert found[stage] == largest or (stage == "match" and found[stage] > largest)


def test_two_sizes_give_a_line_and_one_size_what_is_above_the_model():
    line = {"edit": peaks((10, 3 * GB), (30, 5 * GB), (20, 4 * GB))}
    assert predicted(line, "edit", 50) == 7 * GB
    one = {"edit": peaks((10, 3 * GB), base=1 * GB), "encode": peaks((1, GB))}
    assert predicted(one, "edit", 10) == 3 * GB
    assert predicted(one, "edit", 20) == 5 * GB
    loaded = {"encode": peaks((10, 3 * GB)), "invert": peaks((1, 4 * GB), base=2 * GB)}
    assert predicted(loaded, "encode", 20) == 4 * GB  # the model was loaded within encode
    falling = {"edit": peaks((10, 5 * GB), (30, 3 * GB))}
    assert predicted(falling, "edit", 50) == 5 * GB
    assert predicted(line, "invert", 5) is None


def test_a_budget_gives_the_largest_window_that_stays_within_it():
    line = {"edit": peaks((0, 1 * GB), (100, 2 * GB))}
    s = Settings(window_segments=3, anchors=4)  # three branches: 0.12 GB for the anchors
    for budget in (int(1.24 * GB), int(1.5 * GB), 3 * GB):
        size = largest_window(line, s, 8, 1, budget)
        assert predicted(line, "edit", 3 * (size + 4)) <= budget
        assert predicted(line, "edit", 3 * (size + 5)) > budget
    assert largest_window(line, s, 8, 1, int(1.1 * GB)) is None
    assert largest_window({}, s, 8, 1, GB) is None
    assert edit_batch(s, 3, 8) == max(3 * 3, 2 * 8)


CLIPS = {
    "small": {"size": (64, 64), "frames": 24},
    "wide": {"size": (192, 96), "frames": 20, "window_segments": 3, "window_overlap": 1},
    "many": {"size": (128, 128), "frames": 24, "unet_batch": 16},
}


def watched(manifest, name):
    """Run one job in a process of its own; the peak of its memory by the kernel's account."""
    command_line = [sys.executable, "-m", "tokenflow_batch", "run", manifest, "--only", name]
    child = subprocess.Popen(command_line, stdout=subprocess.DEVNULL, env=os.environ)
    status, peak = Path(f"/proc/{child.pid}/status"), 0
    while child.poll() is None:
        found = re.search(r"VmHWM:\s+(\d+)", status.read_text("ascii"))
        peak = max(peak, int(found[1]) * 1024 if found else 0)
        time.sleep(0.02)
    assert child.returncode == 0
    return peak


@pytest.mark.slow
def test_a_calibrated_plan_against_reality(tmp_path, tiny_model):
    """Bytes within 5 %, rows exact, peak memory within 15 %, on three jobs."""
    clips = []
    for name, given in CLIPS.items():
        settings = dict(given)
        clip(tmp_path / f"{name}.mp4", settings.pop("frames"), size=settings.pop("size"))
        edits = [{"name": "e", "prompt": "a blue ball"}]
        clips.append({"video": f"{name}.mp4", "edits": edits, **settings})
    manifest = write_manifest(tmp_path, tiny_model, clips=clips, steps=6, chunk_frames=16)
    before = planned(manifest)
    assert before["memory"]["peak_bytes"] is None
    answer = command("plan", manifest, "--memory-budget", "1GB")
    assert answer.exit_code == 3
    assert "--calibrate" in answer.output
    plan = planned(manifest, "--calibrate")
    assert all(plan["total"][stage]["seconds"] > 0 for stage in plan["total"])
    rows, report = {}, {}
    for job in plan["jobs"]:
        work = tmp_path / "out" / ".work"
        done = size_of(tmp_path / "out")
        peak = watched(manifest, job["clip"])
        expected = max(stage["peak_bytes"] for stage in job["stages"].values())
        grown = size_of(tmp_path / "out") - done
        metrics = json.loads((tmp_path / "out" / job["clip"] / "e" / "metrics.json").read_text())
        rows[job["clip"]] = sum(s["rows"] for s in job["stages"].values())
        assert rows[job["clip"]] == metrics["unet_rows"]["total"] - metrics["unet_rows"]["retried"]
        report[job["clip"]] = expected / peak, grown
        assert work.is_dir()
        assert expected == pytest.approx(peak, rel=0.15), report
    # Sizes of compressed data are known from the first run on: plan the same for other prompts.
    other = tmp_path / "other.yaml"
    text = manifest.read_text().replace("source_prompt: a red ball on grass", "source_prompt: x")
    other.write_text(text.replace("output: out/", "output: other/"))
    again = planned(other, "--workdir", work)
    done = size_of(work)
    assert command("run", other, "--workdir", work, "--json").exit_code == 0
    grown = size_of(work) - done + size_of(tmp_path / "other")
    assert again["disk"]["bytes"] == pytest.approx(grown, rel=0.05)


def test_what_the_device_cannot_hold_is_refused_and_a_budget_names_a_window(
    tmp_path, tiny_model, monkeypatch
):
    clip(tmp_path / "clip.mp4", 40)
    manifest = write_manifest(tmp_path, tiny_model, segment_length=2)

    def measured(_cls, _workspace, _device):
        from tokenflow_batch.measured import Measured

        found = Measured(device_bytes=GB)
        every = {stage: peaks((0, GB // 2), (100000, 2 * GB)) for stage in ("encode", "edit")}
        every |= dict.fromkeys(("invert", "match", "render", "report"), every["encode"])
        found.peaks = dict.fromkeys(digests, every)
        return found

    digests = set()
    from tokenflow_batch.inputs import Inputs
    from tokenflow_batch.manifest import load

    digests.update(Inputs.of(load(manifest))._model_digests)
    monkeypatch.setattr("tokenflow_batch.measured.Measured.of", classmethod(measured))
    plan = planned(manifest)
    assert plan["memory"]["fits"]
    assert plan["memory"]["stage"] == "edit"
    answer = command("plan", manifest, "--memory-budget", "560MB", "--json")
    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.stdout)["memory"]
    assert not found["fits"]
    size = found["window_segments"]
    smaller = write_manifest(
        tmp_path,
        tiny_model,
        name="b.yaml",
        segment_length=2,
        window_segments=size,
        window_overlap=1,
    )
    assert planned(smaller, "--memory-budget", "560MB")["memory"]["fits"]
    answer = command("plan", manifest, "--memory-budget", "501MB")
    assert answer.exit_code == 8
    assert "of memory at once, and there are 501.0 MB" in answer.output
    assert "lower `" in answer.output
    assert f"{manifest}:" in answer.output

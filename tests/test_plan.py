"""The plan lists exactly the UNet calls that a run makes: rows and FLOPs."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tokenflow_batch.config import Settings
from tokenflow_batch.demo.job import write_clip
from tokenflow_batch.demo.scenes import Clip
from tokenflow_batch.plan import partial_rows, rows, unet_calls
from tokenflow_batch.row_counts import partial_row_count, row_counts

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from rows import compare

EDITS = {
    "pnp": {"attn_t": 0.5, "f_t": 1.0},
    "official": {"mode": "official", "inversion_iterations": 0, "inversion_steps": 4},
    "again": {"conv_features": "recompute", "attn_t": 0.25, "conv_site": "up_blocks.2.resnets.0"},
    "eight": {"conv_features": "store8"},
}


@pytest.mark.slow
def test_plan_equals_run(tiny_model, tmp_path):
    write_clip(tmp_path / "clip.mp4", Clip.random(1, 7, 64))
    manifest = {
        "version": 1,
        "model": str(tiny_model),
        "output": "out",
        "defaults": {
            "steps": 4,
            "inversion_iterations": 4,
            "segment_length": 3,
            "chunk_frames": 4,
            "unet_batch": 3,
        },
        "clips": [
            {
                "video": "clip.mp4",
                "edits": [{"name": n, "prompt": "a red ball", **e} for n, e in EDITS.items()],
            }
        ],
    }
    path = tmp_path / "manifest.yaml"
    path.write_text(yaml.safe_dump(manifest), encoding="utf-8")
    report = {job["job"]: job for job in compare(path)}
    assert len(report) == len(EDITS)
    assert all(job["equal"] for job in report.values()), report
    assert all(job["stages"]["edit"]["flops_run"] > 0 for job in report.values())


def test_balanced_rows_per_frame():
    """25 × 1 inversion, once more at its second step, which gives match what it needs, and an edit
    on two branches."""
    frames = 128
    per_frame = {s: rows(c) / frames for s, c in unet_calls(Settings(), frames).items()}
    assert per_frame["invert"] == 51
    assert 0 < per_frame["match"] < 0.4  # keyframes just outside a chunk
    alone = {s: rows(c) / frames for s, c in unet_calls(Settings(), frames, handed=False).items()}
    assert alone["match"] == 25 + per_frame["match"]
    assert (alone["invert"], alone["edit"]) == (per_frame["invert"], per_frame["edit"])
    assert rows(unet_calls(Settings(), 64)["match"]) == 0
    assert per_frame["edit"] == 25 * (2 + 2 / 8) + 12 / 8
    compared = unet_calls(Settings(source_prompt="a wolf", prompt="a fox"), frames)["edit"]
    assert rows(compared) / frames == per_frame["edit"] + 4 * (1 + 1 / 8)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mode": "official"},
        {"technique": "sdedit", "strength": 0.5},
        {"segment_length": 4, "window_segments": 4, "window_overlap": 1, "anchors": 3},
        {"segment_length": 4, "window_segments": 4, "mode": "official", "unet_batch": 3},
        {"segment_length": 5, "window_segments": 2, "window_overlap": 1, "chunk_frames": 7},
        {"segment_length": 9, "window_segments": 3, "window_overlap": 1, "chunk_frames": 4},
        {"segment_length": 1, "chunk_frames": 5, "keyframe_seed": 7},
        {"guidance_interval": (0.2, 0.7)},
        {"source_prompt": "a", "prompt": "b", "guidance_focus": 0.25},
        {"source_prompt": "a", "prompt": "b", "conv_features": "recompute", "f_t": 1.0},
        {"guidance_scale": 1.0, "mode": "official"},
        {"conv_features": "recompute"},
        {"conv_features": "recompute", "mode": "official"},
        {"conv_features": "recompute", "technique": "sdedit"},
        {"conv_features": "recompute", "attn_t": 0.0, "f_t": 1.0, "segment_length": 3},
        {"conv_features": "recompute", "attn_t": 1.0, "f_t": 0.5, "segment_length": 1},
        {
            "conv_features": "recompute",
            "segment_length": 5,
            "window_segments": 2,
            "window_overlap": 1,
        },
    ],
)
@pytest.mark.parametrize("frames", [1, 8, 23, 24, 61])
@pytest.mark.parametrize("cuts", [(), (7,), (4, 5, 20)])
def test_counted_rows_are_those_of_the_listed_calls(settings, frames, cuts):
    if cuts and (cuts[-1] >= frames or "mode" in settings):
        pytest.skip("no such clip")
    s = Settings(steps=6, inversion_steps=6, **settings)
    calls = unet_calls(s, frames, cuts)
    assert row_counts(s, frames, cuts) == {stage: rows(c) for stage, c in calls.items()}
    partial = {stage: partial_rows(c) for stage, c in calls.items()}
    assert partial == {"invert": 0, "match": 0, "edit": partial_row_count(s, frames, cuts)}


def test_planning_does_not_import_torch():
    code = "import sys, tokenflow_batch.row_counts; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

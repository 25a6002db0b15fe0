"""Shot cuts: found where they are, nowhere else, and heeded by the whole job."""

import json
from fractions import Fraction
from itertools import chain

import numpy as np
import pytest
from jobs import run, run_one, write_manifest

from tokenflow_batch.demo.scenes import FULL, Clip
from tokenflow_batch.errors import VideoError
from tokenflow_batch.video import Encoding, find_cuts, write_segment

RATE = Fraction(24)


def shots(*lengths, seed=0, **options):
    """Clips of different looks, one after the other."""
    clips = [Clip.random(seed + 10 * i, n, domain=FULL, **options) for i, n in enumerate(lengths)]
    return chain.from_iterable(clip.frames() for clip in clips)


@pytest.mark.parametrize("seed", range(6))
def test_cuts_are_found_where_they_are(seed):
    assert find_cuts(shots(14, 9, 20, seed=seed), RATE) == (14, 23)


@pytest.mark.parametrize(
    "options", [{"speed": 6.0}, {"pan": (-4, 3)}, {"post": True}, {"dim": 0.13, "flicker": 0.08}]
)
@pytest.mark.parametrize("seed", range(3))
def test_motion_and_light_are_no_cuts(seed, options):
    assert find_cuts(shots(60, seed=seed, **options), RATE) == ()


@pytest.mark.parametrize("frames", [0, 1, 2])
def test_the_shortest_videos_have_none(frames):
    assert find_cuts(shots(*[1] * frames), RATE) == ()


def write(path, frames, count):
    write_segment(
        path,
        frames,
        np.arange(count),
        time_base=Fraction(1, 24),
        rate=RATE,
        encoding=Encoding(crf=4),
    )


def cuts_of(folder):
    metrics = json.loads((folder / "out" / "clip" / "blue" / "metrics.json").read_text())
    return metrics["shot_cuts"]


@pytest.mark.parametrize(
    ("setting", "expected"), [("auto", [10]), ("none", []), ([4, 10], [4, 10])]
)
def test_a_job_heeds_the_cuts(tiny_model, tmp_path, setting, expected):
    write(tmp_path / "clip.mp4", shots(10, 7, size=64), 17)
    manifest = write_manifest(tmp_path, tiny_model, steps=1, cuts=setting)
    run_one(manifest)
    assert cuts_of(tmp_path) == expected


def test_a_cut_outside_the_clip_is_a_clear_error(tiny_model, tmp_path):
    write(tmp_path / "clip.mp4", shots(5, size=64), 5)
    manifest = write_manifest(tmp_path, tiny_model, steps=1, cuts=[5])
    (result,) = run(manifest)
    assert isinstance(result.error, VideoError)
    assert "cut at frame 5 of 5 frames" in str(result.error)

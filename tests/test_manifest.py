"""Manifests: what they resolve to, and that every mistake is told with its file and line."""

import json
import re
from pathlib import Path

import pytest

from tokenflow_batch.config import PRESETS, Settings
from tokenflow_batch.errors import ManifestError
from tokenflow_batch.manifest import load

GOOD = """\
version: 1
model: demo
output: results/
defaults:
  guidance_scale: 5.0
clips:
  - video: wolf.mp4
    source_prompt: a wolf
    edits:
      - name: robot
        prompt: a robotic wolf
"""


def written(tmp_path, text, name="manifest.yaml"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def edited(old, new):
    assert old in GOOD
    return GOOD.replace(old, new)


def test_a_manifest_resolves_to_jobs(tmp_path):
    path = written(tmp_path, GOOD)
    batch = load(path)
    (job,) = batch.jobs
    assert (job.clip, job.edit, job.name) == ("wolf", "robot", "wolf/robot")
    assert (job.video, job.model, job.base_config) == (tmp_path / "wolf.mp4", "demo", None)
    assert (batch.output, batch.workdir) == (tmp_path / "results", tmp_path / "results" / ".work")
    s = job.settings
    assert (s.prompt, s.source_prompt, s.guidance_scale) == ("a robotic wolf", "a wolf", 5.0)
    assert (s.steps, s.inversion_steps, s.inversion_iterations) == (25, 25, 1)
    assert job.where == f"{path}:10"
    other = load(path, output=tmp_path / "o", workdir=tmp_path / "w")
    assert (other.output, other.workdir) == (tmp_path / "o", tmp_path / "w")


def test_json_is_yaml_too(tmp_path):
    data = {
        "version": 1,
        "model": "demo",
        "clips": [{"video": "a.mp4", "edits": [{"name": "x", "prompt": "y"}]}],
    }
    path = written(tmp_path, json.dumps(data, indent=1), "m.json")
    assert load(path).jobs[0].name == "a/x"
    data["clips"][0]["edits"][0]["prompt"] = 3
    with pytest.raises(ManifestError, match=r"m\.json:10: .*must be a text"):
        load(written(tmp_path, json.dumps(data, indent=1), "m.json"))


# (what is replaced, by what, line, what the message says)
MISTAKES = {
    "unknown top key": ("model: demo", "modle: demo\nmodel: demo", 2, "did you mean `model`"),
    "no model": ("model: demo\n", "", 1, "`model` is missing"),
    "no version": ("version: 1\n", "", 1, "`version` is missing"),
    "future version": ("version: 1", "version: 2", 1, "should be 1"),
    "no clips": (GOOD[GOOD.index("clips") :], "clips: []\n", 6, "at least 1"),
    "clips no list": (GOOD[GOOD.index("clips") :], "clips: wolf\n", 6, "must be a list"),
    "clip no mapping": (
        GOOD[GOOD.index("  - video") :],
        "  - wolf.mp4\n",
        7,
        "must be keys with values",
    ),
    "no video": ("video: wolf.mp4\n    source", "source", 7, "`video` is missing"),
    "no edits": (GOOD[GOOD.index("    edits") :], "    edits: []\n", 9, "at least 1"),
    "edit no mapping": (
        GOOD[GOOD.index("      - name") :],
        "      - robot\n",
        10,
        "keys with values",
    ),
    "no name": ("name: robot\n        prompt", "prompt", 10, "`name` is missing"),
    "no prompt": ("        prompt: a robotic wolf\n", "", 10, "`prompt` is missing"),
    "empty prompt": ("prompt: a robotic wolf", 'prompt: ""', 11, "at least 1 character"),
    "misspelt setting": ("guidance_scale", "guidance_scal", 5, "did you mean `guidance_scale`"),
    "misspelt in clip": ("source_prompt", "sourceprompt", 8, "did you mean `source_prompt`"),
    "misspelt in edit": ("name: robot", "nam: robot", 10, "did you mean `name`"),
    "name of nothing": ("guidance_scale", "zzz", 5, "unknown key"),
    "too large": ("5.0", "500", 5, "less than or equal to 100"),
    "not a number": ("5.0", "much", 5, "a number"),
    "nan": ("5.0", ".nan", 5, "got nan"),
    "negative steps": ("5.0", "5.0\n  steps: -1", 6, "greater than or equal to 1"),
    "steps no whole number": ("5.0", "5.0\n  steps: 2.5", 6, "whole number"),
    "no such preset": ("5.0", "5.0\n  preset: best", 6, "'fast', 'balanced'"),
    "preset no text": ("5.0", "5.0\n  preset: [fast]", 6, "'fast', 'balanced'"),
    "no such technique": ("5.0", "5.0\n  technique: p2p", 6, "'pnp' or 'sdedit'"),
    "overlap of more than half": ("5.0", "5.0\n  window_overlap: 9", 6, "at most half"),
    "cuts out of order": ("5.0", "5.0\n  cuts: [9, 4]", 6, "must ascend"),
    "negative cut": ("5.0", "5.0\n  cuts: [-3]", 6, "greater than or equal to 1"),
    "share above one": ("5.0", "5.0\n  attn_t: 50", 6, "less than or equal to 1"),
    "resolution a number": ("5.0", "5.0\n  resolution: 512", 6, "must be a list"),
    "resolution of three": ("5.0", "5.0\n  resolution: [1, 2, 3]", 6, "at most 2"),
    "resolution too small": ("5.0", "5.0\n  resolution: [512, 4]", 6, "greater than or equal to 8"),
    "inversion below steps": ("5.0", "5.0\n  inversion_steps: 3", 6, "inversion_iterations: 0"),
    "inversion above steps": ("5.0", "5.0\n  inversion_steps: 50", 6, "exactly `steps`"),
    "runtime key": ("model: demo", "model: demo\nruntime: {devce: cpu}", 3, "mean `device`"),
    "runtime value": ("model: demo", "model: demo\nruntime: {threads: 0}", 3, "equal to 1"),
    "duplicate edit": (
        "        prompt: a robotic wolf\n",
        "        prompt: a\n      - {name: ROBOT, prompt: b}\n",
        12,
        "already defined at",
    ),
    "duplicate key": (
        "    source_prompt: a wolf\n",
        "    source_prompt: a\n" * 2,
        9,
        "given twice",
    ),
    "duplicate deep key": ("name: robot", "name: a\n        name: b", 11, "`name` is given twice"),
    "not yaml": ("version: 1", "version: [1", 2, "not valid YAML"),
    "tab": ("  guidance_scale", "\tguidance_scale", 5, "not valid YAML"),
    "python object": ("model: demo", "model: !!python/object:os.system x", 2, "not valid YAML"),
    "glob of nothing": ("wolf.mp4", "'*.webm'", 7, "no file matches"),
    "edit name with slash": ("name: robot", "name: a/b", 10, "can't be a file's name"),
    "edit name above": ("name: robot", "name: ..", 10, "can't be a file's name"),
    "edit name hidden": ("name: robot", "name: .work", 10, "can't be a file's name"),
    "edit name absolute": ("name: robot", "name: /etc/x", 10, "can't be a file's name"),
    "edit name too long": ("name: robot", f"name: {'x' * 121}", 10, "at most 120"),
    "edit name with line": ("name: robot", 'name: "a\\nb"', 10, "can't be a file's name"),
    "clip name above": (
        "video: wolf.mp4",
        "name: ../x\n    video: wolf.mp4",
        7,
        "can't be a file's name",
    ),
    "clip name backslash": (
        "video: wolf.mp4",
        "name: a\\b\n    video: wolf.mp4",
        7,
        "can't be a file's name",
    ),
    "file name above": ("wolf.mp4", "'...mp4'", 7, "can't be a folder's name"),
    "prompt no text": ("prompt: a robotic wolf", "prompt: {a: b}", 11, "must be a text"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_with_file_line_and_what_to_do(tmp_path, name):
    old, new, line, message = MISTAKES[name]
    path = written(tmp_path, edited(old, new))
    with pytest.raises(ManifestError) as caught:
        load(path)
    found = caught.value
    assert found.exit_code == 2
    assert re.search(
        rf"^{re.escape(str(path))}:{line}: .*{re.escape(message)}", found.message, re.MULTILINE
    )
    assert "Traceback" not in str(found)


def test_all_mistakes_are_told_at_once(tmp_path):
    text = GOOD.replace("5.0", "500").replace("source_prompt", "sourceprompt")
    with pytest.raises(ManifestError) as caught:
        load(written(tmp_path, text))
    lines = caught.value.message.splitlines()
    assert sorted(int(line.split(":")[1]) for line in lines) == [5, 8]


@pytest.mark.parametrize("text", ["", "- a\n", "just text", "7", "null"])
def test_what_is_no_mapping_is_no_manifest(tmp_path, text):
    with pytest.raises(ManifestError, match=r"manifest\.yaml:1: a manifest is a mapping"):
        load(written(tmp_path, text))


def test_what_cannot_be_read_is_no_manifest(tmp_path):
    with pytest.raises(ManifestError, match="no such manifest"):
        load(tmp_path / "none.yaml")
    with pytest.raises(ManifestError, match="can't be read"):
        load(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80" * 99)
    with pytest.raises(ManifestError, match=r"binary\.yaml:1: byte 0xff is no UTF-8"):
        load(tmp_path / "binary.yaml")


def test_a_manifest_that_contains_itself_is_refused(tmp_path):
    text = GOOD.replace("defaults:\n", "defaults: &d\n  inside: *d\n")
    with pytest.raises(ManifestError):
        load(written(tmp_path, text))


# -- inheritance -----------------------------------------------------------------------------

NESTED = """\
version: 1
model: demo
defaults: {guidance_scale: 2.0, crf: 20, preset: PRESET}
clips:
  - video: a.mp4
    crf: 21
    edits:
      - {name: plain, prompt: p}
      - {name: own, prompt: p, crf: 22, guidance_scale: 3.0, negative_prompt: n}
  - video: b.mp4
    edits: [{name: plain, prompt: p}]
"""


def test_the_innermost_setting_wins(tmp_path):
    jobs = load(written(tmp_path, NESTED.replace("PRESET", "balanced"))).jobs
    found = {j.name: (j.settings.guidance_scale, j.settings.crf) for j in jobs}
    assert found == {"a/plain": (2.0, 21), "a/own": (3.0, 22), "b/plain": (2.0, 20)}
    assert [j.settings.negative_prompt for j in jobs] == ["", "n", ""]
    assert [j.where.rsplit(":", 1)[1] for j in jobs] == ["8", "9", "11"]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_sets_what_nobody_else_does(tmp_path, preset):
    text = NESTED.replace("PRESET", preset)
    for job in load(written(tmp_path, text)).jobs:
        for name, value in PRESETS[preset].items():
            assert getattr(job.settings, name) == value
        expected = PRESETS[preset].get("inversion_steps", PRESETS[preset]["steps"])
        assert job.settings.inversion_steps == expected
        assert job.settings.crf in (20, 21, 22)
    own = text.replace("crf: 22", "steps: 5")
    jobs = {j.name: j.settings for j in load(written(tmp_path, own)).jobs}
    assert jobs["a/own"].steps == 5
    assert jobs["a/plain"].steps == PRESETS[preset]["steps"]
    assert jobs["a/own"].inversion_steps == (500 if preset == "official" else 5)


@pytest.mark.parametrize(
    ("technique", "strength", "first"),
    [("pnp", 0.5, 0), ("sdedit", 1.0, 0), ("sdedit", 0.9, 3), ("sdedit", 0.01, 24)],
)
def test_sdedit_begins_later_the_weaker_it_is(technique, strength, first):
    assert Settings(technique=technique, strength=strength).first_step == first


def test_convolution_features_are_stored_for_what_a_clip_s_edits_need(tmp_path):
    edits = "\n".join(
        f"      - {{name: e{i}, prompt: p, {extra}}}"
        for i, extra in enumerate(
            [
                *("f_t: 0.5", "technique: sdedit", "steps: 10, f_t: 1.0", "steps: 10"),
                *("mode: official", "conv_features: store8, f_t: 0.9", "conv_features: recompute"),
                "conv_features: recompute, steps: 9",
            ]
        )
    )
    text = GOOD[: GOOD.index("      - name")] + edits
    jobs = load(written(tmp_path, text)).jobs
    assert [j.stored_conv_steps for j in jobs] == [20, 20, 10, 10, 20, 20, 20, 0]
    assert [j.stored_conv8_steps for j in jobs] == [25, 25, 0, 0, 25, 25, 25, 0]
    alone = GOOD.replace("guidance_scale: 5.0", "technique: sdedit")
    assert load(written(tmp_path, alone)).jobs[0].stored_conv_steps == 0


# -- files -----------------------------------------------------------------------------------


@pytest.fixture
def videos(tmp_path):
    for name in ("b.mp4", "a.MKV", "c.txt", ".hidden.mp4", "deep/d.mov", "deep/.cache/e.mp4"):
        path = tmp_path / "videos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "videos" / "results" / "x").mkdir(parents=True)
    (tmp_path / "videos" / "results" / "x" / "old.mp4").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("video", "clips"),
    [
        ("videos", ["a", "b", "d", "old"]),
        ("videos/", ["a", "b", "d", "old"]),
        ("'videos/*.mp4'", ["b"]),
        ("'videos/**/*.mov'", ["d"]),
        ("'videos/[ab].*'", ["a", "b"]),
        ("videos/none.mp4", ["none"]),
    ],
)
def test_a_clip_is_a_file_a_glob_or_a_folder(videos, video, clips):
    batch = load(written(videos, edited("wolf.mp4", video)))
    assert [j.clip for j in batch.jobs] == clips
    assert all(j.video.parts[: len(videos.parts)] == videos.parts for j in batch.jobs)


def test_results_in_the_same_folder_are_no_sources(videos):
    text = edited("wolf.mp4", ".").replace("results/", "videos/results/")
    assert [j.clip for j in load(written(videos, text)).jobs] == ["a", "b", "d"]


def test_an_absolute_glob(videos):
    text = edited("wolf.mp4", f"'{videos}/videos/*.mp4'")
    assert [j.clip for j in load(written(videos, text)).jobs] == ["b"]


def test_a_file_whose_name_looks_like_a_glob_is_a_file(videos):
    (videos / "take [1].mp4").touch()
    assert load(written(videos, edited("wolf.mp4", "'take [1].mp4'"))).jobs[0].clip == "take [1]"


def test_an_empty_folder_is_told(videos):
    (videos / "empty").mkdir()
    with pytest.raises(ManifestError, match=r":7: .*no video files in folder"):
        load(written(videos, edited("wolf.mp4", "empty")))


def test_one_name_for_several_videos_is_refused(videos):
    text = edited("video: wolf.mp4", "name: n\n    video: 'videos/[ab].*'")
    with pytest.raises(ManifestError, match=r":7: .*one name for 2 videos: leave it out"):
        load(written(videos, text))


SAME = """\
version: 1
model: demo
clips:
  - {video: one/wolf.mp4, edits: [{name: x, prompt: p}]}
  - {video: two/WOLF.mp4, edits: [{name: y, prompt: p}]}
"""


def test_two_clips_of_one_name_are_refused_until_one_gets_another(tmp_path):
    with pytest.raises(ManifestError, match=r":5: clip name 'WOLF' is taken: .*give one .*`name`"):
        load(written(tmp_path, SAME))
    fixed = SAME.replace("two/WOLF.mp4,", "two/WOLF.mp4, name: two,")
    assert [j.name for j in load(written(tmp_path, fixed)).jobs] == ["wolf/x", "two/y"]


def test_one_video_may_stand_in_two_entries(tmp_path):
    jobs = load(written(tmp_path, SAME.replace("two/WOLF", "one/wolf"))).jobs
    assert [j.name for j in jobs] == ["wolf/x", "wolf/y"]


def test_edits_whose_files_would_meet_are_refused(tmp_path):
    text = SAME.replace("two/WOLF", "one/wolf").replace("name: y", "name: x.mp4")
    with pytest.raises(ManifestError, match=r":5: "):
        load(written(tmp_path, text))


@pytest.mark.parametrize(
    ("model", "expected"),
    [("demo", "demo"), ("owner/name", "owner/name"), ("here", "FOLDER/here"), ("./x", "./x")],
)
def test_a_model_is_a_path_where_one_lies_there(tmp_path, model, expected):
    for folder in ("here", "demo"):
        (tmp_path / folder).mkdir()
    (job,) = load(written(tmp_path, edited("model: demo", f"model: {model}"))).jobs
    assert job.model == expected.replace("FOLDER", str(tmp_path))


@pytest.mark.parametrize("video", ["videos", "videos/**/*.mp4"])
def test_results_are_no_sources(tmp_path, video):
    """Neither where the manifest puts them, nor where the command line does, nor work files."""
    places = ("videos/results", "videos/elsewhere", "videos/scratch")
    for place in ("videos", *places):
        (tmp_path / place).mkdir()
        (tmp_path / place / f"{Path(place).name}.mp4").touch()
    path = tmp_path / "m.yaml"
    text = "version: 1\nmodel: demo\noutput: {}\nclips: [{{video: {!r}, edits: [{}]}}]\n"
    edit = "{name: a, prompt: b}"
    path.write_text(text.format("videos/results", video, edit))
    (tmp_path / "link").symlink_to(tmp_path / "videos")
    output, workdir = tmp_path / "link" / "elsewhere", tmp_path / "link" / "scratch"
    batch = load(path, output=output, workdir=workdir)
    assert [job.video.name for job in batch.jobs] == ["videos.mp4"]
    path.write_text(text.format(".", video, edit))  # videos below it were named on purpose
    assert len(load(path, output=output, workdir=workdir).jobs) == 2
    path.write_text(text.format("videos", video, edit))
    with pytest.raises(ManifestError, match="which are left out"):
        load(path)

"""Mistakes in manifests: each gives its file, line and remedy, no traceback, and exit code 2; what
only a run can see fails that job alone."""

import json

import pytest
from jobs import clip, command, published, write_manifest

from tokenflow_batch.manifest import load

GOOD = """\
version: 1
model: demo
output: out/
defaults:
  steps: 10
clips:
  - video: wolf.mp4
    source_prompt: a wolf
    edits:
      - name: robot
        prompt: a robot
"""

MISTAKES = {
    "unknown key": ("steps: 10", "stepz: 10", 5, "did you mean `steps`?"),
    "unknown clip key": ("source_prompt:", "source_promt:", 8, "did you mean `source_prompt`?"),
    "unknown edit key": ("prompt: a robot", "promt: a robot", 11, "did you mean `prompt`?"),
    "unknown top key": ("model: demo", "model: demo\nmodle: x", 3, "did you mean `model`?"),
    "no prompt": ("        prompt: a robot\n", "", 10, "`prompt` is missing"),
    "empty prompt": ("prompt: a robot", 'prompt: ""', 11, "at least 1 character"),
    "no version": ("version: 1\n", "", 1, "`version` is missing"),
    "another version": ("version: 1", "version: 2", 1, "should be 1"),
    "no model": ("model: demo\n", "", 1, "`model` is missing"),
    "no clips": (GOOD[GOOD.index("clips:") :], "clips: []\n", 6, "at least 1 item"),
    "clips of the wrong kind": ("  - video: wolf.mp4", "    video: wolf.mp4", 6, "must be a list"),
    "wrong type": ("steps: 10", "steps: many", 5, "got 'many'"),
    "out of range": ("steps: 10", "steps: 0", 5, "greater than or equal to 1"),
    "unknown preset": ("steps: 10", "preset: best", 5, "'balanced'"),
    "unknown technique": ("steps: 10", "technique: magic", 5, "'pnp' or 'sdedit'"),
    "resolution of one number": ("steps: 10", "resolution: 512", 5, "(got 512)"),
    "cuts that do not ascend": ("steps: 10", "cuts: [5, 3]", 5, "must ascend"),
    "strength of nothing": ("steps: 10", "strength: 0", 5, "greater than 0"),
    "overlap of more than half": ("steps: 10", "window_overlap: 9", 5, "at most half"),
    "inversion steps that don't fit": ("steps: 10", "inversion_steps: 7", 5, "inversion_steps"),
    "a list as a key": ("steps: 10", "[a, b]: 10", 5, "a key must be a text"),
    "a number as a key": ("steps: 10", "10: steps", 5, "a key must be a text"),
    "yes for a number": ("steps: 10", "steps: yes", 5, "must be a number"),
    "half a step": ("steps: 10", "steps: 2.5", 5, "must be a whole number"),
    "guidance of no number": ("steps: 10", "guidance_scale: .nan", 5, "got nan"),
    "a prompt of a number": ("prompt: a robot", "prompt: 42", 11, "put it in quotes"),
    "frames backwards": ("source_prompt: a wolf", "frames: [10, 5]", 8, "is empty"),
    "frames of one number": ("source_prompt: a wolf", "frames: [10]", 8, "a list of two"),
    "cuts of something": ("steps: 10", "cuts: some", 5, "`auto`, `none` or a list"),
    "unknown device": ("output: out/", "runtime: {device: tpu}", 3, "`cuda:N`"),
    "backslashes": ("wolf.mp4", r"videos\wolf.mp4", 7, "`/` between folders"),
    "two dots": ("source_prompt: a wolf", "name: ..", 8, "can't be a file's name"),
    "attributes in naming": (
        "output: out/",
        'naming: "{clip.x}/{edit}.mp4"',
        3,
        "{clip} and {edit}",
    ),
    "a colon in a prompt": ("prompt: a robot", "prompt: a: b", 11, "put quotes around"),
    "an open quote": ("prompt: a robot", 'prompt: "a robot', 11, "is not closed"),
    "no edits": ("edits:\n      - name: robot\n        prompt: a robot", "edits:", 9, "a list"),
    "two documents": ("prompt: a robot\n", "prompt: a robot\n---\nmodel: x\n", 12, "not valid"),
    "code in a tag": ("a robot", "!!python/name:os.system x", 11, "not valid YAML"),
    "unknown device option": ("output: out/", "runtime: {gpu: 1}", 3, "unknown key"),
    "duplicate key": ("steps: 10", "steps: 10\n  steps: 20", 6, "`steps` is given twice"),
    "duplicate edits": (
        "        prompt: a robot\n",
        "        prompt: a robot\n      - {name: Robot, prompt: other}\n",
        12,
        "is already defined at",
    ),
    "a path as a name": ("name: robot", "name: ../robot", 10, "can't be a file's name"),
    "a hidden name": ("name: robot", "name: .robot", 10, "can't be a file's name"),
    "a suffix in a name": ("name: robot", "name: robot.mp4", 10, "leave `.mp4` out"),
    "a glob that matches nothing": ("wolf.mp4", '"*.avi"', 7, "no file matches"),
    "tabs": ("  steps: 10", "\tsteps: 10", 5, "not valid YAML"),
    "an open bracket": ("steps: 10", "resolution: [512, 512", 6, "not valid YAML"),
    "naming out of the folder": ("output: out/", 'naming: "../{clip}-{edit}.mp4"', 3, "not inside"),
    "naming with an absolute path": (
        "output: out/",
        'naming: "/tmp/{clip}-{edit}.mp4"',
        3,
        "not inside the output folder",
    ),
    "naming of something unknown": (
        "output: out/",
        'naming: "{video}.mp4"',
        3,
        "{clip} and {edit}",
    ),
    "a field in a field": ("output: out/", 'naming: "{clip:{x}}.mp4"', 3, "there are {clip}"),
    "a name that is too long": (
        "output: out/",
        f'naming: "{"x" * 230}-{{clip}}-{{edit}}.mp4"',
        3,
        "too long",
    ),
    "NUL in a path": ("output: out/", 'output: "out\\0"', 3, "NUL"),
    "somebody else's home": ("wolf.mp4", "~nobody-at-all/*.mp4", 7, "no file matches"),
    "an index into a matrix's key": (
        "name: robot\n        prompt: a robot",
        'name: "{prompt[a]}"\n        matrix: {prompt: [a, b]}',
        10,
        "there are {prompt}",
    ),
    "naming without a suffix": ("output: out/", 'naming: "{clip}/{edit}"', 3, "end in .mp4"),
    "one name for two results": (
        "        prompt: a robot\n",
        "        prompt: a robot\n      - {name: b, prompt: c}\nnaming: '{clip}.mp4'\n",
        13,
        "would both be 'wolf.mp4'",
    ),
    "matrix of no list": ("prompt: a robot", "matrix: {prompt: a robot}", 11, "must be a list"),
    "matrix of nothing": ("prompt: a robot", "matrix: {}", 11, "lists of values"),
    "matrix beside the same": (
        "prompt: a robot",
        "prompt: a\n        matrix: {prompt: [b]}",
        12,
        "beside the matrix too",
    ),
    "matrix with an unknown name": (
        "name: robot\n        prompt: a robot",
        'name: "{colour}"\n        matrix: {prompt: [a, b]}',
        10,
        "there are {prompt}",
    ),
    "matrix with one name": ("prompt: a robot", "matrix: {prompt: [a, b]}", 10, "already defined"),
    "matrix with an unknown key": (
        "prompt: a robot",
        "matrix: {prompt: [a], x: [1]}",
        10,
        "unknown",
    ),
}


ENTRY_MISTAKES = {
    "did you mean `source_prompt`?",
    "did you mean `prompt`?",
    "`prompt` is missing",
    "at least 1 character",
    "can't be a file's name",
    "leave `.mp4` out",
    "no file matches",
    "must be a list",
    "lists of values",
    "beside the matrix too",
    "put it in quotes",
    "is empty",
    "a list of two",
    "`/` between folders",
    "a list",
}
"""Of the above, what clips and edits may say that are wrong alone."""


@pytest.mark.parametrize(("old", "new", "line", "says"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_told_with_file_line_and_remedy(tmp_path, old, new, line, says):
    assert GOOD.count(old) == 1
    path = tmp_path / "m.yaml"
    path.write_text(GOOD.replace(old, new))
    answer = command("status", path)
    assert answer.exit_code == 2, answer.output
    assert f"{path}:{line}:" in answer.output
    assert says in answer.output
    assert "Traceback" not in answer.output


def test_an_unknown_model_is_told_with_its_line(tmp_path):
    path = tmp_path / "m.yaml"
    path.write_text(GOOD.replace("model: demo", "model: Demo"))
    answer = command("status", path)
    assert answer.exit_code == 3
    assert f"{path}:2: model 'Demo': no such folder or file" in answer.output


def test_a_manifest_of_other_bytes_is_told_with_its_line(tmp_path):
    path = tmp_path / "m.yaml"
    path.write_bytes(GOOD.encode().replace(b"a wolf", b"a w\xf6lf"))
    answer = command("status", path)
    assert answer.exit_code == 2
    assert f"{path}:8: byte 0xf6 is no UTF-8" in answer.output


HEAD = "version: 1\nmodel: {}\noutput: out/\nclips:\n"
ENTRY = GOOD[GOOD.index("  - video") :]
IN_CLIPS = [
    (old, new, says)
    for old, new, _, says in MISTAKES.values()
    if ENTRY.count(old) == 1 and says in ENTRY_MISTAKES and "- video" not in old
]


def test_mistakes_in_clips_and_edits_cost_those_alone(tmp_path, tiny_model):
    """All that can be wrong with a clip or an edit, in one manifest, and two good jobs."""
    clip(tmp_path / "wolf.mp4", 2)
    text = HEAD.format(tiny_model)
    for number, (old, new, _) in enumerate(IN_CLIPS):
        text += ENTRY.replace(old, new).replace("name: robot", f"name: e{number}")
    good = ENTRY.replace("    source", "    name: good\n    steps: 1\n    source")
    text += good + "      - {name: late, prompt: p}\n      - {name: bad, promt: p}\n"
    path = tmp_path / "m.yaml"
    path.write_text(text)
    answer = command("run", path, "--until", "encode", "--json")
    assert answer.stdout, answer.output
    found = json.loads(answer.stdout)
    assert [(j["clip"], j["edit"], j["error"]) for j in found["jobs"]] == [
        ("good", "robot", None),
        ("good", "late", None),
    ]
    told = found["mistakes"]
    assert answer.exit_code == 20 + len(told)
    assert len(told) > len(IN_CLIPS) >= 12
    for *_, says in IN_CLIPS:
        assert any(says in line for line in told), says
    assert all(line.startswith(f"{path}:") for line in told)
    assert all(f"error: {line}" in answer.stderr for line in told)
    assert "Traceback" not in answer.output
    # What is chosen is done as if nothing else were there; what removes things wants all right.
    assert command("run", path, "--only", "good/late", "--until", "encode").exit_code == 0
    looked = command("status", path)
    assert (looked.exit_code, "good/late" in looked.stdout) == (2, True)
    assert command("gc", path, "--dry-run").exit_code == 2


def test_all_mistakes_are_told_at_once(tmp_path):
    path = tmp_path / "m.yaml"
    path.write_text(GOOD.replace("steps: 10", "stepz: 10").replace("name: robot", "name: a/b"))
    answer = command("status", path)
    assert f"{path}:5:" in answer.output
    assert f"{path}:10:" in answer.output


TABLES = {
    "no prompt column": ("video,name\na.mp4,x\n", 1, "no column `prompt`"),
    "a column twice": ("video,prompt,prompt\na.mp4,x,y\n", 1, "given twice"),
    "a short row": ("video,prompt,name\na.mp4,x,y\nb.mp4\n", 3, "has not 3 cells"),
    "no video": ("video,prompt\n,a red ball\n", 2, "`video` is missing"),
    "no prompt": ("video,prompt,name\na.mp4,,x\n", 2, "`prompt` is missing"),
    "unknown column": ("video,prompt,stepz\na.mp4,x,3\n", 2, "did you mean `steps`?"),
    "wrong value": ("video,prompt,steps\na.mp4,x,3\nb.mp4,y,many\n", 3, "got 'many'"),
    "one name twice": ("video,prompt\na.mp4,x y\na.mp4,x-y\n", 3, "already defined"),
}


@pytest.mark.parametrize(("text", "line", "says"), TABLES.values(), ids=TABLES.keys())
def test_a_mistake_in_a_table_is_told_with_its_line(tmp_path, text, line, says):
    path = tmp_path / "m.csv"
    path.write_text(text)
    answer = command("status", path, "--model", "demo")
    assert answer.exit_code == 2, answer.output
    assert f"{path}:{line}:" in answer.output
    assert says in answer.output


def test_a_table_needs_a_model_and_a_manifest_has_one(tmp_path):
    (tmp_path / "m.csv").write_text("video,prompt\na.mp4,x\n")
    (tmp_path / "m.yaml").write_text(GOOD)
    for answer, says in [
        (command("status", tmp_path / "m.csv"), "give one with --model"),
        (command("status", tmp_path / "m.yaml", "--model", "demo"), "--model is for CSV tables"),
    ]:
        assert answer.exit_code == 2
        assert says in answer.output


def test_what_only_a_run_sees_fails_that_job_alone(tmp_path, tiny_model):
    clip(tmp_path / "good.mp4", 2)
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "folder.mp4" / "x.mp4").symlink_to(tmp_path / "good.mp4")
    plain = [{"name": "e", "prompt": "p"}]
    wrong = {
        "missing": ({"video": "missing.mp4"}, "no such file", 4),
        "text": ({"video": "text.mp4"}, "can't be opened as a video", 4),
        "empty": ({"video": "empty.mp4"}, "is empty", 4),
        "odd": ({"video": "good.mp4", "resolution": [60, 60]}, "not made of multiples", 4),
        "cut": ({"video": "good.mp4", "cuts": [7]}, "cut at frame 7 of 2 frames", 4),
        "long": ({"video": "good.mp4", "source_prompt": "ball " * 40}, "prompt of", 3),
        "site": ({"video": "good.mp4", "conv_site": "up_blocks.9.resnets.0"}, "up_blocks.9", 3),
    }
    clips = [{"name": n, **c, "edits": plain} for n, (c, _, _) in wrong.items()]
    clips.insert(3, {"name": "good", "video": "good.mp4", "edits": plain})
    manifest = write_manifest(tmp_path, tiny_model, clips=clips, steps=1)
    answer = command("run", manifest, "--until", "render", "--json")
    assert answer.exit_code == 20 + len(wrong)
    failed = {j["clip"]: j["error"] for j in json.loads(answer.stdout)["jobs"]}
    assert failed.pop("good") is None
    for name, (_, says, code) in wrong.items():
        assert failed[name]["code"] == code, name
        assert says in failed[name]["message"]
    assert published(tmp_path) == ["good/e.mp4"]
    # The reasons are still there afterwards, and go once the job succeeds.
    rows = json.loads(command("status", manifest, "--json").stdout)["jobs"]
    assert {r["clip"]: r["error"] for r in rows} == {
        n: failed[n]["message"] if n in failed else None for n in [r["clip"] for r in rows]
    }
    assert "cut/e failed: " in command("status", manifest).stdout
    manifest.write_text(manifest.read_text().replace("- 7\n", "- 1\n"))
    command("run", manifest, "--only", "cut", "--until", "encode")
    rows = json.loads(command("status", manifest, "--json").stdout)["jobs"]
    assert {r["clip"]: r["error"] for r in rows}["cut"] is None


def test_json_s_own_escapes_are_read(tmp_path):
    path = tmp_path / "m.json"
    (tmp_path / "wolf.mp4").write_bytes(b"")
    edit = {"name": "e", "prompt": "a \U0001f43a, \\ud83d and \n"}
    clips = [{"video": "wolf.mp4", "edits": [edit]}]
    path.write_text(json.dumps({"version": 1, "model": "demo", "clips": clips}))
    assert "\\ud83d" in path.read_text()
    assert load(path).jobs[0].settings.prompt == edit["prompt"]


def test_a_cell_that_looks_like_a_date_is_told_with_its_line(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text("video,prompt,keyframe_seed\na.mp4,p,2020-13-45\n")
    answer = command("status", path, "--model", "demo")
    assert answer.exit_code == 2
    assert f"{path}:2: keyframe_seed: can't be read" in answer.output


def test_more_threads_than_there_may_be_are_told(tmp_path):
    path = tmp_path / "m.yaml"
    path.write_text(GOOD)
    (tmp_path / "wolf.mp4").write_bytes(b"")
    answer = command("run", path, "--dry-run", "--threads", "2000")
    assert answer.exit_code == 2
    assert "--threads: Input should be less than or equal to 1024 (got 2000)" in answer.output
    assert "cuda" not in answer.output


def test_a_work_folder_that_can_t_be_made_is_told(tmp_path, tiny_model):
    clip(tmp_path / "clip.mp4", 2)
    path = write_manifest(tmp_path, tiny_model)
    answer = command("gc", path, "--workdir", "/proc/1/none", "--dry-run")
    assert answer.exit_code not in (0, 1)
    assert "/proc/1/none" in answer.output
    assert "Traceback" not in answer.output

"""`init`: a manifest that runs as it stands."""

import pytest
import yaml
from jobs import clip, command

from tokenflow_batch.manifest import load


def test_a_first_manifest_has_every_video_and_prompt(tmp_path, monkeypatch):
    (tmp_path / "films").mkdir()
    for name in ("a", "b"):
        clip(tmp_path / "films" / f"{name}.mp4", 3)
    monkeypatch.chdir(tmp_path)
    quoted = 'a "robot": #1 {é}'
    said = command("init", "films", "--prompt", quoted, "--prompt", "A robot.", "--model", "demo")
    assert said.exit_code == 0, said.output
    assert said.stdout == "manifest.yaml: 4 jobs; next: tokenflow-batch plan manifest.yaml\n"
    jobs = load(tmp_path / "manifest.yaml").jobs
    assert [(j.clip, j.edit, j.settings.prompt) for j in jobs] == [
        (name, edit, prompt)
        for name in ("a", "b")
        for edit, prompt in (("a-robot-1-é", quoted), ("A-robot", "A robot."))
    ]
    assert "preset: balanced" in (tmp_path / "manifest.yaml").read_text()


def test_a_glob_another_folder_and_prompts_of_one_name(tmp_path):
    clip(tmp_path / "a.mp4", 3)
    path = tmp_path / "more" / "m.yaml"
    said = command(
        *("init", tmp_path / "*.mp4", "--manifest", path),
        *("--prompt", "a fox!", "--prompt", "a fox?", "--prompt", "?"),
    )
    assert said.exit_code == 0, said.output
    assert [e["name"] for e in yaml.safe_load(path.read_text())["clips"][0]["edits"]] == [
        "a-fox",
        "a-fox-2",
        "edit",
    ]


@pytest.mark.parametrize(
    ("videos", "prompt", "reason"),
    [("none.mp4", "a fox", "none.mp4"), ("a.mp4", " ", "prompt is empty")],
)
def test_what_would_not_run_is_not_written(tmp_path, videos, prompt, reason):
    clip(tmp_path / "a.mp4", 3)
    said = command("init", tmp_path / videos, "--prompt", prompt, "--manifest", tmp_path / "m.yaml")
    assert said.exit_code == 2
    assert reason in said.stderr
    assert "Traceback" not in said.output
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_a_manifest_that_is_there_is_left_alone(tmp_path):
    clip(tmp_path / "a.mp4", 3)
    (tmp_path / "m.yaml").write_text("mine")
    said = command(
        "init", tmp_path / "a.mp4", "--prompt", "a fox", "--manifest", tmp_path / "m.yaml"
    )
    assert said.exit_code == 2
    assert "exists already" in said.stderr
    assert (tmp_path / "m.yaml").read_text() == "mine"


def test_what_would_be_wrong_is_told_of_the_file_that_was_asked_for(tmp_path):
    (tmp_path / "empty").mkdir()
    path = tmp_path / "m.yaml"
    answer = command("init", tmp_path / "empty", "--prompt", "a wolf", "--manifest", path)
    assert answer.exit_code == 2
    assert f"{path}, as it would be" in answer.output
    assert ".tmp" not in answer.output
    assert list(tmp_path.iterdir()) == [tmp_path / "empty"]

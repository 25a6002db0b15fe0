"""The command line: what it says, how it ends, and what it does not import."""

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from jobs import clip, command, folder_of, published, run_one, write_manifest

from tokenflow_batch.cli.options import messages
from tokenflow_batch.distributed import Team
from tokenflow_batch.locks import StageLocks
from tokenflow_batch.paths import Workspace
from tokenflow_batch.stage_names import STAGES

COMMAND = Path(sys.executable).with_name("tokenflow-batch")
HEAVY = ("torch", "numpy", "diffusers", "transformers", "zarr", "av", "cv2", "faiss")

IMPORTS = """
import sys
from tokenflow_batch.cli import app
try:
    app(sys.argv[2:])
except SystemExit as end:
    code = end.code
loaded = [name for name in sys.argv[1].split(",") if name in sys.modules]
print("LOADED", code, loaded)
"""


def imported(*arguments):
    """(exit code, heavy modules) after a command in a process of its own, and what it said."""
    answer = subprocess.run(
        [sys.executable, "-c", IMPORTS, ",".join(HEAVY), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "200"},
    )
    said, _, found = answer.stdout.rpartition("LOADED ")
    return found.strip(), said


@pytest.fixture(scope="module")
def manifest(tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp("cli")
    clip(folder / "clip.mp4", 2)
    return write_manifest(folder, tiny_model, steps=1)


@pytest.mark.parametrize(
    "name",
    ["", "run", *STAGES, "plan", "status", "gc", "schema", "submit", "fetch", "demo"],
)
def test_help_loads_nothing_heavy(name):
    found, said = imported(*([name] if name else []), "--help")
    assert found == "0 []"
    assert "Usage:" in said
    assert (name or "encode") in said


def test_status_loads_nothing_heavy(manifest):
    found, said = imported("status", manifest, "--json")
    assert found == "0 []"
    (job,) = json.loads(said)["jobs"]
    assert (job["clip"], job["edit"], job["published"]) == ("clip", "blue", False)
    assert list(job["stages"]) == list(STAGES)
    found, said = imported("status", manifest)
    assert found == "0 []"
    assert "clip/blue" in said


def test_submit_loads_nothing_heavy(manifest):
    found, said = imported("submit", manifest, "--dry-run")
    assert found == "0 []"
    assert "tokenflow-batch run" in said


def test_a_wrong_manifest_is_told_before_anything_heavy_is_loaded(tmp_path):
    (tmp_path / "m.yaml").write_text("version: 1\n")
    found, _ = imported("run", tmp_path / "m.yaml")
    assert found == "2 []"


def test_the_installed_command_says_its_version():
    answer = subprocess.run([COMMAND, "--version"], capture_output=True, text=True, check=False)
    assert (answer.returncode, answer.stderr) == (0, "")
    assert answer.stdout.strip() == importlib.metadata.version("tokenflow-batch")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "Usage"),
        (["fly"], "No such command"),
        (["run"], "Missing argument"),
        (["run", "MANIFEST", "--until", "lunch"], "no stage"),
        (["run", "MANIFEST", "--force", "lunch"], "no stage"),
        (["run", "MANIFEST", "--threads", "0"], "--threads"),
        (["run", "no.yaml"], "no such manifest"),
        (["status", "no.yaml"], "no such manifest"),
        (["demo", "--frames", "0"], "--frames"),
    ],
)
def test_wrong_usage_ends_with_two_and_no_traceback(manifest, arguments, says):
    answer = command(*(manifest if a == "MANIFEST" else a for a in arguments))
    assert answer.exit_code == 2
    assert says in answer.output
    assert "Traceback" not in answer.output


def test_a_missing_model_ends_with_three(tmp_path):
    clip(tmp_path / "clip.mp4", 1)
    manifest = write_manifest(tmp_path, "missing.safetensors")
    for name in ("run", "status", "encode"):
        answer = command(name, manifest)
        assert answer.exit_code == 3
        assert "no such folder or file" in answer.output
    assert published(tmp_path) == []


def test_run_tells_what_it_did_and_status_what_there_is(manifest):
    first = command("run", manifest, "--until", "invert", "--json")
    assert first.exit_code == 0
    (job,) = json.loads(first.stdout)["jobs"]
    assert (job["ran"], job["skipped"], job["outputs"]) == (["encode", "invert"], [], [])
    (row,) = json.loads(command("status", manifest, "--json").stdout)["jobs"]
    states = [stage["state"] for stage in row["stages"].values()]
    assert states == ["done", "done", "begun", "waiting", "waiting", "waiting"]
    second = command("run", manifest)
    assert second.exit_code == 0
    assert "clip/blue: ran match, edit, render, report" in second.stdout
    assert str(manifest.parent / "out" / "clip" / "blue.mp4") in second.stdout
    third = command("run", manifest)
    assert "clip/blue: nothing to do" in third.stdout
    (row,) = json.loads(command("status", manifest, "--json").stdout)["jobs"]
    assert row["published"]
    assert {stage["state"] for stage in row["stages"].values()} == {"done"}
    assert all(stage["units"] >= 1 for stage in row["stages"].values())


def test_output_and_work_folder_can_be_given(manifest, tmp_path):
    answer = command("run", manifest, "-o", tmp_path / "o", "--workdir", tmp_path / "w", "--json")
    assert answer.exit_code == 0
    (job,) = json.loads(answer.stdout)["jobs"]
    assert job["outputs"][0] == str(tmp_path / "o" / "clip" / "blue.mp4")
    assert all(Path(path).is_file() for path in job["outputs"])
    assert sorted(p.name for p in (tmp_path / "w").iterdir() if p.is_dir()) == sorted(
        ["logs", *STAGES]
    )
    assert not (tmp_path / "o" / ".work").exists()


def test_force_begins_a_stage_and_what_came_of_it_anew(manifest):
    run_one(manifest)
    answer = command("run", manifest, "--force", "render", "--force", "match", "--json")
    assert json.loads(answer.stdout)["jobs"][0]["ran"] == ["match", "edit", "render", "report"]
    answer = command("edit", manifest, "--force", "--json")
    assert json.loads(answer.stdout)["jobs"][0]["ran"] == ["edit"]


def test_work_under_other_threads_is_not_mixed(manifest, caplog):
    run_one(manifest, ("encode", "invert", "match"))
    text = manifest.read_text().replace("source_prompt: a red ball", "source_prompt: a star")
    other = manifest.with_name("other.yaml")
    other.write_text(text.replace("chunk_frames: 4", "chunk_frames: 1"))
    run_one(other, ("encode", "invert"))
    commits = next(
        (manifest.parent / "out" / ".work" / "invert").glob("*/commits/*-00000-00001.json")
    )
    commits.unlink()
    commits.with_name("complete.json").unlink()
    answer = command("run", other, "--threads", "2")
    assert answer.exit_code == 6
    said = answer.output + caplog.text
    assert "threads was 1 and is 2" in said
    assert "--force invert" in said
    assert command("run", other, "--threads", "2", "--force", "invert").exit_code == 0


@pytest.fixture(scope="module")
def two_by_two(tmp_path_factory, tiny_model):
    """Two clips with two edits each; the second clip's file is broken."""
    folder = tmp_path_factory.mktemp("jobs")
    clip(folder / "wolf.mp4", 2)
    (folder / "bear.mp4").write_bytes(b"no video" * 10_000)
    edits = [{"name": n, "prompt": f"a {n} ball"} for n in ("blue", "red")]
    clips = [{"video": f"{n}.mp4", "edits": edits} for n in ("bear", "wolf")]
    return write_manifest(folder, tiny_model, clips=clips, steps=1)


def told(manifest, *options):
    """What a dry run says: job → stage → (does, why)."""
    found, said = imported("run", manifest, "--dry-run", "--json", *options)
    assert found == "0 []"
    return {
        f"{job['clip']}/{job['edit']}": {
            stage: (step["does"], step["why"]) for stage, step in job["stages"].items()
        }
        for job in json.loads(said)["jobs"]
    }


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        (["wolf"], ["wolf/blue", "wolf/red"]),
        (["*/red"], ["bear/red", "wolf/red"]),
        (["w*", "bear/b?ue"], ["bear/blue", "wolf/blue", "wolf/red"]),
        (["[bw]*/blue"], ["bear/blue", "wolf/blue"]),
    ],
)
def test_only_takes_the_jobs_that_a_pattern_names(two_by_two, only, expected):
    assert list(told(two_by_two, *(f"--only={p}" for p in only))) == expected


@pytest.mark.parametrize(
    ("pattern", "nearest"), [("wulf", "'wolf'"), ("wolf/bleu", "'wolf/blue'"), ("b/*", "")]
)
def test_a_pattern_that_names_nothing_is_told_with_the_nearest(two_by_two, pattern, nearest):
    answer = command("run", two_by_two, "--only", "bear", "--only", pattern)
    assert answer.exit_code == 2
    assert f"no job is called {pattern!r}" in answer.output
    assert nearest in answer.output


def test_from_after_until_is_refused(two_by_two):
    answer = command("run", two_by_two, "--from", "edit", "--until", "match")
    assert answer.exit_code == 2
    assert "comes after" in answer.output


def test_dry_run_says_what_the_run_then_does(two_by_two):
    command("run", two_by_two, "--only", "wolf/blue", "--until", "invert")
    before = told(two_by_two, "--only", "wolf")
    assert [does for does, _ in before["wolf/blue"].values()] == ["skip"] * 2 + ["run"] * 4
    shared = ("skip", "the same work as wolf/blue, done there")
    assert before["wolf/red"]["match"] == shared
    assert before["wolf/red"]["edit"] == ("run", "not begun")
    answer = command("run", two_by_two, "--only", "wolf", "--json")
    for job in json.loads(answer.stdout)["jobs"]:
        steps = before[f"{job['clip']}/{job['edit']}"]
        assert job["ran"] == [stage for stage, (does, _) in steps.items() if does == "run"]
    late = told(two_by_two, "--only", "wolf/blue", "--from", "match", "--force", "render")
    assert [*late["wolf/blue"]] == ["match", "edit", "render", "report"]
    assert late["wolf/blue"]["edit"] == ("skip", "done")
    assert late["wolf/blue"]["render"] == ("run", "begun anew, by --force")


def test_dry_run_of_one_stage_says_what_it_lacks(two_by_two):
    answer = command("render", two_by_two, "--only", "bear/red", "--dry-run")
    assert answer.exit_code == 0
    assert "fail   needs encode, edit: run that first" in answer.stdout


def test_fail_fast_stops_at_the_first_failure(two_by_two):
    answer = command("run", two_by_two, "--fail-fast", "--json")
    assert answer.exit_code == 4
    assert "3 jobs were not begun" in answer.stderr
    answer = command("run", two_by_two, "--json")
    codes = [job["error"] and job["error"]["code"] for job in json.loads(answer.stdout)["jobs"]]
    assert codes == [4, 4, None, None]
    assert answer.exit_code == 20 + 2


def test_a_stage_that_runs_tells_where_and_how_far(tmp_path, tiny_model):
    clip(tmp_path / "clip.mp4", 2)
    manifest = write_manifest(tmp_path, tiny_model, steps=1)
    command("run", manifest, "--until", "encode")
    folder = folder_of(manifest, "invert")
    folder.open({}, {})
    read = folder_of(manifest, "encode").folder / "commits" / "layout.json"
    arrays = json.loads(read.read_text())["facts"]["arrays"]
    grid = {**arrays["latents"], "unit": "invert", "lead": [3]}
    folder.commit("layout", [], {"arrays": {"latents": grid}})
    folder.commit("invert-00000-00000", [], {})
    locks = StageLocks(
        Team(), Workspace(manifest.parent / "out", manifest.parent / "out" / ".work")
    )
    with locks.shared("invert", folder.key, "wolf"):
        answer = command("status", manifest, "--json")
        assert answer.exit_code == 0, answer.output
        found = json.loads(answer.stdout)["jobs"][0]["stages"]["invert"]
        blocks = -(-grid["frames"] // grid["block_frames"])
        assert (found["state"], found["units"], found["total"]) == ("running", 1, 3 * blocks)
        assert found["where"].endswith(f"process {os.getpid()}")
        shown = command("status", manifest).stdout
        assert f"running 1/{3 * blocks}" in shown
        assert f"invert runs on {found['where']}" in shown
    found = json.loads(command("status", manifest, "--json").stdout)["jobs"][0]["stages"]["invert"]
    assert (found["state"], found["where"]) == ("begun", None)


class Interrupted:
    """Gets a signal while it is taken away, where Python prints what is raised and goes on."""

    def __init__(self, number):
        self.number = number

    def __del__(self):
        signal.raise_signal(self.number)


def work_on(number):
    """What runs below a command; True if the signal did not stop it."""
    dying = Interrupted(number)
    del dying
    time.sleep(5)
    return True


@pytest.fixture
def interrupts():
    """Ctrl-C as in the foreground: what a shell runs in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_inside_a_destructor_stops_it_too(number, capsys):
    before = signal.getsignal(number), sys.unraisablehook
    with pytest.raises(typer.Exit) as stopped, messages():
        pytest.fail(f"went on: {work_on(number)}")
    assert stopped.value.exit_code == 128 + number
    assert f"stopped by {number.name}" in capsys.readouterr().err
    assert (signal.getsignal(number), sys.unraisablehook) == before

"""The plain scripts and the lines of docs/cluster.md on a real Slurm; what is submitted twice."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from jobs import clip, outcome, run, same
from slurm_batches import (
    CLIPS,
    finish,
    first_at_work,
    make_batch,
    processes_of,
    restarts,
    submit,
    tasks,
    wait_until,
)
from slurm_cluster import slurm

pytestmark = pytest.mark.slow
__all__ = ["slurm", "submit"]

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="module")
def two(tmp_path_factory, tiny_model):
    """A batch of two clips, run plainly."""
    folder = tmp_path_factory.mktemp("two")
    manifest = make_batch(folder, tiny_model, CLIPS[2:])
    assert [result.error for result in run(manifest)] == [None] * 4
    return manifest


def another(two, folder):
    """The same batch, not begun."""
    for name in (two.name, *(entry["video"] for entry in CLIPS[2:])):
        shutil.copy2(two.parent / name, folder)
    return folder / two.name


def assert_equal(manifest, two):
    for number in range(4):
        assert same(outcome(manifest, number), outcome(two, number))


@pytest.mark.usefixtures("submit")
def test_the_plain_array_script_goes_on_after_a_signal(slurm, two, tmp_path):
    manifest, names = another(two, tmp_path), tmp_path / "clips.txt"
    names.write_text("three\nfour [[]4]\n")
    script, log = SCRIPTS / "slurm_array.sbatch", tmp_path / "%a.log"
    job = slurm("sbatch", "--parsable", "--array=0-1", "-o", log, script, manifest, names)
    # Running to Slurm is not yet under way: before its first lines a script can hear no signal.
    wait_until(lambda: "1" in processes_of(manifest), "the second to work")
    slurm("scancel", "--batch", "--signal=TERM", f"{job}_1")
    wait_until(lambda: restarts(slurm, job)[1] >= 1, "it to be queued again")
    assert set(finish(slurm, [job]).values()) == {"COMPLETED"}
    assert_equal(manifest, two)


def test_a_cancelled_task_stays_away(slurm, submit, two, tmp_path):
    (said,) = submit(another(two, tmp_path), "--throttle", "1")["submitted"]
    job = said["job"]
    wait_until(lambda: tasks(slurm, job)[0] == "RUNNING", "the first to run")
    slurm("scancel", job)
    wait_until(lambda: set(tasks(slurm, job).values()) == {"CANCELLED"}, "the end of both")
    time.sleep(3)
    assert set(tasks(slurm, job).values()) == {"CANCELLED"}


@pytest.mark.usefixtures("submit")
def test_the_plain_multi_node_script_outlives_a_killed_process(slurm, two, tmp_path):
    manifest, log = another(two, tmp_path), tmp_path / "log"
    script = SCRIPTS / "slurm_multinode.sbatch"
    options = ["--parsable", "--gpus-per-node=1", "--export=ALL,TOKENFLOW_MASTER_ADDR=127.0.0.1"]
    job = slurm("sbatch", *options, "-o", log, script, manifest, "--only", "three")
    wait_until(lambda: first_at_work(manifest) is not None, "a first commit")
    os.kill(processes_of(manifest, "RANK")["1"], signal.SIGKILL)
    wait_until(lambda: int(slurm.details(job)["Restarts"]), "the job to be queued again")
    assert set(finish(slurm, [job]).values()) == {"COMPLETED"}, log.read_text()
    for number in (0, 1):
        assert same(outcome(manifest, number), outcome(two, number))


def test_only_what_is_missing_is_submitted(slurm, submit, two):
    assert submit(two)["submitted"] == []
    clip(two.parent / "one.mp4", 6)
    longer = two.with_name("longer.yaml")
    longer.write_text(two.read_text() + "- {video: one.mp4, edits: [{name: red, prompt: red}]}\n")
    said = submit(longer)
    assert [job["only"] for job in said["submitted"]] == [["one/*"]]
    assert said["complete"] == 2
    slurm("scancel", said["submitted"][0]["job"])


@pytest.mark.usefixtures("submit")
def test_a_machine_with_several_gpus_works_on_several_clips(two, tmp_path):
    manifest = another(two, tmp_path)
    answer = subprocess.run(
        [SCRIPTS / "multi_gpu.sh", manifest, "--threads", "1"],
        env={**os.environ, "GPUS": "0 1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    assert_equal(manifest, two)


@pytest.mark.usefixtures("submit")
def test_the_lines_of_the_page_work(slurm, two, tiny_model, tmp_path):
    text = (SCRIPTS.parent / "docs" / "cluster.md").read_text()
    block = text.partition("```console\n")[2].partition("```")[0]
    lines = [line.removeprefix("$ ") for line in block.splitlines()]
    assert len(lines) == 10
    (tmp_path / "videos").mkdir()
    another(two, tmp_path / "videos").unlink()
    small = yaml.safe_load(two.read_text())
    said = []
    for line in lines:
        cheap = line.replace("--model demo", f"--model {tiny_model}")  # the rest as printed
        answer = subprocess.run(
            ["bash", "-c", cheap], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert answer.returncode == 0, (line, answer.stderr)
        said.append(answer.stdout)
        if " init " in line:
            written = tmp_path / "manifest.yaml"
            quick = {key: small[key] for key in ("runtime", "defaults")}
            written.write_text(yaml.safe_dump(yaml.safe_load(written.read_text()) | quick))
        if line.startswith("squeue"):
            (job,) = re.findall(r"job (\d+): all stages of 2 clips", said[-2])
            assert set(finish(slurm, [job]).values()) == {"COMPLETED"}
    assert said[3].startswith("#!/bin/bash")
    assert "nothing to submit" in said[7]
    assert "three/*, start 1" in said[8]
    assert said[9].splitlines() == [
        "outputs/four [4]/a-gold-statue.mp4",
        "outputs/three/a-gold-statue.mp4",
    ]

"""A batch on a real Slurm: interrupted in every way, it ends complete, with a plain run's bits."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from jobs import clip, command, outcome, run, same, write_manifest
from slurm_cluster import slurm
from test_submit import CASES, MISSING, WORK

from tokenflow_batch.manifest import load
from tokenflow_batch.slurm import plan
from tokenflow_batch.status import status as read_status

pytestmark = pytest.mark.slow
__all__ = ["slurm"]

BIN = Path(sys.executable).parent
SCRIPTS = Path(__file__).parents[1] / "scripts"
CLIPS = [
    {"video": f"{name}.mp4", "edits": [{"name": e, "prompt": e} for e in ("blue", "red")]}
    for name in ("one", "two", "three", "four [4]")
]
JOB = {"steps": 2, "inversion_iterations": 0, "chunk_frames": 4}
LIMIT = 900
"""Seconds for a batch to end."""
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"}


def make_batch(folder, model, clips=CLIPS, frames=6):
    """Clips of different lengths and a manifest in `folder`."""
    for more, entry in enumerate(clips):
        clip(folder / entry["video"], frames + more)
    found = [{**c, "video": c["video"].replace("[", "[[]")} for c in clips]
    return write_manifest(folder, model, clips=found, **JOB)


@pytest.fixture
def submit(slurm, monkeypatch):
    """`tokenflow-batch submit --json` for the cluster; gives what it printed."""
    for name, value in slurm.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{BIN}:{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def call(manifest, *options):
        answer = command("submit", manifest, "--json", *options)
        assert answer.exit_code == 0, answer.output
        return json.loads(answer.stdout)

    return call


def status(manifest):
    """`status` from a process of its own: clip/edit → its stages' states, and whether it is out."""
    answer = subprocess.run(
        [BIN / "tokenflow-batch", "status", manifest, "--json"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return {
        f"{j['clip']}/{j['edit']}": ([s["state"] for s in j["stages"].values()], j["published"])
        for j in json.loads(answer.stdout)["jobs"]
    }


def wait_until(true, what, seconds=LIMIT):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"waited {seconds} s: {what}"
        time.sleep(0.5)


def tasks(slurm, job):
    """The tasks of an array: index → (state, starts so far)."""
    lines = slurm("squeue", "-h", "-r", "-t", "all", "-j", job, "-o", "%i|%K|%T").splitlines()
    return {int(index): state for _, index, state in (line.split("|") for line in lines)}


def restarts(slurm, job):
    """Index of a task → how often it was started again."""
    return {i: int(slurm.details(f"{job}_{i}").get("Restarts", 0)) for i in tasks(slurm, job)}


def log(manifest, job, index):
    (path,) = (manifest.parent / "out" / ".work" / "slurm" / "logs").glob(f"*-{job}_{index}.log")
    return path.read_text()


def finish(slurm, jobs, sample=lambda: None):
    """Wait until all arrays are done; tasks that are queued again need not wait two minutes."""
    waiting, end = {}, time.monotonic() + LIMIT
    while time.monotonic() < end:
        states = {f"{j}_{i}": s for j in jobs for i, s in tasks(slurm, j).items()}
        sample()
        if set(states.values()) <= ENDED:
            return states
        for task in [t for t, s in states.items() if s == "PENDING"]:
            if slurm.details(task).get("Reason") != "BeginTime":
                continue
            if time.monotonic() - waiting.setdefault(task, time.monotonic()) > 3:
                del waiting[task]
                slurm.release(task)
        time.sleep(2)
    raise AssertionError(f"not done after {LIMIT} s: {states}")


def first_at_work(manifest):
    """The index of a task of the first array that has committed something, or None."""
    begun = {j.clip for j in read_status(load(manifest)) for s in j.stages.values() if s.units}
    return next((i for i, c in enumerate(CLIPS) if Path(c["video"]).stem in begun), None)


def interrupt(slurm, job, signalled):
    """Interrupt three tasks in three ways; gives the indices of those that must start again."""
    slurm("scancel", "--batch", "--signal=TERM", f"{job}_{signalled}")  # as near the time limit
    where = {i: slurm.details(f"{job}_{i}")["NodeList"] for i in tasks(slurm, job)}
    spared = where[signalled]
    (lost,) = set(where.values()) - {spared}
    slurm("scontrol", "update", f"nodename={lost}", "state=down", "reason=test")
    slurm("sbatch", "-p", "high", "-w", spared, "-c", "2", "-o", "/dev/null", "--wrap", "sleep 1")
    hit = {i for i, node in where.items() if node == lost}
    wait_until(lambda: all(restarts(slurm, job)[i] for i in hit), "the tasks of the lost node")
    slurm("scontrol", "update", f"nodename={lost}", "state=resume", check=False)  # if not yet back
    return set(where)


def test_interrupted_in_every_way_it_ends_with_a_plain_runs_bits(
    slurm, submit, tmp_path, tiny_model
):
    manifest = make_batch(tmp_path, tiny_model)
    options = ["--partition", "gpu", "--cpu-partition", "cpu", "--time", "30", "--cpus", "1"]
    said = submit(manifest, *options)
    gpu, cpu = (job["job"] for job in said["submitted"])
    assert [len(job["only"]) for job in said["submitted"]] == [4, 4]
    again = submit(manifest, *options)
    assert (again["submitted"], len(again["queued"])) == ([], 4)

    wait_until(lambda: set(tasks(slurm, gpu).values()) == {"RUNNING"}, "all four to run")
    wait_until(lambda: first_at_work(manifest) is not None, "a first commit")
    signalled = first_at_work(manifest)
    hit = interrupt(slurm, gpu, signalled)
    samples = []
    ended = finish(slurm, [gpu, cpu], lambda: samples.append(status(manifest)))
    assert set(ended.values()) == {"COMPLETED"}
    assert {i for i, count in restarts(slurm, gpu).items() if count} == hit
    assert "stopped by SIGTERM" in log(manifest, gpu, signalled)
    _told_the_truth(samples)
    assert submit(manifest)["submitted"] == []
    _same_as_a_plain_run(manifest, tmp_path / "plain")


def _told_the_truth(samples):
    """What was done stays done, and at the end that is everything."""
    assert len(samples) >= 3
    for before, after in pairwise(samples):
        for job, (states, published) in before.items():
            now, now_published = after[job]
            assert now_published >= published
            assert all(n == "done" for n, s in zip(now, states, strict=True) if s == "done")
    names = [f"{Path(c['video']).stem}/{e['name']}" for c in CLIPS for e in c["edits"]]
    assert samples[-1] == {name: (["done"] * 6, True) for name in names}


def _same_as_a_plain_run(manifest, folder):
    folder.mkdir()
    for video in manifest.parent.glob("*.mp4"):
        shutil.copy2(video, folder)
    plain = folder / manifest.name
    plain.write_text(manifest.read_text())
    results = run(plain)
    assert [r.error for r in results] == [None] * len(results)
    for number in range(len(results)):
        assert same(outcome(manifest, number), outcome(plain, number))


def test_sbatch_accepts_the_scripts(slurm, tmp_path):
    given = {"nodes": ("1", None), "full": ("1", "50"), "gpus": ("2", None), "plain": ("1", None)}
    for name, (gpus, limit) in given.items():
        wanted = replace(
            CASES[name], gpus=gpus, time=limit, mem="1G", cpus=1, constraint=None, qos=None
        )
        for one in plan(wanted, WORK, MISSING):
            path = tmp_path / f"{name}.sbatch"
            path.write_text(one.text)
            slurm("sbatch", "--test-only", path)  # raises where it is refused
    path.write_text(one.text.replace("--nodes=1", "--nodes=7"))
    with pytest.raises(RuntimeError, match="not available"):
        slurm("sbatch", "--test-only", path)


def test_what_slurm_refuses_is_told(slurm, submit, tmp_path, tiny_model):
    manifest = make_batch(tmp_path, tiny_model, CLIPS[:1])
    answer = command("submit", manifest, "--partition", "lunch")
    assert answer.exit_code == 5
    assert "`sbatch` refused" in answer.output
    assert "partition" in answer.output
    answer = command("submit", manifest, "--cpu-partition", "lunch")
    assert answer.exit_code == 5
    (number,) = re.findall(r"\(job (\d+) is submitted all the same\)", answer.output)
    slurm("scancel", number)
    wait_until(lambda: set(tasks(slurm, number).values()) == {"CANCELLED"}, "the end of it")
    (said,) = submit(manifest)["submitted"]
    slurm("scancel", said["job"])


def test_one_clip_over_two_nodes_outlives_a_killed_process(
    slurm, submit, tmp_path, tiny_model, monkeypatch
):
    pytest.importorskip("tokenflow_batch.distributed")
    monkeypatch.setenv("TOKENFLOW_MASTER_ADDR", "127.0.0.1")
    manifest = make_batch(tmp_path, tiny_model, CLIPS[:1], frames=16)
    (said,) = submit(manifest, "--multi-node", "2", "--time", "30")["submitted"]
    wait_until(lambda: first_at_work(manifest) == 0, "a first commit")
    os.kill(process_of(manifest, rank=1), signal.SIGKILL)
    wait_until(lambda: restarts(slurm, said["job"])[0] >= 1, "the job to be queued again")
    assert set(finish(slurm, [said["job"]]).values()) == {"COMPLETED"}
    _same_as_a_plain_run(manifest, tmp_path / "plain")


def process_of(manifest, rank):
    """The process of that rank that works on a manifest."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            variables = (folder / "environ").read_bytes().split(b"\0")
            if str(manifest).encode() in words and f"RANK={rank}".encode() in variables:
                return int(folder.name)
    raise AssertionError(f"no process has rank {rank}")


@pytest.fixture(scope="module")
def two(tmp_path_factory, tiny_model):
    """A batch of two clips, run plainly."""
    folder = tmp_path_factory.mktemp("two")
    manifest = make_batch(folder, tiny_model, CLIPS[2:])
    assert [result.error for result in run(manifest)] == [None] * 4
    return manifest


def another(two, folder):
    """The same batch, not begun."""
    for file in [two, *two.parent.glob("*.mp4")]:
        shutil.copy2(file, folder)
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
    wait_until(lambda: set(tasks(slurm, job).values()) == {"RUNNING"}, "both to run")
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
def test_the_plain_multi_node_script_starts_a_process_on_each_node(slurm, two, tmp_path):
    script, log = SCRIPTS / "slurm_multinode.sbatch", tmp_path / "log"
    where = slurm.env["PATH"]
    options = ["--parsable", "--gpus-per-node=1", "--export=ALL,TOKENFLOW_MASTER_ADDR=127.0.0.1"]
    job = slurm("sbatch", *options, "-o", log, script, two, PATH=f"{BIN}:{where}")
    wait_until(lambda: set(tasks_of(slurm, job)) <= ENDED, "the job")
    assert tasks_of(slurm, job) == ["COMPLETED"], log.read_text()
    assert "three/blue: nothing to do" in log.read_text()


def tasks_of(slurm, job):
    """The state of a job that is no array."""
    return [slurm.details(job)["JobState"]]


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
def test_the_lines_of_the_page_work(slurm, two, tmp_path):
    text = (SCRIPTS.parent / "docs" / "cluster.md").read_text()
    block = text.partition("```console\n")[2].partition("```")[0]
    lines = [line.removeprefix("$ ") for line in block.splitlines()]
    assert 5 <= len(lines) <= 10
    manifest = another(two, tmp_path)
    manifest.write_text(manifest.read_text().replace("output: out/", "output: outputs/"))
    said = []
    for line in lines:
        answer = subprocess.run(
            ["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert answer.returncode == 0, (line, answer.stderr)
        said.append(answer.stdout)
        if line.startswith("squeue"):
            (job,) = re.findall(r"job (\d+): all stages of 2 clips", said[-2])
            assert set(finish(slurm, [job]).values()) == {"COMPLETED"}
    assert "nothing to submit" in said[5]
    assert said[-1].split() == [
        "outputs/four", "[4]/blue.mp4", "outputs/four", "[4]/red.mp4",
        "outputs/three/blue.mp4", "outputs/three/red.mp4",
    ]  # fmt: skip

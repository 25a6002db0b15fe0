"""A batch on a real Slurm: interrupted in every way, it ends complete, with a plain run's bits."""

import json
import os
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from jobs import clip, command, outcome, run, same, write_manifest
from slurm_cluster import slurm

from tokenflow_batch.manifest import load
from tokenflow_batch.status import status as read_status

pytestmark = pytest.mark.slow
__all__ = ["slurm"]

BIN = Path(sys.executable).parent
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

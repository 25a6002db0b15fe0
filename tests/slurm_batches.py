"""Small batches on the private Slurm: submitting, watching and waiting."""

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from jobs import clip, command, folder_of, write_manifest

from tokenflow_batch.manifest import load
from tokenflow_batch.stage_names import STAGES
from tokenflow_batch.status import status as read_status

BIN = Path(sys.executable).parent
CLIPS = [
    {"video": f"{name}.mp4", "edits": [{"name": e, "prompt": e} for e in ("blue", "red")]}
    for name in ("one", "two", "three", "four [4]")
]
JOB = {"steps": 2, "inversion_iterations": 0, "chunk_frames": 4}
LIMIT = 1800
"""Seconds for a batch to end."""
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"}


def make_batch(folder, model, clips=CLIPS, frames=6, **settings):
    """Clips of different lengths and a manifest in `folder`."""
    for more, entry in enumerate(clips):
        clip(folder / entry["video"], frames + more)
    found = [{**c, "video": c["video"].replace("[", "[[]")} for c in clips]
    return write_manifest(folder, model, clips=found, **JOB, **settings)


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
        f"{j['clip']}/{j['edit']}": (list(j["stages"].values()), j["published"])
        for j in json.loads(answer.stdout)["jobs"]
    }


def units(manifest):
    """What the ledger holds, looked up here: clip/edit → (units of work, all, whether complete)."""
    jobs = load(manifest).jobs
    folders = {
        job.name: [folder_of(manifest, stage, n) for stage in STAGES] for n, job in enumerate(jobs)
    }
    return {
        name: [
            (sum("-" in unit for unit in one.units()), len(list(one.units())), one.complete)
            for one in found
        ]
        for name, found in folders.items()
    }


def sampled(manifest):
    """`status`, which must lie between what is there before it looks and after."""
    before, told, after = units(manifest), status(manifest), units(manifest)
    for job, (stages, published) in told.items():
        for least, stage, most in zip(before[job], stages, after[job], strict=True):
            assert least[0] <= stage["units"] <= most[1]
            assert least[2] <= (stage["state"] == "done") <= most[2]
        if published:
            assert (manifest.parent / "out" / f"{job}.mp4").is_file()
    return told


def wait_until(true, what, seconds=LIMIT):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"waited {seconds} s: {what}"
        time.sleep(0.5)


def tasks(slurm, job):
    """The tasks of an array: index → (state, starts so far)."""
    lines = slurm("squeue", "-h", "-r", "-t", "all", "-j", job, "-o", "%i|%K|%T").splitlines()
    return {int(index): state for _, index, state in (line.split("|") for line in lines)}


def named_tasks(slurm, job):
    """What Slurm calls the tasks of an array, or a job that is none → state."""
    lines = slurm("squeue", "-h", "-r", "-t", "all", "-j", job, "-o", "%i|%T").splitlines()
    return dict(line.split("|") for line in lines)


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
        states = {task: s for j in jobs for task, s in named_tasks(slurm, j).items()}
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


def start_again(slurm, task):
    """Let a task that is queued again begin: not in the second in which it ended."""
    wait_until(lambda: slurm.details(task).get("Reason") == "BeginTime", f"{task} to wait")
    time.sleep(3)
    slurm.release(task)
    wait_until(lambda: slurm.details(task)["JobState"] == "RUNNING", f"{task} to run again")


def first_at_work(manifest):
    """The index of a task of the first array that has committed something, or None."""
    begun = {j.clip for j in read_status(load(manifest)) for s in j.stages.values() if s.units}
    return next((i for i, c in enumerate(CLIPS) if Path(c["video"]).stem in begun), None)


def processes_of(manifest, variable="SLURM_ARRAY_TASK_ID"):
    """The processes that work on a manifest, by a variable of their environment."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            lines = (folder / "environ").read_bytes().decode().split("\0")
            variables = dict(line.partition("=")[::2] for line in lines)
            if str(manifest).encode() in words and b"run" in words and variable in variables:
                found[variables[variable]] = int(folder.name)
    return found

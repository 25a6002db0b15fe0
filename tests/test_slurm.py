"""A batch on a real Slurm: interrupted in every way, it ends complete, with a plain run's bits."""

import os
import re
import shutil
import signal
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
from jobs import SETTINGS, clip, command, outcome, run, same
from slurm_batches import (
    CLIPS,
    finish,
    first_at_work,
    log,
    make_batch,
    processes_of,
    restarts,
    sampled,
    start_again,
    submit,
    tasks,
    units,
    wait_until,
)
from slurm_cluster import ARRAY_SIZE, slurm
from test_submit import RECORDED

from tokenflow_batch.manifest import load
from tokenflow_batch.status import status as read_status
from tokenflow_batch.tokenflow.windows import Layout

pytestmark = pytest.mark.slow
__all__ = ["slurm", "submit"]

LONG = {"window_segments": 4, "window_overlap": 1, "anchors": 2}
"""Settings by which a clip of 48 frames, 16 segments, is edited in five windows."""


def interrupt(slurm, manifest, job, limited):
    """Have one task come to its time limit, take a node down, and preempt what is left.

    The work stands still meanwhile, so that no task is done before its turn comes. Gives the
    indices of those that must start again: all.
    """
    where = {i: slurm.details(f"{job}_{i}")["NodeList"] for i in tasks(slurm, job)}
    frozen = processes_of(manifest)
    for pid in frozen.values():
        os.kill(pid, signal.SIGSTOP)
    _reach_the_limit(slurm, f"{job}_{limited}", frozen.pop(str(limited)))
    spared = where[limited]
    (lost,) = set(where.values()) - {spared}
    slurm("scontrol", "update", f"nodename={lost}", "state=down", "reason=test")
    slurm("sbatch", "-p", "high", "-w", spared, "-c", "2", "-o", "/dev/null", "--wrap", "sleep 1")
    wait_until(lambda: all(restarts(slurm, job)[i] for i in where), "all tasks to be queued again")
    slurm("scontrol", "update", f"nodename={lost}", "state=resume", check=False)  # if not yet back
    for pid in frozen.values():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    return set(where)


def _reach_the_limit(slurm, task, pid):
    """Set a running task's limit so that Slurm's warning is due; let its work hear of it.

    Slurm looks at limits twice a minute; the warning comes two minutes before them (`--grace`).
    """
    hours, minutes, _ = map(int, slurm.details(task)["RunTime"].split(":"))
    slurm("scontrol", "update", f"jobid={task}", f"TimeLimit={60 * hours + minutes + 2}")
    wait_until(lambda: signal.SIGTERM in _pending(pid), "the warning of the time limit", 120)
    os.kill(pid, signal.SIGCONT)
    wait_until(lambda: int(slurm.details(task).get("Restarts", 0)), f"{task} to be queued again")
    slurm("scontrol", "update", f"jobid={task}", "TimeLimit=30")


def _pending(pid):
    """The signals that a stopped process will hear when it goes on."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (mask,) = (int(line.split()[1], 16) for line in lines if line.startswith("ShdPnd:"))
    return {s for s in signal.Signals if mask >> (s - 1) & 1}


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
    samples = [sampled(manifest)]
    hit = interrupt(slurm, manifest, gpu, signalled)
    ended = finish(slurm, [gpu, cpu], lambda: samples.append(sampled(manifest)))
    assert set(ended.values()) == {"COMPLETED"}
    assert {i for i, count in restarts(slurm, gpu).items() if count} == hit
    logs = {i: log(manifest, gpu, i) for i in hit}
    assert "stopped by SIGTERM" in logs[signalled]
    assert sum("DUE TO NODE FAILURE" in text for text in logs.values()) == 2
    assert sum("DUE TO PREEMPTION" in text for text in logs.values()) == 1
    _told_the_truth(samples)
    assert submit(manifest)["submitted"] == []
    _same_as_a_plain_run(manifest, tmp_path / "plain")


def test_a_broken_clip_holds_no_other_back_and_a_killed_process_is_started_again(
    slurm, submit, tmp_path, tiny_model
):
    manifest = make_batch(tmp_path, tiny_model, CLIPS[:2])
    (tmp_path / "two.mp4").write_bytes(b"no video")
    said = submit(manifest, "--cpu-partition", "cpu", "--cpu-mem", "1G", "--logs", tmp_path / "l")
    gpu, cpu = (job["job"] for job in said["submitted"])
    wait_until(lambda: first_at_work(manifest) == 0, "a first commit")
    os.kill(processes_of(manifest)["0"], signal.SIGKILL)
    wait_until(lambda: restarts(slurm, gpu)[0], "it to be queued again")
    finish(slurm, [gpu, cpu])
    assert tasks(slurm, gpu) == {0: "COMPLETED", 1: "FAILED"}
    assert tasks(slurm, cpu) == {0: "COMPLETED", 1: "CANCELLED"}
    assert slurm.details(f"{cpu}_0")["MinMemoryNode"] == "1G"
    assert slurm.details(f"{gpu}_1")["ExitCode"] == "22:0"  # two edits
    assert len(list((tmp_path / "l").glob(f"*-{gpu}_[01].log"))) == 2
    rows = read_status(load(manifest))
    assert [row.published for row in rows] == [True, True, False, False]
    assert [row.error is None for row in rows] == [True, True, False, False]
    clip(tmp_path / "two.mp4", 3)
    (again,) = submit(manifest)["submitted"]
    assert again["only"] == ["two/*"]
    assert set(finish(slurm, [again["job"]]).values()) == {"COMPLETED"}
    _same_as_a_plain_run(manifest, tmp_path / "plain")


def _told_the_truth(samples):
    """What was done stays done, and at the end that is everything."""
    assert len(samples) >= 3
    for before, after in pairwise(samples):
        for job, (stages, published) in before.items():
            now_stages, now_published = after[job]
            assert now_published >= published
            for stage, now in zip(stages, now_stages, strict=True):
                assert now["units"] >= stage["units"]
                assert now["state"] == "done" or stage["state"] != "done"
    names = [f"{Path(c['video']).stem}/{e['name']}" for c in CLIPS for e in c["edits"]]
    assert list(samples[-1]) == names
    for stages, published in samples[-1].values():
        assert published
        assert [stage["state"] for stage in stages] == ["done"] * 6


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


@pytest.mark.parametrize("path", sorted(RECORDED.glob("*.sbatch")), ids=lambda path: path.name)
def test_sbatch_accepts_the_recorded_scripts(slurm, path, tmp_path):
    slurm("sbatch", "--test-only", path)  # raises where it is refused
    too_many = tmp_path / "too_many.sbatch"
    too_many.write_text(re.sub("--nodes=[0-9]", "--nodes=7", path.read_text()))
    with pytest.raises(RuntimeError, match="not available"):
        slurm("sbatch", "--test-only", too_many)


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


def test_a_batch_longer_than_an_array_may_be_is_cut(slurm, submit, tmp_path, tiny_model):
    clips = [{**CLIPS[0], "video": f"{n}.mp4"} for n in range(ARRAY_SIZE + 2)]
    manifest = make_batch(tmp_path, tiny_model, clips, frames=1)
    slurm("scontrol", "update", "partitionname=gpu", "state=down")  # nothing begins
    try:
        first, second = submit(manifest, "--throttle", "2")["submitted"]
        assert [len(one["only"]) for one in (first, second)] == [ARRAY_SIZE, 2]
        assert set(first["only"]) | set(second["only"]) == {f"{n}/*" for n in range(ARRAY_SIZE + 2)}
        assert set(tasks(slurm, first["job"])) == set(range(ARRAY_SIZE))
        waiting = slurm("squeue", "-h", "-j", second["job"], "-o", "%E")
        assert waiting.startswith(f"afterany:{first['job']}")
        again = submit(manifest)
        assert (again["submitted"], len(again["queued"])) == ([], ARRAY_SIZE + 2)
        slurm("scancel", first["job"], second["job"])
        answer = command("submit", manifest)
        assert f"in several arrays: this cluster takes at most {ARRAY_SIZE} tasks" in answer.stdout
        slurm("scancel", *re.findall(r"job (\d+): all stages", answer.stdout))
    finally:
        slurm("scontrol", "update", "partitionname=gpu", "state=up")


def test_one_clip_over_two_nodes_outlives_a_killed_process(
    slurm, submit, tmp_path, tiny_model, monkeypatch
):
    monkeypatch.setenv("TOKENFLOW_MASTER_ADDR", "127.0.0.1")
    assert len(Layout.plan(48, SETTINGS["segment_length"], size=4, overlap=1).windows) == 5
    manifest = make_batch(tmp_path, tiny_model, CLIPS[:1], frames=48, **LONG)
    monkeypatch.setenv("NEAR", str(tmp_path / "near"))
    options = ["--multi-node", "2", "--time", "30", "--scratch", "$NEAR/scratch"]
    (said,) = submit(manifest, *options)["submitted"]
    task = f"{said['job']}_0"
    wait_until(lambda: first_at_work(manifest) == 0, "a first commit")
    os.kill(processes_of(manifest, "RANK")["1"], signal.SIGKILL)
    wait_until(lambda: restarts(slurm, said["job"])[0] == 1, "the job to be queued again")
    left = [p for p in (tmp_path / "near" / "scratch").iterdir() if p.is_dir()]
    assert len(left) == 1  # the killed one's
    before = units(manifest)
    start_again(slurm, task)
    wait_until(lambda: units(manifest) != before, "more commits")
    slurm("scancel", "--batch", "--signal=TERM", task)  # as at a time limit
    wait_until(lambda: restarts(slurm, said["job"])[0] == 2, "the job to be queued again")
    assert "stopped by SIGTERM" in log(manifest, said["job"], 0)
    assert not all(row.published for row in read_status(load(manifest)))
    assert set(finish(slurm, [said["job"]]).values()) == {"COMPLETED"}
    assert not [p for p in (tmp_path / "near" / "scratch").iterdir() if p.is_dir()]
    _same_as_a_plain_run(manifest, tmp_path / "plain")

"""Several processes on one batch: the same bits, each unit computed once, whatever happens."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from jobs import EDIT, clip, outcome, run, same, write_manifest
from test_resume import assert_kept, committed
from torch.distributed import HashStore

from tokenflow_batch.distributed import Team

COUNTING = str(Path(__file__).with_name("counting_cli.py"))
JOB = {"chunk_frames": 3, "steps": 2, "window_segments": 2, "window_overlap": 1, "anchors": 2}
GREEN = {"name": "green", "prompt": "a green ball on grass"}
CLIPS = [
    {"video": "long.mp4", "edits": [EDIT, GREEN]},
    {"video": "short.mp4", "edits": [EDIT]},
]
TRUNCATED = {"video": "bad.mp4", "edits": [EDIT]}


# -- a team in threads -------------------------------------------------------------------------


def together(size, work):
    """What `work(team)` gives in each of `size` members that share a store."""
    store, found = HashStore(), [None] * size
    teams = [Team(store, rank, size) for rank in range(size)]

    def member(team):
        found[team.rank] = work(team)

    threads = [threading.Thread(target=member, args=(team,)) for team in teams]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return found


def test_every_claim_falls_to_exactly_one():
    claimed = together(4, lambda team: [n for n in range(200) if team.claim(str(n))])
    assert sorted(n for own in claimed for n in own) == list(range(200))


def test_one_computes_and_all_agree():
    calls = []

    def work(team):
        return team.agree("answer", lambda: calls.append(team.rank) or {"rank": team.rank})

    answers = together(4, work)
    assert len(calls) == 1
    assert answers == [{"rank": calls[0]}] * 4


def test_an_answer_may_be_nothing():
    assert together(3, lambda team: team.agree("nothing", lambda: None)) == [None] * 3


def test_nobody_passes_a_barrier_before_all_are_there():
    arrived, seen = [], []

    def work(team):
        time.sleep(0.05 * team.rank)
        arrived.append(team.rank)
        team.barrier("here")
        seen.append(len(arrived))

    together(3, work)
    assert seen == [3, 3, 3]


def test_an_epoch_is_a_clean_slate():
    def work(team):
        first = team.claim("unit")
        team.put("said", 1)
        team.next_epoch()
        fresh = team.get("said") is None
        team.next_epoch()  # nobody tells anything before all have looked
        return first, fresh, team.claim("unit")

    found = together(3, work)
    assert sum(first for first, _, _ in found) == 1
    assert all(fresh for _, fresh, _ in found)
    assert sum(again for _, _, again in found) == 1


def test_waiting_ends_with_one_s_patience_and_is_counted():
    team = Team()
    assert not team.wait(lambda: False, patience=0.05)
    assert 0.05 <= team.waited < 1


# -- real processes ----------------------------------------------------------------------------


def batch(folder, model, *extra):
    folder.mkdir()
    clip(folder / "long.mp4", 9)
    clip(folder / "short.mp4", 5)
    (folder / "bad.mp4").write_bytes(b"no video")
    return write_manifest(folder, model, clips=[*CLIPS, *extra], **JOB)


def launch(manifest, processes, log):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    command += ["--num_processes", str(processes), "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    if processes == 1:
        command = [sys.executable]
    return subprocess.Popen(
        [*command, COUNTING, str(log), "run", str(manifest)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(process):
    said, _ = process.communicate(timeout=400)
    return process.returncode, said


def commits(log):
    return [line.split() for line in log.read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny_model):
    """The batch, done by one process."""
    manifest = batch(tmp_path_factory.mktemp("alone") / "job", tiny_model)
    assert all(result.error is None for result in run(manifest))
    return [outcome(manifest, job) for job in range(3)]


def assert_same(manifest, alone):
    assert all(same(outcome(manifest, job), alone[job]) for job in range(3))


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_any_number_of_processes_gives_the_same_bits(alone, tmp_path, tiny_model, processes):
    manifest, log = batch(tmp_path / "job", tiny_model, TRUNCATED), tmp_path / "log"
    status, said = finish(launch(manifest, processes, log))
    assert status != 0  # one job can't be done
    assert said.count("bad/blue (") == 1, said  # and is named, once
    assert "1 of 4 jobs failed" in said
    assert_same(manifest, alone)
    done = commits(log)
    twice = [unit for unit, n in Counter(u for _, _, u in done).items() if n > 1]
    assert twice == []
    # Who gets a unit is a race: on two cores a third process may find all of them taken.
    assert len({rank for rank, _, _ in done}) >= 2


@pytest.mark.slow
def test_a_killed_rank_stops_all_and_one_process_goes_on(alone, tmp_path, tiny_model):
    manifest, log = batch(tmp_path / "job", tiny_model), tmp_path / "log"
    process = launch(manifest, 2, log)
    work, victim = manifest.parent / "out" / ".work", None
    while victim is None:
        assert process.poll() is None, "ended before the other rank had done anything"
        time.sleep(0.05)
        done = commits(log) if log.exists() else []
        if any(unit.startswith("edit") for *_, unit in done):
            victim = next((pid for rank, pid, _ in done if rank == "1"), None)
    os.kill(int(victim), signal.SIGKILL)
    status, _ = finish(process)
    assert status != 0
    before, counted = committed(work), len(commits(log))
    status, said = finish(launch(manifest, 1, log))
    assert status == 0, said
    assert_kept(before, committed(work))
    assert_same(manifest, alone)
    first, second = commits(log)[:counted], commits(log)[counted:]
    redone = {u for *_, u in first} & {u for *_, u in second}
    assert redone <= {u for *_, u in first if not (work / record(u)).exists()}


def record(unit):
    stage, key, name = unit.split("/")
    return f"{stage}/{key}/commits/{name}.json"


@pytest.mark.slow
def test_two_runs_at_once_share_a_folder(alone, tmp_path, tiny_model):
    manifest = batch(tmp_path / "job", tiny_model)
    logs = [tmp_path / "first", tmp_path / "second"]
    runs = [launch(manifest, 1, log) for log in logs]
    for status, said in map(finish, runs):
        assert status == 0, said
    assert_same(manifest, alone)
    done = Counter(u for log in logs if log.exists() for *_, u in commits(log))
    assert [unit for unit, n in done.items() if n > 1] == []


@pytest.mark.slow
def test_damage_is_mended_by_two_processes(alone, tmp_path, tiny_model):
    manifest, log = batch(tmp_path / "job", tiny_model), tmp_path / "log"
    for result in run(manifest, ("encode", "invert")):
        assert result.error is None
    work = manifest.parent / "out" / ".work"
    shard = max(p for p in work.glob("invert/*/data.zarr/latents/c/**/*") if p.is_file())
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    status, said = finish(launch(manifest, 2, log))
    assert status == 0, said
    assert "computed again" in said
    assert_same(manifest, alone)


@pytest.mark.slow
def test_processors_of_two_types_do_not_mix_their_bits(tmp_path, tiny_model):
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("this processor has no vector instructions to leave out")
    manifest = batch(tmp_path / "job", tiny_model)
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port.getsockname()[1])}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tokenflow_batch", "run", str(manifest)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **where, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", **own},
        )
        for rank, own in (("0", {}), ("1", {"ATEN_CPU_CAPABILITY": "default"}))
    ]
    for process in processes:
        code, said = finish(process)
        assert code == 10, said
        assert "processes 0 and 1 of this launch would give different bits (device: " in said
        assert "Traceback" not in said
    assert not list(manifest.parent.glob("out/.work/*/*/commits/*"))

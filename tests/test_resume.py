"""SIGKILL at random moments: a run that is started again ends with the same bits.

TOKENFLOW_TEST_SEED repeats a run's moments.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jobs import clip, outcome, quick_first, run_one, same, snapshot, write_manifest

from tokenflow_batch import ledger

KILLS = 10
# Three segments in two overlapping windows with anchors, three chunks.
JOB = {"chunk_frames": 3, "steps": 4, "window_segments": 2, "window_overlap": 1, "anchors": 2}
COMMAND = Path(sys.executable).with_name("tokenflow-batch")


def start(manifest):
    return subprocess.Popen(
        [COMMAND, "run", manifest],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # What a shell runs in the background ignores Ctrl-C, and so would all below it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def timed(manifest):
    began = time.monotonic()
    process = start(manifest)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return time.monotonic() - began


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_model):
    """An uninterrupted run: its manifest, how long a run without work takes, and one with."""
    folder = tmp_path_factory.mktemp("whole")
    clip(folder / "clip.mp4", 9)
    manifest = write_manifest(folder, tiny_model, **JOB)
    duration = timed(manifest)
    return manifest, timed(manifest), duration


def committed(work):
    """Per commit record: its content, its file's facts and those of the files that it lists.

    What a kill has left of one that was being written has a name with a dot in front.
    """
    found = {}
    for record in work.glob("*/*/commits/[!.]*.json"):
        content = json.loads(record.read_text())
        facts = snapshot(record.parents[1]) if not content["dropped"] else {}
        files = {name: facts.get(name) for name in content["files"]} if facts else {}
        found[record] = (content, record.stat().st_mtime_ns, files)
    return found


def assert_kept(before, after):
    """What was committed is still there, untouched; or its files were dropped since."""
    for record, (content, time_ns, files) in before.items():
        assert record in after
        now, now_ns, now_files = after[record]
        assert now["files"] == content["files"]
        assert now["facts"] == content["facts"]
        if now["dropped"]:
            continue
        assert (now_ns, now_files) == (time_ns, files)


@pytest.mark.slow
def test_killed_and_started_again_it_ends_with_the_same_bits(whole, tmp_path, tiny_model):
    reference, idle, duration = whole
    seed = int(os.environ.get("TOKENFLOW_TEST_SEED", random.SystemRandom().randrange(10**6)))
    print(f"TOKENFLOW_TEST_SEED={seed}")
    draw = random.Random(seed)  # noqa: S311
    clips, done, killed_at_work = 0, 0, 0
    manifest = None
    # On a machine that gets slower meanwhile, kills may all fall into the start-up: then some more.
    while done < KILLS or (not killed_at_work and done < 5 * KILLS):
        if manifest is None:
            folder = tmp_path / str(clips)
            clips += 1
            folder.mkdir()
            shutil.copy2(reference.parent / "clip.mp4", folder)
            manifest = write_manifest(folder, tiny_model, **JOB)
        work = manifest.parent / "out" / ".work"
        before = committed(work)
        process = start(manifest)
        try:
            said, _ = process.communicate(timeout=draw.uniform(idle / 2, duration))
            assert process.returncode == 0, said
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            done += 1
        after = committed(work)
        assert_kept(before, after)
        killed_at_work += len(after) > len(before) and process.returncode != 0
        if process.returncode == 0:  # it was quicker: another clip for the kills that are left
            assert same(outcome(manifest), outcome(reference))
            manifest = None
    if manifest is not None:
        before = committed(work)
        run_one(manifest)
        assert_kept(before, committed(work))
        assert same(outcome(manifest), outcome(reference))
    assert killed_at_work >= 1


@pytest.mark.slow
@pytest.mark.parametrize(("number", "times"), [(signal.SIGTERM, 3), (signal.SIGINT, 2)])
def test_a_signal_stops_it_soon_and_nothing_is_lost(whole, tmp_path, tiny_model, number, times):
    reference, idle, duration = whole
    shutil.copy2(reference.parent / "clip.mp4", tmp_path)
    manifest = write_manifest(tmp_path, tiny_model, **JOB)
    work = manifest.parent / "out" / ".work"
    stopped = 0
    for share in (0.3, 0.5, 0.7, 0.8):
        if stopped == times:
            break
        before = committed(work)
        process = start(manifest)
        try:
            said, _ = process.communicate(timeout=idle + share * (duration - idle))
            assert process.returncode == 0, said
            continue  # it was quicker
        except subprocess.TimeoutExpired:
            process.send_signal(number)
        began = time.monotonic()
        said, _ = process.communicate(timeout=60)
        assert time.monotonic() - began < 10
        if process.returncode == -number and (not said or "blue.mp4" in said):
            continue  # before it had come to its work, or after the last of it
        assert process.returncode == 128 + number, said
        assert f"stopped by {number.name}" in said
        assert "Traceback" not in said
        assert_kept(before, committed(work))
        stopped += 1
    assert stopped
    run_one(manifest)
    assert same(outcome(manifest), outcome(reference))


class Died(BaseException):
    """Stops this process's run where SIGKILL could have stopped it."""


def dying(monkeypatch, writes, *, after):
    """Die at the n-th commit record, before or after it gets its name."""
    left, write = writes, ledger.write_json

    def counted(path, value):
        nonlocal left
        if path.parent.name == "commits":
            left -= 1
            if left == 0 and not after:
                raise Died
        write(path, value)
        if left == 0 and path.parent.name == "commits":
            raise Died

    monkeypatch.setattr(ledger, "write_json", counted)


@pytest.mark.parametrize(
    ("writes", "after"),
    quick_first([(2, False), (1, True), (5, True), (7, False)], [(7, False)]),
)
def test_dying_at_commit_after_commit_it_ends_with_the_same_files(
    tmp_path, tiny_model, monkeypatch, writes, after
):
    kept = []
    for name in ("whole", "dying"):
        folder = tmp_path / name
        folder.mkdir()
        clip(folder / "clip.mp4", 4)
        manifest = write_manifest(
            folder, tiny_model, steps=2, inversion_steps=4, inversion_iterations=0, unet_batch=8
        )
        died = name == "dying"
        while died:
            before = committed(folder / "out" / ".work")
            with monkeypatch.context() as patch:
                dying(patch, writes, after=after)
                try:
                    run_one(manifest)
                    died = False
                except Died:
                    pass
            assert_kept(before, committed(folder / "out" / ".work"))
        run_one(manifest)
        kept.append((manifest, sorted(snapshot(folder))))
    (first, files), (second, others) = kept
    assert same(outcome(second), outcome(first))
    assert others == files  # nothing lies about that an uninterrupted run would have removed

"""What goes wrong on real disks: bad videos, a second process, a full disk."""

import json
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from jobs import (
    EDIT,
    clip,
    command,
    copy_of,
    folder_of,
    outcome,
    published,
    quick_first,
    run,
    run_one,
    same,
    snapshot,
    write_manifest,
)

from tokenflow_batch.files import digest
from tokenflow_batch.results import exit_code


@pytest.fixture(scope="module")
def done(tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp("done")
    clip(folder / "clip.mp4", 7)
    run_one(write_manifest(folder, tiny_model, steps=2))
    return folder


@pytest.fixture
def manifest(done, tmp_path):
    path = copy_of(done, tmp_path / "copy")
    run_one(path)  # takes note of where the copy lies
    return path


def said(answer, caplog):
    """What the command wrote: its log goes to the test's own handler."""
    return answer.stderr + caplog.text


# -- bad videos among good ones --------------------------------------------------------------

BAD = {
    "missing": (lambda _: None, "no such file"),
    "empty": (lambda p: p.touch(), "is empty"),
    "text": (lambda p: p.write_text("no video\n" * 99), "can't be opened"),
    "noise": (lambda p: p.write_bytes(np.random.default_rng(0).bytes(9999)), "can't be opened"),
    "cut": (lambda p: p.write_bytes(clip(p, 7).read_bytes()[:900]), "can't be opened"),
    "sound": (lambda p: sound_alone(p), "has sound but no picture"),
}


def sound_alone(path):
    import av
    from video_files import add_sound

    with av.open(str(path), "w") as container:
        add_sound(container, container.add_stream("aac", rate=44100), 44100, 0, 1)


def test_bad_videos_fail_alone_and_the_batch_goes_on(tmp_path, tiny_model):
    for name, (make, _) in BAD.items():
        make(tmp_path / f"{name}.mp4")
    clip(tmp_path / "first.mp4", 2)
    clip(tmp_path / "last.mp4", 3)
    names = ["first", *BAD, "last"]
    clips = [{"video": f"{name}.mp4", "edits": [EDIT]} for name in names]
    manifest = write_manifest(tmp_path, tiny_model, clips=clips, steps=1)
    answer = command("run", manifest, "--json")
    jobs = {job["clip"]: job for job in json.loads(answer.stdout)["jobs"]}
    assert list(jobs) == names
    for name, (_, reason) in BAD.items():
        assert reason in jobs[name]["error"]["message"]
        assert f"{name}.mp4" in jobs[name]["error"]["message"]
        assert jobs[name]["error"]["code"] == 4
        assert jobs[name]["outputs"] == []
    assert answer.exit_code == 20 + len(BAD)
    assert f"{len(BAD)} of {len(names)} jobs failed" not in answer.stdout
    assert {f.split("/")[0] for f in published(tmp_path)} == {"first", "last"}
    assert jobs["first"]["error"] is jobs["last"]["error"] is None


def test_the_exit_code_is_one_failure_s_kind_or_how_many_there_are(tmp_path, tiny_model):
    clip(tmp_path / "wide.mp4", 1, size=(96, 64))
    edits = [EDIT, {**EDIT, "name": "long", "prompt": "very " * 40 + "long"}]
    clips = [{"video": v, "edits": edits[i : i + 1]} for i, v in enumerate(("no.mp4", "wide.mp4"))]
    manifest = write_manifest(tmp_path, tiny_model, clips=clips, steps=1)
    results = run(manifest)
    assert [r.error.exit_code for r in results] == [4, 3]
    assert exit_code(results) == 22
    assert exit_code(results[1:]) == 3
    assert exit_code([], mistakes=1) == 2
    assert exit_code(results[1:], mistakes=500) == 119
    assert "prompt of" in results[1].error.message


def test_what_the_model_can_t_do_is_said_before_anything_runs(tmp_path, tiny_model, caplog):
    clip(tmp_path / "clip.mp4", 2)
    edits = [
        EDIT,
        {"name": "long", "prompt": "much " * 40},
        {"name": "site", "prompt": "a star", "conv_site": "up_blocks.9.resnets.0"},
    ]
    manifest = write_manifest(tmp_path, tiny_model, clips=[{"video": "clip.mp4", "edits": edits}])
    fine, long, site = run(manifest, ("encode",))
    assert fine.error is None
    assert "prompt of" in str(long.error)
    assert "up_blocks.9" in str(site.error)
    assert fine.ran == ["encode"]
    assert long.ran == long.skipped == site.skipped == []
    assert "manifest.yaml:" in caplog.text  # where


def test_a_resolution_that_does_not_fit_the_model_names_the_next_ones(tmp_path, tiny_model):
    clip(tmp_path / "clip.mp4", 1)
    (result,) = run(write_manifest(tmp_path, tiny_model, resolution=[60, 32]))
    assert result.error.exit_code == 4
    assert "32×32 and 64×32" in result.error.message
    assert "manifest.yaml" in str(result.error)


def test_a_stage_without_the_one_before_says_what_to_run(tmp_path, tiny_model, caplog):
    clip(tmp_path / "clip.mp4", 1)
    answer = command("edit", write_manifest(tmp_path, tiny_model))
    assert answer.exit_code == 6
    assert "tokenflow-batch encode" in said(answer, caplog)
    assert published(tmp_path) == []


# -- another process, a full disk ------------------------------------------------------------

HOLD = """
import sys, time
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_stage_that_another_run_works_on_is_waited_for(manifest, tiny_model, caplog):
    write_manifest(manifest.parent, tiny_model, steps=2, guidance_scale=5.0)
    lock = folder_of(manifest, "edit").folder.with_suffix(".lock")
    lock.parent.mkdir(exist_ok=True)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        refused = command("run", manifest, "--force", "invert")
        assert folder_of(manifest, "invert").complete  # nothing is lost by what can't be begun
        threading.Timer(3, other.kill).start()  # a dead process holds nothing
        answer = command("run", manifest, "--json")
    assert refused.exit_code == 9
    assert answer.exit_code == 0
    assert "another run" in said(answer, caplog)
    assert json.loads(answer.stdout)["jobs"][0]["ran"] == ["edit", "render", "report"]


def remount(folder, kilobytes, *, first=False):
    options = f"size={kilobytes}k" if first else f"remount,size={kilobytes}k"
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tokenflow-test", str(folder)],
        capture_output=True,
        check=False,
    )
    return made.returncode == 0


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a disk of a given size; where that is not allowed the test is left out."""
    folder = tmp_path / "small"
    folder.mkdir()

    def mount(kilobytes):
        if not remount(folder, kilobytes, first=True):
            pytest.skip("mounting a small disk needs privileges")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True, check=False)


@pytest.mark.parametrize("kilobytes", quick_first([16, 64, 160, 320, 480, 640], [64, 320]))
def test_a_full_disk_is_a_message_and_leaves_nothing_half_done(
    small_disk, done, tiny_model, caplog, kilobytes
):
    folder = small_disk(kilobytes)
    shutil.copy2(done / "clip.mp4", folder)
    manifest = write_manifest(folder, tiny_model, steps=2)
    answer = command("run", manifest)
    assert answer.exit_code == 7
    assert "no space left" in said(answer, caplog)
    good = done / "out"
    for name in published(folder):
        if name.endswith("metrics.json"):  # it says how long things took
            assert json.loads((folder / "out" / name).read_text())["frames"] == 7
        else:
            assert digest(folder / "out" / name) == digest(good / name)
    assert not list(folder.rglob(".*.tmp*"))
    begun = snapshot(folder / "out" / ".work") if (folder / "out").exists() else {}
    assert remount(folder, 8192)
    run_one(manifest)
    assert same(outcome(manifest), outcome(done / "manifest.yaml"))
    after = snapshot(folder / "out" / ".work")
    assert all(
        after.get(f, begun[f]) == begun[f] for f in begun if "/commits/" in f and "advance" not in f
    )


def test_a_file_that_may_not_grow_is_a_full_disk_too(tmp_path, tiny_model, done):
    shutil.copy2(done / "clip.mp4", tmp_path)
    manifest = write_manifest(tmp_path, tiny_model, steps=2)
    answer = subprocess.run(
        [Path(sys.executable).with_name("tokenflow-batch"), "run", manifest],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)),
    )
    assert answer.returncode == 7, answer.stderr
    assert "no space left" in answer.stderr
    assert published(tmp_path) == []

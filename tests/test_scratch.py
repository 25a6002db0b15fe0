"""`run --scratch`: files are worked on nearby, and the work folder is right at every moment."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from jobs import clip, command, outcome, run_one, same, write_manifest
from test_store import SPECS, again, block, filled

from tokenflow_batch.errors import DamagedUnit, StoreError
from tokenflow_batch.files import digest
from tokenflow_batch.ledger import Record, StageFolder
from tokenflow_batch.scratch import keep_only, own_folder
from tokenflow_batch.store import ArrayStore

COMMAND = Path(sys.executable).with_name("tokenflow-batch")
UNIT = "made-00001-00000"


@pytest.fixture
def stage(tmp_path):
    work, near = tmp_path / "work" / "invert" / "k0", tmp_path / "near" / "invert" / "k0"
    folder = StageFolder(work, "invert", "k0", near)
    folder.open({"stage": "invert"}, {"device": "cpu"})
    return folder


def nearby(stage, near):
    """The folder as a process on another machine sees it."""
    return StageFolder(stage.folder, stage.stage, stage.key, near)


def assert_right(work):
    """Every file that a commit record names lies in the work folder as it was committed."""
    records = list(work.glob("*/*/commits/[!.]*.json"))
    for path in records:
        record = Record.from_json(json.loads(path.read_text()))
        for name, (size, sha) in record.files.items():
            if not record.dropped:
                file = path.parents[1] / name
                assert (file.stat().st_size, digest(file)) == (size, sha)
    return records


# -- one stage --------------------------------------------------------------------------------


def test_the_work_folder_is_as_without_scratch(stage, tmp_path):
    filled(stage)
    plain = StageFolder(tmp_path / "plain", "invert", "k0")
    plain.open({"stage": "invert"}, {"device": "cpu"})
    filled(plain)

    def data(folder):
        return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("data.zarr/**/*.*")}

    def commits(folder):
        found = {p.name: json.loads(p.read_text()) for p in folder.glob("commits/*")}
        return {name: (record["files"], record["dropped"]) for name, record in found.items()}

    assert commits(stage.folder) == commits(plain.folder)
    shards = [p for p in plain.folder.rglob("data.zarr/*/c/**/*") if p.is_file()]
    assert len(shards) == 14
    for shard in shards:
        name = shard.relative_to(plain.folder)
        assert digest(stage.folder / name) == digest(stage.files / name) == digest(shard)
    assert data(stage.folder).keys() == data(plain.folder).keys()


def test_copies_then_files_then_folders_then_the_record_get_to_the_disk(stage, monkeypatch):
    store = ArrayStore.create(stage, SPECS)
    work = str(stage.folder)
    record = stage.folder / "commits" / f"{UNIT}.json"
    order, fsync, replace = [], os.fsync, os.replace

    def recording_fsync(handle):
        path = Path(f"/proc/self/fd/{handle}").readlink()
        size = path.stat().st_size if path.is_file() else None
        order.append(("fsync", str(path), size))
        fsync(handle)

    def recording_replace(source, target, **kwargs):
        order.append(("rename", str(target), None))
        replace(source, target, **kwargs)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "replace", recording_replace)
    store.write((1, 0), block(0, 4))
    stage.settle()
    order = [entry for entry in order if entry[1].startswith(work)]
    files = json.loads(record.read_text())["files"]
    assert len(files) == 2
    shards = {str(stage.folder / name) for name in files}
    flushed = [i for i, (what, path, _) in enumerate(order) if what == "fsync" and path in shards]
    # What is flushed is the whole copy.
    assert {Path(order[i][1]).name: order[i][2] for i in flushed} == {
        Path(name).name: size for name, (size, _) in files.items()
    }
    parents = {str(parent) for shard in shards for parent in Path(shard).parents}
    entered = [i for i, (_, path, _) in enumerate(order) if path in parents and path != work]
    appears = [i for i, (_, path, _) in enumerate(order) if path == str(record)]
    assert len(flushed) == 2
    assert max(flushed) < min(entered)
    assert max(i for i in entered if order[i][1] != str(record.parent)) < appears[0]


def test_a_kill_between_copy_and_record_leaves_a_unit_that_is_not_done(stage, monkeypatch):
    store = ArrayStore.create(stage, SPECS)

    def killed(*_):
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr("tokenflow_batch.ledger.write_json", killed)
        with pytest.raises(SystemExit):
            store._write(UNIT, (1, 0), block(0, 4), {})
    elsewhere = again(stage)
    assert not elsewhere.committed(UNIT)
    ArrayStore.create(elsewhere, SPECS).write((1, 0), block(1, 4))
    elsewhere.settle()
    read = ArrayStore.open(nearby(stage, stage.files)).read("latents", (1,), range(4))
    assert np.array_equal(read, block(1, 4)["latents"])  # not what lies in scratch


def test_another_machine_reads_what_was_committed(stage, tmp_path):
    expected = filled(stage).read("latents", (1,))
    elsewhere = nearby(stage, tmp_path / "elsewhere")
    assert np.array_equal(ArrayStore.open(elsewhere).read("latents", (1,)), expected)
    copies = [p for p in elsewhere.files.rglob("c/**/*") if p.is_file()]
    assert len(copies) == 4  # of the two units that were read, and no more


@pytest.mark.parametrize("spoil", [b"", b"something else"])
def test_a_spoilt_copy_is_fetched_again(stage, spoil):
    expected = filled(stage).read("latents", (1,))
    for copy in stage.files.rglob("c/**/*"):
        if copy.is_file():
            copy.write_bytes(spoil)
    read = ArrayStore.open(nearby(stage, stage.files)).read("latents", (1,))
    assert np.array_equal(read, expected)


def test_damage_in_the_work_folder_does_not_come_along(stage, tmp_path):
    filled(stage)
    (shard, *_) = (p for p in stage.folder.rglob("latents/c/1/**/*") if p.is_file())
    shard.write_bytes(bytes(shard.stat().st_size))
    elsewhere = nearby(stage, tmp_path / "elsewhere")
    with pytest.raises(DamagedUnit, match="another digest"):
        ArrayStore.open(elsewhere).read("latents", (1,))
    assert not [p for p in elsewhere.files.rglob("latents/c/**/*") if p.is_file()]


def test_what_is_dropped_or_released_goes_from_scratch(stage):
    store = filled(stage)
    before = {p for p in stage.files.rglob("c/**/*") if p.is_file()}
    stage.drop(UNIT)
    dropped = before - {p for p in stage.files.rglob("c/**/*") if p.is_file()}
    assert len(dropped) == 2
    assert not any((stage.folder / p.relative_to(stage.files)).exists() for p in dropped)
    stage.release(["made-00002-00000"])
    assert len([p for p in stage.files.rglob("c/**/*") if p.is_file()]) == len(before) - 4
    assert store.read("latents", (2,), [0]).shape == (1, 2, 3, 5)  # fetched again


# -- the folder -------------------------------------------------------------------------------


def test_a_process_s_folder_goes_with_it_and_killed_ones_leavings_with_the_next(tmp_path):
    left = tmp_path / "tokenflow_batch-0" / "match"
    left.mkdir(parents=True)
    (tmp_path / "tokenflow_batch-0.lock").touch()
    (tmp_path / "tokenflow_batch-1").mkdir()
    (tmp_path / "another").mkdir()
    with FileLock(tmp_path / "tokenflow_batch-1.lock"), own_folder(tmp_path) as own:
        assert own.is_dir()
        assert not left.exists()
        with own_folder(tmp_path) as other:
            assert other != own
        assert not other.exists()
        there = {p.name for p in tmp_path.iterdir() if p.is_dir()}
        assert there == {own.name, "tokenflow_batch-1", "another"}
    assert not own.exists()


def test_scratch_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="--scratch"), own_folder(tmp_path / "file"):
        pass


def test_what_earlier_jobs_needed_goes(tmp_path):
    for name in ("invert/a", "edit/b", "edit/c"):
        (tmp_path / name / "data.zarr").mkdir(parents=True)
    keep_only(tmp_path, {tmp_path / "invert" / "a", tmp_path / "edit" / "c"})
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.glob("*/*")} == {"invert/a", "edit/c"}


# -- a run ------------------------------------------------------------------------------------

JOB = {"chunk_frames": 3, "steps": 2, "window_segments": 2, "window_overlap": 1, "anchors": 2}


@pytest.fixture(scope="module")
def plain(tmp_path_factory, tiny_model):
    """A run without scratch."""
    folder = tmp_path_factory.mktemp("plain")
    clip(folder / "clip.mp4", 9)
    manifest = write_manifest(folder, tiny_model, **JOB)
    run_one(manifest)
    return manifest


def begun(plain, folder):
    (folder / "clip.mp4").write_bytes((plain.parent / "clip.mp4").read_bytes())
    manifest = folder / plain.name
    manifest.write_text(plain.read_text())
    return manifest


@pytest.mark.slow
def test_killed_with_scratch_it_goes_on_without_to_the_same_bits(plain, tmp_path):
    manifest, scratch = begun(plain, tmp_path), tmp_path / "scratch"
    work = manifest.parent / "out" / ".work"
    # In the middle of `invert`, of `edit`, and of what comes after.
    for stage, units in (("invert", 2), ("edit", 4), ("render", 1)):
        process = subprocess.Popen(
            [COMMAND, "run", manifest, "--scratch", scratch],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        while len(list(work.glob(f"{stage}/*/commits/[!.]*.json"))) < units:
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        records = assert_right(work)
        assert any(r.parents[2].name == stage for r in records)
        assert [p for p in scratch.glob("*/*/*/data.zarr/latents/c/**/*") if p.is_file()]
    run_one(manifest)
    assert_right(work)
    assert same(outcome(manifest), outcome(plain))


def test_a_whole_run_with_scratch_leaves_nothing_there(plain, tmp_path):
    manifest, scratch = begun(plain, tmp_path), tmp_path / "scratch"
    answer = command("run", manifest, "--scratch", scratch)
    assert answer.exit_code == 0, answer.output
    assert not [p for p in scratch.rglob("*") if p.suffix != ".lock"]
    assert_right(manifest.parent / "out" / ".work")
    assert same(outcome(manifest), outcome(plain))


def test_a_scratch_that_is_a_file_is_told(plain):
    answer = command("run", plain, "--scratch", plain)
    assert answer.exit_code == 6
    assert "--scratch" in answer.output
    assert "Traceback" not in answer.output

"""--disk-budget: what goes, what stays, and what comes back when it is needed again."""

import json
import os
import shutil
import threading
import time

import pytest
from jobs import (
    EDIT,
    clip,
    command,
    copy_of,
    folder_of,
    outcome,
    run,
    run_one,
    same,
    write_manifest,
)

from tokenflow_batch.disk import keep_within, parse_size
from tokenflow_batch.errors import ManifestError, MissingInput
from tokenflow_batch.files import DigestMemory, tree_bytes
from tokenflow_batch.inputs import Inputs
from tokenflow_batch.ledger import StageFolder
from tokenflow_batch.manifest import load
from tokenflow_batch.slurm import missing
from tokenflow_batch.stage_names import STAGES
from tokenflow_batch.status import status

DATA = STAGES[:4]
SECOND = {**EDIT, "name": "green", "prompt": "a green ball on grass"}
CLIPS = [{"video": f"{name}.mp4", "edits": [EDIT]} for name in ("first", "last")]


def sized(*edits):
    return [{"video": "clip.mp4", "edits": list(edits)}]


@pytest.mark.parametrize(
    ("text", "size"),
    [("500M", 500e6), ("20GB", 20e9), ("1.5 TiB", 1.5 * 2**40), ("77", 77), ("3kib", 3072)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "big", "0", "-3GB", "3 GX", "nan"])
def test_what_is_no_size_is_an_error_that_says_how(text):
    with pytest.raises(ManifestError, match="is no size") as caught:
        parse_size(text)
    assert "20GB" in str(caught.value)


@pytest.fixture(scope="module")
def done(tmp_path_factory, tiny_model):
    """One finished edit, its manifest and what came out."""
    folder = tmp_path_factory.mktemp("done")
    clip(folder / "clip.mp4", 5)
    manifest = write_manifest(folder, tiny_model, steps=2)
    run_one(manifest)
    return folder


@pytest.fixture
def manifest(done, tmp_path):
    path = copy_of(done, tmp_path / "copy")
    run_one(path)
    return path


def freed(manifest, job=0):
    return [s for s in DATA if folder_of(manifest, s, job).freed]


def test_a_finished_clip_goes_and_counts_as_done(manifest):
    before, video = outcome(manifest), manifest.parent / "out" / "clip" / "blue.mp4"
    work = manifest.parent / "out" / ".work"
    size = sum(p.stat().st_size for p in work.rglob("*") if p.is_file())
    assert command("run", manifest, "--disk-budget", f"{size}b").exit_code == 0
    assert freed(manifest) == []  # it fits
    run_one(manifest, disk_budget=size - 1)
    assert freed(manifest) == ["edit"]  # no more than must be
    run_one(manifest, disk_budget=1)
    assert freed(manifest) == list(DATA)
    assert not any((folder_of(manifest, s).folder / "data.zarr").exists() for s in DATA)
    assert video.is_file()
    (row,) = status(load(manifest))
    assert [s.state for s in row.stages.values()] == [*["freed"] * 4, "done", "done"]
    assert run_one(manifest).ran == []  # done is done
    assert run_one(manifest, disk_budget=1).ran == []
    # A report needs no more than the video and what is kept of the rest.
    shutil.rmtree(folder_of(manifest, "report").folder)
    sheet = video.with_suffix("") / "contact_sheet.png"
    looked = sheet.read_bytes()
    sheet.unlink()
    assert run_one(manifest, disk_budget=1).ran == ["report"]
    assert sheet.read_bytes() == looked
    # What is needed again is computed again, with the same result.
    (folder_of(manifest, "render").folder / "video.mp4").unlink()
    again = run_one(manifest, disk_budget=10**12)
    assert set(again.ran) >= {"encode", "invert", "match", "edit", "render"}
    assert same(outcome(manifest), before)


def test_a_new_edit_computes_what_it_needs_again(manifest, tiny_model):
    before = outcome(manifest)
    run_one(manifest, disk_budget=1)
    write_manifest(manifest.parent, tiny_model, clips=sized(EDIT, SECOND), steps=2)
    with pytest.raises(MissingInput, match="was removed to keep the disk budget"):
        raise run(manifest, ("edit",))[1].error
    first, second = run(manifest)
    assert first.error is second.error is None
    assert first.ran + second.ran == list(STAGES)  # whichever comes first, each once
    assert {"edit", "render", "report"} <= set(second.ran)
    assert freed(manifest) == ["edit"]
    folder_of(manifest, "render").forget("video")  # the first edit is wanted once more
    assert run(manifest)[0].ran == ["edit", "render"]
    assert same(outcome(manifest), before)


def test_what_another_job_needs_stays(tmp_path, tiny_model, caplog):
    clip(tmp_path / "clip.mp4", 2)
    clips = [
        {"video": "clip.mp4", "edits": [EDIT]},
        {"video": "clip.mp4", "name": "other", "edits": [{**SECOND, "prompt": "much " * 40}]},
    ]
    manifest = write_manifest(tmp_path, tiny_model, clips=clips, steps=1)
    first, failed = run(manifest, disk_budget=1)
    assert first.error is None
    assert failed.error is not None  # its prompt is too long: it remains to be done
    assert freed(manifest) == ["edit"]
    assert "is still over it by" in caplog.text


def test_what_was_done_first_goes_first(tmp_path, tiny_model, caplog):
    for name, frames in (("first", 3), ("last", 2)):
        clip(tmp_path / f"{name}.mp4", frames)
    manifest = write_manifest(tmp_path, tiny_model, clips=CLIPS, steps=1)
    assert [r.error for r in run(manifest, disk_budget=10**12)] == [None, None]
    assert freed(manifest, 0) == freed(manifest, 1) == []
    inputs = Inputs.of(load(manifest))
    work = inputs.workspace.work
    size = sum(p.stat().st_size for p in work.rglob("*") if p.is_file())
    kept = sum(
        p.stat().st_size
        for s in DATA
        for p in (folder_of(manifest, s, 0).folder / "data.zarr").rglob("*")
        if p.is_file()
    )
    marks = 100  # the records say that the data are gone
    assert keep_within(inputs, size - kept + marks) == 0
    assert freed(manifest, 0) == list(DATA)
    assert freed(manifest, 1) == []
    assert keep_within(inputs, 1) > 0
    assert freed(manifest, 1) == list(DATA)
    assert "disk budget: removed invert of first/blue" in caplog.text


def test_a_wrong_size_is_said_before_anything_runs(manifest):
    answer = command("run", manifest, "--disk-budget", "plenty")
    assert answer.exit_code == 2
    assert "'plenty' is no size" in answer.stderr


# -- beside others, and what is said: on folders that only the ledger knows ---------------------


@pytest.fixture
def ledgers(tmp_path, tiny_model):
    """Two clips whose stages are all done, with 1,000 bytes of data each."""
    for name, frames in (("first", 3), ("last", 2)):
        clip(tmp_path / f"{name}.mp4", frames)
    path = write_manifest(tmp_path, tiny_model, clips=CLIPS, steps=1)
    for job in range(2):
        for stage in STAGES:
            finish(folder_of(path, stage, job))
    for name in ("first", "last"):
        video = tmp_path / "out" / name / "blue.mp4"
        video.parent.mkdir()
        video.touch()
    return path


def finish(folder):
    folder.open({}, {})
    data = folder.folder / "data" / "0"
    data.parent.mkdir(exist_ok=True)
    data.write_bytes(b"x" * 1000)
    folder.commit("unit", [data])
    folder.finish({})


def everything_freed(manifest):
    return [freed(manifest, 0), freed(manifest, 1)] == [list(DATA)] * 2


def test_two_processes_remove_no_more_than_one(ledgers, monkeypatch):
    free = StageFolder.free

    def slowly(self):
        time.sleep(0.2)
        free(self)

    monkeypatch.setattr(StageFolder, "free", slowly)
    inputs = [Inputs.of(load(ledgers)) for _ in range(2)]
    budget = tree_bytes(inputs[0].workspace.work) - 1
    threads = [threading.Thread(target=keep_within, args=(one, budget)) for one in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert freed(ledgers, 0) + freed(ledgers, 1) == ["edit"]


def test_damage_and_errors_stop_nobody(ledgers, monkeypatch, caplog):
    free = StageFolder.free

    def failing(self):
        if self.stage == "match":
            raise OSError(5, "Input/output error", str(self.folder))
        free(self)

    monkeypatch.setattr(StageFolder, "free", failing)
    damaged = folder_of(ledgers, "invert")
    (damaged.folder / "commits" / "complete.json").write_text("{")
    inputs = Inputs.of(load(ledgers))
    assert keep_within(inputs, 1) > 0
    assert freed(ledgers, 1) == ["encode", "invert", "edit"]
    assert "Input/output error" in caplog.text

    def lost(_folder):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr("tokenflow_batch.disk.tree_bytes", lost)
    assert keep_within(inputs, 1) == 0
    assert "nothing more is removed this time: [Errno 116]" in caplog.text


def test_folders_that_vanish_are_not_counted(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(b"x" * 10)
    lstat = os.lstat

    def vanishing(path, **options):
        if str(path).endswith("a/file"):
            raise FileNotFoundError(path)
        return lstat(path, **options)

    monkeypatch.setattr(os, "lstat", vanishing)
    assert tree_bytes(tmp_path) == 10
    assert tree_bytes(tmp_path / "none") == 0


def test_videos_that_are_left_out_are_not_read(ledgers):
    (ledgers.parent / "out" / ".work" / "digests.json").unlink()
    only = load(ledgers).only(["first"])
    inputs = Inputs.of(only)
    inputs.keys(only.jobs[0])
    keep_within(inputs, 1)
    (other,) = only.others
    assert inputs.memory.peek(other.video) is None
    assert freed(ledgers, 0) == list(DATA)
    assert freed(ledgers, 1) == []  # nobody knows what it needs


def test_processes_learn_digests_from_each_other(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    first, second = (DigestMemory(tmp_path / "digests.json") for _ in range(2))
    assert second.peek(file) is None
    first.digest(file)
    assert second.peek(file) == first.peek(file)


def planned(manifest):
    answer = json.loads(command("plan", manifest, "--json").stdout)
    return [[s["state"] for s in job["stages"].values()] for job in answer["jobs"]]


def previewed(manifest, *options):
    answer = json.loads(command("run", manifest, "--dry-run", "--json", *options).stdout)
    return [{s: t["does"] for s, t in job["stages"].items()} for job in answer["jobs"]]


def lacking(manifest):
    found = missing(load(manifest), frozenset())
    return found.gpu, found.cpu, found.complete


def test_freed_is_said_and_costs_nothing(ledgers):
    keep_within(Inputs.of(load(ledgers)), 1)
    assert everything_freed(ledgers)
    assert planned(ledgers) == [[*["freed"] * 4, "done", "done"]] * 2
    assert set(previewed(ledgers)[0].values()) == {"skip"}
    assert "disk budget" in command("run", ledgers, "--dry-run").stdout
    assert lacking(ledgers) == ((), (), 2)
    assert "freed" in command("status", ledgers).stdout


def test_what_is_freed_and_needed_again_is_planned(ledgers, tiny_model):
    keep_within(Inputs.of(load(ledgers)), 1)
    forced = previewed(ledgers, "--force", "edit")
    assert all(set(steps.values()) == {"run"} for steps in forced)
    folder_of(ledgers, "render").forget("unit")
    assert planned(ledgers)[0] == [*["again"] * 4, "to do", "done"]
    assert previewed(ledgers)[0] == {**dict.fromkeys(STAGES[:5], "run"), "report": "skip"}
    assert lacking(ledgers) == (("first/*",), (), 1)
    clips = [{**CLIPS[0], "edits": [EDIT, SECOND]}, CLIPS[1]]
    finish(folder_of(ledgers, "render"))
    write_manifest(ledgers.parent, tiny_model, clips=clips, steps=1)
    old, new, other = planned(ledgers)
    assert old == other == [*["freed"] * 4, "done", "done"]
    assert new == [*["again"] * 3, *["to do"] * 3]
    costs = json.loads(command("plan", ledgers, "--json").stdout)["jobs"][1]["stages"]
    assert costs["invert"]["rows"] > 0
    assert costs["match"]["bytes"] > 0
    steps = previewed(ledgers)
    assert set(steps[0].values()) == {"skip"}
    assert set(steps[1].values()) == {"run"}

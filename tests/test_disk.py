"""--disk-budget: what goes, what stays, and what comes back when it is needed again."""

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

from tokenflow_batch.config import STAGES
from tokenflow_batch.disk import keep_within, parse_size
from tokenflow_batch.errors import ManifestError, MissingInput
from tokenflow_batch.inputs import Inputs
from tokenflow_batch.manifest import load
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
    assert {s.state for s in row.stages.values()} == {"done"}
    assert run_one(manifest).ran == []  # done is done
    assert run_one(manifest, disk_budget=1).ran == []
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
    assert keep_within(inputs, size - kept) == 0
    assert freed(manifest, 0) == list(DATA)
    assert freed(manifest, 1) == []
    assert keep_within(inputs, 1) > 0
    assert freed(manifest, 1) == list(DATA)
    assert "disk budget: removed invert of first/blue" in caplog.text


def test_a_wrong_size_is_said_before_anything_runs(manifest):
    answer = command("run", manifest, "--disk-budget", "plenty")
    assert answer.exit_code == 2
    assert "'plenty' is no size" in answer.stderr

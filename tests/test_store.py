"""What counts as done, in what order it gets to the disk, and what damage is found."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import zarr

from tokenflow_batch.arrays import ArraySpec
from tokenflow_batch.errors import DamagedUnit, NumericsMismatch, StoreError
from tokenflow_batch.files import write_json
from tokenflow_batch.ledger import StageFolder
from tokenflow_batch.store import LAYOUT, ArrayStore, unit_name

NUMERICS = {"device": "cpu", "threads": 2}
SPECS = {
    "latents": ArraySpec("made", (3,), 7, 4, (2, 3, 5), "float32"),
    "index": ArraySpec("made", (3,), 7, 4, (6,), "uint16", compress=True),
    "sums": ArraySpec("summed", (), 7, 4, (), "float32"),
}


@pytest.fixture
def stage(tmp_path):
    folder = StageFolder(tmp_path / "work" / "invert" / "k0", "invert", "k0")
    folder.open({"stage": "invert"}, NUMERICS)
    return folder


def again(stage):
    """The folder as another process sees it."""
    return StageFolder(stage.folder, stage.stage, stage.key)


def block(seed, frames):
    rng = np.random.default_rng(seed)
    return {
        "latents": rng.standard_normal((frames, 2, 3, 5)).astype(np.float32),
        "index": rng.integers(0, 65536, (frames, 6), dtype=np.uint16),
    }


def filled(stage):
    """A store with every unit committed."""
    store = ArrayStore.create(stage, SPECS)
    for step in range(3):
        for chunk, frames in enumerate((4, 3)):
            store.write((step, chunk), block(10 * step + chunk, frames), {"rows": frames})
    for chunk, frames in enumerate((4, 3)):
        store.write((chunk,), {"sums": np.arange(frames, dtype=np.float32)})
    stage.settle()
    return store


def files_of(folder):
    return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file())


# -- order on the way to the disk ------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """Every fsync and rename of this process, in order, with what they were done to."""
    recorded = []
    fsync, replace = os.fsync, os.replace

    def recording_fsync(handle):
        recorded.append(("fsync", str(Path(f"/proc/self/fd/{handle}").readlink())))
        fsync(handle)

    def recording_replace(source, target, **kwargs):
        recorded.append(("rename", str(target)))
        replace(source, target, **kwargs)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "replace", recording_replace)
    return recorded


def test_files_then_folders_then_the_record_get_to_the_disk(stage, calls):
    store = ArrayStore.create(stage, SPECS)
    calls.clear()
    store.write((1, 0), block(0, 4))
    stage.settle()
    record = stage.folder / "commits" / "made-00001-00000.json"
    shards = [store._file(name, (1, 0)) for name in ("latents", "index")]
    order = [c for c in calls if str(stage.folder) in c[1]]
    appears = order.index(("rename", str(record)))
    assert [c for c in order if c == ("rename", str(record))] == [("rename", str(record))]
    flushed = [order.index(("fsync", str(shard))) for shard in shards]
    folders = {parent for shard in shards for parent in shard.relative_to(stage.folder).parents}
    entered = [order.index(("fsync", str(stage.folder / folder))) for folder in folders]
    assert max(flushed) < min(entered)
    assert max(entered) < appears
    # The record's own content before its name, and its name before the call returns.
    content, name = order[appears - 1], order[appears + 1]
    assert content[0] == "fsync"
    assert Path(content[1]).parent == record.parent
    assert name == ("fsync", str(record.parent))


def test_a_file_is_flushed_before_it_gets_its_name(tmp_path, calls):
    write_json(tmp_path / "a.json", {"x": 1})
    what = [kind for kind, _ in calls]
    assert what == ["fsync", "rename", "fsync"]
    assert calls[1][1] == str(tmp_path / "a.json")
    assert calls[2][1] == str(tmp_path)


# -- the store -------------------------------------------------------------------------------


def test_what_is_written_is_read_in_any_process_and_order(stage):
    filled(stage)
    store = ArrayStore.open(again(stage))
    wanted = np.concatenate([block(20, 4)["latents"], block(21, 3)["latents"]])
    assert np.array_equal(store.read("latents", (2,)), wanted)
    assert np.array_equal(store.read("latents", (2,), [6, 0, 3, 4, 3]), wanted[[6, 0, 3, 4, 3]])
    assert np.array_equal(store.read("latents", (2,), range(2, 6)), wanted[2:6])
    assert store.read("latents", (2,), []).shape == (0, 2, 3, 5)
    assert store.read("index", (0,)).dtype == np.uint16
    assert store.read("sums", ()).tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert store.specs == SPECS


def test_frames_side_by_side_are_read_as_one_slice(stage, monkeypatch):
    """zarr takes forty times as long for a list of frames; whatever the list, it is right."""
    filled(stage)
    store = ArrayStore.open(again(stage))
    asked, read = [], zarr.Array.__getitem__

    def counted(array, selection):
        asked.append(selection)
        return read(array, selection)

    monkeypatch.setattr(zarr.Array, "__getitem__", counted)
    whole = store.read("latents", (1,))
    assert [selection[-1] for selection in asked] == [slice(0, 7)]
    for frames, runs in (([2, 3, 4, 5], 1), ([6, 0, 1, 3], 3), ([5, 4], 2), ([3, 3], 2)):
        asked.clear()
        assert np.array_equal(store.read("latents", (1,), frames), whole[frames])
        assert len(asked) == runs


def test_a_unit_is_one_file_per_array_and_a_tail_is_a_block_too(stage):
    filled(stage)
    for name, units in (("latents", 6), ("index", 6), ("sums", 2)):
        root = stage.folder / "data.zarr" / name
        assert len([f for f in files_of(root) if f != "zarr.json"]) == units
    record = stage.record(unit_name("made", (2, 1)))
    assert len(record.files) == 2
    assert record.facts["rows"] == 3
    assert all((stage.folder / n).stat().st_size == size for n, (size, _) in record.files.items())


def test_chunks_inside_a_shard_carry_checksums(stage):
    filled(stage)
    for name in SPECS:
        text = (stage.folder / "data.zarr" / name / "zarr.json").read_text()
        (codec,) = json.loads(text)["codecs"]
        assert codec["name"] == "sharding_indexed"
        inner = [c["name"] for c in codec["configuration"]["codecs"]]
        assert (
            "crc32c" in inner or codec["configuration"]["codecs"][-1]["configuration"]["checksum"]
        )


def test_a_block_of_zeros_is_a_file_and_its_loss_is_no_zeros(stage):
    store = ArrayStore.create(stage, SPECS)
    store.write((0, 0), {k: v * 0 for k, v in block(0, 4).items()})
    record = stage.record(unit_name("made", (0, 0)))
    assert len(record.files) == 2
    assert not ArrayStore.open(again(stage)).read("latents", (0,), range(4)).any()
    (stage.folder / next(iter(record.files))).unlink()
    with pytest.raises(DamagedUnit, match="is missing"):
        ArrayStore.open(again(stage)).read("latents", (0,), range(4))


@pytest.mark.parametrize("remove", ["drop", "free", "rename"])
def test_what_another_run_removes_after_the_check_is_no_zeros(stage, remove):
    filled(stage)
    stage.finish({})
    reader = ArrayStore.open(again(stage))
    assert reader.read("latents", (0,), range(4)).any()
    if remove == "drop":
        again(stage).drop(unit_name("made", (0, 0)))
    elif remove == "free":
        again(stage).free()
    else:
        stage.folder.rename(stage.folder.with_name("k0.removed"))
    with pytest.raises(DamagedUnit, match="made-00000-00000"):
        reader.read("latents", (0,), range(4))


def test_a_unit_that_was_never_written_is_no_zeros(stage):
    store = ArrayStore.create(stage, SPECS)
    store.write((0, 0), block(0, 4))
    with pytest.raises(DamagedUnit, match=r"made-00000-00001 .*needed but not there"):
        store.read("latents", (0,))


def test_what_a_killed_process_left_of_a_block_does_not_show(stage):
    store = ArrayStore.create(stage, SPECS)
    store._arrays["latents"][0, :4] = 77.0  # on the disk, but not committed
    assert not stage.committed(unit_name("made", (0, 0)))
    partial = store._file("latents", (0, 1))
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.write_bytes(b"half a shard")
    store = ArrayStore.create(again(stage), SPECS)
    for chunk, frames in enumerate((4, 3)):
        store.write((0, chunk), block(chunk, frames))
    found = ArrayStore.open(store.stage).read("latents", (0,))
    assert np.array_equal(found, np.concatenate([block(0, 4)["latents"], block(1, 3)["latents"]]))


def test_the_same_blocks_are_the_same_bytes(tmp_path):
    found = []
    for name in ("a", "b"):
        stage = StageFolder(tmp_path / name, "invert", "k0")
        stage.open({}, NUMERICS)
        filled(stage)
        found.append({unit: stage.record(unit).files for unit in stage.units()})
    assert found[0] == found[1]


def test_arrays_of_different_units_are_not_written_together(stage):
    store = ArrayStore.create(stage, SPECS)
    with pytest.raises(ValueError, match="belong together"):
        store.write((0,), {"sums": np.zeros(4), "latents": np.zeros((4, 2, 3, 5))})


def test_zarr_s_own_setting_is_left_alone(stage):
    before = zarr.config.get("array.write_empty_chunks")
    filled(stage)
    assert zarr.config.get("array.write_empty_chunks") == before


# -- damage ----------------------------------------------------------------------------------


def flip(at):
    def damage(path):
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)

    return damage


DAMAGE = {
    "flipped in the data": (flip(3), "another digest"),
    "flipped in the index": (flip(-9), "another digest"),
    "flipped in the checksum": (flip(-1), "another digest"),
    "cut": (lambda p: p.write_bytes(p.read_bytes()[:-1]), "bytes, not"),
    "longer": (lambda p: p.write_bytes(p.read_bytes() + b"\0"), "bytes, not"),
    "empty": (lambda p: p.write_bytes(b""), "has 0 bytes"),
    "deleted": (lambda p: p.unlink(), "is missing"),
    "a folder instead": (lambda p: (p.unlink(), p.mkdir()), "is missing"),
}


@pytest.mark.parametrize("name", ["latents", "index"])
@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_shard_is_named_and_never_used(stage, how, name):
    store = filled(stage)
    path = store._file(name, (1, 0))
    damage, reason = DAMAGE[how]
    damage(path)
    with pytest.raises(DamagedUnit, match=reason) as caught:
        ArrayStore.open(again(stage)).read(name, (1,), [2])
    error = caught.value
    assert (error.stage, error.key, error.unit) == ("invert", "k0", unit_name("made", (1, 0)))
    assert str(path.relative_to(stage.folder)) in error.message
    # Its neighbours are none the worse, and once forgotten it can be written anew.
    store = ArrayStore.open(again(stage))
    assert np.array_equal(store.read(name, (1,), [4, 5, 6]), block(11, 3)[name])
    if path.is_dir():
        path.rmdir()
    store.stage.forget(error.unit)
    store.write((1, 0), block(10, 4))
    assert np.array_equal(store.read(name, (1,), range(4)), block(10, 4)[name])


@pytest.mark.parametrize("name", ["", "latents"])
@pytest.mark.parametrize("change", ["edited", "cut", "deleted"])
def test_a_changed_layout_is_noticed_and_laid_out_again(stage, name, change):
    filled(stage)
    path = stage.folder / "data.zarr" / name / "zarr.json"
    text = path.read_text()
    if change == "deleted":
        path.unlink()
    else:
        path.write_text(text.replace("3", "4") if change == "edited" else text[:-20])
    with pytest.raises(DamagedUnit, match=r"zarr\.json") as caught:
        ArrayStore.open(again(stage))
    assert caught.value.unit == LAYOUT
    fresh = again(stage)
    fresh.forget(LAYOUT)
    store = ArrayStore.create(fresh, SPECS)
    assert path.read_text() == text
    assert np.array_equal(store.read("latents", (0,), range(4)), block(0, 4)["latents"])


GARBAGE = ["", "{", "[]", "null", "7", '{"files": {}}', '{"files": [], "facts": {}}']
GARBAGE += ['{"files": {"a": 1}, "facts": {}, "dropped": false}', "\x00\xff" * 9]
GARBAGE += ['{"files": {}, "facts": {"rows": 1}, "dropped": false, "sha256": "0"}']


@pytest.mark.parametrize("text", GARBAGE)
def test_a_record_that_is_no_record_is_damage(stage, text):
    filled(stage)
    unit = unit_name("made", (0, 0))
    (stage.folder / "commits" / f"{unit}.json").write_bytes(text.encode("latin-1"))
    stage = again(stage)
    for ask in (stage.committed, stage.available, stage.record, stage.check, stage.drop):
        with pytest.raises(DamagedUnit, match="not readable"):
            ask(unit)
    assert not stage.complete
    stage.forget(unit)
    assert not stage.committed(unit)


# -- dropping, forgetting, finishing ---------------------------------------------------------


def test_a_dropped_unit_is_done_but_not_there(stage):
    store = filled(stage)
    unit = unit_name("made", (1, 0))
    files = [stage.folder / n for n in stage.record(unit).files]
    for _ in range(2):
        stage.drop(unit)
        assert (stage.committed(unit), stage.available(unit)) == (True, False)
        assert not any(f.exists() for f in files)
    with pytest.raises(DamagedUnit, match="not there"):
        store.read("latents", (1,), [0])
    assert stage.totals()["rows"] == 21  # what it cost still counts
    stage.drop("never-was")
    assert not stage.committed("never-was")


def test_a_stage_is_complete_while_what_it_keeps_is_there(stage):
    store = filled(stage)
    assert not stage.finished
    assert not stage.complete
    stage.drop(unit_name("made", (0, 0)))
    stage.finish({})
    assert again(stage).complete
    path = store._file("latents", (1, 1))
    kept = path.read_bytes()
    path.write_bytes(kept[:-1])
    assert (again(stage).finished, again(stage).complete) == (True, False)
    path.write_bytes(kept)
    assert again(stage).complete
    stage.forget(unit_name("made", (1, 1)))
    assert not again(stage).finished
    assert list(stage.units()) == sorted(set(stage.units()) - {unit_name("made", (1, 1))})
    stage.forget("never-was")


def test_work_begun_under_other_numerics_is_not_gone_on_with(stage):
    again(stage).open({}, {**NUMERICS, "threads": 3})  # nothing is committed yet
    filled(stage)
    again(stage).open({}, {**NUMERICS, "threads": 3})
    for other in ({**NUMERICS, "threads": 4}, {"device": "cpu"}, {**NUMERICS, "torch": "9"}):
        with pytest.raises(NumericsMismatch, match="begun under other numerics") as caught:
            again(stage).open({}, other)
        assert "--force invert" in str(caught.value)
    with pytest.raises(NumericsMismatch, match="threads was 3 and is 4"):
        again(stage).open({}, {**NUMERICS, "threads": 4})
    (stage.folder / "numerics.json").unlink()
    with pytest.raises(NumericsMismatch, match="device was None"):
        again(stage).open({}, NUMERICS)


def test_a_work_folder_that_is_a_file_is_an_error_with_its_name(tmp_path):
    (tmp_path / "work").write_text("")
    with pytest.raises(StoreError, match="can't be used as a work folder"):
        StageFolder(tmp_path / "work" / "k", "edit", "k").open({}, NUMERICS)

"""Damaged files in the work folder: each is found, named and computed again."""

import json
import shutil
from functools import partial

import pytest
from jobs import (
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
    write_manifest,
)

from tokenflow_batch.errors import DamagedUnit
from tokenflow_batch.files import digest
from tokenflow_batch.manifest import load
from tokenflow_batch.stage_names import STAGES
from tokenflow_batch.status import status


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


def flip(path, at=None):
    """Turn one bit of a file, by default in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(path, change):
    """Change what a JSON file says; it stays JSON."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data, indent=1))


def swap_a_digest(record):
    name, (size, _) = next(iter(record["files"].items()))
    record["files"][name] = [size, "0" * 64]


FILE = {
    "flipped": flip,
    "cut": cut,
    "empty": lambda p: p.write_bytes(b""),
    "deleted": lambda p: p.unlink(),
}
# A shard of n frames: their data, each with its CRC-32C behind, then the index (offset and length,
# 8 bytes each, for every frame) and the index's CRC-32C. Chunks of this job have 4 frames.
FRAMES = 4
SHARD = {
    **FILE,
    "flipped in the data": partial(flip, at=0),
    "flipped in a checksum": partial(flip, at=-4 - 16 * FRAMES - 1),
    "flipped in the index": partial(flip, at=-4 - 16),
    "flipped in the index's checksum": partial(flip, at=-1),
}


def change_one_value(said):
    said.append(1) if isinstance(said, list) else said.update(fill_value=1)


JSON = {**FILE, "edited": lambda p: edit(p, change_one_value)}
RECORD = {
    **FILE,
    # Ends with its digest. In the middle are numbers, whose last bits may say the same.
    "flipped": partial(flip, at=-20),
    "edited digest": lambda p: edit(p, swap_a_digest),
    "edited facts": lambda p: edit(p, lambda d: d["facts"].update(multiple=1)),
    "edited to dropped": lambda p: edit(p, lambda d: d.update(dropped=True)),
}


def kinds_of(name):
    """What can happen to a file of that name."""
    if name.startswith("commits/"):
        return RECORD
    return JSON if name.endswith("json") else SHARD


def units_of(manifest):
    """(stage, unit, record) of all that a job keeps."""
    for stage in STAGES:
        folder = folder_of(manifest, stage)
        for unit in folder.units():
            if folder.available(unit):
                yield stage, unit, folder.record(unit)


def says_the_same(path, good):
    try:
        return json.loads(path.read_bytes()) == json.loads(good)
    except (OSError, ValueError):
        return False


def test_every_kind_of_damage_to_every_file_is_found_and_named(manifest):
    found = 0
    for stage, unit, record in units_of(manifest):
        of_the_record = f"commits/{unit}.json"
        for name in (*record.files, of_the_record):
            path = folder_of(manifest, stage).folder / name
            good = path.read_bytes()
            for kind, damage in kinds_of(name).items():
                if kind == "edited digest" and not record.files:
                    continue
                damage(path)
                if name == of_the_record and says_the_same(path, good):
                    continue  # a bit of a number's last digit, beyond what is kept of it
                if path.exists() and path.read_bytes() == good:
                    continue  # an edit that this file has no room for
                with pytest.raises(DamagedUnit) as caught:
                    folder_of(manifest, stage).check(unit)
                assert (caught.value.stage, caught.value.unit) == (stage, unit), kind
                assert name == of_the_record or name in caught.value.message, kind
                path.write_bytes(good)
                found += 1
    assert found > 300


# A unit of every stage; each is read when the next stage's is computed again.
NEEDED = {
    "encode": ("encode-00000", "data.zarr/latents/c/0/0/0/0"),
    "invert": ("invert-00001-00000", "data.zarr/latents/c/1/0/0/0/0"),
    "match": ("match-00000-00000", "data.zarr/conv/c/0/0/0/0/0"),
    "edit": ("advance-00002-00000", "data.zarr/latents/c/2/0/0/0/0"),
    "render": ("video", "video.mp4"),
    "report": ("report", "side_by_side.mp4"),
}
SHARDS = {stage: name for stage, (_, name) in NEEDED.items()}
RECORDS = {stage: f"commits/{unit}.json" for stage, (unit, _) in NEEDED.items()}
LAYOUTS = dict.fromkeys(("encode", "invert", "edit"), "data.zarr/latents/zarr.json")
LAYOUTS["match"] = "data.zarr/zarr.json"
FACTS = {"encode": "facts.json", "report": "metrics.json"}
CASES = [
    *((SHARDS, kind) for kind in SHARD),
    *((RECORDS, kind) for kind in ("flipped", "deleted", "edited facts", "edited to dropped")),
    *((LAYOUTS, kind) for kind in ("edited", "cut", "deleted")),
    (FACTS, "flipped"),
]
QUICK = [
    (SHARDS, "flipped in the data"),
    (SHARDS, "deleted"),
    (RECORDS, "flipped"),
    (LAYOUTS, "edited"),
    (FACTS, "flipped"),
]


@pytest.mark.parametrize(
    ("victims", "kind"),
    quick_first(CASES, QUICK, lambda v, kind: f"{next(iter(v.values()))} {kind}"),
)
def test_damage_is_named_and_computed_again_with_the_same_result(manifest, caplog, victims, kind):
    before, files = outcome(manifest), published(manifest.parent)
    contents = {f: digest(manifest.parent / "out" / f) for f in files}
    caplog.clear()
    for stage, name in victims.items():
        kinds_of(name)[kind](folder_of(manifest, stage).folder / name)
    if victims is LAYOUTS:  # what is laid out is only looked at where something is missing
        for stage, name in SHARDS.items():
            flip(folder_of(manifest, stage).folder / name)
    if victims is FACTS:
        flip(folder_of(manifest, "render").folder / "video.mp4")
    result = run_one(manifest)
    warnings = [r.getMessage() for r in caplog.records]
    for stage, name in victims.items():
        folder = folder_of(manifest, stage)
        unit = name.removeprefix("commits/").removesuffix(".json")
        said_so = [w for w in warnings if f"{stage} {folder.key}: unit " in w and "damaged" in w]
        assert any((unit if name.startswith("commits/") else name) in w for w in said_so), warnings
        assert stage in result.ran
    for stage, unit, _ in units_of(manifest):
        folder_of(manifest, stage).check(unit)
    assert same(outcome(manifest), before)
    changed = {f for f in files if digest(manifest.parent / "out" / f) != contents[f]}
    assert changed <= {"clip/blue/metrics.json"}  # it says how long things took
    assert run_one(manifest).ran == []


def test_a_damaged_stage_that_is_not_to_run_is_an_error_with_its_name(manifest, caplog):
    victim = folder_of(manifest, "encode").folder / "data.zarr/latents/c/0/0/0/0"
    shutil.rmtree(folder_of(manifest, "invert").folder)
    flip(victim)
    (result,) = run(manifest, ("invert",))
    assert isinstance(result.error, DamagedUnit)
    assert "data.zarr/latents/c/0/0/0/0 has another digest" in str(result.error)
    answer = command("invert", manifest)
    assert answer.exit_code == 6
    assert "another digest" in said(answer, caplog)


def test_damage_never_reaches_the_output_folder(manifest):
    video = manifest.parent / "out" / "clip" / "blue.mp4"
    good = digest(video)
    flip(folder_of(manifest, "render").folder / "video.mp4")
    flip(folder_of(manifest, "report").folder / "contact_sheet.png")
    run_one(manifest)
    assert digest(video) == good
    assert digest(folder_of(manifest, "render").folder / "video.mp4") == good
    video.unlink()
    assert run_one(manifest).outputs[0] == video
    assert digest(video) == good


def test_status_tells_damage(manifest):
    cut(folder_of(manifest, "match").folder / "data.zarr/conv/c/0/0/0/0/0")
    (row,) = status(load(manifest))
    assert {k: v.state for k, v in row.stages.items() if v.state != "done"} == {"match": "damaged"}

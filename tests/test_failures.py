"""What goes wrong on real disks: damage, bad videos, a second process, a full disk."""

import json
import resource
import shutil
import subprocess
import sys
import threading
from functools import partial
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

from tokenflow_batch.errors import DamagedUnit
from tokenflow_batch.files import digest
from tokenflow_batch.manifest import load
from tokenflow_batch.results import exit_code
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

"""Whole runs of a team, with stages that are small files: what reaches whom when one fails."""

import json
import threading
import time

import pytest
from filelock import FileLock
from jobs import EDIT, clip, silent, write_manifest
from team_threads import commit, is_free, together

from tokenflow_batch import runner as runner_module
from tokenflow_batch.errors import DamagedUnit, StoreError
from tokenflow_batch.inputs import Inputs
from tokenflow_batch.ledger import StageFolder
from tokenflow_batch.manifest import load
from tokenflow_batch.runner import Runner
from tokenflow_batch.stages import IMPLEMENTATIONS
from tokenflow_batch.stages.base import Stage

GREEN = {"name": "green", "prompt": "a green ball on grass"}


class Chain(Stage):
    """Three units, each of which needs the one before; `hook` may do anything to them."""

    name = "encode"

    def __init__(self, hook=lambda *_: None):
        self.hook = hook

    def run(self, context, folder):
        sharing, units = context.sharing, {name: name for name in "abc"}
        for unit in sharing.share(folder, units):
            if unit > "a":
                sharing.wait_for(folder, [chr(ord(unit) - 1)])
            self.hook(sharing.team, folder, unit)
            folder.commit_behind(unit, lambda unit=unit: commit(folder, unit))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return clip(tmp_path_factory.mktemp("source") / "clip.mp4", 2)


@pytest.fixture
def manifest(tmp_path, source, tiny_model, monkeypatch):
    monkeypatch.setattr(runner_module, "_PATIENCE", 0.05)
    monkeypatch.setattr(runner_module, "_LOCKED_PAUSE", 0.05)
    monkeypatch.setitem(IMPLEMENTATIONS, "encode", Chain())
    edits = [{"video": str(source), "edits": [EDIT, GREEN]}]
    return write_manifest(tmp_path, tiny_model, clips=edits, steps=1)


def hooked(monkeypatch, hook):
    monkeypatch.setitem(IMPLEMENTATIONS, "encode", Chain(hook))


def runs(manifest, size=2, **options):
    """The results of every member of a team that runs `encode`."""
    batch = load(manifest)
    return together(size, lambda team: Runner(batch, silent, team).run(("encode",), **options))


def encoded(manifest):
    inputs = Inputs.of(load(manifest))
    key = inputs.keys(inputs.batch.jobs[0])["encode"].key
    return StageFolder(inputs.workspace.stage("encode", key), "encode", key)


def test_a_slow_unit_stops_nobody_and_is_logged_once(manifest, monkeypatch):
    hooked(monkeypatch, lambda _team, _folder, unit: time.sleep(0.5 if unit == "a" else 0))
    for results in runs(manifest):
        assert [r.error for r in results] == [None, None]
    assert encoded(manifest).complete
    events = []
    for log in (manifest.parent / "out" / ".work" / "logs").glob("*.jsonl"):
        own = [json.loads(line)["event"] for line in log.read_text().splitlines()]
        assert len(set(own)) == len(own)  # though helpers have come and gone
        events += own
    assert {"stage started", "stage finished"} <= set(events)


def test_a_failure_reaches_every_job_that_shares_the_stage(manifest, monkeypatch, caplog):
    def hook(_team, _folder, unit):
        if unit == "b":
            time.sleep(0.2)  # the other has long begun to wait
            raise RuntimeError("boom")

    hooked(monkeypatch, hook)
    for results in runs(manifest):
        assert ["boom" in str(r.error) for r in results] == [True, True]
    assert caplog.text.count("clip/blue (") == caplog.text.count("clip/green (") == 1


@pytest.mark.parametrize("unit", ["a", "b"])
def test_a_write_that_fails_behind_reaches_all(manifest, monkeypatch, unit):
    original = StageFolder.commit

    def commit_or_fail(self, name, *arguments):
        if name == unit:
            time.sleep(0.2)
            raise OSError(28, "No space left on device")
        original(self, name, *arguments)

    monkeypatch.setattr(StageFolder, "commit", commit_or_fail)
    for results in runs(manifest):
        assert ["no space left" in str(r.error) for r in results] == [True, True]


def test_damage_found_by_one_is_mended_for_all(manifest, monkeypatch):
    found = []

    def hook(_team, folder, unit):
        if unit == "b" and not found:
            found.append(unit)
            folder.forget("a")
            raise DamagedUnit("encode", folder.key, "a", "seen here")

    hooked(monkeypatch, hook)
    for results in runs(manifest):
        assert [r.error for r in results] == [None, None]
    assert sorted(encoded(manifest).units()) == ["a", "b", "c"]


def test_damage_that_can_t_be_mended_is_that_job_s_failure(manifest, monkeypatch):
    def hook(_team, folder, _unit):
        raise DamagedUnit("encode", folder.key, "a", "seen here")

    def forget(_self, _unit):
        raise OSError(30, "Read-only file system", "/work")

    hooked(monkeypatch, hook)
    monkeypatch.setattr(StageFolder, "forget", forget)
    for results in runs(manifest):
        assert all(type(r.error) is StoreError for r in results)
        assert all("Read-only" in str(r.error) for r in results)


def test_a_forced_stage_is_locked_while_it_is_computed(manifest, monkeypatch):
    free = []

    def hook(_team, folder, _unit):
        free.append(is_free(folder.folder.with_name(f"{folder.key}.lock")))

    runs(manifest)
    hooked(monkeypatch, hook)
    for results in runs(manifest, force=["encode"]):
        assert [r.error for r in results] == [None, None]
    assert free == [False] * 3


@pytest.mark.parametrize("size", [1, 2])
def test_a_freed_stage_that_another_run_holds_is_waited_for(manifest, size):
    runs(manifest, 1)
    folder = encoded(manifest)
    folder.free()
    lock = FileLock(folder.folder.with_name(f"{folder.key}.lock"), thread_local=False)
    lock.acquire()
    threading.Timer(0.5, lock.release).start()
    for results in runs(manifest, size):
        assert [r.error for r in results] == [None, None]
    assert not encoded(manifest).freed


@pytest.mark.parametrize("size", [1, 2])
def test_a_freed_stage_that_can_t_be_begun_anew_is_a_message(manifest, size):
    runs(manifest, 1)
    folder = encoded(manifest)
    folder.free()
    folder.folder.with_name(f"{folder.key}.removed").write_text("a file in the way")
    for results in runs(manifest, size):
        assert all(type(r.error) is StoreError for r in results)


class Inverting(Stage):
    """Begins `match` on the way, as `invert` does, and `hook` may be in the way."""

    name = "invert"

    def __init__(self, hook):
        self.hook = hook

    def run(self, context, folder):
        target = context.handed
        assert target is not None
        context.sharing.once(target, "layout", lambda: self.hook(context.sharing.team))
        for unit in context.sharing.share(folder, {"x": "x"}):
            commit(folder, unit)


def test_what_fails_in_a_stage_that_is_handed_to_reaches_all(manifest, monkeypatch):
    def hook(_team):
        time.sleep(0.2)  # the other has long begun to wait
        raise RuntimeError("boom")

    monkeypatch.setitem(IMPLEMENTATIONS, "invert", Inverting(hook))
    batch = load(manifest)
    for results in together(2, lambda team: Runner(batch, silent, team).run(("encode", "invert"))):
        assert ["boom" in str(r.error) for r in results] == [True, True]

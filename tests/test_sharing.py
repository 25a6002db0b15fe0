"""Processes that share a stage: none waits forever, whatever happens to another.

Teams of threads over one key-value store, real folders and locks, and stages that are small files:
what is tested is who waits for whom.
"""

import json
import threading
import time

import pytest
from filelock import FileLock, Timeout
from jobs import EDIT, clip, silent, write_manifest
from torch.distributed import HashStore

from tokenflow_batch import runner as runner_module
from tokenflow_batch.distributed import Team
from tokenflow_batch.errors import DamagedUnit, LockedError, StoreError
from tokenflow_batch.inputs import Inputs
from tokenflow_batch.ledger import StageFolder
from tokenflow_batch.locks import StageLocks
from tokenflow_batch.manifest import load
from tokenflow_batch.paths import Workspace
from tokenflow_batch.runner import Runner
from tokenflow_batch.stages import IMPLEMENTATIONS
from tokenflow_batch.stages.base import Stage
from tokenflow_batch.stages.sharing import JobOver, NothingToDo, Sharing

GREEN = {"name": "green", "prompt": "a green ball on grass"}


def together(size, work, timeout=60):
    """What `work(team)` gives, or raises, in each of `size` members; none may hang."""
    store, found = HashStore(), [None] * size

    def member(rank):
        try:
            found[rank] = work(Team(store, rank, size))
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=member, args=(n,), daemon=True) for n in range(size)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout
    for thread in threads:
        thread.join(max(0, deadline - time.monotonic()))
    assert not any(thread.is_alive() for thread in threads), "somebody waits forever"
    return found


@pytest.fixture
def folder(tmp_path):
    made = StageFolder(tmp_path / "encode" / "k", "encode", "k")
    made.open({}, {})
    return made


def again(folder):
    """The folder as another process sees it."""
    return StageFolder(folder.folder, folder.stage, folder.key)


def commit(folder, unit):
    path = folder.folder / unit
    path.write_text(unit)
    folder.commit(unit, [path])


# -- agreements --------------------------------------------------------------------------------


def test_an_answer_that_can_t_be_had_is_an_error_for_all():
    def work(team):
        def compute():
            raise PermissionError(13, "Permission denied", "/work")

        return team.agree("answer", compute)

    found = together(3, work)
    assert sorted(type(e).__name__ for e in found) == ["PermissionError", *["StoreError"] * 2]
    assert all("Permission denied" in str(e) for e in found)


def test_errors_of_ours_keep_their_class_and_their_words():
    def work(team):
        def compute():
            raise LockedError("held", hint="wait")

        return team.agree("answer", compute)

    assert [(type(e), e.message, e.hint) for e in together(2, work)] == [
        (LockedError, "held", "wait")
    ] * 2


# -- units -------------------------------------------------------------------------------------


def test_what_is_claimed_is_seen_through_however_long_its_predecessor_takes(folder):
    claimed = threading.Event()

    def work(team):
        own = again(folder)
        sharing = Sharing(team, patience=None if team.rank == 0 else 0.05)
        if team.rank == 1:
            assert claimed.wait(20)  # the other has the first
        for unit in sharing.share(own, {"a": "a", "b": "b"}):
            claimed.set()
            if unit == "b":
                sharing.wait_for(own, ["a"])
            else:
                time.sleep(0.5)
            commit(own, unit)
        return sorted(own.units())

    assert together(2, work) == [["a", "b"]] * 2


def test_one_s_patience_ends_when_nothing_is_left_to_claim(folder):
    claimed = threading.Event()

    def work(team):
        own = again(folder)
        if team.rank == 1:
            assert claimed.wait(20)
        for unit in Sharing(team, patience=(team.rank and 0.05) or None).share(own, {"a": "a"}):
            claimed.set()
            time.sleep(0.5)
            commit(own, unit)

    first, second = together(2, work)
    assert first is None
    assert isinstance(second, NothingToDo)


def test_who_fails_tells_those_who_wait(folder):
    claimed = threading.Event()

    def work(team):
        own, sharing = again(folder), Sharing(team)
        if team.rank == 1:
            assert claimed.wait(20)
        for _ in sharing.share(own, {"a": "a"}):
            claimed.set()
            time.sleep(0.1)
            assert sharing.owes(own)
            sharing.fail(own, {"message": "no"})
            return sharing.owes(own)

    first, second = together(2, work)
    assert first is False  # once is enough
    assert isinstance(second, JobOver)
    assert second.told == {"message": "no"}


def test_what_is_committed_is_owed_no_more(folder):
    sharing = Sharing(Team(HashStore(), 0, 2))
    for unit in sharing.share(folder, {"a": "a"}):
        assert sharing.owes(folder)
        commit(folder, unit)
    assert not sharing.owes(folder)


def test_a_failed_answer_about_a_stage_is_the_stage_s_failure(folder):
    def work(team):
        own, sharing = again(folder), Sharing(team)
        try:
            sharing.agree(own, "answer", lambda: own.check("missing"))
        except DamagedUnit:
            assert sharing.owes(own)
            sharing.fail(own, {"message": "damaged"})
            raise

    found = sorted(together(3, work), key=lambda e: type(e).__name__)
    assert [type(e) for e in found] == [DamagedUnit, JobOver, JobOver]
    assert found[1].told == {"message": "damaged"}


def test_who_waits_sees_to_what_it_has_behind(folder):
    """Its failed unit may be what others need to come to the unit that it waits for."""

    def fail():
        raise OSError(28, "No space left on device")

    folder.commit_behind("a", fail)
    with pytest.raises(OSError, match="No space left"):
        Sharing(Team(HashStore(), 0, 2)).wait_for(folder, ["b"])


def test_a_stage_is_done_when_nobody_tidies_up_any_more(folder):
    claimed, gone = threading.Event(), []

    def work(team):
        sharing = Sharing(team)
        if team.rank == 1:
            assert claimed.wait(20)
        with sharing.busy(folder):
            if sharing.mine(folder, "drop"):
                claimed.set()
                time.sleep(0.3)
                gone.append(team.rank)
        sharing.quiet(folder)
        return list(gone)

    assert together(2, work) == [[0], [0]]


# -- locks -------------------------------------------------------------------------------------


def is_free(path):
    try:
        with FileLock(path, timeout=0):
            return True
    except Timeout:
        return False


def test_a_lock_stays_while_others_may_go_on(tmp_path):
    workspace = Workspace(tmp_path, tmp_path / ".work")
    path = workspace.lock("encode", "k")
    locks = StageLocks(Team(HashStore(), 0, 2), workspace)
    with pytest.raises(ValueError, match="x"), locks.shared("encode", "k", "a/b"):
        raise ValueError("x")
    assert not is_free(path)
    locks.release()
    assert is_free(path)


def test_a_process_alone_lets_go_of_what_it_leaves(tmp_path):
    workspace = Workspace(tmp_path, tmp_path / ".work")
    path = workspace.lock("encode", "k")
    locks = StageLocks(Team(), workspace)
    with pytest.raises(ValueError, match="x"), locks.shared("encode", "k", "a/b"):
        raise ValueError("x")
    assert is_free(path)


# -- whole runs --------------------------------------------------------------------------------


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

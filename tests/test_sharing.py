"""Processes that share a stage: none waits forever, whatever happens to another.

Teams of threads over one key-value store, real folders and locks: who waits for whom.
"""

import threading
import time

import pytest
from team_threads import commit, is_free, together
from torch.distributed import HashStore

from tokenflow_batch.distributed import Team
from tokenflow_batch.errors import DamagedUnit, LockedError
from tokenflow_batch.ledger import StageFolder
from tokenflow_batch.locks import StageLocks
from tokenflow_batch.paths import Workspace
from tokenflow_batch.stages.sharing import JobOver, NothingToDo, Sharing


@pytest.fixture
def folder(tmp_path):
    made = StageFolder(tmp_path / "encode" / "k", "encode", "k")
    made.open({}, {})
    return made


def again(folder):
    """The folder as another process sees it."""
    return StageFolder(folder.folder, folder.stage, folder.key)


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

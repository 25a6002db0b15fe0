"""Reading ahead and writing behind: order, bounds, errors, and no thread that stays."""

import threading
import time

import numpy as np
import pytest

from tokenflow_batch.ahead import PIECES, Behind, ahead
from tokenflow_batch.clock import Lap, waited, waiting
from tokenflow_batch.errors import DamagedUnit
from tokenflow_batch.ledger import StageFolder
from tokenflow_batch.store import ArraySpec, ArrayStore, unit_name

SPEC = {"x": ArraySpec("made", (), 12, 2, (3,), "float32")}


def readers():
    return [t for t in threading.enumerate() if t.name == "ahead"]


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    assert readers() == []


def settles(condition):
    """Wait for what another thread is about to do."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("depth", [1, 3, 50])
@pytest.mark.parametrize("count", [0, 1, 20])
def test_items_come_in_order_and_all(count, depth):
    assert list(ahead(range(count), depth)) == list(range(count))
    assert list(ahead((i for i in range(count)), depth)) == list(range(count))


@pytest.mark.parametrize("depth", [1, 3])
def test_it_reads_so_far_ahead_and_no_further(depth):
    taken = []
    items = ahead((taken.append(i) or i for i in range(20)), depth)
    assert taken == []  # not before the first is asked for
    assert next(items) == 0
    settles(lambda: len(taken) == depth + 2)  # given, kept ready, and one in the reader's hand
    time.sleep(0.05)
    assert len(taken) == depth + 2
    items.close()


def test_none_and_exceptions_are_items_like_others():
    odd = [None, ValueError("no error"), ()]
    assert list(ahead(odd, 2)) == odd


@pytest.mark.parametrize(
    "error", [OSError("disk"), KeyboardInterrupt(), DamagedUnit("a", "b", "c", "d")]
)
def test_an_error_comes_after_the_items_before_it(error):
    def failing():
        yield 1
        yield 2
        raise error

    items, seen = ahead(failing(), 5), []
    with pytest.raises(type(error)) as caught:
        seen.extend(iter(items.__next__, None))
    assert caught.value is error
    assert list(items) == []


@pytest.mark.parametrize("how", ["closed", "broken off", "interrupted"])
def test_a_reader_that_is_left_ends_and_closes_its_source(how):
    closed = []

    def source():
        try:
            yield from range(10**9)
        finally:
            closed.append(threading.current_thread().name)

    items = ahead(source(), 2)
    if how == "closed":
        next(items)
        items.close()
    elif how == "broken off":
        for item in items:
            if item == 3:
                break
        del items, item
    else:
        with pytest.raises(KeyboardInterrupt):
            items.throw(KeyboardInterrupt()) if next(items) == 0 else None
    assert closed == ["ahead"]
    assert readers() == []


def test_an_error_on_closing_is_not_lost():
    class Awkward:
        def __iter__(self):
            yield 1
            raise RuntimeError("at the end")

    with pytest.raises(RuntimeError, match="at the end"):
        list(ahead(Awkward(), 1))
    with pytest.raises(ValueError, match="at least 1"):
        ahead([], 0)


def test_waiting_is_what_the_caller_stood_still_for():
    def slow():
        for i in range(3):
            time.sleep(0.05)
            yield i

    before = waited()
    assert list(ahead(slow(), 1)) == [0, 1, 2]
    assert 0.1 < waited() - before < 5
    before = waited()
    began = time.perf_counter()
    with waiting(), waiting():
        time.sleep(0.05)
    assert 0.05 <= waited() - before <= time.perf_counter() - began  # once, though nested
    items = ahead(iter(range(2)), 3)
    next(items)
    settles(lambda: not readers())
    before = waited()
    list(items)
    assert waited() - before < 0.05  # it lay ready


@pytest.mark.parametrize("computes", [True, False])
def test_what_a_reader_computes_is_no_waiting_for_the_disk(computes):
    def items():
        for i in range(3):
            if computes:
                end = time.thread_time() + 0.1
                while time.thread_time() < end:
                    pass
            else:
                time.sleep(0.1)
            yield i

    lap = Lap()
    assert list(ahead(items(), 1, computed=True)) == [0, 1, 2]
    told = lap.take()
    waited, decoding = told["waited"], told.get("decoding", 0.0)
    assert waited + decoding > 0.25
    assert decoding > 0.2 if computes else waited > 0.25
    lap = Lap()
    list(ahead(items(), 1))
    assert lap.take()["waited"] > 0.25  # unless said, all is waiting


# -- behind ----------------------------------------------------------------------------------


def test_pieces_without_a_size_are_behind_alone():
    behind, gate, done = Behind(), threading.Event(), []
    behind.add("a", lambda: (gate.wait(20), done.append("a")))
    behind.wait("other")  # doesn't wait for `a`
    assert done == []
    threading.Timer(0.05, gate.set).start()
    behind.add("b", lambda: done.append("b"))
    assert done[0] == "a"
    behind.wait("b")
    assert done == ["a", "b"]
    behind.drain()
    behind.abandon()


@pytest.mark.parametrize("ask", ["add", "wait", "drain"])
def test_what_fails_behind_is_raised_by_the_next_call(ask):
    def fail():
        raise OSError(28, "No space left on device")

    behind, done = Behind(), []
    behind.add("a", fail)
    calls = {
        "add": lambda: behind.add("b", lambda: done.append("b")),
        "wait": lambda: behind.wait("a"),
        "drain": behind.drain,
    }
    with pytest.raises(OSError, match="No space left"):
        calls[ask]()
    behind.abandon()
    assert done == []


def test_pieces_of_a_size_are_done_in_order_while_there_is_room():
    behind, gate, done = Behind(room=10), threading.Event(), []
    for name, size in (("a", 4), ("b", 6)):
        behind.add(name, lambda name=name: (gate.wait(20), done.append(name)), size)
    assert behind.pending("a")
    assert behind.pending("b")
    threading.Timer(0.05, gate.set).start()
    behind.add("c", lambda: done.append("c"), 1)
    assert done[0] == "a"
    behind.add("much", lambda: done.append("much"), 100)
    assert done[:3] == ["a", "b", "c"]
    behind.drain()
    assert done == ["a", "b", "c", "much"]
    assert not behind.pending("much")


def test_no_more_pieces_wait_than_a_stopping_process_has_time_for():
    behind, gate, done = Behind(), threading.Event(), []
    for n in range(PIECES):
        behind.add(str(n), lambda n=n: (gate.wait(20), done.append(n)), 0)
    assert done == []
    threading.Timer(0.05, gate.set).start()
    behind.add("more", lambda: done.append("more"), 0)
    assert done[0] == 0
    behind.drain()
    assert done == [*range(PIECES), "more"]


def test_what_comes_after_a_failure_is_not_done_and_says_why():
    behind, gate, done = Behind(), threading.Event(), []

    def fail():
        gate.wait(20)
        raise OSError(28, "No space left on device")

    behind.add("a", fail, 1)
    behind.add("b", lambda: done.append("b"), 1)
    gate.set()
    with pytest.raises(OSError, match="No space left"):
        behind.wait("b")
    with pytest.raises(OSError, match="No space left"):
        behind.drain()
    behind.add("c", lambda: done.append("c"), 1)
    behind.drain()
    assert done == ["c"]


# -- units behind ----------------------------------------------------------------------------


@pytest.fixture
def stage(tmp_path):
    folder = StageFolder(tmp_path / "work" / "k", "invert", "k")
    folder.open({}, {})
    yield folder
    folder.abandon()


def data(seed):
    return {"x": np.random.default_rng(seed).standard_normal((2, 3)).astype(np.float32)}


@pytest.fixture
def gate(monkeypatch):
    """Holds every commit of a `made` unit back until it is opened."""
    opened, commit = threading.Event(), StageFolder.commit

    def held(self, unit, *arguments):
        if unit.startswith("made"):
            assert opened.wait(20)
        commit(self, unit, *arguments)

    monkeypatch.setattr(StageFolder, "commit", held)
    return opened


def seen_by_others(stage):
    return list(StageFolder(stage.folder, stage.stage, stage.key).units())


def test_nothing_counts_before_it_is_committed(stage, gate):
    store = ArrayStore.create(stage, SPEC)
    store.write((0,), data(0), {"rows": 7})  # returns at once
    assert seen_by_others(stage) == ["layout"]
    threading.Timer(0.05, gate.set).start()
    assert stage.committed(unit_name("made", (0,)))  # waits
    assert seen_by_others(stage) == ["layout", "made-00000"]
    facts = stage.record(unit_name("made", (0,))).facts
    assert facts["rows"] == 7
    assert facts["waited"] >= 0


@pytest.mark.parametrize("what", ["read", "drop", "forget", "units", "finish"])
def test_whoever_needs_a_unit_waits_for_it(stage, gate, what):
    store, unit = ArrayStore.create(stage, SPEC), unit_name("made", (0,))
    store.write((0,), data(0))
    threading.Timer(0.05, gate.set).start()
    if what == "read":
        assert np.array_equal(store.read("x", (), [0, 1]), data(0)["x"])
    elif what == "units":
        assert list(stage.units()) == ["layout", unit]
    elif what == "finish":
        stage.finish({})
        assert unit in seen_by_others(stage)
    else:
        getattr(stage, what)(unit)
        assert stage.available(unit) is False
        assert stage.committed(unit) is (what == "drop")


def test_small_units_are_behind_together_and_read_from_memory(stage, gate):
    """Reading them waits for nothing; what is committed and what is coming are read as one."""
    store = ArrayStore.create(stage, SPEC)
    gate.set()
    store.write((0,), data(0))
    stage.settle()
    gate.clear()
    store.write((1,), data(1))
    store.write((2,), data(2))
    assert [stage.coming(unit_name("made", (n,))) for n in range(3)] == [False, True, True]
    rows = [data(n)["x"][i] for n, i in ((2, 1), (0, 0), (1, 1), (0, 1))]
    assert np.array_equal(store.read("x", (), [5, 0, 3, 1]), rows)
    assert seen_by_others(stage) == ["layout", "made-00000"]
    gate.set()
    stage.settle()
    assert np.array_equal(store.read("x", (), [5, 0, 3, 1]), rows)
    assert not any(stage.coming(unit) for unit in stage.units())


def test_where_there_is_no_room_the_next_write_waits_and_says_how_long(stage, gate):
    stage._behind._room = data(0)["x"].nbytes
    store = ArrayStore.create(stage, SPEC)
    store.write((0,), data(0))
    threading.Timer(0.2, gate.set).start()
    store.write((1,), data(1))
    store.write((2,), data(2))
    stage.settle()
    assert stage.record(unit_name("made", (2,))).facts["waited"] >= 0.1
    assert stage.totals()["waited"] >= 0.1


def test_a_write_that_fails_stops_the_stage(stage, monkeypatch):
    store = ArrayStore.create(stage, SPEC)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(StageFolder, "commit", full)
    store.write((0,), data(0))
    with pytest.raises(OSError, match="No space left"):
        stage.committed(unit_name("made", (0,)))
    with pytest.raises(OSError, match="No space left"):
        store.write((1,), data(1))
    assert seen_by_others(stage) == ["layout"]

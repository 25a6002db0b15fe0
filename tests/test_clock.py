"""Seconds by kind: each to the innermost, of all threads, and of a device by its own clock."""

import threading
import time

import pytest

from tokenflow_batch import clock
from tokenflow_batch.clock import Lap, measured, timed, waiting

PART = 0.03
ROUNDING = 1e-5


def work(kind):
    with measured(kind):
        time.sleep(PART)


@pytest.fixture
def lap():
    return Lap()


def test_a_second_belongs_to_the_innermost_kind(lap):
    with measured("unet"):
        time.sleep(PART)
        work("attention")
        work("attention")
    told = lap.take()
    assert told["elapsed"] >= told["unet"] + told["attention"] >= 3 * PART
    assert told["attention"] >= 2 * PART
    assert PART <= told["unet"] < told["elapsed"] - 2 * PART + ROUNDING
    assert set(told) == {"elapsed", "waited", "unet", "attention"}
    assert lap.take().get("unet") is None  # told once


def test_a_kind_in_itself_counts_once(lap):
    with measured("store"):
        work("store")
    told = lap.take()
    assert PART <= told["store"] <= told["elapsed"]


def test_waiting_is_no_part_of_the_kind_around_it(lap):
    with measured("video"), waiting():
        time.sleep(PART)
    told = lap.take()
    assert told["waited"] >= PART
    assert told.get("video", 0) <= told["elapsed"] - told["waited"] + ROUNDING


def test_threads_add_up_and_waiting_is_each_one_s_own(lap):
    def other():
        with waiting():
            work("store")

    threads = [threading.Thread(target=other) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    told = lap.take()
    assert told["store"] >= 3 * PART
    assert told["waited"] == 0


def test_what_happens_in_a_pause_is_another_s(lap):
    work("vae")
    with lap.paused():
        work("vae")
        work("store")
    told = lap.take()
    assert PART <= told["vae"] < told["elapsed"] + ROUNDING
    assert "store" not in told


def test_items_are_timed_and_their_source_is_closed(lap):
    closed = []

    def source():
        try:
            for n in range(9):
                time.sleep(PART)
                yield n
        finally:
            closed.append(True)

    items = timed("video", source())
    assert [next(items), next(items)] == [0, 1]
    time.sleep(PART)
    items.close()
    assert closed == [True]
    assert lap.take()["video"] >= 2 * PART


class Queue:
    """A device whose clock is a number, and which comes past marks when told to."""

    def __init__(self):
        self.now, self.reached = 0.0, 0.0

    def mark(self):
        return Mark(self, self.now)


class Mark:
    def __init__(self, queue, at):
        self.queue, self.at = queue, at

    def query(self):
        return self.at <= self.queue.reached

    def elapsed_time(self, end_event):
        return end_event.at - self.at


def test_a_device_is_asked_when_it_has_come_past(lap):
    queue = Queue()
    clock.use_marks(queue.mark)
    try:
        with measured("unet"):
            queue.now += 2000.0
            with measured("attention"):
                queue.now += 500.0
        with measured("store"):
            time.sleep(PART)
        told = lap.take()
        assert "unet" not in told
        assert told["store"] >= PART  # by the wall
        queue.reached = queue.now
        told = lap.take()
        assert (told["unet"], told["attention"]) == (2.0, 0.5)
    finally:
        clock.use_marks(None)

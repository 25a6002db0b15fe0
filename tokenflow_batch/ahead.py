"""Reads ahead and writes behind, in threads, so that the model doesn't wait for the disk.

Both are bounded: memory is that of a few items more. What is left of waiting is counted
(`clock.waiting`): the seconds that a thread has stood still for reading or writing. Where a reader
computes what it gives, as a decoder does, the time it was at that is told apart.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from queue import Empty, Queue
from typing import TypeVar

from tokenflow_batch.clock import waiting

T = TypeVar("T")

ROOM = 4 << 20
"""Bytes that may wait to be written, where they are many small pieces: flat memory comes first."""
PIECES = 24
"""How many may wait: whoever is told to stop does them first, within seconds."""


def ahead(items: Iterable[T], depth: int, *, computed: bool = False) -> Iterator[T]:
    """Go through `items` in a thread of their own, up to `depth` items ahead of the caller.

    The thread starts at the first item asked for and ends with the last, with an error, or when
    the iterator is closed or forgotten; then nothing more is taken from `items`, and a generator
    among them is closed in its thread.

    Args:
        items: what to iterate over; used by that thread alone.
        depth: how many items are kept ready, at least 1.
        computed: processor time of that thread isn't waiting for the disk.

    Raises:
        BaseException: whatever `items` raised, after the items before it.
    """
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
    return _ahead(items, depth, computed=computed)


def _ahead(items: Iterable[T], depth: int, *, computed: bool) -> Iterator[T]:
    ready: Queue[tuple[T, float] | BaseException | None] = Queue(depth)
    stop = threading.Event()
    # A daemon: a process that dies of something else must not wait for a reader.
    filling = functools.partial(_fill, items, ready, stop)
    thread = threading.Thread(target=filling, name="ahead", daemon=True)
    thread.start()
    try:
        while True:
            with waiting() as pause:
                found = ready.get()
                if computed and isinstance(found, tuple):
                    pause.computed = found[1]
            if found is None:
                return
            if isinstance(found, BaseException):
                raise found
            yield found[0]
    finally:
        stop.set()
        _empty(ready)  # it may stand before a full queue
        thread.join()


def _fill(
    items: Iterable[T], ready: Queue[tuple[T, float] | BaseException | None], stop: threading.Event
) -> None:
    last: BaseException | None = None
    try:
        began = time.perf_counter(), time.thread_time()
        for item in items:
            took, computed = time.perf_counter() - began[0], time.thread_time() - began[1]
            if not stop.is_set():
                ready.put((item, min(computed / took, 1.0) if took else 0.0))
            if stop.is_set():
                break
            began = time.perf_counter(), time.thread_time()
        if isinstance(items, Generator):
            items.close()
    except BaseException as error:  # whatever it is, the caller gets it
        last = error
    if not stop.is_set():
        ready.put(last)


def _empty(queue: Queue[T]) -> None:
    try:
        while True:
            queue.get_nowait()
    except Empty:
        return


class Behind:
    """Work done behind the caller's back: one piece at a time, in order.

    A piece's error is raised by whichever call comes next; those after it are not done any more,
    and have the same error.

    Args:
        room: bytes that pieces not yet done may hold together.
    """

    def __init__(self, room: int = ROOM) -> None:
        self._room = room
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="behind")
        self._pieces: dict[str, tuple[int, Future[None]]] = {}
        self._failed: BaseException | None = None

    def add(self, name: str, work: Callable[[], None], size: int | None = None) -> None:
        """Have `work` done; waits until there is room for it.

        Args:
            name: to ask for it by.
            work: what to do.
            size: bytes that it holds until then; None takes all the room there is, and what takes
                more is done alone.
        """
        wanted = self._room if size is None else size
        while self._pieces and (self._full(wanted) or self._oldest().done()):
            self._forget_oldest()
        self._pieces[name] = wanted, self._pool.submit(self._unless_failed, work)

    def _unless_failed(self, work: Callable[[], None]) -> None:
        if self._failed is not None:
            raise self._failed
        try:
            work()
        except BaseException as error:
            self._failed = error
            raise

    def _full(self, wanted: int) -> bool:
        taken = sum(size for size, _ in self._pieces.values())
        return taken + wanted > self._room or len(self._pieces) >= PIECES

    def _oldest(self) -> Future[None]:
        return next(iter(self._pieces.values()))[1]

    def _forget_oldest(self) -> None:
        oldest = self._oldest()
        try:
            with waiting():
                oldest.result()
        except Exception:
            self.abandon()
            raise
        del self._pieces[next(iter(self._pieces))]

    def pending(self, name: str) -> bool:
        """Whether the piece of that name is still to be done."""
        piece = self._pieces.get(name)
        return piece is not None and not piece[1].done()

    def wait(self, name: str) -> None:
        """Return when the piece of that name is done; at once where it isn't in work.

        Any thread may ask.
        """
        piece = self._pieces.get(name)
        if piece is not None:
            with waiting():
                piece[1].result()

    def drain(self) -> None:
        """Return when nothing is in work any more."""
        while self._pieces:
            self._forget_oldest()

    def abandon(self) -> None:
        """Return when nothing is in work any more, whatever became of it."""
        wait([future for _, future in self._pieces.values()])
        self._pieces, self._failed = {}, None

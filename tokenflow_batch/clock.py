"""Seconds by kind of work: one stopwatch for all threads of a process. No torch in here.

Every second of a thread belongs to the innermost kind that it is in: `unet` is the UNet without the
method's own `attention` and `correspondence` inside it, `video` in a pull of frames is without the
`vae` that makes them. So kinds can be added up. Threads work side by side, so a sum may exceed the
wall clock: reading and writing (`store`), decoding (`video`) mostly happen behind the model's back.
What the model's thread stands still for is `waited`, whatever the others do meanwhile, but for what
another spends on decoding the frames it needs next: that is computing, and counted as `decoding`.

On a GPU kernels run long after they are launched, so a wall clock would see the launches only.
There the kinds in `ON_DEVICE` take the device's own clock (`use_marks`): marks are put in its queue
of work, and read when it has passed them; nothing ever waits for the device.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final, Protocol, TypeVar

T = TypeVar("T")

KINDS: Final = ("unet", "attention", "correspondence", "vae", "video", "store")
_ALWAYS: Final = ("elapsed", "waited")
ON_DEVICE: Final = frozenset(("unet", "attention", "correspondence", "vae"))


class Mark(Protocol):
    """A moment in a device's queue, such as a `torch.cuda.Event`."""

    def query(self) -> bool:
        """Whether the device has come past it."""

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds from here to another mark."""


class _Own(threading.local):
    """What is each thread's own: the kinds it is in, and how long it has stood still."""

    def __init__(self) -> None:
        self.inside: list[str | None] = []
        self.waited, self.decoding, self.depth = 0.0, 0.0, 0


class Pause:
    """A thread's standing still.

    Attributes:
        computed: the share of it that what it waits for was computed, not read or written.
    """

    def __init__(self) -> None:
        self.computed = 0.0


_own = _Own()
_lock = threading.Lock()
_seconds = dict.fromkeys(KINDS, 0.0)
_marker: Callable[[], Mark] | None = None
_pending: list[tuple[str | None, str | None, Mark, Mark]] = []


def use_marks(marker: Callable[[], Mark] | None) -> None:
    """Take the device's clock from now on: `marker` puts a mark in its queue. None: the wall's."""
    global _marker
    _marker = marker


@contextmanager
def measured(kind: str | None) -> Iterator[None]:
    """What happens inside is of that kind, but for other kinds further inside; None is no kind.

    Also a decorator.
    """
    inside = _own.inside
    outer = inside[-1] if inside else None
    marker = _marker if kind in ON_DEVICE or outer in ON_DEVICE else None
    inside.append(kind)
    before = marker() if marker else None
    began = time.perf_counter()
    try:
        yield
    finally:
        inside.pop()
        if marker is None or before is None:
            _add(kind, outer, time.perf_counter() - began)
        else:
            with _lock:
                _pending.append((kind, outer, before, marker()))


def timed(kind: str, items: Iterable[T]) -> Iterator[T]:
    """The same items; making each is of that kind."""
    source = iter(items)
    try:
        while True:
            with measured(kind):
                try:
                    item = next(source)
                except StopIteration:
                    return
            yield item
    finally:
        if isinstance(source, Generator):
            source.close()


def _add(kind: str | None, outer: str | None, seconds: float) -> None:
    with _lock:
        _credit(kind, outer, seconds)


def _credit(kind: str | None, outer: str | None, seconds: float) -> None:
    for name, sign in ((kind, 1), (outer, -1)):
        if name in _seconds:
            _seconds[name] += sign * seconds


def waited() -> float:
    """Seconds that the calling thread has waited so far; differences count, as of any clock."""
    return _own.waited


@contextmanager
def waiting() -> Iterator[Pause]:
    """What happens inside counts as waiting, once if nested, and not as the kind around it."""
    pause = Pause()
    _own.depth += 1
    try:
        with measured(None):
            began = time.perf_counter()
            try:
                yield pause
            finally:
                took = time.perf_counter() - began
                if _own.depth == 1:
                    _own.waited += took * (1 - pause.computed)
                    _own.decoding += took * pause.computed
    finally:
        _own.depth -= 1


def seconds() -> dict[str, float]:
    """By kind, of all threads so far; of a device what it has come past."""
    with _lock:
        while _pending and _pending[0][3].query():
            kind, outer, before, after = _pending.pop(0)
            _credit(kind, outer, before.elapsed_time(after) / 1000)
        return dict(_seconds)


class Lap:
    """What has gone by since it was made or last taken, for one thread that works on one thing."""

    def __init__(self) -> None:
        self._last = _now()

    def take(self) -> dict[str, float]:
        """`elapsed` of the calling thread, of it `waited` and, if any, `decoding`, and `seconds` of
        kinds that there were.

        A next lap begins with it.
        """
        now = _now()
        told = {name: round(value - self._last[name], 6) for name, value in now.items()}
        self._last = now
        return {name: value for name, value in told.items() if value or name in _ALWAYS}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside belongs to something else."""
        before = _now()
        try:
            yield
        finally:
            after = _now()
            self._last = {n: v + after[n] - before[n] for n, v in self._last.items()}


def _now() -> dict[str, float]:
    own = {"waited": _own.waited, "decoding": _own.decoding}
    return {"elapsed": time.perf_counter(), **own, **seconds()}

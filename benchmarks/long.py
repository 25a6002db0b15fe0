"""Does a very long video go through in the same memory? One process, one log line now and then.

    python benchmarks/long.py [--frames 30000] [--every 10] [--log FILE]

A generated video of small frames, a real encoded file, goes through `encode`, `invert`, `match`,
`edit` and `render` at two steps with the small random model (`small_model.py`; why that is enough
is said in `memory.py`). A log line tells the stage, the frames done (times steps), frames a second
and the resident memory. Verdict: over the last three quarters of every stage, resident memory grows
by at most 4 KB a frame (least squares), which the exit code says, too. 30,000 frames should take
under 20 minutes on two free cores.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
from memory import BOUND, prepare
from small_model import write_small_model

from tokenflow_batch.manifest import load
from tokenflow_batch.results import exit_code
from tokenflow_batch.runner import Runner
from tokenflow_batch.stages.base import Advance

STAGES: Final = ("encode", "invert", "match", "edit", "render")
_ARENA_MAX, _MMAP_THRESHOLD = -8, -3
"""Parameters of glibc's mallopt."""


class Watch:
    """Counts frames, and samples them with this process's memory in a thread.

    Args:
        every: seconds between samples.
        log: where samples go, a JSON document a line; None prints only.
    """

    def __init__(self, every: float, log: Path | None) -> None:
        self.samples: list[dict[str, Any]] = []
        self._every, self._log = every, log
        self._what, self._done, self._total, self._began = "", 0, 0, time.perf_counter()
        self._start, self._over = time.perf_counter(), threading.Event()
        self._lock = threading.Lock()

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Advance]:
        """A progress bar's stand-in: a sample at its end, and now and then before."""
        self._what, self._done, self._total = what.split()[-1], 0, total
        self._began = time.perf_counter()

        def advance(frames: int) -> None:
            self._done += frames

        yield advance
        self.sample()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Sample while this is open."""
        thread = threading.Thread(target=self._run, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    def _run(self) -> None:
        while not self._over.wait(self._every):
            self.sample()

    def sample(self) -> None:
        """Take note of where the work is."""
        now, done = time.perf_counter(), self._done
        sample = {
            "seconds": round(now - self._start, 1),
            "stage": self._what,
            "done": done,
            "total": self._total,
            "per_second": round(done / max(now - self._began, 1e-9), 1),
            "resident_bytes": resident_bytes(),
        }
        with self._lock:
            self.samples.append(sample)
            line = json.dumps(sample)
            print(line, flush=True)
            if self._log is not None:
                with self._log.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")


def resident_bytes() -> int:
    """This process's resident memory."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def slopes(samples: list[dict[str, Any]]) -> dict[str, float | None]:
    """Bytes a frame by which each stage's memory grows; None where there are too few samples."""
    found: dict[str, float | None] = {}
    for stage in STAGES:
        own = [s for s in samples if s["stage"] == stage and s["done"] >= s["total"] / 4]
        done = np.array([s["done"] for s in own], float)
        resident = np.array([s["resident_bytes"] for s in own], float)
        enough = len(set(done.tolist())) >= 4
        found[stage] = float(np.polyfit(done, resident, 1)[0]) if enough else None
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--frames", type=int, default=30_000)
    parser.add_argument("--size", type=int, default=64, help="pixels on each side")
    parser.add_argument("--every", type=float, default=10, help="seconds between log lines")
    parser.add_argument("--log", type=Path, metavar="FILE", help="JSON lines, written anew")
    args = parser.parse_args()
    if args.log is not None:
        args.log.write_text("", encoding="utf-8")
    libc = ctypes.CDLL("libc.so.6")  # one heap that gives freed blocks back: what is held shows
    libc.mallopt(_ARENA_MAX, 1)
    libc.mallopt(_MMAP_THRESHOLD, 65536)
    watch = Watch(args.every, args.log)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = write_small_model(folder / "model")
        prepare(folder, str(model), args.frames, args.size, ", inversion_iterations: 0")
        with watch.running():
            results = Runner(load(folder / "manifest.yaml"), watch.progress).run(STAGES)
    found = slopes(watch.samples)
    flat = {stage: slope is not None and slope <= BOUND for stage, slope in found.items()}
    verdict = {
        "frames": args.frames,
        "bytes_per_frame": found,
        "bound_bytes_per_frame": BOUND,
        "flat": flat,
    }
    print(json.dumps(verdict))
    if args.log is not None:
        with args.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(verdict) + "\n")
    sys.exit(exit_code(results) or int(not all(flat.values())))


if __name__ == "__main__":
    main()

"""Do memory and time per frame grow with the length of the video? Each size in its own process.

    python benchmarks/memory.py [--frames 512 4096] [--overlap-frames 64 1024] [--json FILE]

For every stage, a process of its own runs this stage alone on a real encoded clip, and tells from
when the model is loaded: its peak resident memory, and the seconds of processor and of wall time.

- Memory: (peak at the longer − peak at the shorter) / (frames between them) is at most 4 KB. A
  variant of `encode` that deliberately keeps a sixteenth of each frame must be caught by the same
  measurement, or the measurement is worth nothing. `match`, which `invert` mostly does on its way,
  is measured by itself as well.
- Time per frame, of every stage: at the longer at most 5 % above the shorter, and for the second
  pair of lengths, from one window to many that overlap, at most 20 %. `edit_flops_ratio` tells what
  of the edit's growth is arithmetic: a clip that does not fill a window has fewer keyframes to
  attend to. Both lengths go on at the same time, each on a core of its own, the shorter again and
  again: a shared machine's moods, which come to a quarter of a frame's time within minutes, meet
  both. Processor time decides.

The exit code says whether all of it holds. A small random model does (`small_model.py`): what a
process holds for each frame of the clip are latents' and units' bookkeeping, lists and arrays of
ours, of the same size whatever the weights are and however wide the layers; the model itself adds a
constant. `--model demo` takes the trained one instead, for hours. The clip runs to and fro, so that
a frame costs the same wherever it is. With two free cores the whole should take 15 to 20 minutes.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

from tokenflow_batch.stage_names import STAGES, StageName

BOUND: Final = 4096.0
"""Bytes a frame that count as flat: timestamps and the units' bookkeeping."""
SLOWER: Final = 1.05
SLOWER_WITH_OVERLAP: Final = 1.2
LEAKING: Final = "encode, leaking"
ALONE: Final = "match, by itself"
ALL: Final = "all stages"
_TURN: Final = 64
"""Frames after which the clip turns back."""

MANIFEST = """\
version: 1
model: {model}
output: out
runtime: {{device: cpu, threads: 1}}
defaults: {{{settings}}}
clips:
  - {{video: clip.mp4, source_prompt: {source!r}, edits: [{{name: edit, prompt: {target!r}}}]}}
"""

Measured = dict[str, dict[int, dict[str, float]]]
"""stage → frames → peak_bytes, cpu_seconds, wall_seconds."""


def prepare(folder: Path, model: str, frames: int, size: int, more: str = "") -> None:
    """A generated clip of so many frames, written as it is made, and its manifest."""
    import numpy as np

    from tokenflow_batch.demo.scenes import Clip, recoloured
    from tokenflow_batch.video import Encoding, write_segment

    clip = Clip.random(3, _TURN, size)
    there = list(clip.frames())
    to_and_fro = [*there, *there[-2:0:-1]]
    write_segment(
        folder / "clip.mp4",
        (to_and_fro[i % len(to_and_fro)] for i in range(frames)),
        np.arange(frames),
        time_base=Fraction(1, 12),
        rate=Fraction(12),
        encoding=Encoding(preset="veryfast"),
    )
    target = recoloured(clip, color="blue").caption
    settings = f"steps: 2, guidance_scale: 5{more}"
    text = MANIFEST.format(model=model, settings=settings, source=clip.caption, target=target)
    (folder / "manifest.yaml").write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class Child:
    """A fresh process that runs one stage of a job.

    Attributes:
        process: it.
        where: for messages.
    """

    process: subprocess.Popen[str]
    where: str

    @property
    def running(self) -> bool:
        """Whether it still is."""
        return self.process.poll() is None

    def measured(self) -> dict[str, float]:
        """What `run_child` measured, once it is done."""
        told, _ = self.process.communicate()
        if self.process.returncode:
            raise SystemExit(f"{self.where} failed")
        measured: dict[str, float] = json.loads(told)
        return measured


def child(folder: Path, stage: StageName, core: int, *options: str) -> Child:
    """Start one stage in a process of its own, on one core."""
    command = [sys.executable, __file__, "--child", stage, str(folder / "manifest.yaml")]
    command += ["--core", str(core), *options]
    # One heap that gives freed blocks back, so that the peak is what is held and not its holes.
    tidy = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    started = subprocess.Popen(
        command, env={**os.environ, **tidy}, stdout=subprocess.PIPE, text=True
    )
    return Child(started, f"{stage} in {folder}")


def forget_peak() -> None:
    """Start the kernel's account of this process's peak anew, after giving back what is free."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_bytes() -> int:
    """This process's peak resident memory since `forget_peak`."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


@contextmanager
def leaking_frames() -> Iterator[None]:
    """Make `encode` keep a thumbnail of every frame it reads, as a careless list would."""
    from tokenflow_batch.video import read_frames

    kept: list[Any] = []

    def hoarding(*args: Any) -> Iterator[Any]:
        for frame in read_frames(*args):
            kept.append(frame[::4, ::4].copy())
            yield frame

    with patch("tokenflow_batch.stages.encode.read_frames", hoarding):
        yield


def run_child(stage: StageName, manifest: Path, core: int, *, leak: bool, force: bool) -> None:
    """Run one stage in this process and print what it took."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[core % len(cores)]})
    from tokenflow_batch.console import progress_bars
    from tokenflow_batch.manifest import load
    from tokenflow_batch.results import exit_code
    from tokenflow_batch.runner import Runner

    with leaking_frames() if leak else nullcontext(), progress_bars() as progress:
        again = (stage,) if leak or force else ()
        runner = Runner(load(manifest), progress)
        if stage != "report":
            assert runner.model is not None  # loaded here, before anything is measured
        forget_peak()
        wall, cpu = time.perf_counter(), time.process_time()
        results = runner.run((stage,), force=again)
        taken = {
            "cpu_seconds": round(time.process_time() - cpu, 3),
            "wall_seconds": round(time.perf_counter() - wall, 3),
        }
    print(json.dumps({"peak_bytes": peak_bytes(), **taken}))
    sys.exit(exit_code(results))


def measure(pairs: Sequence[tuple[int, int]], leaking: int, model: str, size: int) -> Measured:
    """Every stage at every pair of lengths, and the leaking variant at those of one of them."""
    found: Measured = {name: {} for name in (*STAGES, ALONE, LEAKING)}
    for index, pair in enumerate(pairs):
        with tempfile.TemporaryDirectory() as scratch:
            folders = {frames: Path(scratch) / str(frames) for frames in pair}
            for frames, folder in folders.items():
                folder.mkdir()
                prepare(folder, model, frames, size)
            for stage in STAGES:
                for frames, now in side_by_side(folders, stage).items():
                    found[stage][frames] = now
                    print(
                        f"{stage} at F = {frames}: {now['peak_bytes'] / 2**20:.1f} MiB, "
                        f"{1e3 * now['cpu_seconds'] / frames:.1f} ms a frame of processor time, "
                        f"{1e3 * now['wall_seconds'] / frames:.1f} ms of wall time",
                        flush=True,
                    )
            if index == leaking:
                for frames, folder in folders.items():
                    found[ALONE][frames] = child(folder, "match", 0, "--force").measured()
                    found[LEAKING][frames] = child(folder, "encode", 0, "--leak").measured()
    return found


def side_by_side(folders: Mapping[int, Path], stage: StageName) -> dict[int, dict[str, float]]:
    """One stage of a long clip, and of a short one as often as that takes; means of the latter.

    Peaks are those of the first runs, which find nothing there.
    """
    short, long = sorted(folders)
    slow, quick = child(folders[long], stage, 0), [child(folders[short], stage, 1).measured()]
    while slow.running and stage != "match":  # which would be other work without `invert`
        quick.append(child(folders[short], stage, 1, "--force").measured())
    means = {name: statistics.fmean(run[name] for run in quick) for name in quick[0]}
    first = {**means, "peak_bytes": quick[0]["peak_bytes"], "runs": len(quick)}
    return {short: first, long: slow.measured()}


def memory_slopes(found: Measured, short: int, long: int) -> dict[str, float]:
    """Bytes a frame by which every stage's peak grows."""
    return {
        name: (at[long]["peak_bytes"] - at[short]["peak_bytes"]) / (long - short)
        for name, at in found.items()
    }


def time_ratios(found: Measured, clock: str, short: int, long: int) -> dict[str, float]:
    """Time per frame at the longer over that at the shorter, by stage and of all together."""
    seconds = {n: {stage: found[stage][n][clock] / n for stage in STAGES} for n in (short, long)}
    ratios: dict[str, float] = {
        stage: round(seconds[long][stage] / seconds[short][stage], 3) for stage in STAGES
    }
    return {**ratios, ALL: round(sum(seconds[long].values()) / sum(seconds[short].values()), 3)}


def flops_ratios(model: Path, size: int, lengths: Sequence[int]) -> dict[str, float]:
    """An edit's floating-point operations a frame, relative to those at the first length."""
    from tokenflow_batch.config import Settings
    from tokenflow_batch.model_files import locate
    from tokenflow_batch.model_shape import ModelShape
    from tokenflow_batch.row_counts import edit_flops

    shape, s = ModelShape.of(locate(str(model))), Settings(steps=2, inversion_steps=2)
    _, *hw = shape.frame_shape((size, size))
    found = [edit_flops(s, n, (), shape.flops, (hw[0], hw[1])) / n for n in lengths]
    return {str(n): round(flops / found[0], 3) for n, flops in zip(lengths, found, strict=True)}


def judged(found: Measured, memory: tuple[int, int], overlap: tuple[int, int]) -> dict[str, Any]:
    """Slopes, ratios and verdicts."""
    slopes = memory_slopes(found, *memory)
    times = {}
    for (short, long), bound in ((memory, SLOWER), (overlap, SLOWER_WITH_OVERLAP)):
        cpu = time_ratios(found, "cpu_seconds", short, long)
        times[f"{short} to {long}"] = {
            "bound": bound,
            "cpu": cpu,
            "wall": time_ratios(found, "wall_seconds", short, long),
            "holds": {name: cpu[name] <= bound for name in STAGES},
        }
    return {
        "bytes_per_frame": slopes,
        "bound_bytes_per_frame": BOUND,
        "flat": {stage: slopes[stage] <= BOUND for stage in (*STAGES, ALONE)},
        "leak_caught": slopes[LEAKING] > BOUND,
        "time_per_frame_ratio": times,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    pair: dict[str, Any] = {"type": int, "nargs": 2, "metavar": ("F1", "F2")}
    parser.add_argument("--frames", default=(512, 4096), help="for memory and time", **pair)
    parser.add_argument(
        "--overlap-frames", default=(64, 1024), help="for time: one window against many", **pair
    )
    parser.add_argument("--size", type=int, default=256, help="pixels on each side")
    parser.add_argument("--model", choices=("small", "demo"), default="small")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--core", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--leak", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--force", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        stage, manifest = args.child
        run_child(stage, Path(manifest), args.core, leak=args.leak, force=args.force)
    memory, overlap = tuple(args.frames), tuple(args.overlap_frames)
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model
        if model == "small":
            from small_model import write_small_model

            model = str(write_small_model(Path(scratch) / "model"))
        found = measure([overlap, memory], 1, model, args.size)
        lengths = sorted({overlap[0], 2 * overlap[0], *memory, *overlap})
        flops = flops_ratios(Path(model), args.size, lengths)
    verdict = judged(found, memory, overlap)
    report = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "model": args.model,
        "size": args.size,
        "measured": found,
        **verdict,
        "edit_flops_ratio": flops,
    }
    text = json.dumps(report, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")
    in_time = all(all(t["holds"].values()) for t in verdict["time_per_frame_ratio"].values())
    sys.exit(0 if all(verdict["flat"].values()) and verdict["leak_caught"] and in_time else 1)


if __name__ == "__main__":
    main()

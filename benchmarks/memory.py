"""Does memory grow with the length of the video? Per stage, each size in its own process.

    python benchmarks/memory.py [--frames 128 512] [--json FILE]

For every stage: the peak resident memory, from when the model is loaded, of a process that runs
this stage alone on a real encoded clip, and the slope (peak at the longer − peak at the shorter) /
(frames between them). A variant
of `encode` that deliberately keeps its frames must be caught by the same measurement, or the
measurement is worth nothing. The exit code says whether every stage stays under the bound and the
leak doesn't. Windows are of 4 segments here, so that short clips have several, too.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tokenflow_batch.config import STAGES, StageName

BOUND = 4096.0
"""Bytes a frame that count as flat: timestamps and the units' bookkeeping."""
LEAKING = "encode, leaking"

MANIFEST = """\
version: 1
model: demo
output: out
runtime: {{device: cpu, threads: 1}}
defaults:
  {{steps: 2, chunk_frames: 32, guidance_scale: 5, window_segments: 4, window_overlap: 1}}
clips:
  - {{video: clip.mp4, source_prompt: {source!r}, edits: [{{name: edit, prompt: {target!r}}}]}}
"""


def prepare(folder: Path, frames: int, size: int) -> None:
    """A generated clip of so many frames and its manifest."""
    from tokenflow_batch.demo.job import write_clip
    from tokenflow_batch.demo.scenes import Clip, recoloured

    clip = Clip.random(3, frames, size)
    write_clip(folder / "clip.mp4", clip)
    text = MANIFEST.format(source=clip.caption, target=recoloured(clip, color="blue").caption)
    (folder / "manifest.yaml").write_text(text, encoding="utf-8")


def peak(folder: Path, stage: StageName, *, leak: bool = False) -> int:
    """Peak resident bytes of a fresh process while it runs one stage, by the kernel's account."""
    command = [sys.executable, __file__, "--child", stage, str(folder / "manifest.yaml")]
    if leak:
        command.append("--leak")
    # One heap that gives freed blocks back, so that the peak is what is held and not its holes.
    tidy = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        command, env={**os.environ, **tidy}, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{stage} failed in {folder}")
    return int(done.stdout)


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
    """Make `encode` keep every frame it reads, as a careless list would."""
    from tokenflow_batch.video import read_frames

    kept: list[Any] = []

    def hoarding(*args: Any) -> Iterator[Any]:
        for frame in read_frames(*args):
            kept.append(frame.copy())
            yield frame

    with patch("tokenflow_batch.stages.encode.read_frames", hoarding):
        yield


def run_child(stage: StageName, manifest: Path, *, leak: bool) -> None:
    """Run one stage in this process."""
    from contextlib import nullcontext

    from tokenflow_batch.console import progress_bars
    from tokenflow_batch.manifest import load
    from tokenflow_batch.runner import Runner, exit_code

    with leaking_frames() if leak else nullcontext(), progress_bars() as progress:
        force = (stage,) if leak else ()
        runner = Runner(load(manifest), progress)
        if stage != "report":
            assert runner.model is not None  # loaded here, before anything is measured
        forget_peak()
        results = runner.run((stage,), force=force)
    print(peak_bytes())
    sys.exit(exit_code(results))


def measure(short: int, long: int, size: int) -> dict[str, dict[str, float]]:
    """Peaks and slopes of every stage and of the leaking variant."""
    peaks: dict[str, list[int]] = {}
    for frames in (short, long):
        with tempfile.TemporaryDirectory() as scratch:
            prepare(Path(scratch), frames, size)
            for stage in STAGES:
                peaks.setdefault(stage, []).append(peak(Path(scratch), stage))
                print(f"{stage} at F = {frames}: {peaks[stage][-1] / 2**20:.1f} MiB", flush=True)
            peaks.setdefault(LEAKING, []).append(peak(Path(scratch), "encode", leak=True))
    return {
        name: {
            f"peak_bytes_{short}": low,
            f"peak_bytes_{long}": high,
            "bytes_per_frame": (high - low) / (long - short),
        }
        for name, (low, high) in peaks.items()
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--frames", type=int, nargs=2, default=(128, 512), metavar=("F1", "F2"))
    parser.add_argument("--size", type=int, default=64, help="pixels on each side")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--leak", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run_child(args.child[0], Path(args.child[1]), leak=args.leak)
    short, long = args.frames
    stages = measure(short, long, args.size)
    flat = {name: stages[name]["bytes_per_frame"] <= BOUND for name in STAGES}
    caught = stages[LEAKING]["bytes_per_frame"] > BOUND
    report = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "frames": list(args.frames),
        "size": args.size,
        "bound_bytes_per_frame": BOUND,
        "stages": stages,
        "flat": flat,
        "leak_caught": caught,
    }
    text = json.dumps(report, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")
    sys.exit(0 if all(flat.values()) and caught else 1)


if __name__ == "__main__":
    main()

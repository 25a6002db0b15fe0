"""A minute of moving video through the pipeline: what it costs, whether its look holds.

    python benchmarks/minute.py FOLDER [--frames 1440] [--size 64] [--sheet PNG] [--json FILE]

Generates a clip (24 frames a second, the object moving, turning and growing, the light changing),
edits its colour with the demo model at the `fast` preset in overlapping windows, and leaves
everything in FOLDER: the edit, the side-by-side, the report. Run again after a kill it goes on.
Writes a contact sheet at 20 times, and prints the report's seams and drift: ratios of the change
over 8 frames across the joins to the same elsewhere. With `--processes 2`, some 13 minutes
at 64 pixels, two processes share the clip.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import yaml

from tokenflow_batch.demo.job import EDIT, write_clip
from tokenflow_batch.demo.scenes import Clip, recoloured
from tokenflow_batch.sheet import contact_sheet, sample_times
from tokenflow_batch.video import probe, read_frames

FPS = 24
TIMES = 20


def prepare(folder: Path, frames: int, size: int, seed: int) -> Path:
    """The clip and its manifest, written once."""
    manifest = folder / "manifest.yaml"
    clip = Clip.random(seed, frames, size, zoom=0.2, turn=0.3, dim=0.12, flicker=0.06)
    wanted = recoloured(clip, color="blue" if clip.params(0).color != "blue" else "red")
    if manifest.exists():
        return manifest
    write_clip(folder / "clip.mp4", clip, fps=FPS)
    job = {
        "version": 1,
        "model": "demo",
        "output": "results/",
        "runtime": {"threads": 1},
        "defaults": {"preset": "fast", **EDIT.model_dump(exclude_unset=True)},
        "clips": [
            {
                "video": "clip.mp4",
                "source_prompt": clip.caption,
                "edits": [{"name": "edit", "prompt": wanted.caption}],
            }
        ],
    }
    manifest.write_text(yaml.safe_dump(job, sort_keys=False), encoding="utf-8")
    return manifest


def run(manifest: Path, processes: int) -> float:
    """Seconds of wall time."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "accelerate.commands.launch", "--multi_gpu"]
        command += ["--num_processes", str(processes), "--num_machines", "1"]
        command += ["--mixed_precision", "no", "--dynamo_backend", "no"]
        command += ["--main_process_port", "0"]
    began = time.monotonic()
    subprocess.run(
        [*command, "-m", "tokenflow_batch", "run", str(manifest)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
    )
    return time.monotonic() - began


def write_sheet(path: Path, side_by_side: Path, title: str) -> None:
    """Source and edit at `TIMES` times, in two blocks of columns."""
    facts = probe(side_by_side)
    wanted, kept = set(sample_times(facts.frames, TIMES)), {}
    for i, frame in enumerate(read_frames(side_by_side, facts)):
        if i in wanted:
            kept[i] = np.array_split(frame, 2, axis=1)
    half = (len(kept) + 1) // 2
    times, rows = sorted(kept), {}
    for part in (times[:half], times[half:]):
        label = f"{part[0] / FPS:.0f}-{part[-1] / FPS:.0f} s"
        for column, name in enumerate(("source", "edit")):
            rows[f"{name} {label}"] = [kept[i][column] for i in part]
    columns = [f"{number} of {TIMES}" for number in range(1, half + 1)]
    contact_sheet(path, title, columns, rows)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--frames", type=int, default=1440)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="write the contact sheet here")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    manifest = prepare(args.folder, args.frames, args.size, args.seed)
    seconds = run(manifest, args.processes)
    results = args.folder / "results" / "clip" / "edit"
    metrics = json.loads((results / "metrics.json").read_text("utf-8"))
    found = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "command": {"frames": args.frames, "size": args.size, "processes": args.processes},
        "seconds": round(seconds, 1),
        **{key: metrics[key] for key in ("unet_rows_per_frame", "warp_error", "seams")},
    }
    print(json.dumps(found, indent=1))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if args.sheet:
        write_sheet(args.sheet, results / "side_by_side.mp4", metrics["settings"]["prompt"])


if __name__ == "__main__":
    main()

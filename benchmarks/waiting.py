"""How much of its time does the model wait for the disk, in every stage?

    python benchmarks/waiting.py [--frames 256] [--steps 3] [--edits 1] [--json FILE]

A generated clip goes through all stages with the small model that comes along, at 64 pixels, where
a batch takes least time and so the disk has most to keep up with. Waiting is what the thread that
runs the model stands still for while data are read, written or flushed (`clock.waiting`), a share
of all its time in the stage; beside it, what it stands still for while a frame of the video is
being decoded, which another core is busy with and no disk could help. Must hold: at most 5 % of
waiting in every stage. The exit code says so.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
from pathlib import Path
from typing import Any, Final

from edits import PIXELS, write_job

from tokenflow_batch.console import progress_bars
from tokenflow_batch.demo.job import write_clip
from tokenflow_batch.demo.scenes import Clip
from tokenflow_batch.manifest import load
from tokenflow_batch.runner import Runner
from tokenflow_batch.stage_names import STAGES
from tokenflow_batch.work import Work

BOUND: Final = 0.05


def measure(frames: int, steps: int, edits: int, threads: int) -> dict[str, Any]:
    """By stage, what its records say; of several edits, those of the first."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, clip = Path(scratch), Clip.random(4, frames, PIXELS)
        write_clip(folder / "clip.mp4", clip)
        batch = load(write_job(folder, "job", clip, edits, steps, threads))
        with progress_bars() as progress:
            runner = Runner(batch, progress)
            assert runner.model is not None  # loading it is no stage's work
            for result in runner.run():
                if result.error is not None:
                    raise SystemExit(str(result.error))
        context = runner.context(batch.jobs[0])
        return {stage: Work.of(context.folder(stage)).to_json(frames) for stage in STAGES}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--frames", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--edits", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    args = parser.parse_args()
    found = measure(args.frames, args.steps, args.edits, args.threads)
    holds = all(stage["waited_share"] <= BOUND for stage in found.values())
    report = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        **{k: v for k, v in vars(args).items() if k != "json"},
        "pixels": PIXELS,
        "bound": BOUND,
        "holds": holds,
        "stages": found,
    }
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for stage, told in found.items():
        waited, elapsed = told["waited_seconds"], told["elapsed_seconds"]
        print(
            f"{stage:<7} waited {waited:6.2f} of {elapsed:7.1f} s: {told['waited_share']:.1%}"
            f" (and {told['decoding_seconds']:.2f} s for decoding)"
        )
    raise SystemExit(0 if holds else 1)


if __name__ == "__main__":
    main()

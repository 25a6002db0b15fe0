"""How much faster are several processes on one clip, and where does the rest of the time go?

    python benchmarks/sharing.py [--processes 2] [--repeats 3] [--json FILE]

One generated clip of nine overlapping windows, edited by the demo model: by one process of one
thread and by several of one thread each, in turn (either goes first every other time), each time
from nothing and in fresh processes (`accelerate launch`). Seconds are counted from when the models
are loaded to the last commit, by the slowest process. Besides: the seconds of all processes in the
units of each stage, what share of all their time they waited for each other, and what of it is
neither. The edited latents of both must be the same bits.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tokenflow_batch.stage_names import StageName

STAGES: tuple[StageName, ...] = ("encode", "invert", "match", "edit", "render")
FRAMES, SIZE = 80, 64
MANIFEST = """\
version: 1
model: demo
output: out
runtime: {device: cpu, threads: 1}
defaults:
  {steps: 4, chunk_frames: 8, guidance_scale: 5, window_segments: 2, window_overlap: 1}
clips:
"""
JOB = """\
  - {{video: {name}.mp4, source_prompt: {source!r}, edits: [{{name: edit, prompt: {target!r}}}]}}
"""


def prepare(folder: Path, lengths: Sequence[int]) -> Path:
    """Generated clips of so many frames, and their manifest."""
    from tokenflow_batch.demo.job import write_clip
    from tokenflow_batch.demo.scenes import Clip, recoloured

    text = MANIFEST
    for number, frames in enumerate(lengths):
        clip = Clip.random(3 + number, frames, SIZE)
        write_clip(folder / f"clip{number}.mp4", clip)
        target = recoloured(clip, color="blue").caption
        text += JOB.format(name=f"clip{number}", source=clip.caption, target=target)
    (folder / "manifest.yaml").write_text(text, encoding="utf-8")
    return folder / "manifest.yaml"


def run_child(manifest: Path, told: Path) -> None:
    """One process of a launch: run everything, then write down what it took."""
    from tokenflow_batch.console import progress_bars
    from tokenflow_batch.distributed import Team
    from tokenflow_batch.manifest import load
    from tokenflow_batch.results import exit_code
    from tokenflow_batch.runner import Runner

    team = Team.of_launch()
    with progress_bars(shown=False) as progress:
        runner = Runner(load(manifest), progress, team)
        assert runner.model is not None  # loaded here, before anything is measured
        team.barrier("loaded")
        team.waited, began = 0.0, time.monotonic()
        results = runner.run(STAGES)
        seconds = time.monotonic() - began
    facts = {"seconds": seconds, "waited": team.waited}
    (told / f"{team.rank}.json").write_text(json.dumps(facts), encoding="utf-8")
    team.close()
    sys.exit(exit_code(results))


def timed(manifest: Path, processes: int) -> tuple[dict[str, Any], Any]:
    """From nothing, by so many processes; and the edited latents."""
    shutil.rmtree(manifest.parent / "out", ignore_errors=True)
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "accelerate.commands.launch", "--multi_gpu"]
        command += ["--num_processes", str(processes), "--num_machines", "1"]
        command += ["--mixed_precision", "no", "--dynamo_backend", "no"]
        command += ["--main_process_port", "0"]
    with tempfile.TemporaryDirectory() as told:
        subprocess.run(
            [*command, __file__, "--child", str(manifest), told],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=True,
        )
        ranks = [json.loads(p.read_text("utf-8")) for p in sorted(Path(told).iterdir())]
    assert len(ranks) == processes
    seconds = max(rank["seconds"] for rank in ranks)
    total, waited = (sum(rank[name] for rank in ranks) for name in ("seconds", "waited"))
    stages = by_stage(manifest)
    shares = {"waited": waited / total, "other": 1 - (waited + sum(stages.values())) / total}
    return {"seconds": seconds, "share": shares, "stage_seconds": stages}, latents(manifest)


def by_stage(manifest: Path) -> dict[str, float]:
    """Seconds that all processes together spent in units of all jobs, as those say themselves."""
    from tokenflow_batch.inputs import Inputs
    from tokenflow_batch.ledger import StageFolder
    from tokenflow_batch.manifest import load

    batch = load(manifest)
    inputs = Inputs.of(batch)
    found: dict[str, float] = {}
    for job in batch.jobs:
        for stage in STAGES:
            key = inputs.keys(job)[stage].key
            totals = StageFolder(inputs.workspace.stage(stage, key), stage, key).totals()
            found[stage] = found.get(stage, 0.0) + totals["seconds"]
    return found


def latents(manifest: Path) -> Any:
    """The edited latents of the first job."""
    from tokenflow_batch.console import progress_bars
    from tokenflow_batch.manifest import load
    from tokenflow_batch.runner import Runner
    from tokenflow_batch.stages.clip import read_clip
    from tokenflow_batch.stages.edit import read_edited

    with progress_bars(shown=False) as progress:
        runner = Runner(load(manifest), progress)
        context = runner.context(runner.batch.jobs[0])
        return read_edited(context, range(read_clip(context).frames)).numpy()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        manifest = prepare(Path(scratch), [FRAMES])
        pairs = []
        for number in range(args.repeats):
            counts = {"one": 1, "several": args.processes}
            names = list(counts) if number % 2 == 0 else list(reversed(counts))
            found = {name: timed(manifest, counts[name]) for name in names}
            assert np.array_equal(found["one"][1], found["several"][1]), "other bits"
            pairs.append({name: found[name][0] for name in counts})
            print(json.dumps(pairs[-1]), flush=True)
    ratios = [pair["one"]["seconds"] / pair["several"]["seconds"] for pair in pairs]
    report = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "processes": args.processes,
        "speedup": {"median": statistics.median(ratios), "each": ratios},
        "same_bits": True,
        "runs": pairs,
    }
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in report.items() if k != "runs"}, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        run_child(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()

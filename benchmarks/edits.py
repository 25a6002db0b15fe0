"""What do ten edits of one clip cost together, against a first edit and nine further ones?

    python benchmarks/edits.py [--edits 10] [--frames 16] [--steps 5] [--json FILE]

A generated clip and the small model that comes along, the real stages. One after the other: the
first edit from the video file to the edited one, then each further edit from the stores to another
video. Side by side: all of them in one run from the video file. The model is loaded before.

Rows through the UNet and bits must be the same, which is checked; what is stored of the source is
read once instead of once an edit, and its digests are compared once. Must hold: side by side it
takes no more rows and no more wall clock. The exit code says so.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
import yaml

from tokenflow_batch.console import progress_bars
from tokenflow_batch.demo.job import write_clip
from tokenflow_batch.demo.scenes import Clip, recoloured
from tokenflow_batch.manifest import load
from tokenflow_batch.runner import Runner
from tokenflow_batch.stage_names import STAGES, StageName
from tokenflow_batch.store import ArrayStore

DONE: Final[tuple[StageName, ...]] = STAGES[:-1]
COLOURS: Final = ("blue", "red", "green", "yellow", "orange", "purple", "pink", "white", "black")
PIXELS: Final = 64


def write_job(folder: Path, name: str, clip: Clip, edits: int, steps: int, threads: int) -> Path:
    """A manifest of so many edits; those beyond the colours differ in guidance."""
    wanted = [
        {
            "name": f"edit{n}",
            "prompt": recoloured(clip, color=COLOURS[n % len(COLOURS)]).caption,
            "guidance_scale": 5.0 + n // len(COLOURS),
        }
        for n in range(edits)
    ]
    manifest = {
        "version": 1,
        "model": "demo",
        "output": name,
        "runtime": {"device": "cpu", "threads": threads},
        "defaults": {"steps": steps, "inversion_steps": steps},
        "clips": [{"video": "clip.mp4", "source_prompt": clip.caption, "edits": wanted}],
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(manifest, sort_keys=False), encoding="utf-8")
    return path


def run(manifest: Path, only: str | None = None) -> dict[str, float]:
    """Seconds of wall clock and of processor time, of stages that were not done yet."""
    batch = load(manifest)
    with progress_bars() as progress:
        runner = Runner(batch.only([only]) if only else batch, progress)
        assert runner.model is not None
        wall, processor = time.perf_counter(), time.process_time()
        for result in runner.run(DONE):
            if result.error is not None:
                raise SystemExit(str(result.error))
        return {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}


def outcome(manifest: Path) -> tuple[int, list[np.ndarray[Any, Any]]]:
    """UNet rows of all stages, each counted once, and every edit's latents."""
    batch, rows, latents = load(manifest), dict[tuple[str, str], int](), []
    with progress_bars() as progress:
        runner = Runner(batch, progress)
    for job in batch.jobs:
        context = runner.context(job)
        for stage in DONE:
            folder = context.folder(stage)
            rows[stage, folder.key] = int(folder.totals().get("rows", 0))
        store = ArrayStore.open(context.folder("edit"))
        latents.append(store.read("latents", (job.settings.steps,)))
    return sum(rows.values()), latents


def compare(edits: int, frames: int, steps: int, threads: int) -> dict[str, Any]:
    """Both ways, in one run."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, clip = Path(scratch), Clip.random(4, frames, PIXELS)
        write_clip(folder / "clip.mp4", clip)
        single, together = (
            write_job(folder, name, clip, edits, steps, threads) for name in ("single", "together")
        )
        each = [run(single, f"clip/edit{n}") for n in range(edits)]
        at_once = run(together)
        rows, latents = outcome(single)
        rows_at_once, latents_at_once = outcome(together)
    same = all(np.array_equal(a, b) for a, b in zip(latents, latents_at_once, strict=True))
    one_by_one = {kind: sum(run[kind] for run in each) for kind in at_once}
    return {
        "first": each[0],
        "further": each[1:],
        "one_by_one": {"rows": rows, **one_by_one},
        "side_by_side": {"rows": rows_at_once, **at_once},
        "less": {kind: 1 - at_once[kind] / one_by_one[kind] for kind in at_once},
        "same_bits": same,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--edits", type=int, default=10)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    args = parser.parse_args()
    found = compare(args.edits, args.frames, args.steps, args.threads)
    alone, together = found["one_by_one"], found["side_by_side"]
    holds = together["rows"] <= alone["rows"] and together["wall"] <= alone["wall"]
    holds &= found["same_bits"]
    report = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        **{k: v for k, v in vars(args).items() if k != "json"},
        "pixels": PIXELS,
        "holds": holds,
        **found,
    }
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"a first edit and {args.edits - 1} further ones, against {args.edits} side by side:")
    print(f"  rows       {alone['rows']} and {together['rows']}")
    for kind, words in (("wall", "wall clock"), ("processor", "processor")):
        less = f"{100 * found['less'][kind]:.1f} % less"
        print(f"  {words:<10} {alone[kind]:.1f} s and {together[kind]:.1f} s: {less}")
    print(f"  bits       {'the same' if found['same_bits'] else 'OTHERS'}")
    raise SystemExit(0 if holds else 1)


if __name__ == "__main__":
    main()

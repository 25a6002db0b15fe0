"""How much sooner is an edit there than with the published method? Both modes, in one run.

    python benchmarks/speed.py [--models demo mid] [--frames 16] [--repeats 2] [--json FILE]

A generated clip is edited by the real stages, twice: in mode `official` with the published settings
(500 plain inversion steps, reconstructed once to check them, 50 sampling steps, three branches with
self-attention in all passes), and by default. Official's inversion is measured in part (50 steps)
and scaled to 1000 evaluations a frame, its reconstruction included; all else is measured whole.
Encoding and writing videos count on both sides. Two models: the one that comes along, and a random
UNet of Stable Diffusion's shape, a fifth as wide. The modes alternate; ratios are within a repeat.

First edit: from the video file to the edited one. Further edit: from the stores to another video.
Must hold for every model, in the median: first edit ≥ 7, further edit ≥ 2.5 times as fast.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from small_model import write_small_model

from tokenflow_batch.console import progress_bars
from tokenflow_batch.demo.job import write_clip
from tokenflow_batch.demo.scenes import Clip, recoloured
from tokenflow_batch.manifest import load
from tokenflow_batch.runner import Runner
from tokenflow_batch.stage_names import StageName

STAGES: Final[tuple[StageName, ...]] = ("encode", "invert", "match", "edit", "render")
MEASURED, PUBLISHED = 50, 1000
"""Evaluations a frame of official's inversion: run here; with its reconstruction, in all."""
SETTINGS: Final = {
    "official": f"{{preset: official, inversion_steps: {MEASURED}}}",
    "default": "{preset: balanced}",
}
SIZES: Final = {"demo": 64, "mid": 128}
"""Pixels on each side."""
BOUNDS: Final = {"first": 7.0, "further": 2.5}
MANIFEST: Final = """\
version: 1
model: {model}
output: {mode}
runtime: {{device: cpu, threads: {threads}}}
defaults: {settings}
clips:
  - {{video: clip.mp4, source_prompt: {source!r}, edits: [{{name: edit, prompt: {target!r}}}]}}
"""


def prepare(folder: Path, model: str, frames: int, threads: int) -> None:
    """A clip, and a manifest for each mode."""
    clip = Clip.random(4, frames, SIZES[model])
    write_clip(folder / "clip.mp4", clip)
    if model != "demo":
        write_small_model(folder / "model", mid=True)
    for mode, settings in SETTINGS.items():
        text = MANIFEST.format(
            model="demo" if model == "demo" else "model",
            mode=mode,
            threads=threads,
            settings=settings,
            source=clip.caption,
            target=recoloured(clip, color="blue").caption,
        )
        (folder / f"{mode}.yaml").write_text(text, encoding="utf-8")


def seconds_of(manifest: Path) -> dict[str, float]:
    """Wall-clock seconds of every stage, all of it done anew; the model is loaded before."""
    with progress_bars() as progress:
        runner = Runner(load(manifest), progress)
        assert runner.model is not None
        found: dict[str, float] = {}
        for stage in STAGES:
            began = time.perf_counter()
            # Forced once, all later stages begin anew; `match` has been handed its part by then.
            (result,) = runner.run((stage,), force=("encode",) if stage == "encode" else ())
            found[stage] = time.perf_counter() - began
            if result.error is not None:
                raise RuntimeError(result.error)
    return found


def costs(seconds: dict[str, float], mode: str) -> dict[str, float]:
    """Seconds of a first and of a further edit."""
    scale = PUBLISHED / MEASURED if mode == "official" else 1.0
    further = seconds["edit"] + seconds["render"]
    first = seconds["encode"] + scale * seconds["invert"] + seconds["match"] + further
    return {"first": first, "further": further}


def compare(model: str, frames: int, threads: int, repeats: int) -> dict[str, Any]:
    """Both modes on one model, in turn; and how many times as fast default was."""
    runs, ratios = [], dict[str, list[float]]()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder, model, frames, threads)
        for number in range(repeats):
            modes = list(SETTINGS) if number % 2 == 0 else list(reversed(SETTINGS))
            stages = {mode: seconds_of(folder / f"{mode}.yaml") for mode in modes}
            whole = {mode: costs(stages[mode], mode) for mode in SETTINGS}
            for edit in BOUNDS:
                ratio = whole["official"][edit] / whole["default"][edit]
                ratios.setdefault(edit, []).append(ratio)
            runs.append({mode: {"stages": stages[mode], **whole[mode]} for mode in SETTINGS})
            print(json.dumps({"model": model, **runs[-1]}), flush=True)
    return {
        "model": model,
        "pixels": SIZES[model],
        "runs": runs,
        "ratio": {
            edit: {"median": statistics.median(r), "low": min(r), "high": max(r)}
            for edit, r in ratios.items()
        },
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    args = parser.parse_args()
    found = [compare(m, args.frames, args.threads, args.repeats) for m in args.models]
    holds = all(
        row["ratio"][edit]["median"] >= bound for row in found for edit, bound in BOUNDS.items()
    )
    report = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "frames": args.frames,
        "threads": args.threads,
        "extrapolated": f"official's inversion from {MEASURED} to {PUBLISHED} evaluations a frame",
        "bounds": BOUNDS,
        "holds": holds,
        "models": found,
    }
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    table = Table("model", "first edit", "further edit", title="default against official")
    for row in found:
        cells = (row["ratio"][edit] for edit in BOUNDS)
        table.add_row(
            row["model"], *(f"{c['median']:.1f} x ({c['low']:.1f}-{c['high']:.1f})" for c in cells)
        )
    Console().print(table)
    raise SystemExit(0 if holds else 1)


if __name__ == "__main__":
    main()

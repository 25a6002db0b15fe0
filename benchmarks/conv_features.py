"""Convolution features stored in 16 bits, in 8, or computed again: error, bytes, work, seconds.

    python benchmarks/conv_features.py [--frames 16] [--preset fast] [--json FILE]

A generated clip is edited by the real stages with the demo model, once for each value of
`conv_features`, at the usual thresholds and site and at those that the demo model does best with.
Error of the features: of what is stored against the same features in fp32, root mean square over
root mean square, mean and worst of the steps. Of the edit: PSNR of its decoded frames against
`store`'s (and `store`'s features are those of `recompute` but for 16 bits), of all frames together
and of the worst; null where they are equal. Rows and FLOPs are the plan's, whose rows must be the
run's; bytes are those of the convolution features on disk. Seconds are of one run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tokenflow_batch.arrays import CONV8, CONV8_SCALE
from tokenflow_batch.config import ConvFeatures
from tokenflow_batch.console import progress_bars
from tokenflow_batch.demo.job import write_clip
from tokenflow_batch.demo.scenes import Clip, recoloured
from tokenflow_batch.forecast import Forecast, forecast
from tokenflow_batch.manifest import load
from tokenflow_batch.metrics import psnr
from tokenflow_batch.runner import Runner
from tokenflow_batch.stage_names import StageName
from tokenflow_batch.stages.base import StageContext
from tokenflow_batch.stages.clip import InvertedLatents
from tokenflow_batch.stages.edit import read_edited
from tokenflow_batch.stages.matching import stored_features
from tokenflow_batch.store import ArrayStore
from tokenflow_batch.tokenflow.attention import tokenflow_hooks
from tokenflow_batch.tokenflow.denoise import Denoiser
from tokenflow_batch.tokenflow.passes import FeaturePass
from tokenflow_batch.tokenflow.quantise import dequantise

KINDS: Final[tuple[ConvFeatures, ...]] = ("store", "store8", "recompute")
STORED: Final = {"store": "conv", "store8": "conv8"}
SETTINGS: Final[dict[str, dict[str, Any]]] = {
    "usual": {"guidance_scale": 5.0},
    "demo": {
        "guidance_scale": 5.0,
        "attn_t": 0.8,
        "f_t": 1.0,
        "conv_site": "up_blocks.2.resnets.1",
    },
}
SIZE, SEED = 64, 4
STAGES: Final[tuple[StageName, ...]] = ("encode", "invert", "match", "edit")


def manifest_of(folder: Path, clip: Clip, kind: ConvFeatures, settings: dict[str, Any]) -> Path:
    """A job of one edit; those of all kinds share what they can."""
    wanted = recoloured(clip, color="blue" if clip.params(0).color != "blue" else "red")
    job = {
        "version": 1,
        "model": "demo",
        "output": "results/",
        "runtime": {"device": "cpu", "threads": 1},
        "defaults": {**settings, "conv_features": kind},
        "clips": [
            {
                "video": "clip.mp4",
                "source_prompt": clip.caption,
                "edits": [{"name": kind, "prompt": wanted.caption}],
            }
        ],
    }
    path = folder / f"{kind}.yaml"
    path.write_text(yaml.safe_dump(job, sort_keys=False), encoding="utf-8")
    return path


class Run:
    """One kind's edit, run and looked into."""

    def __init__(self, manifest: Path) -> None:
        self.planned: Forecast = forecast(load(manifest))
        with progress_bars() as progress:
            runner = Runner(load(manifest), progress)
            self.model = runner.model
            self.seconds = {stage: self._timed(runner, stage) for stage in STAGES}
            self.context: StageContext = runner.context(runner.batch.jobs[0])

    @staticmethod
    def _timed(runner: Runner, stage: StageName) -> float:
        began = time.perf_counter()
        (result,) = runner.run((stage,))
        if result.error is not None:
            raise RuntimeError(result.error)
        return time.perf_counter() - began

    def pictures(self, frames: int) -> NDArray[np.uint8]:
        """The edited frames, (F, H, W, 3)."""
        return self.model.decode(read_edited(self.context, range(frames)))

    def costs(self) -> dict[str, Any]:
        """What was planned, and what it took."""
        cost = self.planned.jobs[0].stages["edit"]
        totals = self.context.folder("edit").totals()
        rows = {"rows": cost.rows, "partial_rows": cost.partial_rows}
        if any(totals.get(name, 0) != planned for name, planned in rows.items()):
            raise RuntimeError(f"planned {rows}, made {totals}")
        folder = self.context.folder("match")
        specs, root = ArrayStore.open(folder).specs, folder.folder / "data.zarr"
        return {
            **rows,
            "gflop": cost.flops / 1e9,
            "conv_bytes_planned": sum(s.stored_bytes() for n, s in specs.items() if _conv(n)),
            "conv_bytes": sum(_bytes(root / name) for name in specs if _conv(name)),
            "seconds": {stage: round(self.seconds[stage], 2) for stage in ("match", "edit")},
        }

    @torch.no_grad()
    def features(self, frames: int) -> list[Tensor]:
        """The source's features in fp32 at every step of the injection, (F, C, h, w) each."""
        s, model = self.context.settings, self.model
        schedule = model.schedule(s.steps)
        source = InvertedLatents(self.context.folder("invert"), schedule, schedule)
        denoiser, embed = Denoiser(model.unet, model.prediction_type), model.embed(s.source_prompt)
        found = []
        with tokenflow_hooks(model.unet, conv_site=s.conv_site) as hooks:
            for step in range(int(s.steps * s.f_t)):
                with hooks.during(FeaturePass()) as seen:
                    latents = source.read(step, range(frames))
                    denoiser.until_enough(latents, schedule.timesteps[step], embed, s.conv_site)
                assert seen.conv is not None
                found.append(seen.conv)
        return found


def _conv(array: str) -> bool:
    return array.startswith("conv")


def _bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def errors(features: Sequence[Tensor], kind: str) -> dict[str, float]:
    """Relative error of what is stored, over the steps."""
    found = []
    for exact in features:
        stored = {n: torch.from_numpy(a) for n, a in stored_features(kind, exact, "here").items()}
        back = dequantise(stored[CONV8], stored[CONV8_SCALE]) if CONV8 in stored else stored[kind]
        gap, size = (back.double() - exact.double()), exact.double()
        found.append(float(gap.pow(2).mean().sqrt() / size.pow(2).mean().sqrt()))
    return {"mean": float(np.mean(found)), "worst_step": float(np.max(found))}


def gaps(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> dict[str, float | None]:
    """PSNR in dB of all frames as one picture, and of the worst."""
    whole = [x.reshape(-1, *x.shape[2:]) for x in (first, second)]
    found = {"all": psnr(whole[0], whole[1]), "worst": min(map(psnr, first, second))}
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


def compare(name: str, frames: int, preset: str) -> dict[str, Any]:
    """All kinds at one choice of settings."""
    clip = Clip.random(SEED, frames, SIZE)
    kinds: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_clip(folder / "clip.mp4", clip)
        settings = {"preset": preset, **SETTINGS[name]}
        runs = {k: Run(manifest_of(folder, clip, k, settings)) for k in KINDS}
        features = runs["store"].features(frames)
        plain = runs["store"].pictures(frames)
        for kind, run in runs.items():
            kinds[kind] = run.costs()
            if kind in STORED:
                kinds[kind]["feature_error"] = errors(features, STORED[kind])
            if kind != "store":
                kinds[kind]["psnr"] = gaps(run.pictures(frames), plain)
    return {"settings": name, **settings, "kinds": kinds}


def decibels(value: float | None) -> str:
    """For people."""
    return "equal" if value is None else f"{value:.1f}"


def table_of(rows: Sequence[dict[str, Any]]) -> Table:
    """For people."""
    table = Table("settings", "conv_features", "feature error", "PSNR", "MB", "rows", "GFLOP", "s")
    for row in rows:
        for kind, cost in row["kinds"].items():
            error, gap = cost.get("feature_error"), cost.get("psnr")
            table.add_row(
                row["settings"],
                kind,
                "" if error is None else f"{error['mean']:.1e} (at most {error['worst_step']:.1e})",
                "" if gap is None else f"{decibels(gap['all'])} (worst {decibels(gap['worst'])})",
                f"{cost['conv_bytes'] / 1e6:.2f}",
                f"{cost['rows']} + {cost['partial_rows']} partial",
                f"{cost['gflop']:.0f}",
                f"{cost['seconds']['edit']:.1f}",
            )
    return table


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    args = parser.parse_args()
    rows = [compare(name, args.frames, args.preset) for name in args.settings]
    report = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "frames": args.frames,
        "pixels": SIZE,
        "seed": SEED,
        "rows": rows,
    }
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    Console(width=140).print(table_of(rows))


if __name__ == "__main__":
    main()

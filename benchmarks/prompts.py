"""Whether the demo model draws what a prompt says, as read by an independent classifier.

    python benchmarks/prompts.py [--model FOLDER] [--single 200] [--pairs 60] [--json FILE]
                                 [--sheet PNG]

Prompts are drawn from the full domain (five shapes, ten colours, four textures, six grounds), or
from what the first weights knew (`--domain first`), one object or two; each is sampled once with 25
DDIM steps and guidance 5 and read by `benchmarks/classifier.py`. A prompt of two objects scores the
share of them that is right. Per attribute the mean is given with a 95 % bootstrap interval.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import multiprocessing
import textwrap
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
import numpy as np
import torch
from classifier import agreement, load, read
from diffusers import DDIMScheduler, StableDiffusionPipeline
from numpy.typing import NDArray

from tokenflow_batch.console import progress_bars
from tokenflow_batch.demo.captions import describe
from tokenflow_batch.demo.stills import FIRST, FULL, SceneParams, sample
from tokenflow_batch.model_files import locate

mpl.use("Agg")
import matplotlib.pyplot as plt

Images = list[NDArray[np.uint8]]
DOMAINS: Final = {"first": FIRST, "full": FULL}

_STREAM: Final = 21
_BATCH: Final = 4
_SHEET: Final = 64
_COLUMNS: Final = 8


def draw_scenes(seed: int, single: int, pairs: int, *, domain: str) -> list[SceneParams]:
    """What the prompts ask for: scenes with one object, then with two."""
    base = DOMAINS[domain]
    rng = np.random.default_rng([_STREAM, seed])
    one = [sample(rng, base) for _ in range(single)]
    return one + [sample(rng, replace(base, pairs=1.0)) for _ in range(pairs)]


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn; picture i depends on this and its prompt and number alone."""

    model: str
    seed: int
    size: int
    threads: int

    def __call__(self, start: int, prompts: Sequence[str]) -> Images:
        """RGB uint8 pictures of prompts whose numbers begin with `start`."""
        numbers = range(start, start + len(prompts))
        found = _pipeline(self.model, self.threads)(
            list(prompts),
            height=self.size,
            width=self.size,
            num_inference_steps=25,
            guidance_scale=5.0,
            generator=[torch.Generator().manual_seed(self.seed * 100_000 + n) for n in numbers],
            output_type="np",
        ).images
        return list((found * 255).round().astype(np.uint8))


@functools.cache
def _pipeline(reference: str, threads: int) -> Any:
    """Loaded once a process."""
    torch.set_num_threads(threads)
    files = locate(reference)
    pipeline = StableDiffusionPipeline.from_pretrained(
        files.path, variant=files.variant, safety_checker=None, dtype=torch.float32
    )
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sampled(sampling: Sampling, prompts: Sequence[str], processes: int) -> Iterator[Images]:
    """All pictures, a few prompts at a time."""
    starts = range(0, len(prompts), _BATCH)
    parts = [prompts[start : start + _BATCH] for start in starts]
    if processes == 1:
        yield from map(sampling, starts, parts)
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(sampling, starts, parts)


def summary(rows: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    """Per attribute: mean and both ends of its 95 % bootstrap interval."""
    rng = np.random.default_rng(0)
    table = {}
    for key in rows[0]:
        values = np.array([row[key] for row in rows])
        means = values[rng.integers(len(values), size=(2000, len(values)))].mean(1)
        low, high = np.quantile(means, (0.025, 0.975))
        table[key] = [round(float(x), 4) for x in (values.mean(), low, high)]
    return table


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default="demo", help="'demo' or a pipeline's folder")
    parser.add_argument("--single", type=int, default=200, help="prompts with one object")
    parser.add_argument("--pairs", type=int, default=60, help="prompts with two")
    parser.add_argument("--size", type=int, default=128, help="side of the pictures in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--domain", choices=tuple(DOMAINS), default="full")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="write a contact sheet here")
    args = parser.parse_args()
    sampling = Sampling(args.model, args.seed, args.size, args.threads)
    scenes = draw_scenes(args.seed, args.single, args.pairs, domain=args.domain)
    prompts = [describe(params) for params in scenes]
    images: Images = []
    with progress_bars() as progress, progress("sampling", len(prompts)) as advance:
        for found in sampled(sampling, prompts, args.processes):
            images += found
            advance(len(found))
    readings = read(load(), images)
    scores = [agreement(seen, asked) for seen, asked in zip(readings, scenes, strict=True)]
    report: dict[str, Any] = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "model": args.model if args.model == "demo" else Path(args.model).name,
        "size": args.size,
        "domain": args.domain,
    }
    parts = {"single": scores[: args.single], "pairs": scores[args.single :], "all": scores}
    for name, part in parts.items():
        if part:
            report[name] = {"prompts": len(part), **summary(part)}
    report["misread"] = [
        {"prompt": prompt, "read": [*(" ".join(o) for o in seen.objects), seen.ground]}
        for prompt, seen, score in zip(prompts, readings, scores, strict=True)
        if min(score.values()) < 1
    ]
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if args.sheet:
        _sheet(args.sheet, prompts, images, [min(score.values()) < 1 for score in scores])
    print(json.dumps({k: v for k, v in report.items() if k != "misread"}, indent=1))


def _sheet(path: Path, prompts: Sequence[str], images: Images, wrong: Sequence[bool]) -> None:
    """Pictures spread evenly over the prompts, each under its own; red where misread."""
    chosen = np.unique(np.linspace(0, len(images) - 1, min(_SHEET, len(images))).astype(int))
    rows = -(-len(chosen) // _COLUMNS)
    figure, axes = plt.subplots(rows, _COLUMNS, figsize=(1.5 * _COLUMNS, 1.85 * rows))
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, i in zip(axes.flat, chosen, strict=False):
        axis.imshow(images[i])
        title = "\n".join(textwrap.wrap(prompts[i], 26))
        axis.set_title(title, fontsize=7, color="red" if wrong[i] else "black")
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=80)
    plt.close(figure)


if __name__ == "__main__":
    main()

"""How well the inversion reconstructs, by steps and fixed-point iterations.

    python benchmarks/inversion.py [--images 12] [--json FILE]

Held-out scenes at 128 px on the demo model: invert, sample back with as many steps, decode, and
compare with the VAE's own reconstruction (PSNR, mean and worst image). `warm` starts each step
along the noise that the previous one went along; otherwise its first evaluation is a plain step.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from inverted import invert, sample

from tokenflow_batch.config import Runtime
from tokenflow_batch.demo.scenes import Clip
from tokenflow_batch.metrics import psnr
from tokenflow_batch.model_files import locate
from tokenflow_batch.models import Model, load, resolve
from tokenflow_batch.tokenflow.denoise import Denoiser

CONFIGURATIONS = ((25, 0, False), (25, 1, False), (25, 1, True), (25, 2, True), (10, 2, True))
"""(steps, extra iterations, warm start)"""


def measure(model: Model, images: int) -> list[dict[str, Any]]:
    """One row per configuration."""
    clips = [Clip.random(seed, 1) for seed in range(5000, 5000 + images)]
    clean = model.encode(np.stack([clip.frame(0) for clip in clips]))
    embeds = torch.stack([model.embed(clip.caption) for clip in clips])
    own = model.decode(clean)
    rows = []
    for steps, extra, warm in CONFIGURATIONS:
        denoiser = Denoiser(model.unet, model.prediction_type)
        schedule = model.schedule(steps)
        noisy = invert(denoiser, clean, embeds, schedule, extra, warm=warm)[0]
        used = denoiser.rows / images
        back = model.decode(sample(denoiser, noisy, embeds, schedule))
        found = [psnr(a, b) for a, b in zip(back, own, strict=True)]
        rows.append(
            {
                "steps": steps,
                "extra_iterations": extra,
                "warm": warm,
                "rows_per_frame": used,
                "psnr_mean": float(np.mean(found)),
                "psnr_worst": float(np.min(found)),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--model", default="demo", help="'demo' or a pipeline's folder")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    args = parser.parse_args()
    compute = resolve(Runtime(device="cpu", threads=args.threads))
    report = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "images": args.images,
        "rows": measure(load(locate(args.model), compute), args.images),
    }
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Correspondence backends side by side: FAISS against its torch twin.

    python benchmarks/kernels.py [--device cpu] [--threads 2] [--json FILE]

One query frame against one keyframe, normalised float32 tokens, for the token counts and widths of
the blocks of SD 1.x at 512×512 and of the demo model. Runs alternate; the median is given.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from tokenflow_batch.models import set_threads
from tokenflow_batch.tokenflow.correspondence import Backend, nearest, normalise

SIZES = ((64, 96), (256, 96), (1024, 32), (256, 1280), (1024, 640), (4096, 320))
BACKENDS: tuple[Backend, ...] = ("faiss", "torch")


def once(tokens: int, width: int, backend: Backend, device: str, seed: int) -> float:
    """Seconds of one search."""
    generator = torch.Generator().manual_seed(seed)
    query, keys = (
        normalise(torch.randn(tokens, width, generator=generator)).to(device) for _ in range(2)
    )
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    began = time.perf_counter()
    nearest(query, keys, backend)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - began


def compare(device: str, repeats: int) -> list[dict[str, Any]]:
    """Median milliseconds of both backends at every size, and their ratio."""
    rows = []
    for tokens, width in SIZES:
        times: dict[Backend, list[float]] = {backend: [] for backend in BACKENDS}
        for seed in range(repeats + 1):
            for backend in BACKENDS:
                times[backend].append(once(tokens, width, backend, device, seed))
        median = {b: statistics.median(t[1:]) * 1e3 for b, t in times.items()}  # first: warm-up
        ratio = median["faiss"] / median["torch"]
        rows.append({"tokens": tokens, "width": width, "ms": median, "faiss_over_torch": ratio})
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    args = parser.parse_args()
    set_threads(args.threads)
    report = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "device": args.device,
        "threads": args.threads,
        "torch": torch.__version__,
        "correspondence": compare(args.device, args.repeats),
    }
    text = json.dumps(report, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""A short measurement on this machine: seconds a row and memory, by running two small jobs.

They are real runs in processes of their own, on generated clips, with the batch's own model and
working sizes. What they leave in WORK/calibration is read by every later plan (`measured`).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

from tokenflow_batch.config import Batch, Job
from tokenflow_batch.errors import TokenflowBatchError
from tokenflow_batch.paths import Workspace

Size = tuple[int, int]
_RUNS: dict[str, dict[str, Any]] = {
    "small": {"frames": 4, "unet_batch": 1, "vae_batch": 1},
    "usual": {"frames": 12},
}
"""Two sizes of every batch, so that what is fixed can be told from what grows."""


def calibrate(batch: Batch, sizes: Iterable[tuple[Job, Size]]) -> None:
    """Measure, and keep it in the work folder in place of what an earlier calibration found.

    Args:
        batch: whose model and runtime are meant.
        sizes: jobs with their working (width, height); equal sizes are measured once.

    Raises:
        TokenflowBatchError: a run failed.
    """
    workspace = Workspace(batch.output, batch.workdir)
    shutil.rmtree(workspace.calibration, ignore_errors=True)
    distinct = {size: job for job, size in sizes}
    for name, options in _RUNS.items():
        folder = workspace.calibration / name
        folder.mkdir(parents=True)
        clips = [_clip(folder, job, size, options) for size, job in distinct.items()]
        manifest = folder / "manifest.json"
        manifest.write_text(json.dumps(_manifest(batch, clips)), "utf-8")
        _run(manifest)


def _clip(folder: Path, job: Job, size: Size, options: dict[str, Any]) -> dict[str, Any]:
    import numpy as np

    from tokenflow_batch.video import Encoding, write_segment

    width, height = size
    path = folder / f"{width}x{height}.mp4"
    noise = np.random.default_rng(0)
    write_segment(
        path,
        (noise.integers(0, 256, (height, width, 3), np.uint8) for _ in range(options["frames"])),
        np.arange(options["frames"]),
        time_base=Fraction(1, 10),
        rate=Fraction(10),
        encoding=Encoding(preset="veryfast"),
    )
    s = job.settings
    return {
        "video": str(path.resolve()),
        "resolution": [width, height],
        "unet_batch": options.get("unet_batch", s.unet_batch),
        "vae_batch": options.get("vae_batch", s.vae_batch),
        "conv_site": s.conv_site,
        "conv_features": s.conv_features,
        "source_prompt": "a blue ball",  # prompts that differ: focused guidance is measured too
        "guidance_focus": 0.0,
        "edits": [{"name": "edit", "prompt": "a red ball"}],
    }


def _manifest(batch: Batch, clips: list[dict[str, Any]]) -> dict[str, Any]:
    job = batch.jobs[0]
    here = {k: _absolute(v) for k, v in (("model", job.model), ("base_config", job.base_config))}
    common = {"preset": "fast", "steps": 2, "inversion_iterations": 1, "segment_length": 2}
    injected = {"attn_t": 1.0, "f_t": 1.0, "cuts": "none"}
    return {
        "version": 1,
        **{k: v for k, v in here.items() if v is not None},
        "output": "out",
        "runtime": batch.runtime.model_dump(),
        "defaults": {**common, **injected},
        "clips": clips,
    }


def _absolute(model: str | None) -> str | None:
    return (
        str(Path(model).resolve()) if model and model != "demo" and Path(model).exists() else model
    )


def _run(manifest: Path) -> None:
    work = manifest.parent
    command = [sys.executable, "-m", "tokenflow_batch", "run", str(manifest)]
    command += ["--workdir", str(work)]
    alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(command, env=alone, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip()
        raise TokenflowBatchError(
            f"the calibration's run failed: {said.splitlines()[0] if said else done.returncode}",
            hint=f"see it whole with: {' '.join(command)}",
        )

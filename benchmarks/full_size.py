"""The whole product at Stable Diffusion 1.5's size: how long, in what memory, the same bits?

    python benchmarks/full_size.py [--frames 24] [--json FILE]
    python benchmarks/full_size.py --small          (a CPU will do: does all of it run?)

For a GPU. A model of Stable Diffusion 1.5's shape with random weights, in half precision; generated
clips of 512 × 512 pixels, edited by `tokenflow-batch run` in processes of their own.

whole: preset `balanced`, two edits of one clip: each stage's seconds, UNet rows and peak of memory,
the seconds of a frame from an empty folder and of the second edit.
cut: preset `fast`, 16 frames in windows of 8. One run uncut, one that SIGKILL ends twice, one by
two processes on the one device (`accelerate launch`): all must give the same latents and the same
video file.
long: the same, three times as long; its peaks of memory must be theirs.

The exit code says whether bits and memory are as they must be.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import yaml
from gpu import SMALL, Shape
from kernels import Machine
from small_model import in_layout, random_text_encoder
from transformers import CLIPTokenizer

from tokenflow_batch.demo.job import write_clip
from tokenflow_batch.demo.scenes import Clip
from tokenflow_batch.files import digest
from tokenflow_batch.inputs import Inputs
from tokenflow_batch.ledger import StageFolder
from tokenflow_batch.manifest import load
from tokenflow_batch.measured import Measured
from tokenflow_batch.model_files import DEMO
from tokenflow_batch.store import ArrayStore

EDITS: Final = ("a marble ball on grass", "a wooden ball on sand")
KILLS: Final = (0.3, 0.75)
"""At what shares of an uncut run's commits the other is killed."""
SHORT: Final = 16
FLAT: Final = 1.02
"""Peak of the long clip over that of the short one, at most."""
TOGETHER: Final = (
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
    *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
    *("--main_process_port", "0"),
)


def write_model(folder: Path, shape: Shape, machine: Machine, *, layers: int) -> Path:
    """A random model in diffusers' layout, in half precision; returns `folder`."""
    tokens, width = max(24, shape.text[0]), shape.text[1]
    tokenizer = CLIPTokenizer.from_pretrained(DEMO / "tokenizer", model_max_length=tokens)
    text_encoder = random_text_encoder(
        tokenizer, width=width, inner=4 * width, layers=layers, heads=max(1, width // 64)
    )
    pipeline = in_layout(shape.vae(machine), shape.unet(machine), text_encoder, tokenizer)
    pipeline.to(torch.float16).save_pretrained(folder, safe_serialization=True)
    return folder


class Job:
    """One clip with its edits in a folder of its own."""

    def __init__(
        self, folder: Path, model: Path, video: Path, frames: int, settings: Mapping[str, Any]
    ) -> None:
        folder.mkdir()
        self.frames, self.manifest = frames, folder / "manifest.yaml"
        settings = dict(settings)
        edits = EDITS[: settings.pop("edits", 1)]
        job = {
            "version": 1,
            "model": str(model),
            "output": "out/",
            "runtime": {"threads": 1},
            "defaults": settings,
            "clips": [
                {
                    "video": str(video),
                    "name": "clip",
                    "frames": [0, frames],
                    "source_prompt": "a red ball on grass",
                    "edits": [{"name": f"edit{i}", "prompt": p} for i, p in enumerate(edits)],
                }
            ],
        }
        self.manifest.write_text(yaml.safe_dump(job, sort_keys=False), encoding="utf-8")

    def start(self, launcher: Sequence[str] = ()) -> subprocess.Popen[str]:
        """Run it, in a process of its own."""
        return subprocess.Popen(
            [sys.executable, *launcher, "-m", "tokenflow_batch", "run", str(self.manifest)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def commits(self) -> int:
        """How many units of work are done."""
        return len(list((self.manifest.parent / "out").glob(".work/*/*/commits/[!.]*.json")))

    def bits(self) -> tuple[Any, str]:
        """The first edit's latents, and its video's digest."""
        batch = load(self.manifest)
        inputs, job = Inputs.of(batch), batch.jobs[0]
        key = inputs.keys(job)["edit"].key
        store = ArrayStore.open(StageFolder(inputs.workspace.stage("edit", key), "edit", key))
        video = batch.output / job.clip / f"{job.edit}.mp4"
        return store.read("latents", (job.settings.steps,)), digest(video)

    def peaks(self) -> dict[str, int]:
        """Most bytes of the device that each stage took."""
        batch = load(self.manifest)
        found: dict[str, int] = {}
        for stages in Measured.of(Inputs.of(batch).workspace).peaks.values():
            for stage, peaks in stages.items():
                found[stage] = max(found.get(stage, 0), *(p.peak for p in peaks))
        return found

    def work(self, edit: str) -> dict[str, Any]:
        """Per stage, what an edit's report tells of the work behind it."""
        path = self.manifest.parent / "out" / "clip" / edit / "metrics.json"
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))["work"]
        return found


def finish(process: subprocess.Popen[str]) -> None:
    """Wait for a run that must succeed."""
    said, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"a run failed ({process.returncode}):\n{said[-3000:]}")


def kill_at(job: Job, process: subprocess.Popen[str], commits: float) -> bool:
    """SIGKILL it once so many units are done; whether it was still at work then."""
    while job.commits() < commits and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    return process.returncode < 0


def measure_whole(job: Job) -> dict[str, Any]:
    """Seconds by stage, of a frame, and of a frame of the second edit."""
    began = time.monotonic()
    finish(job.start())
    wall = time.monotonic() - began
    first, second = job.work("edit0"), job.work("edit1")
    both = ("encode", "invert", "match")
    seconds = {stage: work["elapsed_seconds"] for stage, work in first.items()}
    own = sum(w["elapsed_seconds"] for stage, w in second.items() if stage not in both)
    return {
        "frames": job.frames,
        "wall_seconds_both_edits": wall,
        "first_edit_seconds_per_frame": sum(seconds.values()) / job.frames,
        "second_edit_seconds_per_frame": own / job.frames,
        "stages": first,
        "stages_second_edit": {s: w for s, w in second.items() if s not in both},
        "peak_bytes": job.peaks(),
    }


def measure_cuts(uncut: Job, killed: Job, shared: Job, long: Job) -> dict[str, Any]:
    """Bits of one clip edited in three ways, and the peaks of a longer one."""
    finish(uncut.start())
    others = [shared.start(TOGETHER), long.start()]
    kills = [kill_at(killed, killed.start(), share * uncut.commits()) for share in KILLS]
    finish(killed.start())
    for other in others:
        finish(other)
    latents, video = uncut.bits()
    short_peaks, long_peaks = uncut.peaks(), long.peaks()
    return {
        "frames": uncut.frames,
        "kills_at_work": sum(kills),
        "same_bits": {
            name: bool(np.array_equal(latents, job.bits()[0]) and job.bits()[1] == video)
            for name, job in (("killed", killed), ("two processes", shared))
        },
        "finite": bool(np.isfinite(latents.astype(np.float32)).all()),
        "peak_bytes": short_peaks,
        "long": {"frames": long.frames, "peak_bytes": long_peaks},
        "long_over_short": {s: long_peaks[s] / p for s, p in short_peaks.items() if p},
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--small", action="store_true", help="a small model, on a CPU too")
    parser.add_argument("--frames", type=int, default=24, help="of the whole run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    args = parser.parse_args()
    shape, layers = (SMALL, 2) if args.small else (Shape(), 12)
    machine = Machine("cuda" if torch.cuda.is_available() else "cpu", torch.float16)
    settings: dict[str, Any] = {"preset": "fast", "window_segments": 2, "window_overlap": 1}
    # Two anchors and two segments: even a short clip's windows are as large as any can be.
    settings |= {"anchors": 2, "chunk_frames": 8, "segment_length": 4}
    balanced = {"preset": "fast" if args.small else "balanced", "edits": 2}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = write_model(folder / "model", shape, machine, layers=layers)
        if machine.gpu:
            torch.cuda.empty_cache()  # the runs have a GPU to themselves
        lengths = {"uncut": SHORT, "killed": SHORT, "shared": SHORT, "long": 3 * SHORT}
        video = folder / "clip.mp4"
        clip = Clip.random(0, max(args.frames, 3 * SHORT), shape.pixels, zoom=0.2, turn=0.3)
        write_clip(video, clip, fps=24)
        jobs = {
            name: Job(folder / name, model, video, frames, settings)
            for name, frames in lengths.items()
        }
        whole = measure_whole(Job(folder / "whole", model, video, args.frames, balanced))
        print(json.dumps(whole, indent=1), flush=True)
        cut = measure_cuts(**jobs)
    report = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "device": torch.cuda.get_device_name() if machine.gpu else "cpu",
        "torch": torch.__version__,
        "small": args.small,
        "pixels": shape.pixels,
        "whole": whole,
        "cut": cut,
        "holds": {
            "same bits": all(cut["same_bits"].values()) and cut["finite"],
            "killed at work": cut["kills_at_work"] == len(KILLS),
            "flat memory": not machine.gpu or max(cut["long_over_short"].values()) <= FLAT,
        },
    }
    print(json.dumps({"cut": cut, "holds": report["holds"]}, indent=1))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    raise SystemExit(0 if all(report["holds"].values()) else 1)


if __name__ == "__main__":
    main()

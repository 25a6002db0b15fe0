"""Colour edits by the pipeline against plain per-frame Plug-and-Play, with ground truth.

    python benchmarks/pnp_colour.py [--clips 16] [--frames 8] [--json FILE] [--sheet PNG]

Generated clips whose object is recoloured, on the model that comes along. Both sides start from the
same inverted latents with the same prompts, thresholds and guidance; per-frame PnP edits every
frame on its own. Measured on frames decoded from latents, with the clip's true mask:

- in place: share of frames in which most of the true mask has the target colour (nearest of the
  palette in CIE Lab, mask eroded by 2 pixels). The pale half of a striped object has no palette
  colour and counts against both sides;
- background PSNR: outside the mask (dilated by 3 pixels) against the source.

The exit code says whether the pipeline is in place at least as often (less 0.02) and its background
PSNR no lower.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenflow_batch.config import Preset
from tokenflow_batch.console import progress_bars
from tokenflow_batch.demo.job import write_clip
from tokenflow_batch.demo.scenes import Clip, recoloured
from tokenflow_batch.demo.stills import SHIPPED
from tokenflow_batch.demo.textures import COLORS
from tokenflow_batch.manifest import load
from tokenflow_batch.metrics import psnr
from tokenflow_batch.plan import injection_of
from tokenflow_batch.runner import Runner
from tokenflow_batch.sheet import contact_sheet
from tokenflow_batch.stages.base import StageContext
from tokenflow_batch.stages.clip import InvertedLatents
from tokenflow_batch.stages.edit import read_edited
from tokenflow_batch.tokenflow.attention import tokenflow_hooks
from tokenflow_batch.tokenflow.ddim import move
from tokenflow_batch.tokenflow.denoise import Denoiser
from tokenflow_batch.tokenflow.passes import KeyframePass

Frames = NDArray[np.uint8]

MANIFEST = """\
version: 1
model: demo
output: out
runtime: {{device: cpu, threads: {threads}}}
defaults: {{preset: {preset}, guidance_scale: 4, attn_t: 0.8, f_t: 1.0, segment_length: 4}}
clips:
  - {{video: clip.mp4, source_prompt: {source!r}, edits: [{{name: edit, prompt: {target!r}}}]}}
"""


def target_colour(seed: int, clip: Clip) -> str:
    """Another colour than the object's that the model knows, drawn from the seed."""
    others = [name for name in SHIPPED.colors if name != clip.scene.color]
    return str(np.random.default_rng(seed + 1000).choice(others))


def per_frame_pnp(context: StageContext, frames: Sequence[int]) -> Tensor:
    """Plug-and-Play on every frame alone: a joint edit of one keyframe, DDIM, (F, C, h, w)."""
    s, model = context.settings, context.model()
    schedule, injection = model.schedule(s.steps), injection_of(s)
    source = InvertedLatents(context.folder("invert"), schedule, schedule)
    denoiser = Denoiser(model.unet, model.prediction_type)
    prompts = (s.source_prompt, s.negative_prompt, s.prompt)
    embeds_RTE = torch.stack([model.embed(prompt) for prompt in prompts])
    edited = []
    with tokenflow_hooks(model.unet, context.compute.attention) as hooks:
        for frame in frames:
            x = source.read(0, [frame])
            for step, (t, alpha) in enumerate(
                zip(schedule.timesteps, schedule.alphas, strict=True)
            ):
                alone = KeyframePass(
                    branches=3,
                    inject_qk=step < injection.qk_steps,
                    inject_conv=step < injection.conv_steps,
                    stored_conv_KChw=None,
                    attention=hooks.attention,
                )
                batch = torch.cat([source.read(step, [frame]), x, x])
                with hooks.during(alone):
                    _, negative, target = denoiser.noise(batch, t, alpha, embeds_RTE)
                noise = negative + s.guidance_scale * (target - negative)
                x = move(x, noise.unsqueeze(0), alpha, schedule.alpha_after(step))
            edited.append(x)
    return torch.cat(edited)


def in_place(frame: Frames, mask: NDArray[np.bool_], colour: str) -> bool:
    """Whether most of the mask has the colour, by nearest palette entry in CIE Lab."""
    inside = cv2.erode(mask.astype(np.uint8), np.ones((5, 5), np.uint8)).astype(bool)
    lab = cv2.cvtColor(frame.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)[inside]
    names = list(SHIPPED.colors)
    palette = np.array([[COLORS[name] for name in names]], np.float32)
    palette_lab = cv2.cvtColor(palette, cv2.COLOR_RGB2LAB)[0]
    nearest = np.linalg.norm(lab[:, None] - palette_lab[None], axis=-1).argmin(axis=1)
    return bool(np.mean(nearest == names.index(colour)) > 0.5)


def score(frames: Frames, clip: Clip, colour: str) -> dict[str, float]:
    """Share of frames in place, and mean background PSNR in dB."""
    placed, background = [], []
    for i, frame in enumerate(frames):
        mask = clip.mask(i)
        outside = ~cv2.dilate(mask.astype(np.uint8), np.ones((7, 7), np.uint8)).astype(bool)
        placed.append(in_place(frame, mask, colour))
        background.append(psnr(frame, clip.frame(i), outside))
    return {"in_place": float(np.mean(placed)), "background_psnr": float(np.mean(background))}


def run_clip(
    seed: int, frames: int, preset: Preset, threads: int
) -> tuple[dict[str, Any], list[Frames]]:
    """One clip through both; scores, and (source, per-frame, pipeline) at its middle."""
    clip = Clip.random(seed, frames)
    colour = target_colour(seed, clip)
    wanted = recoloured(clip, color=colour)
    with tempfile.TemporaryDirectory() as scratch, progress_bars() as progress:
        folder = Path(scratch)
        write_clip(folder / "clip.mp4", clip)
        prompts = {"source": clip.caption, "target": wanted.caption}
        text = MANIFEST.format(preset=preset, threads=threads, **prompts)
        (folder / "manifest.yaml").write_text(text, encoding="utf-8")
        runner = Runner(load(folder / "manifest.yaml"), progress)
        (result,) = runner.run(("encode", "invert", "match", "edit"))
        if result.error is not None:
            raise SystemExit(str(result.error))
        context = runner.context(result.job)
        latents = {
            "per_frame": per_frame_pnp(context, range(frames)),
            "pipeline": read_edited(context, range(frames)),
        }
        shown = {name: runner.model.decode(x) for name, x in latents.items()}
    scores = {name: score(video, clip, colour) for name, video in shown.items()}
    middle = frames // 2
    row = {"seed": seed, "source": clip.caption, "target": wanted.caption, **scores}
    return row, [clip.frame(middle), *(video[middle] for video in shown.values())]


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over clips and the verdict."""
    means = {
        side: {key: float(np.mean([r[side][key] for r in rows])) for key in rows[0][side]}
        for side in ("per_frame", "pipeline")
    }
    ours, theirs = means["pipeline"], means["per_frame"]
    passed = (
        ours["in_place"] >= theirs["in_place"] - 0.02
        and ours["background_psnr"] >= theirs["background_psnr"]
    )
    return {**means, "passed": passed}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--first-seed", type=int, default=100)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--preset", choices=("fast", "balanced", "quality"), default="balanced")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="write a contact sheet here")
    args = parser.parse_args()
    rows, pictures = [], []
    for seed in range(args.first_seed, args.first_seed + args.clips):
        row, frames = run_clip(seed, args.frames, args.preset, args.threads)
        print(json.dumps(row), flush=True)
        rows.append(row)
        pictures.append(frames)
    report = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "preset": args.preset,
        "frames": args.frames,
        **summary(rows),
        "clips": rows,
    }
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if args.sheet:
        columns = [row["target"].removeprefix("a ").split(" on ")[0] for row in rows]
        sides = zip(("source", "per frame", "pipeline"), zip(*pictures, strict=True), strict=True)
        contact_sheet(args.sheet, "colour edits, middle frame", columns, dict(sides))
    print(json.dumps({k: v for k, v in report.items() if k != "clips"}, indent=1))
    sys.exit(0 if report["passed"] else 1)


if __name__ == "__main__":
    main()

"""Stage `sheet`: pictures of how the training went."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import matplotlib as mpl
import torch
from diffusers import StableDiffusionPipeline
from matplotlib.axes import Axes

mpl.use("Agg")
import matplotlib.pyplot as plt

PROMPTS: Final = (
    "a red ball on grass",
    "a blue heart on sand",
    "a yellow star on water",
    "a white square on night sky",
    "a black triangle on snow",
    "a green striped ball on brick wall",
    "a purple dotted square on grass",
    "a cyan checkered heart on night sky",
    "an orange striped star on water",
    "a photo of a red striped box on the beach",
    "a striped yellow circle in the sea",
    "a red ball and a blue star on grass",
    "a pink heart and a green triangle on snow",
    "a white dotted square and an orange ball on sand",
)
_LOG_LINES: Final = 150


def contact_sheet(pipeline_folder: Path, path: Path, *, samples: int, seed: int) -> None:
    """Draw samples of `PROMPTS` with guidance 5 and 25 steps of the pipeline's own sampler.

    Args:
        pipeline_folder: a saved pipeline with fp16 weights; it is run in float32.
        path: PNG to write, one row per prompt.
        samples: images per prompt.
        seed: of the noise, which is the same for all prompts.
    """
    pipeline = StableDiffusionPipeline.from_pretrained(
        pipeline_folder, variant="fp16", safety_checker=None
    ).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    figure, axes = plt.subplots(
        len(PROMPTS), samples, figsize=(samples + 3, len(PROMPTS)), squeeze=False
    )
    for row, prompt in zip(axes, PROMPTS, strict=True):
        images = pipeline(
            prompt,
            guidance_scale=5.0,
            num_inference_steps=25,
            num_images_per_prompt=samples,
            generator=torch.Generator().manual_seed(seed),
        ).images
        for axis, image in zip(row, images, strict=True):
            axis.imshow(image)
            axis.set_axis_off()
        row[0].text(
            -0.08, 0.5, prompt, ha="right", va="center", fontsize=9, transform=row[0].transAxes
        )
    figure.subplots_adjust(
        left=3 / (samples + 3), right=1, top=1, bottom=0, wspace=0.03, hspace=0.03
    )
    figure.savefig(path, dpi=80)
    plt.close(figure)


def read_log(path: Path) -> list[dict[str, float]]:
    """Lines of a stage's log, in order."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def loss_curve(logs: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Plot loss over samples, one panel per stage, four a row.

    Args:
        logs: per stage its log lines, at least one each.
        path: PNG to write.
    """
    columns = min(len(logs), 4)
    rows = -(-len(logs) // columns)
    size = (4 * columns, 3 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for axis in axes.flat[len(logs) :]:
        axis.set_axis_off()
    for axis, (stage, lines) in zip(axes.flat, logs.items(), strict=False):
        samples = [line["samples"] for line in lines]
        axis.plot(samples, [line["loss"] for line in lines], lw=0.8, label="loss")
        axis.plot(samples, [line["mse"] for line in lines], lw=0.8, label="mean squared error")
        axis.set(title=stage, xlabel="samples", yscale="log")
        axis.grid(alpha=0.3, which="both")
        _mark_quality(axis, lines)
        axis.legend(loc="upper right")
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _mark_quality(axis: Axes, lines: list[dict[str, float]]) -> None:
    measured = [line for line in lines if "psnr" in line]
    if measured:
        right = axis.twinx()
        right.plot(
            [line["samples"] for line in measured], [line["psnr"] for line in measured], "k.-"
        )
        right.set_ylabel("held-out reconstruction, dB (black)")


def thin_log(logs: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Write at most some 150 evenly spaced lines of each stage, as JSON lines with its name.

    Args:
        logs: per stage its log lines.
        path: file to write.
    """
    with path.open("w") as file:
        for stage, lines in logs.items():
            every = -(-len(lines) // _LOG_LINES)
            kept = [x for i, x in enumerate(lines) if i % every == 0 or x is lines[-1]]
            file.writelines(json.dumps({"stage": stage, **line}) + "\n" for line in kept)


def report(work: Path, pipeline: Path, out: Path, *, samples: int, seed: int) -> None:
    """Write loss.png, log.jsonl and contact_sheet.png.

    Args:
        work: work folder with the stages' logs.
        pipeline: the trained pipeline.
        out: folder for the three files, made if missing.
        samples: images per prompt.
        seed: of their noise.
    """
    out.mkdir(parents=True, exist_ok=True)
    logs = {"vae": read_log(work / "vae.jsonl"), "unet": read_log(work / f"{pipeline.name}.jsonl")}
    loss_curve(logs, out / "loss.png")
    thin_log(logs, out / "log.jsonl")
    contact_sheet(pipeline, out / "contact_sheet.png", samples=samples, seed=seed)

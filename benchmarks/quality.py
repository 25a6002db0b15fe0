"""Quality of edits against ground truth: methods side by side on the same inverted latents.

    python benchmarks/quality.py [--scenes 8] [--frames 24] [--seed 0] [--json FILE] [--sheet PNG]

Generated clips with exact masks, flow and occlusions, each with one edit: colour, texture or ground
in turn, on plain motion and on harder scenes (light that changes, a post in front, two objects,
zoom and rotation, ground that repeats). Every method starts from the same inverted latents (25
steps, one fixed-point iteration) with the same prompts and thresholds. One row per method:

- success: share of frames whose object and ground are what the prompt says, by an independent
  classifier; and of frames whose true mask has the colour asked for ("in place");
- background: PSNR outside the objects against the VAE's reconstruction of the source (not for
  ground edits);
- warp error × 10³ along the exact flow, outside occlusions, of all pixels, object and ground; the
  VAE's reconstruction of the source and the perfect edit have rows of their own;
- sharpness: gradient energy inside the mask, relative to per-frame PnP's.

Ratios between methods are paired by scene, with 95 % bootstrap intervals over scenes.

Besides: the inversion's reconstruction (PSNR against the VAE's own) over all scenes, and on some
frames of the first one beside 500 plain steps sampled in 50; and how far the correspondences lie
from the exact flow, in tokens, by site and step: a diagnostic, not a goal.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from classifier import Classifier, agreement, load, read
from methods import (
    METHODS,
    Method,
    Moment,
    Prepared,
    Thresholds,
    decode,
    edit,
    invert,
    prepare,
    sample,
)
from numpy.typing import NDArray
from options import OPTIONS, endpoint_errors
from rich.console import Console
from rich.table import Table
from truth import background_psnr, gradient_energy, in_place, warp_errors

from tokenflow_batch.config import Runtime
from tokenflow_batch.console import progress_bars
from tokenflow_batch.demo.scenes import GROUND, SHIPPED, Clip, Domain, recoloured
from tokenflow_batch.demo.stills import FULL
from tokenflow_batch.demo.textures import GROUNDS
from tokenflow_batch.metrics import psnr
from tokenflow_batch.model_files import locate
from tokenflow_batch.models import Model, resolve
from tokenflow_batch.models import load as load_model
from tokenflow_batch.sheet import contact_sheet
from tokenflow_batch.tokenflow.attention import tokenflow_hooks
from tokenflow_batch.tokenflow.denoise import Denoiser

Frames = NDArray[np.uint8]
Row = dict[str, float]

KINDS: Final = ("color", "texture", "ground")
VARIANTS: Final[tuple[dict[str, Any], ...]] = (
    {},
    {"dim": 0.12, "flicker": 0.06},
    {"post": True},
    {"two": True},
    {"zoom": 0.2, "turn": 0.3},
)
"""Options of `Clip.random`, in turn."""

DOMAINS: Final = {"shipped": SHIPPED, "full": FULL}
ALL: Final = {**METHODS, **OPTIONS}
REFERENCES: Final = ("reconstruction", "perfect")
PLAIN_STEPS: Final = (500, 50)
"""Inversion and sampling steps of the published code."""

_PLAIN_FRAMES: Final = 4
_DIAGNOSED: Final = (0, 8, 16, 24)
"""Sampling steps whose correspondences are compared with the flow."""


@dataclass(frozen=True)
class Scene:
    """A clip and the edit that is asked of it."""

    seed: int
    kind: str
    clip: Clip
    wanted: Clip


def draw_scene(number: int, seed: int, frames: int, domain: Domain, kinds: Sequence[str]) -> Scene:
    """The `number`-th scene of a seed: its kind of edit and its variant take turns."""
    kind, variant = kinds[number % len(kinds)], VARIANTS[number % len(VARIANTS)]
    own = 10_000 * (seed + 1) + number
    clip = Clip.random(own, frames, domain=domain, **variant)
    rng = np.random.default_rng([own, 3])
    options: Mapping[str, Sequence[str]] = {
        "color": domain.colors,
        "texture": domain.textures,
        "ground": [g for g in GROUNDS if g in domain.grounds],
    }
    others = [name for name in options[kind] if name != getattr(clip.scene, kind)]
    return Scene(own, kind, clip, recoloured(clip, **{kind: str(rng.choice(others))}))


def score(frames: Frames, scene: Scene, reconstruction: Frames, classifier: Classifier) -> Row:
    """Everything measured of one method on one scene."""
    wanted, clip = scene.wanted, scene.clip
    asked = [wanted.params(i) for i in range(len(clip))]
    seen = [agreement(r, p) for r, p in zip(read(classifier, list(frames)), asked, strict=True)]
    success = {f"read_{key}": float(np.mean([s[key] for s in seen])) for key in seen[0]}
    masks = [clip.mask(i) for i in range(len(clip))]
    things = [clip.layers(i) for i in range(len(clip))]
    look = wanted.scene
    placed = [
        in_place(frame, mask, look.color, look.texture)
        for frame, mask in zip(frames, masks, strict=True)
    ]
    background = [
        background_psnr(frame, own, layers != GROUND)
        for frame, own, layers in zip(frames, reconstruction, things, strict=True)
    ]
    warp = {f"warp_{name}": value for name, value in warp_errors(list(frames), clip).items()}
    energy = [gradient_energy(f, m) for f, m in zip(frames, masks, strict=True)]
    return {
        "success": float(np.mean([s[scene.kind] for s in seen])),
        "in_place": float(np.mean(placed)),
        "background": float("nan") if scene.kind == "ground" else float(np.mean(background)),
        **warp,
        "gradient": float(np.nanmean(energy)),
        **success,
    }


def run_scene(
    model: Model,
    scene: Scene,
    methods: Mapping[str, Method],
    thresholds: Thresholds,
    classifier: Classifier,
) -> tuple[dict[str, Any], dict[str, Frames]]:
    """Scores, diagnostics, and frames of every method and of the two references."""
    endpoint: dict[str, dict[str, float]] = {}
    with progress_bars() as progress, progress(scene.wanted.caption, 26) as advance:
        prepared: Prepared = prepare(model, scene.clip, 25)
        advance(1)
        with tokenflow_hooks(model.unet) as hooks:

            def observe(now: Moment) -> None:
                if now.step in _DIAGNOSED:
                    endpoint[f"step {now.step}"] = endpoint_errors(now, scene.clip, hooks)

            videos = edit(
                model, hooks, prepared, scene.wanted.caption, methods, thresholds, advance, observe
            )
    reconstruction = decode(model, prepared.clean)
    videos["reconstruction"] = reconstruction
    videos["perfect"] = np.stack(list(scene.wanted.frames()))
    rows = {
        name: score(frames, scene, reconstruction, classifier) for name, frames in videos.items()
    }
    found = reconstructed(model, prepared, reconstruction)
    return (
        {"rows": rows, "inversion": found, "endpoint_error": endpoint},
        {"source": prepared.frames, **videos},
    )


def reconstructed(model: Model, prepared: Prepared, own: Frames) -> dict[str, float]:
    """PSNR in dB of sampling the inverted latents back, against the VAE's reconstruction."""
    denoiser = Denoiser(model.unet, model.prediction_type)
    embeds = model.embed(prepared.clip.caption).unsqueeze(0)
    parts = [sample(denoiser, x, embeds, prepared.schedule) for x in prepared.source[0].split(8)]
    values = [psnr(a, b) for a, b in zip(decode(model, torch.cat(parts)), own, strict=True)]
    return {"mean": float(np.mean(values)), "worst": float(np.min(values))}


def compare_inversions(model: Model, scene: Scene) -> dict[str, Any]:
    """Fixed point at 25 × 1 against the published code's many plain steps, on the same frames."""
    frames = np.stack([scene.clip.frame(i) for i in range(min(_PLAIN_FRAMES, len(scene.clip)))])
    clean = model.encode(frames)
    own, embeds = model.decode(clean), model.embed(scene.clip.caption).unsqueeze(0)
    denoiser = Denoiser(model.unet, model.prediction_type)
    found: dict[str, Any] = {}
    for name, (steps, back, extra) in {
        "fixed point, 25 x 1": (25, 25, 1),
        f"plain, {PLAIN_STEPS[0]} sampled in {PLAIN_STEPS[1]}": (*PLAIN_STEPS, 0),
    }.items():
        inversion, sampling = model.schedule(steps), model.schedule(back)
        latents = invert(denoiser, clean, embeds, inversion, extra, warm=True)
        start = latents[inversion.timesteps.index(sampling.timesteps[0])]
        shown = model.decode(sample(denoiser, start, embeds, sampling))
        values = [psnr(a, b) for a, b in zip(shown, own, strict=True)]
        rows = steps * (1 + extra) + back
        found[name] = {"mean": float(np.mean(values)), "rows_per_frame": rows}
    return found


def means(scenes: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, Row]:
    """Mean over scenes per method and figure; scenes without the figure are left out."""
    return {
        name: {
            key: _mean([scene["rows"][name][key] for scene in scenes])
            for key in scenes[0]["rows"][name]
        }
        for name in names
    }


def _mean(values: Sequence[float]) -> float:
    known = [v for v in values if not np.isnan(v)]
    return float(np.mean(known)) if known else float("nan")


def ratio(scenes: Sequence[dict[str, Any]], key: str, above: str, below: str) -> dict[str, float]:
    """Ratio of two methods' means over scenes, its paired bootstrap interval, the worst scene."""
    pairs = np.array([[s["rows"][above][key], s["rows"][below][key]] for s in scenes])
    drawn = np.random.default_rng(0).integers(len(pairs), size=(5000, len(pairs)))
    sums = pairs[drawn].sum(axis=1)
    low, high = np.quantile(sums[:, 0] / sums[:, 1], (0.025, 0.975))
    total = pairs.sum(axis=0)
    return {
        "ratio": float(total[0] / total[1]),
        "low": float(low),
        "high": float(high),
        "worst_scene": float((pairs[:, 0] / pairs[:, 1]).max()),
    }


def ratios(scenes: Sequence[dict[str, Any]], methods: Sequence[str]) -> dict[str, Any]:
    """Every method's warp error and sharpness against per-frame PnP's and the published mode's."""
    return {
        f"{key}: {above} / {below}": ratio(scenes, key, above, below)
        for below in ("per_frame", "official")
        if below in methods
        for above in methods
        if above != below
        for key in ("warp_all", "warp_object", "warp_ground", "gradient")
    }


def _endpoint_means(scenes: Sequence[dict[str, Any]]) -> dict[str, Row]:
    """Over scenes, by step and site."""
    steps = scenes[0]["endpoint_error"]
    return {
        step: {site: _mean([s["endpoint_error"][step][site] for s in scenes]) for site in sites}
        for step, sites in steps.items()
    }


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def print_table(table: Mapping[str, Row]) -> None:
    """One row per method."""
    shown = Table("method")
    columns = [key for key in next(iter(table.values())) if not key.startswith("read_")]
    for key in columns:
        shown.add_column(key, justify="right")
    for name, row in table.items():
        shown.add_row(name, *(f"{row[key]:.3f}" for key in columns))
    Console().print(shown)


def write_sheet(path: Path, scene: Scene, videos: Mapping[str, Frames]) -> None:
    """Source, methods and the perfect edit at the same times."""
    times = np.unique(np.linspace(0, len(scene.clip) - 1, 8).round().astype(int))
    rows = {name: [frames[i] for i in times] for name, frames in videos.items()}
    title = f"{scene.clip.caption} → {scene.wanted.caption}"
    contact_sheet(path, title, [f"frame {i}" for i in times], rows)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--scenes", type=int, default=8)
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", default=",".join(ALL), help="of " + ", ".join(ALL))
    parser.add_argument("--kinds", default=",".join(KINDS), help="of " + ", ".join(KINDS))
    parser.add_argument("--domain", choices=tuple(DOMAINS), default="shipped")
    parser.add_argument("--model", default="demo", help="'demo' or a pipeline's folder")
    parser.add_argument("--guidance-scale", type=float, default=5.0)
    parser.add_argument("--attn-t", type=float, default=0.8)
    parser.add_argument("--f-t", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--no-plain-inversion",
        dest="plain_inversion",
        action="store_false",
        help="leave out the 500 plain steps on the first scene",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    parser.add_argument("--sheets", type=Path, metavar="FOLDER", help="write contact sheets here")
    args = parser.parse_args()
    methods = {name: ALL[name] for name in args.methods.split(",")}
    began = time.monotonic()
    thresholds = Thresholds(args.guidance_scale, args.attn_t, args.f_t)
    model = load_model(
        locate(args.model), resolve(Runtime(device="cpu", dtype="fp32", threads=args.threads))
    )
    classifier = load()
    scenes: list[dict[str, Any]] = []
    for number in range(args.scenes):
        scene = draw_scene(
            number, args.seed, args.frames, DOMAINS[args.domain], args.kinds.split(",")
        )
        measured, videos = run_scene(model, scene, methods, thresholds, classifier)
        facts = {"seed": scene.seed, "kind": scene.kind, "source": scene.clip.caption}
        scenes.append({**facts, "edit": scene.wanted.caption, **measured})
        print(json.dumps(_plain(scenes[-1])), flush=True)
        if args.sheets:
            args.sheets.mkdir(parents=True, exist_ok=True)
            write_sheet(args.sheets / f"{scene.seed}_{scene.kind}.png", scene, videos)
    table = means(scenes, [*methods, *REFERENCES])
    first = draw_scene(0, args.seed, args.frames, DOMAINS[args.domain], args.kinds.split(","))
    inversion = {
        "mean": _mean([s["inversion"]["mean"] for s in scenes]),
        "worst_frame": min(s["inversion"]["worst"] for s in scenes),
        "first_scene": compare_inversions(model, first) if args.plain_inversion else None,
    }
    compared = ratios(scenes, list(methods))
    report = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "command": {k: str(v) for k, v in vars(args).items() if k not in ("json", "sheets")},
        "minutes": round((time.monotonic() - began) / 60, 1),
        "means": table,
        "inversion": inversion,
        "endpoint_error": _endpoint_means(scenes),
        "by_kind": {
            kind: means([s for s in scenes if s["kind"] == kind], [*methods, *REFERENCES])
            for kind in sorted({s["kind"] for s in scenes})
        },
        "ratios": compared,
        "scenes": scenes,
    }
    if args.json:
        args.json.write_text(json.dumps(_plain(report), indent=1) + "\n", encoding="utf-8")
    print_table(table)
    print(json.dumps(_plain({"inversion": inversion}), indent=1))
    for name, found in compared.items():
        print(f"{name}: {found['ratio']:.3f} [{found['low']:.3f}, {found['high']:.3f}]")


if __name__ == "__main__":
    main()

"""Quality of edits against ground truth: methods side by side on the same inverted latents.

    python benchmarks/quality.py [--scenes 8] [--frames 24] [--seed 0] [--json FILE] [--sheets DIR]

Options (`options.py`), and what they could lead to at most (`beyond.py`), are measured on the first
`--option-scenes` only, the methods on all: six options unless `--methods` says which. 8 scenes then
take 28 minutes on two cores.

Generated clips with exact masks, flow and occlusions, each with one edit: colour, texture or ground
in turn, on scenes with ground that repeats, light that changes, a post in front, two objects, zoom
and rotation in turn (`quality_scenes.py`). Every method starts from the same inverted latents (25
steps, one fixed-point iteration) with the same prompts and thresholds. One row per method:

- success: share of frames whose object (of two, the one that is edited) or ground is what the edit
  asks for, by an independent classifier; and of frames whose true mask has the colour asked for
  ("in place"). Shapes are not edited: their masks and flow would be others than the source's;
- background: PSNR outside the objects against the VAE's reconstruction of the source (not for
  ground edits);
- warp error × 10³ along the exact flow, outside occlusions, of all pixels, object and ground; the
  VAE's reconstruction of the source and the perfect edit have rows of their own;
- sharpness: gradient energy inside the mask, relative to per-frame PnP's; and how far it is from
  the perfect edit's, as an object that is to be plain, or coarser, has less;
- how far the correspondences lie from the exact flow, in tokens, over sites and steps: a
  diagnostic, not a goal, and by site and step for the default and `official`;
- the inversion's reconstruction of the scenes, PSNR against the VAE's own, the same for all; on
  eight frames of the first one beside 500 plain steps sampled in 50.

Ratios between methods are paired by scene, with 95 % bootstrap intervals over scenes.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import multiprocessing
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from beyond import BEYOND
from classifier import Classifier, agreement, first_right, load, read
from inverted import Prepared, compare_inversions, decode, prepare, reconstructed
from methods import METHODS, Method, Moment, Thresholds, TokenFlow, edit
from numpy.typing import NDArray
from options import OPTIONS, Variant, endpoint_errors
from quality_scenes import DOMAINS, KINDS, Scene, draw_scene
from tables import (
    Row,
    bounds,
    endpoint_means,
    mean,
    means,
    plain,
    print_bounds,
    print_endpoints,
    print_table,
    ratios,
)
from truth import background_psnr, gradient_energy, in_place, warp_errors

from tokenflow_batch.config import Runtime
from tokenflow_batch.console import progress_bars
from tokenflow_batch.demo.job import EDIT
from tokenflow_batch.demo.scenes import GROUND
from tokenflow_batch.errors import ModelError
from tokenflow_batch.model_files import locate
from tokenflow_batch.models import Model, resolve
from tokenflow_batch.models import load as load_model
from tokenflow_batch.sheet import contact_sheet
from tokenflow_batch.tokenflow.injection import CONV_SITE, attention_sites

Frames = NDArray[np.uint8]

ALL: Final = {**METHODS, **OPTIONS, **BEYOND}
USUAL: Final = (
    *METHODS,
    "fixed keyframes",
    "forward-backward",
    "gate 0.6",
    "soft top-4",
    "local search",
    "field per site",
)
"""Other choices of keyframes and correspondences; how guidance is limited is left to `all`."""

REFERENCES: Final = ("reconstruction", "perfect")
_JUDGED: Final = ("per_frame", "official", "default")
_DIAGNOSED: Final = (0, 8, 16, 24)
"""Sampling steps whose correspondences are compared with the flow."""


def score(frames: Frames, scene: Scene, reconstruction: Frames, classifier: Classifier) -> Row:
    """Everything measured of one method on one scene."""
    wanted, clip = scene.wanted, scene.clip
    asked = [wanted.params(i) for i in range(len(clip))]
    readings = zip(read(classifier, list(frames)), asked, strict=True)
    seen = [agreement(r, p) | first_right(r, p) for r, p in readings]
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
    asked_for = "ground" if scene.kind == "ground" else f"first_{scene.kind}"
    energy = [gradient_energy(f, m) for f, m in zip(frames, masks, strict=True)]
    return {
        "success": float(np.mean([s[asked_for] for s in seen])),
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
    endpoint: dict[str, dict[str, Row]] = {}
    with progress_bars() as progress, progress(scene.wanted.caption, 26) as advance:
        prepared: Prepared = prepare(model, scene.clip, 25)
        advance(1)
        sites = attention_sites(model.unet)

        def observe(now: Moment) -> None:
            if now.step not in _DIAGNOSED:
                return
            for name, method in methods.items():
                if isinstance(method, TokenFlow | Variant):
                    errors = endpoint_errors(method.matches(now), scene.clip, sites)
                    endpoint.setdefault(name, {})[f"step {now.step}"] = errors

        videos = edit(model, prepared, scene.wanted.caption, methods, thresholds, advance, observe)
    reconstruction = decode(model, prepared.clean)
    videos["reconstruction"] = reconstruction
    videos["perfect"] = np.stack(list(scene.wanted.frames()))
    rows = {
        name: score(frames, scene, reconstruction, classifier) for name, frames in videos.items()
    }
    found = reconstructed(model, prepared, reconstruction)
    for name, row in rows.items():
        row["gradient_gap"] = abs(row["gradient"] - rows["perfect"]["gradient"])
        row["end_point"] = mean([e for at in endpoint.get(name, {}).values() for e in at.values()])
        row["inversion"] = float("nan") if name in REFERENCES else found["mean"]
    return (
        {"rows": rows, "inversion": found, "endpoint_error": endpoint},
        {"source": prepared.frames, **videos},
    )


def write_sheet(path: Path, scene: Scene, videos: Mapping[str, Frames]) -> None:
    """Source, methods and the perfect edit at the same times."""
    times = np.unique(np.linspace(0, len(scene.clip) - 1, 8).round().astype(int))
    rows = {name: [frames[i] for i in times] for name, frames in videos.items()}
    title = f"{scene.clip.caption} to {scene.wanted.caption}"
    contact_sheet(path, title, [f"frame {i}" for i in times], rows)


@dataclass(frozen=True)
class Options:
    """What a scene's measurement depends on besides its number."""

    model: str
    threads: int
    frames: int
    seed: int
    domain: str
    kinds: tuple[str, ...]
    methods: tuple[str, ...]
    option_scenes: int
    thresholds: Thresholds
    sheets: Path | None

    def scene(self, number: int) -> Scene:
        """The `number`-th."""
        return draw_scene(number, self.seed, self.frames, DOMAINS[self.domain], self.kinds)

    def measured(self, number: int) -> dict[str, Method]:
        """What the `number`-th scene is edited with."""
        kept = self.methods if number < self.option_scenes else set(METHODS)
        return {name: ALL[name] for name in self.methods if name in kept}


@functools.cache
def _tools(reference: str, threads: int) -> tuple[Model, Classifier]:
    """Loaded once a process."""
    runtime = resolve(Runtime(device="cpu", dtype="fp32", threads=threads))
    return load_model(locate(reference), runtime), load()


def measure(number: int, options: Options) -> dict[str, Any]:
    """One scene, from drawing it to its contact sheet."""
    model, classifier = _tools(options.model, options.threads)
    scene, methods = options.scene(number), options.measured(number)
    measured, videos = run_scene(model, scene, methods, options.thresholds, classifier)
    if options.sheets:
        write_sheet(options.sheets / f"{scene.seed}_{scene.kind}.png", scene, videos)
    facts = {"seed": scene.seed, "kind": scene.kind, "source": scene.clip.caption}
    return {**facts, "edit": scene.wanted.caption, **measured}


def measure_all(count: int, processes: int, options: Options) -> Iterator[dict[str, Any]]:
    """Every scene, in order, each as a whole in one of so many processes."""
    work = functools.partial(measure, options=options)
    if processes == 1:
        yield from map(work, range(count))
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(work, range(count))


def method_names(given: str) -> tuple[str, ...]:
    """Methods from the command line.

    Raises:
        argparse.ArgumentTypeError: one that there is not.
    """
    names = tuple(ALL) if given == "all" else tuple(given.split(","))
    if unknown := [name for name in names if name not in ALL]:
        raise argparse.ArgumentTypeError(f"no method {unknown[0]!r}; there are {', '.join(ALL)}")
    return names


def kinds(given: str) -> tuple[str, ...]:
    """Kinds of edits from the command line.

    Raises:
        argparse.ArgumentTypeError: one that there is not.
    """
    names = tuple(given.split(","))
    if unknown := [name for name in names if name not in KINDS]:
        raise argparse.ArgumentTypeError(f"no kind {unknown[0]!r}; there are {', '.join(KINDS)}")
    return names


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--scenes", type=int, default=8)
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--methods",
        type=method_names,
        default=USUAL,
        help=f"'all', or of {', '.join(ALL)}; unless given: {', '.join(USUAL)}",
    )
    parser.add_argument("--option-scenes", type=int, default=1, help="that options are measured on")
    parser.add_argument("--kinds", type=kinds, default=KINDS, help="of " + ", ".join(KINDS))
    parser.add_argument("--domain", choices=tuple(DOMAINS), default="full")
    parser.add_argument("--model", default="demo", help="'demo' or a pipeline's folder")
    parser.add_argument("--guidance-scale", type=float, default=EDIT.guidance_scale)
    parser.add_argument("--attn-t", type=float, default=EDIT.attn_t)
    parser.add_argument("--f-t", type=float, default=EDIT.f_t)
    parser.add_argument(
        "--conv-site", default=CONV_SITE, help="where those are injected; SD's usual"
    )
    parser.add_argument("--processes", type=int, default=2, help="scenes measured at once")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument(
        "--no-plain-inversion",
        dest="plain_inversion",
        action="store_false",
        help="leave out the 500 plain steps on the first scene",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    parser.add_argument("--sheets", type=Path, metavar="DIR", help="write contact sheets here")
    args = parser.parse_args()
    if min(args.scenes, args.frames, args.processes, args.threads, args.seed + 1) < 1:
        parser.error("--scenes, --frames, --processes, --threads are at least 1, --seed at least 0")
    for folder in (args.json and args.json.parent, args.sheets):
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
    try:
        _tools(args.model, args.threads)[0].check_conv_site(args.conv_site)
    except ModelError as error:
        parser.error(str(error))
    return args


def main() -> None:
    """Measure, print, write."""
    args, began = parse(), time.monotonic()
    options = Options(
        args.model,
        args.threads,
        args.frames,
        args.seed,
        args.domain,
        args.kinds,
        args.methods,
        args.option_scenes,
        Thresholds(args.guidance_scale, args.attn_t, args.f_t, conv_site=args.conv_site),
        args.sheets,
    )
    scenes: list[dict[str, Any]] = []
    for found in measure_all(args.scenes, args.processes, options):
        scenes.append(found)
        print(json.dumps(plain(found)), flush=True)
    report = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "command": {
            name: ",".join(value) if isinstance(value, tuple) else str(value)
            for name, value in vars(args).items()
            if name not in ("json", "sheets")
        },
        **summary(scenes, options, plain_inversion=args.plain_inversion),
        "minutes": round((time.monotonic() - began) / 60, 1),
        "scenes": scenes,
    }
    if args.json:
        args.json.write_text(json.dumps(plain(report), indent=1) + "\n", encoding="utf-8")
    print_table(report["means"])
    for name, errors in report["endpoint_error"].items():
        print_endpoints(name, errors)
    print(json.dumps(plain({"inversion": report["inversion"]}), indent=1))
    if report["bounds"]:
        print_bounds(report["bounds"])
    for name, found in report["ratios"].items():
        interval = f"[{found['low']:.3f}, {found['high']:.3f}]"
        print(f"{name}: {found['ratio']:.3f}", interval if found["scenes"] > 1 else "(one scene)")


def summary(
    scenes: Sequence[dict[str, Any]], options: Options, *, plain_inversion: bool
) -> dict[str, Any]:
    """Means, ratios, inversion and end-point errors over all scenes."""
    names = [*options.methods, *REFERENCES]
    model, _ = _tools(options.model, options.threads)
    inversion = {
        "mean": mean([s["inversion"]["mean"] for s in scenes]),
        "worst_frame": min(s["inversion"]["worst"] for s in scenes),
        "first_scene": compare_inversions(model, options.scene(0).clip)
        if plain_inversion
        else None,
    }
    return {
        "means": means(scenes, names),
        "inversion": inversion,
        "bounds": bounds(scenes, inversion) if set(_JUDGED) <= set(options.methods) else [],
        "endpoint_error": {
            name: endpoint_means(scenes, name)
            for name in ("default", "official")
            if name in options.methods
        },
        "by_kind": {
            kind: means([s for s in scenes if s["kind"] == kind], names)
            for kind in sorted({s["kind"] for s in scenes})
        },
        "ratios": ratios(scenes, options.methods),
    }


if __name__ == "__main__":
    main()

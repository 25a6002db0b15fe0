"""Are the joins of a long clip's windows visible? Ways of cutting it, against one single window.

    python benchmarks/seams.py [--scenes 4] [--frames 192] [--steps 10] [--json FILE] [--sheets DIR]

Moving generated clips (changing light, a post in front, zoom and rotation, plain) are edited by
colour and texture in turn, in windows of 4 segments that share 2 (40 joins at the defaults, some
seven minutes a way on two cores), all ways from the same inverted latents. At 64 pixels, or with
features injected at SD's usual site, the demo model draws half of the objects in another place than
the source's, out of the masks; so 96, and the demo's site:

- one window: TokenFlow as published, the whole clip at once; every figure is relative to it;
- windows: the default; 4 global anchors, others at every step, that weigh as many keyframes as they
  stand for, ramps over the overlap;
- anchors weigh alike, as one keyframe each; no anchors; fixed anchors, the same at every step;
  8 anchors;
- keyframes overlap: the cheaper way, ordinary frames are computed once and windows change at the
  middle of an overlap;
- pieces: independent edits of as many segments, side by side.

At every join, on the same pairs of frames as the one window's run:

- error: warp error × 10³ along the exact flow between neighbouring frames of the overlap;
- tone: change of mean colour (CIE76 ΔE) of object and ground over B frames across the join;
- excess: the same beyond what the perfect edit changes on these frames (light, turning, a post);
- texture: change of the mean gradient of L*.

Drift is the change of look from the first window to the last. Intervals are 95 % bootstraps over
joins (over scenes for drift). A last row turns the hue of every other window's frames by 2 % in the
windowed run: the measures have to notice.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
import torch
from inverted import prepare
from joins import Joined, judge, print_joins
from methods import Inputs, Method, Moment, Thresholds, TokenFlow, correspondences, edit
from numpy.typing import NDArray
from quality import write_sheet
from quality_scenes import Scene as Edited
from torch import Tensor

from tokenflow_batch.config import Runtime
from tokenflow_batch.console import progress_bars
from tokenflow_batch.demo.job import EDIT
from tokenflow_batch.demo.scenes import GROUND, OBJECT, Clip, recoloured
from tokenflow_batch.demo.stills import FULL
from tokenflow_batch.errors import ModelError
from tokenflow_batch.metrics import look, warp_error
from tokenflow_batch.model_files import locate
from tokenflow_batch.models import Model, resolve
from tokenflow_batch.models import load as load_model
from tokenflow_batch.tokenflow.attention import Hooks
from tokenflow_batch.tokenflow.denoise import Denoiser, EditSettings, predict_window
from tokenflow_batch.tokenflow.keyframes import draw_keyframes, segments, true_neighbours
from tokenflow_batch.tokenflow.modes import DEFAULT
from tokenflow_batch.tokenflow.windows import (
    Chunk,
    Layout,
    Standing,
    WindowMoment,
)

Frames = NDArray[np.uint8]

VARIANTS: Final[tuple[dict[str, Any], ...]] = (
    {"dim": 0.12, "flicker": 0.06},
    {"post": True},
    {"zoom": 0.2, "turn": 0.3},
    {},
)
KINDS: Final = ("color", "texture")
LENGTH: Final = 8
SIZE, OVERLAP, ANCHORS = 4, 2, 4
HUE_STEP: Final = 0.02
"""Of a full turn."""


def plan(frames: int, anchors: int = ANCHORS) -> Layout:
    """How the clips are cut."""
    return Layout.plan(frames, LENGTH, size=SIZE, overlap=OVERLAP, anchors=anchors)


@dataclass(frozen=True)
class Windows:
    """The default method, window by window.

    Attributes:
        anchors: how many keyframes every window attends to.
        drawn: others at every step, instead of the same ones.
        weighed: by how many keyframes they stand for.
        once: compute ordinary frames in one window alone, without ramps.
    """

    anchors: int = ANCHORS
    drawn: bool = True
    weighed: bool = True
    once: bool = False

    def __call__(self, denoiser: Denoiser, hooks: Hooks, now: Moment, x: Tensor) -> Tensor:
        """See `Method`."""
        frames, drawn = len(x), now.keyframes
        layout = plan(frames, self.anchors)
        if self.drawn:
            layout = layout.at(now.thresholds.keyframe_seed, now.step)
        inputs = Inputs(now, x, correspondences(now))
        settings = EditSettings(
            guidance=now.guidance(),
            injection=now.injection,
            steps=now.steps,
            batch=LENGTH,
            latent_hw=(x.shape[2], x.shape[3]),
        )
        total = torch.zeros_like(x)
        blend = layout.blend(true_neighbours, drawn, Chunk(0, 0, frames))
        parts = {window.index: torch.tensor(weights) for window, weights in blend}
        owner = torch.stack([parts[w.index] for w in layout.windows]).argmax(dim=0)
        for window in layout.windows:
            moment = layout.moment(true_neighbours, drawn, window)
            if not self.weighed:
                moment = replace(moment, standing=alike(moment.standing))
            weight = parts[window.index]
            if self.once:  # of equal weights the earlier window's counts
                weight = (owner == window.index).float()
                moment = only(moment, [f for f in moment.frames if weight[f] > 0])
            noise = predict_window(
                denoiser,
                hooks,
                inputs,
                now.prompts,
                settings,
                step=now.step,
                t=now.t,
                alpha=now.alpha,
                window=moment,
            )
            own = list(moment.frames)
            total[own] += weight[own].view(-1, 1, 1, 1) * noise
        return total


def alike(standing: Standing) -> Standing:
    """The same anchors, each for one keyframe."""
    return Standing.alone(standing.foreign, len(standing.own))


def only(moment: WindowMoment, frames: Sequence[int]) -> WindowMoment:
    """A window that predicts a run of its frames alone."""
    first = frames[0] - moment.frames.start
    return replace(
        moment,
        frames=range(frames[0], frames[-1] + 1),
        neighbours=moment.neighbours[first : first + len(frames)],
    )


def pieces(denoiser: Denoiser, hooks: Hooks, now: Moment, x: Tensor) -> Tensor:
    """Independent edits of as many segments as a window has, each with keyframes of its own."""
    found, whole = [], TokenFlow(DEFAULT)
    for start in piece_starts(len(x)):
        part = slice(start, start + SIZE * LENGTH)
        segs = segments(len(x[part]), LENGTH)
        own = replace(
            now,
            keyframes=draw_keyframes(now.thresholds.keyframe_seed + start, now.step, segs),
            source=now.source[part],
            clean=now.clean[part],
            tokens=[tokens[part] for tokens in now.tokens],
            conv=now.conv[part],
        )
        found.append(whole(denoiser, hooks, own, x[part]))
    return torch.cat(found)


def piece_starts(frames: int) -> range:
    """First frames of independent pieces."""
    return range(0, frames, SIZE * LENGTH)


WAYS: Final[Mapping[str, Method]] = {
    "one window": TokenFlow(DEFAULT),
    "windows": Windows(),
    "anchors weigh alike": Windows(weighed=False),
    "no anchors": Windows(anchors=0),
    "fixed anchors": Windows(drawn=False),
    "8 anchors": Windows(anchors=8),
    "keyframes overlap": Windows(once=True),
    "pieces": pieces,
}


JUDGED: Final = ("one window", "windows", "pieces")
"""Those that the bounds are about."""


def draw_scene(number: int, seed: int, frames: int, size: int) -> Edited:
    """The `number`-th scene of a seed."""
    kind, own = KINDS[number % len(KINDS)], 20_000 * (seed + 1) + number
    clip = Clip.random(own, frames, size, FULL, **VARIANTS[number % len(VARIANTS)])
    rng = np.random.default_rng([own, 3])
    options = {"color": FULL.colors, "texture": FULL.textures}[kind]
    others = [name for name in options if name != getattr(clip.scene, kind)]
    return Edited(own, kind, clip, recoloured(clip, **{kind: str(rng.choice(others))}))


def turn_hue(frames: Frames, joins: Sequence[int]) -> Frames:
    """Every other run between joins with its hue turned by `HUE_STEP`."""
    turned = frames.copy()
    edges = [*joins, len(frames)]
    for start, stop in list(itertools.pairwise(edges))[::2]:
        for i in range(start, stop):
            hsv = cv2.cvtColor(frames[i].astype(np.float32) / 255, cv2.COLOR_RGB2HSV)
            hsv[..., 0] = (hsv[..., 0] + 360 * HUE_STEP) % 360
            turned[i] = (cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB) * 255).round()
    return turned


def looks_of(frame: NDArray[np.uint8], clip: Clip, index: int) -> NDArray[np.float64]:
    """Looks of object and ground, (2, 4)."""
    layers = clip.layers(index)
    return np.array([look(frame, layers == region) for region in (OBJECT, GROUND)], np.float64)


@dataclass(frozen=True)
class Options:
    """What a scene's measurement depends on besides its number."""

    model: str
    threads: int
    frames: int
    size: int
    steps: int
    seed: int
    ways: tuple[str, ...]
    conv_site: str
    sheets: Path | None


@functools.cache
def _model(reference: str, threads: int) -> Model:
    """Loaded once a process."""
    return load_model(
        locate(reference), resolve(Runtime(device="cpu", dtype="fp32", threads=threads))
    )


def measure(number: int, options: Options) -> dict[str, Any]:
    """One scene: all ways, and what there is to know at each of its joins."""
    model = _model(options.model, options.threads)
    scene = draw_scene(number, options.seed, options.frames, options.size)
    with progress_bars() as progress, progress(scene.wanted.caption, options.steps + 1) as advance:
        prepared = prepare(model, scene.clip, options.steps)
        advance(1)
        thresholds = Thresholds(conv_site=options.conv_site)
        ways = {way: WAYS[way] for way in options.ways}
        videos = edit(model, prepared, scene.wanted.caption, ways, thresholds, advance)
    joins = plan(options.frames).joins
    videos["hue step"] = turn_hue(videos["windows"], joins)
    if options.sheets:
        options.sheets.mkdir(parents=True, exist_ok=True)
        name = f"{scene.seed}_{scene.kind}.png"
        write_sheet(options.sheets / name, scene, {"source": prepared.frames, **videos})
    return {
        "seed": scene.seed,
        "kind": scene.kind,
        "source": scene.clip.caption,
        "edit": scene.wanted.caption,
        "ways": figures(videos, scene),
    }


def figures(videos: Mapping[str, Frames], scene: Edited) -> dict[str, Any]:
    """Of every video: at the windows' joins, at those of independent pieces, and its drift."""
    clip = scene.clip
    truth = np.array([looks_of(scene.wanted.frame(i), clip, i) for i in range(len(clip))])
    return {name: video_figures(frames, clip, truth) for name, frames in videos.items()}


def video_figures(frames: Frames, clip: Clip, truth: NDArray[np.float64]) -> dict[str, Any]:
    """Of one video; `truth` are the perfect edit's looks."""
    looks = np.array([looks_of(frame, clip, i) for i, frame in enumerate(frames)])
    errors = [
        1e3 * warp_error(frames[i], frames[i + 1], clip.flow(i), ~clip.occluded(i))
        for i in range(len(clip) - 1)
    ]
    seen, layout = Joined(looks, truth, np.array(errors)), plan(len(clip))
    reach = OVERLAP * LENGTH // 2
    return {
        "joins": [seen.at(join, LENGTH, reach) for join in layout.joins],
        "pieces": [seen.at(start, LENGTH, reach) for start in piece_starts(len(clip))[1:]],
        "drift": seen.drift(len(layout.windows[0]), len(layout.windows[-1])),
    }


def measure_all(
    count: int, processes: int, work: Callable[[int], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Every scene, in order, each as a whole in one of so many processes."""
    if processes == 1:
        yield from map(work, range(count))
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(work, range(count))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--scenes", type=int, default=4)
    parser.add_argument("--frames", type=int, default=192, help="of each clip")
    parser.add_argument("--size", type=int, default=96, help="side in pixels")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--ways",
        default=",".join(WAYS),
        help=f"which of {', '.join(WAYS)}; {', '.join(JUDGED)} are needed",
    )
    parser.add_argument("--model", default="demo", help="'demo' or a pipeline's folder")
    parser.add_argument(
        "--conv-site", default=EDIT.conv_site, help="where Plug-and-Play injects features"
    )
    parser.add_argument("--processes", type=int, default=2, help="scenes measured at once")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    parser.add_argument("--sheets", type=Path, metavar="DIR", help="write contact sheets here")
    args, began = parser.parse_args(), time.monotonic()
    ways = tuple(args.ways.split(","))
    if not set(JUDGED) <= set(ways) <= set(WAYS):
        parser.error(f"--ways: of {', '.join(WAYS)}, at least {', '.join(JUDGED)}")
    try:
        _model(args.model, args.threads).check_conv_site(args.conv_site)
    except ModelError as error:
        parser.error(str(error))
    options = Options(
        args.model,
        args.threads,
        args.frames,
        args.size,
        args.steps,
        args.seed,
        ways,
        args.conv_site,
        args.sheets,
    )
    work = functools.partial(measure, options=options)
    scenes = list(measure_all(args.scenes, args.processes, work))
    report = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "command": {k: str(v) for k, v in vars(args).items() if k not in ("json", "sheets")},
        **judge(scenes),
        "minutes": round((time.monotonic() - began) / 60, 1),
        "scenes": scenes,
    }
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print_joins(report)
    raise SystemExit(0 if all(row["holds"] for row in report["bounds"]) else 1)


if __name__ == "__main__":
    main()

"""Compare the published mode with vectors recorded from the published code.

    python benchmarks/golden.py [--dump DIR] FILE...

Each FILE is a safetensors file with a small UNet's weights, its inputs and what the published
implementation computed from them (docs/architecture.md, "Golden vectors"). One JSON object a line
is printed: {"file", "source_latents": {"max_abs", "mean_abs", "ref_std"},
"steps": [{"max_abs", "mean_abs", "ref_std", "share_over_5e-3"}, …]}.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tokenflow_batch.tokenflow.attention import tokenflow_hooks
from tokenflow_batch.tokenflow.ddim import Schedule, invert_plain
from tokenflow_batch.tokenflow.denoise import (
    Denoiser,
    EditSettings,
    Prompts,
    predict_window,
)
from tokenflow_batch.tokenflow.modes import PUBLISHED, Guidance, Injection
from tokenflow_batch.tokenflow.samplers import Ddim, State
from tokenflow_batch.tokenflow.windows import WindowMoment

_META: Final = ("unet_config", "scheduler", "B", "N", "INV", "cfgscale", "mode", "pred")
_EMBEDS: Final = tuple(f"embeds.{name}" for name in ("source", "negative", "target"))
_STATES: Final = ("x0", "x_T", "source_latents", "x_after_step")
_TENSORS: Final = (*_STATES, *_EMBEDS, "timesteps", "keyframes")


@dataclass(frozen=True)
class Vectors:
    """One recorded file."""

    meta: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def load(cls, path: Path) -> Vectors:
        """Read a vector file.

        Raises:
            ValueError: it is not one.
        """
        try:
            with safe_open(path, "pt") as file:
                found = (file.metadata() or {}).get("meta")
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: {error}") from error
        meta = json.loads(found) if found else {}
        lacking = [*(k for k in _TENSORS if k not in tensors), *(k for k in _META if k not in meta)]
        if lacking:
            raise ValueError(f"{path} is not a vector file: it lacks {', '.join(lacking)}")
        return cls(meta, tensors)

    def unet(self) -> UNet2DConditionModel:
        """The UNet with the recorded weights, float32."""
        unet = UNet2DConditionModel(**self.meta["unet_config"]).eval()
        prefix = "unet."
        weights = {k[len(prefix) :]: v for k, v in self.tensors.items() if k.startswith(prefix)}
        unet.load_state_dict(weights)
        return unet

    def schedule(self, steps: int) -> Schedule:
        """The recorded scheduler's timesteps for so many steps."""
        scheduler = DDIMScheduler(**self.meta["scheduler"])
        scheduler.set_timesteps(steps)
        return self.schedule_at([int(t) for t in scheduler.timesteps])

    def schedule_at(self, timesteps: Sequence[int]) -> Schedule:
        """ᾱ at given timesteps."""
        scheduler = DDIMScheduler(**self.meta["scheduler"])
        alphas = [float(scheduler.alphas_cumprod[t]) for t in timesteps]
        return Schedule(tuple(timesteps), tuple(alphas), float(scheduler.final_alpha_cumprod))


def invert(vectors: Vectors, denoiser: Denoiser) -> Tensor:
    """Plain DDIM inversion from x0, kept at the sampling timesteps, (T, F, C, h, w)."""
    schedule = vectors.schedule(int(vectors.meta["INV"]))
    wanted = [int(t) for t in vectors.tensors["timesteps"]]
    source = vectors.tensors["embeds.source"].unsqueeze(0)
    x, alpha, kept = vectors.tensors["x0"], schedule.final_alpha, {}
    for t, alpha_t in zip(reversed(schedule.timesteps), reversed(schedule.alphas), strict=True):

        def noise(x_FChw: Tensor, at: int, level: float = alpha_t) -> Tensor:
            return denoiser.noise(x_FChw, at, level, source, raw=True)

        x, alpha = invert_plain(noise, x, t, alpha, alpha_t).x, alpha_t
        if t in wanted:
            kept[t] = x
    return torch.stack([kept[t] for t in wanted])


@dataclass
class _Recorded:
    """The recorded source latents and the running edit, as a window's inputs."""

    x: Tensor
    source_latents: Tensor

    def latents(self, frames: Sequence[int]) -> Tensor:
        return self.x[list(frames)]

    def source(self, frames: Sequence[int]) -> Tensor:
        return self.source_latents[list(frames)]

    def conv(self, frames: Sequence[int]) -> Tensor:
        raise NotImplementedError("the published mode finds features on the way")

    def correspondences(self, frames: Sequence[int]) -> list[Tensor]:
        raise NotImplementedError("the published mode finds correspondences on the way")


def edit(vectors: Vectors, denoiser: Denoiser) -> Tensor:
    """The edit from x_T with the recorded keyframes and source latents, (T, F, C, h, w)."""
    meta, tensors = vectors.meta, vectors.tensors
    steps, length = int(meta["N"]), int(meta["B"])
    schedule = vectors.schedule_at([int(t) for t in tensors["timesteps"]])
    pnp = meta["mode"] == "pnp"
    settings = EditSettings(
        guidance=Guidance(float(meta["cfgscale"])),
        injection=Injection.pnp(steps, meta["attn_t"], meta["f_t"]) if pnp else Injection(),
        steps=steps,
        batch=length,
        latent_hw=(tensors["x_T"].shape[2], tensors["x_T"].shape[3]),
        mode=PUBLISHED,
    )
    prompts = Prompts(*(tensors[f"embeds.{name}"] for name in ("source", "negative", "target")))
    state, after = State(tensors["x_T"]), []
    with tokenflow_hooks(denoiser.unet, "eager") as hooks:
        for step, (t, alpha) in enumerate(zip(schedule.timesteps, schedule.alphas, strict=True)):
            inputs = _Recorded(state.x, tensors["source_latents"][step])
            noise = predict_window(
                denoiser,
                hooks,
                inputs,
                prompts,
                settings,
                step=step,
                t=t,
                alpha=alpha,
                window=WindowMoment.whole(
                    len(state.x), length, PUBLISHED.neighbours, tensors["keyframes"][step].tolist()
                ),
            )
            state = Ddim().step(schedule, step, 0, state, noise)
            after.append(state.x)
    return torch.stack(after)


def difference(ours: Tensor, recorded: Tensor) -> dict[str, float]:
    """Largest and mean absolute difference, and the spread of what was recorded."""
    gap = (ours - recorded).abs()
    return {
        "max_abs": float(gap.max()),
        "mean_abs": float(gap.mean()),
        "ref_std": float(recorded.std()),
    }


def compare(path: Path, dump: Path | None) -> dict[str, Any]:
    """Run one file and compare; optionally write what was computed."""
    vectors = Vectors.load(path)
    denoiser = Denoiser(vectors.unet(), vectors.meta["pred"])
    source_latents, after = invert(vectors, denoiser), edit(vectors, denoiser)
    if dump is not None:
        dump.mkdir(parents=True, exist_ok=True)
        save_file({"source_latents": source_latents, "x_after_step": after}, dump / path.name)
    recorded = vectors.tensors["x_after_step"]
    steps = []
    for ours, theirs in zip(after, recorded, strict=True):
        over = float(((ours - theirs).abs() > 5e-3).float().mean())
        steps.append({**difference(ours, theirs), "share_over_5e-3": over})
    return {
        "file": str(path),
        "source_latents": difference(source_latents, vectors.tensors["source_latents"]),
        "steps": steps,
    }


def _refuse_overwriting(parser: argparse.ArgumentParser, files: Sequence[Path], dump: Path) -> None:
    """Nothing that is written may take the place of a vector file, or of another result."""
    names = [path.name for path in files]
    for path in files:
        if (dump / path.name).resolve() in [given.resolve() for given in files]:
            parser.error(f"--dump {dump} would overwrite {dump / path.name}: choose another folder")
        if names.count(path.name) > 1:
            parser.error(f"two files are named {path.name}: dump them one at a time")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--dump", type=Path, metavar="DIR", help="write our latents here")
    args = parser.parse_args()
    if args.dump:
        _refuse_overwriting(parser, args.files, args.dump)
    failed = False
    for path in args.files:
        try:
            print(json.dumps(compare(path, args.dump)), flush=True)
        except ValueError as error:
            print(error, file=sys.stderr)
            failed = True
    sys.exit(failed)


if __name__ == "__main__":
    main()

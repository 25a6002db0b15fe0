"""One command for one GPU: seconds a frame, memory, kernels, numerics at Stable Diffusion's size.

    python benchmarks/gpu.py [--frames 16 64 256] [--minutes 9] [--json FILE]
    python benchmarks/gpu.py --small          (a CPU will do: does all of it run?)

Needs torch, diffusers and, where it is there, FAISS; of this package only the method, so neither
PyAV nor OpenCV nor pydantic. A UNet and a VAE of Stable Diffusion 1.5's shape with random weights,
512 × 512 pixels, in half precision.

Seconds a frame are put together from measured parts: a UNet row in a batch of 16 (inversion;
1000 rows a frame for `official`, its reconstruction included, 51 by default), one step of matching,
and of the edit one step of each kind (with queries and keys injected, with features alone, with
neither) over all windows of the clip, times how many there are. Videos and disk are left out.
Latents are random: the work is the same. Peak memory is the allocator's, or on a CPU the process's.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from kernels import FINEST, SIZES, Machine, Run, attention, correspondence, peak, reset_peak
from torch import Tensor

from tokenflow_batch.config import Settings
from tokenflow_batch.tokenflow.attention import Hooks, choose_attention, tokenflow_hooks
from tokenflow_batch.tokenflow.correspondence import choose_backend, match_frames, side_by_side
from tokenflow_batch.tokenflow.denoise import Denoiser, EditSettings, Prompts, predict_window
from tokenflow_batch.tokenflow.injection import conv_shape
from tokenflow_batch.tokenflow.keyframes import draw_keyframes, true_neighbours
from tokenflow_batch.tokenflow.modes import MODES, Guidance, Injection
from tokenflow_batch.tokenflow.passes import SourcePass
from tokenflow_batch.tokenflow.windows import Layout

SEGMENT: Final = 8
BATCH: Final = 8
"""Frames between two keyframes, that are matched and edited together."""
INVERTED: Final = 16
"""Frames of a batch of the inversion."""
T: Final = 401
ALPHA: Final = 0.5
STEPS: Final = {"official": 50, "default": 25}
INVERSION_ROWS: Final = {"official": 1000, "default": 51}
"""UNet rows a frame."""


@dataclass(frozen=True)
class Shape:
    """What is measured: Stable Diffusion 1.5's, or something small of the same layout."""

    widths: tuple[int, ...] = (320, 640, 1280, 1280)
    vae_widths: tuple[int, ...] = (128, 256, 512, 512)
    text: tuple[int, int] = (77, 768)
    pixels: int = 512

    @property
    def latent(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        return 4, self.pixels // 8, self.pixels // 8

    def unet(self, machine: Machine) -> UNet2DConditionModel:
        """With random weights, in float32."""
        torch.manual_seed(0)
        with torch.device(machine.device):
            unet = UNet2DConditionModel(
                sample_size=self.latent[1],
                block_out_channels=self.widths,
                cross_attention_dim=self.text[1],
                attention_head_dim=8,
            )
        unet.conv_out.weight.data.mul_(0.1)
        return _laid_out(unet.eval().requires_grad_(False), machine)

    def vae(self, machine: Machine) -> AutoencoderKL:
        """With random weights, in the machine's dtype."""
        with torch.device(machine.device):
            vae = AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=self.vae_widths,
                layers_per_block=2,
                latent_channels=4,
            )
        vae = vae.eval().requires_grad_(False).to(machine.dtype)
        return _laid_out(vae, machine)


def _laid_out(module: Any, machine: Machine) -> Any:
    """In memory as the product lays it out."""
    return module if machine.gpu else module.to(memory_format=torch.channels_last)


SMALL: Final = Shape((32, 32, 64, 64), (32, 32, 32, 32), (7, 32), 64)


class RandomClip:
    """A clip's latents and stored source features, random; see `WindowInputs`."""

    def __init__(self, shape: Shape, hooks: Hooks, unet: Any, frames: int) -> None:
        cpu = Machine()
        self._x = cpu.random(frames, *shape.latent, seed=1)
        self._source = cpu.random(frames, *shape.latent, seed=2)
        # A few frames' features, over and over: there is room for no more at any length.
        self._conv = cpu.random(16, *conv_shape(unet, shape.latent[1:]), seed=3, dtype=torch.half)
        tokens = [site.tokens(shape.latent[1:]) for site in hooks.sites]
        generator = torch.Generator().manual_seed(4)
        by_tokens = {n: torch.randint(n, (16, 2, n), generator=generator) for n in set(tokens)}
        self._index = [by_tokens[n] for n in tokens]

    def latents(self, frames: Sequence[int]) -> Tensor:
        """See `WindowInputs`."""
        return self._x[list(frames)]

    def source(self, frames: Sequence[int]) -> Tensor:
        """See `WindowInputs`."""
        return self._source[list(frames)]

    def conv(self, frames: Sequence[int]) -> Tensor:
        """See `WindowInputs`."""
        return self._conv[[f % 16 for f in frames]]

    def correspondences(self, frames: Sequence[int]) -> list[Tensor]:
        """See `WindowInputs`."""
        return [index[[f % 16 for f in frames]] for index in self._index]


class Bench:
    """One UNet on one device, with the method's seams on it."""

    def __init__(self, machine: Machine, shape: Shape, unet: Any, hooks: Hooks) -> None:
        self.machine, self.shape, self.unet, self.hooks = machine, shape, unet, hooks
        self.denoiser = Denoiser(unet, "epsilon")
        self.matching = choose_backend("auto", "cuda" if machine.gpu else "cpu")
        texts = Machine().random(3, *shape.text, seed=5)
        self.prompts = Prompts(*texts)

    def row(self, batch: int = INVERTED) -> float:
        """Seconds of a UNet row in a batch."""
        x = self.machine.random(batch, *self.shape.latent, dtype=torch.float32)
        embed = self.prompts.source.unsqueeze(0)

        def run() -> Tensor:
            return self.denoiser.noise(x, T, ALPHA, embed)

        run()
        return min(self.machine.seconds(run) for _ in range(3)) / batch

    def tokens(self, frames: int) -> list[Tensor]:
        """φ of a batch's sites."""
        x = self.machine.random(frames, *self.shape.latent, dtype=torch.float32, seed=frames)
        with self.hooks.during(SourcePass()) as seen:
            self.denoiser.noise(x, T, ALPHA, self.prompts.source.unsqueeze(0))
        return seen.tokens

    def joined(self, every: Sequence[Tensor]) -> dict[int, Tensor]:
        """φ of the sites of one resolution, side by side."""
        groups: dict[int, list[Tensor]] = {}
        for tokens in every:
            groups.setdefault(tokens.shape[1], []).append(tokens)
        return {n: side_by_side(group) for n, group in groups.items()}

    def match(self) -> float:
        """Seconds a frame of one step of matching: a batch between two keyframes.

        Tokens come from the inversion's rows, on their way.
        """
        keyframes, every = self.joined(self.tokens(2)), self.tokens(BATCH)
        near = [true_neighbours(f, (0, BATCH + 1), SEGMENT) for f in range(1, BATCH + 1)]

        def run() -> None:
            for n, tokens in self.joined(every).items():
                match_frames(tokens, keyframes[n], near, self.matching)

        run()
        return min(self.machine.seconds(run) for _ in range(2)) / BATCH

    def settings(self, mode: str) -> EditSettings:
        """Of an edit."""
        injection = Injection.pnp(STEPS[mode], 0.5, 0.8)
        focus = Settings().guidance_focus if mode == "default" else 1.0
        guidance = Guidance.within(7.5, STEPS[mode], (0.0, 1.0), focus)
        _, *hw = self.shape.latent
        return EditSettings(
            guidance=guidance,
            injection=injection,
            steps=STEPS[mode],
            batch=BATCH,
            latent_hw=(hw[0], hw[1]),
            mode=MODES[mode],
            matching=self.matching,
        )

    def step(self, mode: str, frames: int, step: int) -> list[Tensor]:
        """Noise of all windows of a clip at one step."""
        settings = self.settings(mode)
        size = 16 if mode == "default" else max(2, frames // SEGMENT)
        layout = Layout.plan(frames, SEGMENT, size=size, overlap=min(2, size // 2))
        drawn = draw_keyframes(0, step, layout.segments)
        clip = RandomClip(self.shape, self.hooks, self.unet, frames)
        return [
            predict_window(
                self.denoiser,
                self.hooks,
                clip,
                self.prompts,
                settings,
                step=step,
                t=T,
                alpha=ALPHA,
                window=layout.moment(settings.mode.neighbours, drawn, window),
            )
            for window in layout.windows
        ]

    def edit(self, mode: str, frames: int) -> dict[str, Any]:
        """Seconds a frame and UNet rows a frame of an edit, from a step of each kind."""
        injection, guidance = self.settings(mode).injection, self.settings(mode).guidance
        late = (guidance.focus, guidance.own, guidance.detail)
        changes = (injection.qk_steps, injection.conv_steps, *late)
        steps = STEPS[mode]
        borders = sorted({0, steps, *(step for step in changes if step < steps)})
        seconds, rows = 0.0, 0
        self.step(mode, frames, 0)  # libraries look for kernels at the first of every shape
        for first, stop in pairwise(borders):
            before = self.denoiser.rows
            taken = self.machine.seconds(lambda s=first: self.step(mode, frames, s))  # type: ignore[misc]
            seconds += taken * (stop - first)
            rows += (self.denoiser.rows - before) * (stop - first)
        return {"edit_seconds": seconds / frames, "edit_rows": rows / frames}


@contextmanager
def bench(machine: Machine, shape: Shape, unet: Any) -> Iterator[Bench]:
    """Seams on a UNet, and off again."""
    backend = choose_attention("auto", "cuda" if machine.gpu else "cpu", machine.dtype)
    with tokenflow_hooks(unet, backend) as hooks:
        yield Bench(machine, shape, unet, hooks)


def autoencoder(machine: Machine, shape: Shape) -> dict[str, float]:
    """Seconds a frame to encode and to decode, four frames at a time."""
    vae: Any = shape.vae(machine)
    pixels = machine.random(4, 3, shape.pixels, shape.pixels)
    latents = machine.random(4, *shape.latent)
    runs: dict[str, Run] = {
        "encode": lambda: vae.encode(pixels),
        "decode": lambda: vae.decode(latents),
    }
    with torch.no_grad():
        for run in runs.values():
            run()
        return {name: machine.seconds(run) / 4 for name, run in runs.items()}


def numerics(machine: Machine, shape: Shape, unet: Any) -> tuple[dict[str, Any], Any]:
    """What half precision changes: an evaluation, a window's step, correspondences.

    Returns:
        The differences, and the UNet in half precision.
    """
    found = {}
    for dtype in (torch.float32, machine.dtype):
        with bench(replace(machine, dtype=dtype), shape, unet.to(dtype)) as b:
            x = machine.random(2, *shape.latent, dtype=torch.float32)
            noise = b.denoiser.noise(x, T, ALPHA, b.prompts.target.unsqueeze(0))
            window = torch.cat(b.step("default", 2 * SEGMENT, 0))
            near = [true_neighbours(1, (0, 2), SEGMENT)]
            fields = {
                n: match_frames(tokens[:1], tokens[1:], near, b.matching)
                for n, tokens in b.joined(b.tokens(3)).items()
            }
        found[dtype] = noise.cpu(), window, fields
    (noise, window, fields), (noise2, window2, fields2) = found.values()
    differences = {
        "unet_evaluation": _difference(noise, noise2),
        "predict_window": _difference(window, window2),
        "flipped_correspondences": {
            n: float((fields[n] != fields2[n]).float().mean()) for n in fields
        },
    }
    return differences, unet


def _difference(exact: Tensor, other: Tensor) -> dict[str, float]:
    off = (exact - other).abs()
    return {"mean": float(off.mean()), "max": float(off.max()), "spread": float(exact.std())}


def clips(b: Bench, frames: Sequence[int], vae: dict[str, float], stop: float) -> dict[str, Any]:
    """Seconds a frame and peak memory of both modes at every length that there is time for."""
    reset_peak(b.machine)
    row, match = b.row(), b.match()
    shared_peak, taken = peak(b.machine), 0.0
    found: dict[str, Any] = {
        "row_seconds": row,
        "row_seconds_by_batch": {n: b.row(n) for n in (8, 16, 24)},
        "match_step_seconds": match,
        "runs": [],
    }
    for count in frames:
        for mode in ("default", "official"):
            began = time.monotonic()
            # The last run, four times as long as a rule, tells whether the next still fits.
            if began + 4 * taken > stop:
                found["runs"].append({"mode": mode, "frames": count, "left_out": "no time"})
                continue
            reset_peak(b.machine)
            edit = b.edit(mode, count)
            first = INVERSION_ROWS[mode] * row + (STEPS[mode] * match if mode == "default" else 0)
            whole = vae["encode"] + vae["decode"] + first + edit["edit_seconds"]
            found["runs"].append(
                {
                    "mode": mode,
                    "frames": count,
                    "seconds_per_frame": whole,
                    "further_edit_seconds_per_frame": edit["edit_seconds"] + vae["decode"],
                    **edit,
                    "peak_bytes": max(shared_peak, peak(b.machine)),
                }
            )
            taken = time.monotonic() - began
            print(json.dumps(found["runs"][-1]), flush=True)
    return found


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All of it."""
    stop = time.monotonic() + 60 * args.minutes
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() and not args.small else "cpu"
    half = torch.float16 if device.startswith("cuda") else torch.bfloat16
    machine = Machine(device, half, args.threads)
    machine.prepare()
    shape = SMALL if args.small else Shape()
    side, rounds, sizes, many = 8192 if machine.gpu else 4096, 9, SIZES, (16, FINEST[0])
    if args.small:
        side, rounds, sizes, many = 256, 1, SIZES[:1], (2, 64)
    wide = replace(machine, dtype=torch.float32)
    kernels = {
        "correspondence": correspondence(wide, rounds, side, sizes),
        "attention": attention(machine if machine.gpu else wide, *many, side),
    }
    differences, unet = numerics(machine, shape, shape.unet(machine))
    vae = autoencoder(machine, shape)
    with bench(machine, shape, unet) as b:
        measured = clips(b, args.frames, vae, stop)
    return {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "device": torch.cuda.get_device_name() if machine.gpu else "cpu",
        "dtype": str(half).removeprefix("torch."),
        "torch": torch.__version__,
        "pixels": shape.pixels,
        "small": args.small,
        "backends": {"attention": b.hooks.attention, "correspondence": b.matching},
        "extrapolated": "from one row, one step of matching, a step of each kind of the edit",
        "autoencoder_seconds": vae,
        "clips": measured,
        "kernels": kernels,
        "half_against_float32": differences,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--small", action="store_true", help="a small model, on a CPU too")
    parser.add_argument("--frames", nargs="+", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=9, help="begin nothing that ends later")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    args = parser.parse_args(arguments)
    args.frames = args.frames or ([8, 16] if args.small else [16, 64, 256])
    text = json.dumps(measure(args), indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

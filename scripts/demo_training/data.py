"""Training data as pure functions of (seed, index): nothing to store but a cache of latents.

Tensor suffixes: N samples, C channels, H and W pixels, h and w latent pixels.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from accelerate import PartialState
from diffusers import AutoencoderKL
from torch import Tensor

from tokenflow_batch.demo.scenes import Domain, SceneParams, render, sample
from tokenflow_batch.demo.stills import TRAINED, render_layers

_LATENTS: Final = "latents.npy"
_COVER: Final = "cover.npy"
_DESCRIPTION: Final = "cache.json"


class Stream(IntEnum):
    """Kinds of draws; each has random numbers of its own."""

    SCENES = 0
    VAE = 1
    UNET = 2
    HELD_OUT = 3


def generator(seed: int, stream: Stream, *indices: int) -> np.random.Generator:
    """Random numbers that depend on the arguments alone, never on what was drawn before.

    That is what lets an interrupted training go on with the very batches it would have seen.
    """
    return np.random.default_rng([seed, stream, *indices])


def scene(seed: int, stream: Stream, index: int, domain: Domain) -> SceneParams:
    """The `index`-th scene of a stream."""
    return sample(generator(seed, stream, index), domain)


def images(scenes: Iterable[SceneParams], size: int) -> Tensor:
    """Render scenes.

    Args:
        scenes: N of them.
        size: side in pixels.

    Returns:
        (N, 3, H, W) float32 in [-1, 1], quantised to 8 bits as a video's frames would be.
    """
    stack_NHWC = np.stack([render(params, size)[0] for params in scenes])
    pixels_NCHW = torch.from_numpy(np.rint(stack_NHWC * 255)).permute(0, 3, 1, 2).contiguous()
    return pixels_NCHW / 127.5 - 1


def cover(params: SceneParams, size: int, downscale: int) -> npt.NDArray[np.uint8]:
    """Share of each latent pixel that objects cover.

    Args:
        params: the scene.
        size: side of its image in pixels.
        downscale: pixels per latent pixel.

    Returns:
        (h, w) uint8, 255 for all of it.
    """
    _, first_HW, second_HW = render_layers(params, size)
    latent = size // downscale
    tiles = np.maximum(first_HW, second_HW).reshape(latent, downscale, latent, downscale)
    share_hw: npt.NDArray[np.uint8] = np.rint(tiles.mean((1, 3)) * 255).astype(np.uint8)
    return share_hw


@dataclass(frozen=True)
class LatentCache:
    """Scenes encoded once, for all epochs of the UNet.

    Attributes:
        folder: with latents.npy, (count, 4, h, w) float32, cover.npy, (count, h, w) uint8, and
            cache.json, the fields below.
        seed: of the scenes.
        count: scenes in all.
        size: side of their images in pixels.
        pairs: share of them with two objects.
    """

    folder: Path
    seed: int
    count: int
    size: int
    pairs: float = TRAINED.pairs

    @classmethod
    def open(cls, folder: Path) -> LatentCache:
        """Find a cache that is complete.

        Raises:
            FileNotFoundError: there is none.
        """
        return cls(folder, **json.loads((folder / _DESCRIPTION).read_text()))

    def array(self) -> npt.NDArray[np.float32]:
        """The latents, scaled to unit variance: (count, 4, h, w) float32, mapped, read-only."""
        latents_NChw: npt.NDArray[np.float32] = np.load(self.folder / _LATENTS, mmap_mode="r")
        return latents_NChw

    def cover(self) -> npt.NDArray[np.uint8]:
        """The share of each latent pixel that objects cover: (count, h, w) uint8, 255 for all."""
        share_Nhw: npt.NDArray[np.uint8] = np.load(self.folder / _COVER, mmap_mode="r")
        return share_Nhw

    def scene(self, index: int) -> SceneParams:
        """What the `index`-th latents show."""
        domain = replace(TRAINED, pairs=self.pairs)
        return scene(self.seed, Stream.SCENES, index, domain)

    def create(self, downscale: int) -> None:
        """Make the files, all zeros; `downscale` is pixels per latent pixel."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / _DESCRIPTION).unlink(missing_ok=True)
        h = w = self.size // downscale
        for name, dtype, shape in (
            (_LATENTS, np.float32, (self.count, 4, h, w)),
            (_COVER, np.uint8, (self.count, h, w)),
        ):
            path = self.folder / name
            np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape).flush()

    @torch.inference_mode()
    def fill(self, vae: AutoencoderKL, rank: int, processes: int, batch: int = 32) -> None:
        """Encode one process's share of the scenes with an AutoencoderKL, `batch` at a time."""
        latents_NChw = np.lib.format.open_memmap(self.folder / _LATENTS, mode="r+")
        share_Nhw = np.lib.format.open_memmap(self.folder / _COVER, mode="r+")
        first, last = self.count * rank // processes, self.count * (rank + 1) // processes
        for start in range(first, last, batch):
            stop = min(start + batch, last)
            scenes = [self.scene(i) for i in range(start, stop)]
            pixels = images(scenes, self.size)
            # The posterior's mean: its noise would only blur what the UNet has to learn.
            mean = vae.encode(pixels.to(vae.device)).latent_dist.mode()
            latents_NChw[start:stop] = (mean * vae.config.scaling_factor).cpu().numpy()
            downscale = self.size // latents_NChw.shape[-1]
            share_Nhw[start:stop] = [cover(params, self.size, downscale) for params in scenes]
        latents_NChw.flush()
        share_Nhw.flush()

    def describe(self) -> str:
        """The scenes as JSON: what decides the content but for the autoencoder."""
        return json.dumps({k: v for k, v in asdict(self).items() if k != "folder"})

    def finish(self) -> None:
        """Declare the cache complete, once every process has filled its share."""
        (self.folder / _DESCRIPTION).write_text(self.describe())


def encode_scenes(vae_folder: Path, cache: LatentCache) -> None:
    """Stage `latents`: fill a cache, each process its share.

    Args:
        vae_folder: a saved AutoencoderKL.
        cache: where to and what of.
    """
    state = PartialState(cpu=not torch.cuda.is_available())
    vae = AutoencoderKL.from_pretrained(vae_folder).to(state.device).eval()
    if state.is_main_process:
        cache.create(2 ** (len(vae.config.block_out_channels) - 1))
    state.wait_for_everyone()
    cache.fill(vae, state.process_index, state.num_processes)
    state.wait_for_everyone()
    if state.is_main_process:
        cache.finish()
        latents_NChw = cache.array()
        print(f"{cache.count} latents, deviation {latents_NChw.std():.3f}", flush=True)

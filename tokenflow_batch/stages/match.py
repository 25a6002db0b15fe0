"""match: inverted latents → correspondences, and convolution features for Plug-and-Play."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tokenflow_batch.ahead import ahead
from tokenflow_batch.arrays import (
    CONV,
    CONV8,
    CONV8_SCALE,
    index_dtype,
    index_name,
    match_arrays,
)
from tokenflow_batch.ledger import StageFolder
from tokenflow_batch.models import require_finite
from tokenflow_batch.stages.base import Stage, StageContext
from tokenflow_batch.stages.clip import Clip, InvertedLatents, read_clip
from tokenflow_batch.store import Array, unit_name
from tokenflow_batch.tokenflow.attention import Hooks, tokenflow_hooks
from tokenflow_batch.tokenflow.correspondence import Backend, match_frames, side_by_side
from tokenflow_batch.tokenflow.ddim import Schedule
from tokenflow_batch.tokenflow.denoise import Denoiser
from tokenflow_batch.tokenflow.injection import Site, attention_sites, conv_shape
from tokenflow_batch.tokenflow.keyframes import Neighbours, draw_keyframes, true_neighbours
from tokenflow_batch.tokenflow.modes import MODES
from tokenflow_batch.tokenflow.passes import SourcePass
from tokenflow_batch.tokenflow.quantise import quantise
from tokenflow_batch.tokenflow.windows import Chunk, batches


class Match(Stage):
    """Units: (sampling step, chunk). In official mode, which finds correspondences on the way,
    there are none."""

    name = "match"

    def run(self, context: StageContext, folder: StageFolder) -> None:
        """See `Stage.run`."""
        s = context.settings
        if not MODES[s.mode].stored_source:
            return
        clip, model = read_clip(context), context.model()
        model.check_conv_site(s.conv_site)
        sampling = model.schedule(s.steps)
        source = InvertedLatents(
            context.folder("invert"), sampling, model.schedule(s.inversion_steps)
        )
        _, *hw = model.frame_shape(clip.geometry.working)
        latent_hw = (hw[0], hw[1])
        sites = attention_sites(model.unet)
        conv = conv_shape(model.unet, latent_hw, s.conv_site)
        tokens = sites_by_tokens(sites, latent_hw)
        size = (s.steps, clip.frames, clip.chunk_frames)
        job = context.job
        specs = match_arrays(*size, tokens, conv, job.stored_conv_steps, job.stored_conv8_steps)
        store = context.store(folder, specs)
        units = {
            unit_name("match", (step, chunk.index)): (step, chunk)
            for step in range(s.steps)
            for chunk in clip.chunks
        }
        missing = [chunk for unit, (_, chunk) in units.items() if not folder.committed(unit)]
        denoiser = Denoiser(model.unet, model.prediction_type)
        embed = model.embed(s.source_prompt)
        with (
            tokenflow_hooks(model.unet, context.compute.attention, s.conv_site) as hooks,
            context.progress("match", sum(map(len, missing))) as advance,
        ):
            work = _Matching(context, clip, source, sampling, denoiser, hooks, embed, latent_hw)
            for step, chunk in context.sharing.share(folder, units):
                rows, flops, began = denoiser.rows, denoiser.flops, time.perf_counter()
                values = work.unit(step, chunk)
                facts = {
                    "rows": denoiser.rows - rows,
                    "flops": denoiser.flops - flops,
                    "seconds": time.perf_counter() - began,
                }
                store.write((step, chunk.index), values, facts)
                advance(len(chunk))


def sites_by_tokens(sites: Sequence[Site], latent_hw: tuple[int, int]) -> dict[int, list[Site]]:
    """Sites grouped by token count: one array each."""
    groups: dict[int, list[Site]] = {}
    for site in sites:
        groups.setdefault(site.tokens(latent_hw), []).append(site)
    return groups


class _Matching:
    """One clip's source passes, a unit at a time."""

    def __init__(
        self,
        context: StageContext,
        clip: Clip,
        source: InvertedLatents,
        sampling: Schedule,
        denoiser: Denoiser,
        hooks: Hooks,
        embed: Tensor,
        latent_hw: tuple[int, int],
    ) -> None:
        self.settings, self.matching = context.settings, context.compute.matching
        self.kept = {CONV: context.job.stored_conv_steps, CONV8: context.job.stored_conv8_steps}
        self.clip, self.source, self.sampling = clip, source, sampling
        self.denoiser, self.hooks, self.embed = denoiser, hooks, embed.unsqueeze(0)
        self.groups = sites_by_tokens(hooks.sites, latent_hw)

    def unit(self, step: int, chunk: Chunk) -> dict[str, Array]:
        """Correspondences and convolution features of a chunk's frames at one step.

        By array name: `index_L` (N, 2, L), shared by all sites with L tokens, and `conv`
        (N, C, h, w) float16, or `conv8` int8 with `conv8_scale` (N, C), as the clip's edits need.

        The keyframes that the chunk's frames look at go first, those just outside included; then
        the other frames, a batch at a time, so that tokens are held for keyframes alone.
        """
        drawn = draw_keyframes(self.settings.keyframe_seed, step, self.clip.segments)
        near = {
            f: true_neighbours(f, drawn, self.clip.segment_length, self.clip.cuts)
            for f in chunk.frames
        }
        used = sorted({k for n in near.values() for k in (n.first, n.second)})
        near = {f: _relative(n, used) for f, n in near.items()}
        keyframes = [drawn[k] for k in used]
        kept = [name for name, steps in self.kept.items() if step < steps]
        filling = _Filling(step, chunk, near, self.groups, self.matching, kept)
        parts = [seen for _, seen in self._source(step, keyframes)]
        filling.keyframes = {
            n: torch.cat(found)
            for n, found in _gathered(self._joined(seen.tokens) for seen in parts).items()
        }
        inside = [n for n, f in enumerate(keyframes) if f in chunk.frames]
        conv = torch.cat([_conv(p) for p in parts])[inside]
        own = {n: tokens[inside] for n, tokens in filling.keyframes.items()}
        filling.add([keyframes[n] for n in inside], own, conv)
        others = [f for f in chunk.frames if f not in set(keyframes)]
        for batch, seen in self._source(step, others):
            filling.add(batch, self._joined(seen.tokens), _conv(seen))
        return filling.values

    def _joined(self, tokens: Sequence[Tensor]) -> dict[int, Tensor]:
        """Per token count L, the tokens of its sites side by side, (N, L, C)."""
        return {
            n: side_by_side([tokens[site.index] for site in group])
            for n, group in self.groups.items()
        }

    def _source(
        self, step: int, frames: Sequence[int]
    ) -> Iterator[tuple[Sequence[int], SourcePass]]:
        """Passes over frames, a batch at a time."""
        t, alpha = self.sampling.timesteps[step], self.sampling.alphas[step]
        parts = batches(frames, self.settings.unet_batch)
        for batch, x in ahead(((b, self.source.read(step, b)) for b in parts), 1):
            with self.hooks.during(SourcePass()) as seen:
                self.denoiser.noise(x, t, alpha, self.embed)
            yield batch, seen


def _gathered(parts: Iterable[Mapping[int, Tensor]]) -> dict[int, list[Tensor]]:
    found: dict[int, list[Tensor]] = {}
    for part in parts:
        for n, tokens in part.items():
            found.setdefault(n, []).append(tokens)
    return found


class _Filling:
    """The arrays of one unit, filled batch by batch."""

    def __init__(
        self,
        step: int,
        chunk: Chunk,
        near: dict[int, Neighbours],
        tokens: Iterable[int],
        matching: Backend,
        kept: Sequence[str],
    ) -> None:
        self.step, self.chunk, self.near, self.matching = step, chunk, near, matching
        self.kept = kept
        self.keyframes: dict[int, Tensor] = {}
        self.values: dict[str, Array] = {
            index_name(n): np.empty((len(chunk), 2, n), index_dtype(n)) for n in tokens
        }

    def add(self, frames: Sequence[int], tokens: Mapping[int, Tensor], conv_NChw: Tensor) -> None:
        """Match some frames at every resolution and put the result in its place."""
        if not frames:
            return
        rows = [f - self.chunk.start for f in frames]
        near = [self.near[f] for f in frames]
        for n, tokens_NLC in tokens.items():
            index_N2L = match_frames(tokens_NLC, self.keyframes[n], near, self.matching)
            self.values[index_name(n)][rows] = index_N2L.cpu().numpy()
        for name in self.kept:
            where = f"match, sampling step {self.step}, frames {frames[0]} to {frames[-1]}"
            for array, found in stored_features(name, conv_NChw, where).items():
                if array not in self.values:
                    self.values[array] = np.empty((len(self.chunk), *found.shape[1:]), found.dtype)
                self.values[array][rows] = found


def stored_features(kind: str, conv_NChw: Tensor, where: str) -> dict[str, Array]:
    """Convolution features as they are stored, by array name.

    Args:
        kind: `conv` or `conv8`.
        conv_NChw: of any float type.
        where: for messages.

    Raises:
        ModelError: some are not finite, or beyond half precision.
    """
    if kind == CONV:
        half = conv_NChw.half()
        require_finite(half, f"{where}: convolution features in 16 bits")
        return {CONV: half.cpu().numpy()}
    require_finite(conv_NChw, f"{where}: convolution features")
    steps, scale = quantise(conv_NChw)
    return {CONV8: steps.cpu().numpy(), CONV8_SCALE: scale.cpu().numpy()}


def _conv(seen: SourcePass) -> Tensor:
    assert seen.conv is not None  # noqa: S101 - the hook has run
    return seen.conv


def _relative(near: Neighbours, used: Sequence[int]) -> Neighbours:
    """The same neighbours, by position among the keyframes in use."""
    return replace(near, first=used.index(near.first), second=used.index(near.second))

"""One unit of `match` put together as source passes over its frames come in, whoever made them.

The frames between two keyframes look at those two. They are matched when all of them and both
keyframes have been seen, and their tokens let go: what is held does not grow with the chunk. So
results don't depend on when the keyframes that lie in other chunks come.

Shape suffixes: N frames in a batch, L tokens, C channels, h w feature map size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tokenflow_batch.arrays import CONV, CONV8, CONV8_SCALE, Specs, index_dtype, index_name
from tokenflow_batch.arrays import match_arrays as arrays
from tokenflow_batch.models import Model, require_finite
from tokenflow_batch.stages.base import StageContext
from tokenflow_batch.stages.clip import Clip
from tokenflow_batch.store import Array
from tokenflow_batch.tokenflow.correspondence import Backend, match_frames, side_by_side
from tokenflow_batch.tokenflow.injection import Site, attention_sites, conv_shape
from tokenflow_batch.tokenflow.keyframes import Neighbours, draw_keyframes, true_neighbours
from tokenflow_batch.tokenflow.passes import SourcePass
from tokenflow_batch.tokenflow.quantise import quantise
from tokenflow_batch.tokenflow.windows import Chunk

Tokens = Mapping[int, Tensor]
"""Per token count L, what is compared of some frames, (N, L, C)."""


@dataclass(frozen=True)
class Matching:
    """What all units of a clip's `match` have in common.

    Attributes:
        clip: and its segments.
        keyframe_seed: of the keyframe draws.
        backend: of the search.
        groups: sites by token count.
        specs: the stage's arrays.
        kept: of how many of the first steps which features are stored.
    """

    clip: Clip
    keyframe_seed: int
    backend: Backend
    groups: Mapping[int, Sequence[Site]]
    specs: Specs
    kept: Mapping[str, int]
    _drawn: dict[int, list[int]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, context: StageContext, clip: Clip, model: Model) -> Matching:
        """Of a job.

        Raises:
            ModelError: the model has no such `conv_site`.
        """
        s, job = context.settings, context.job
        model.check_conv_site(s.conv_site)
        _, height, width = model.frame_shape(clip.geometry.working)
        hw = (height, width)
        groups = sites_by_tokens(attention_sites(model.unet), hw)
        conv = conv_shape(model.unet, hw, s.conv_site)
        stored = (job.stored_conv_steps, job.stored_conv8_steps)
        specs = arrays(s.steps, clip.frames, clip.chunk_frames, groups, conv, *stored)
        kept = dict(zip((CONV, CONV8), stored, strict=True))
        return cls(clip, s.keyframe_seed, context.compute.matching, groups, specs, kept)

    def unit(self, step: int, chunk: Chunk) -> Unit:
        """Begin the unit of a chunk at a sampling step."""
        clip = self.clip
        if step not in self._drawn:  # a step's units mostly follow each other
            self._drawn.clear()
            self._drawn[step] = draw_keyframes(self.keyframe_seed, step, clip.segments)
        drawn = self._drawn[step]
        near = {f: true_neighbours(f, drawn, clip.segment_length, clip.cuts) for f in chunk.frames}
        return Unit(self, step, chunk, drawn, near)

    def joined(self, tokens: Sequence[Tensor]) -> Tokens:
        """Per token count L, the tokens of its sites side by side, (N, L, C)."""
        return {
            n: side_by_side([tokens[site.index] for site in group])
            for n, group in self.groups.items()
        }


def sites_by_tokens(sites: Sequence[Site], latent_hw: tuple[int, int]) -> dict[int, list[Site]]:
    """Sites grouped by token count: one array each."""
    groups: dict[int, list[Site]] = {}
    for site in sites:
        groups.setdefault(site.tokens(latent_hw), []).append(site)
    return groups


@dataclass
class Unit:
    """A chunk's frames at one step, from the passes over them to what is stored.

    Attributes:
        matching: what all units have in common.
        step: the sampling step.
        chunk: the frames.
        drawn: the step's keyframes, one per segment.
        near: which two of them each frame looks at.
    """

    matching: Matching
    step: int
    chunk: Chunk
    drawn: Sequence[int]
    near: Mapping[int, Neighbours]
    _values: dict[str, Array] = field(default_factory=dict, repr=False)
    _keyframes: dict[int, Tokens] = field(default_factory=dict, repr=False)
    _waiting: dict[tuple[int, int], list[tuple[int, Tokens]]] = field(
        default_factory=dict, repr=False
    )

    def __post_init__(self) -> None:
        size = len(self.chunk)
        for n in self.matching.groups:
            self._values[index_name(n)] = np.empty((size, 2, n), index_dtype(n))
        self._unseen = Counter(self._pair(f) for f in self.chunk.frames)
        self._used = {self.drawn[k]: k for pair in self._unseen for k in pair}

    @property
    def outside(self) -> list[int]:
        """Keyframes that the chunk's frames look at and that lie in other chunks, ascending."""
        return sorted(set(self._used) - set(self.chunk.frames))

    def outside_seen(self, seen: SourcePass) -> None:
        """Take a pass over the keyframes `outside`."""
        self._look(self.outside, seen)
        self._match()

    def add(self, frames: Sequence[int], seen: SourcePass) -> None:
        """Take a pass over the chunk's next frames."""
        self._look(frames, seen)
        self._match()
        for waiting in self._waiting.values():  # the rest of the batch's tokens goes
            waiting[:] = [(f, _own(rows) if f in frames else rows) for f, rows in waiting]
        assert seen.conv is not None  # noqa: S101 - the hook has run
        for kind, steps in self.matching.kept.items():
            if self.step < steps:
                self._keep(kind, frames, seen.conv)

    @property
    def values(self) -> dict[str, Array]:
        """By array name `index_L` (N, 2, L), shared by all sites with L tokens, and `conv`
        (N, C, h, w) float16, or `conv8` int8 with `conv8_scale` (N, C), as the clip's edits need.

        Raises:
            RuntimeError: some frames or keyframes have not been seen.
        """
        if self._waiting or self._unseen.total():
            raise RuntimeError(f"match, step {self.step}, {self.chunk.frames}: not all was seen")
        return self._values

    def _pair(self, frame: int) -> tuple[int, int]:
        return self.near[frame].first, self.near[frame].second

    def _look(self, frames: Sequence[int], seen: SourcePass) -> None:
        tokens = self.matching.joined(seen.tokens)
        for row, frame in enumerate(frames):
            own = {n: tokens_NLC[row] for n, tokens_NLC in tokens.items()}
            if frame in self._used:
                self._keyframes[self._used[frame]] = _own(own)
            if frame in self.near:
                self._waiting.setdefault(self._pair(frame), []).append((frame, own))
                self._unseen[self._pair(frame)] -= 1

    def _match(self) -> None:
        """Match the frames between two keyframes, wherever all have been seen."""
        for pair in list(self._waiting):
            if self._unseen[pair] == 0 and all(k in self._keyframes for k in pair):
                self._between(pair, self._waiting.pop(pair))
        for k in list(self._keyframes):
            if not any(k in p for p in (*self._waiting, *(+self._unseen))):
                del self._keyframes[k]

    def _between(self, pair: tuple[int, int], found: Sequence[tuple[int, Tokens]]) -> None:
        frames = [frame for frame, _ in found]
        rows = [frame - self.chunk.start for frame in frames]
        used = list(dict.fromkeys(pair))
        near = [
            Neighbours(used.index(n.first), used.index(n.second), n.weight, n.itself)
            for n in (self.near[frame] for frame in frames)
        ]
        for n in self.matching.groups:
            tokens_NLC = torch.stack([tokens[n] for _, tokens in found])
            keyframes_KLC = torch.stack([self._keyframes[k][n] for k in used])
            index_N2L = match_frames(tokens_NLC, keyframes_KLC, near, self.matching.backend)
            self._values[index_name(n)][rows] = index_N2L.cpu().numpy()

    def _keep(self, kind: str, frames: Sequence[int], conv_NChw: Tensor) -> None:
        where = f"match, sampling step {self.step}, frames {frames[0]} to {frames[-1]}"
        for array, found in stored_features(kind, conv_NChw, where).items():
            if array not in self._values:
                self._values[array] = np.empty((len(self.chunk), *found.shape[1:]), found.dtype)
            self._values[array][[f - self.chunk.start for f in frames]] = found


def _own(tokens: Tokens) -> Tokens:
    """A copy, that doesn't hold on to its batch."""
    return {n: rows.clone() for n, rows in tokens.items()}


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

"""What the default mode leaves on the table: two ways that cost or know too much to be options.

- `Residual`: an ordinary frame keeps its own source self-attention, and only what the edit changed
  on the keyframes is propagated to it. That takes the source branch in every pass: T · 3 rows a
  frame instead of T · 2.
- `exact_flow`: edited tokens come from where the exact flow says, between tokens by bilinear
  interpolation; no video has it. What a better correspondence could gain at most.

Shape suffixes: R branches, N frames in a batch, L tokens, C channels, h w token grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from methods import Method, Moment, correspondences
from options import joined, keyframe_pass
from torch import Tensor
from torch.nn import functional

from tokenflow_batch.tokenflow.attention import Hooks
from tokenflow_batch.tokenflow.denoise import Denoiser
from tokenflow_batch.tokenflow.injection import Site
from tokenflow_batch.tokenflow.keyframes import Neighbours
from tokenflow_batch.tokenflow.passes import PropagationPass, near_k


def _blend(neighbours: Sequence[Neighbours], first: Tensor, second: Tensor) -> Tensor:
    weight_N11 = torch.tensor([n.weight for n in neighbours]).to(first).view(-1, 1, 1)
    return weight_N11 * first + (1 - weight_N11) * second


class ResidualPass(PropagationPass):
    """Own source self-attention, plus the keyframes' change by the edit."""

    def self_attention(self, site: Site, attn: Any, tokens_NLC: Tensor, plain: Any) -> Tensor:
        """(3·N, L, C): the source branch is computed, the others add propagated changes to it."""
        del attn
        out_RKLC = self.keyframe_pass.outputs[site.index]
        change_RNLC = self.blended(site, out_RKLC - out_RKLC[:1], tokens_NLC)
        source_NLC = plain().chunk(self.branches)[0]
        return (source_NLC + change_RNLC).flatten(0, 1)


def residual(denoiser: Denoiser, hooks: Hooks, now: Moment, x: Tensor) -> Tensor:
    """See `Method`."""
    index, joint = correspondences(now), keyframe_pass(hooks, now, branches=3)

    def spread(batch: list[int], near: Sequence[Neighbours], **conv: Any) -> PropagationPass:
        own = [field[batch] for field in index]
        return ResidualPass(
            joint, near, branches=3, stored_index=own, matching="torch", vote_hw=_hw(x), **conv
        )

    return joined(denoiser, hooks, now, x, joint, spread)


@dataclass
class Truth:
    """Where a batch's tokens come from, by the exact flow.

    Attributes:
        now: the step, with the ground truth.
        batch: frames.
    """

    now: Moment
    batch: list[int]

    def sample(self, out_RLC: Tensor, n: int, keyframe: int, grid: tuple[int, int]) -> Tensor:
        """A keyframe's tokens where the flow from the batch's n-th frame points, (R, L, C)."""
        h, w = grid
        flow = torch.from_numpy(self.now.clip.flow(self.batch[n], keyframe).astype(np.float32))
        size = len(flow) // h
        shift_2hw = functional.avg_pool2d(flow.permute(2, 0, 1)[None], size)[0] / size
        y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        to_x, to_y = (x + shift_2hw[0] + 0.5) / w * 2 - 1, (y + shift_2hw[1] + 0.5) / h * 2 - 1
        places = torch.stack([to_x, to_y], dim=-1).expand(len(out_RLC), -1, -1, -1)
        image_RChw = out_RLC.transpose(1, 2).unflatten(-1, (h, w))
        found = functional.grid_sample(
            image_RChw, places, padding_mode="border", align_corners=False
        )
        return found.flatten(2).transpose(1, 2)

    def hidden(self, n: int, keyframe: int, grid: tuple[int, int]) -> Tensor:
        """(L, 1): tokens of which the keyframe hides more than a third."""
        mask = torch.from_numpy(self.now.clip.occluded(self.batch[n], keyframe).astype(np.float32))
        size = len(mask) // grid[0]
        return functional.avg_pool2d(mask[None, None], size).flatten().unsqueeze(1) > 1 / 3


class FlowPass(PropagationPass):
    """Tokens by the exact flow; by correspondence where the keyframe doesn't show them."""

    truth: Truth

    def self_attention(self, site: Site, attn: Any, tokens_NLC: Tensor, plain: Any) -> Tensor:
        """(R·N, L, C)."""
        del attn, plain
        out_RKLC = self.keyframe_pass.outputs[site.index][-self.branches :]
        frames = len(self.neighbours)
        sides = [
            self.blended(site, out_RKLC, tokens_NLC, [share] * frames)
            for share in ((1.0, 0.0), (0.0, 1.0))
        ]
        assert self.vote_hw is not None
        grid, now = site.grid(self.vote_hw), self.truth.now
        for side, tokens_RNLC in enumerate(sides):
            for n, near in enumerate(self.neighbours):
                k = near_k(near, side)
                frame = now.keyframes[k]
                if frame == self.truth.batch[n]:
                    continue
                moved = self.truth.sample(out_RKLC[:, k], n, frame, grid)
                hidden = self.truth.hidden(n, frame, grid)
                tokens_RNLC[:, n] = torch.where(hidden, tokens_RNLC[:, n], moved)
        return _blend(self.neighbours, *sides).flatten(0, 1)


def exact_flow(denoiser: Denoiser, hooks: Hooks, now: Moment, x: Tensor) -> Tensor:
    """See `Method`."""
    index, joint = correspondences(now), keyframe_pass(hooks, now)

    def spread(batch: list[int], near: Sequence[Neighbours], **conv: Any) -> PropagationPass:
        own = [field[batch] for field in index]
        made = FlowPass(
            joint, near, branches=2, stored_index=own, matching="torch", vote_hw=_hw(x), **conv
        )
        made.truth = Truth(now, batch)
        return made

    return joined(denoiser, hooks, now, x, joint, spread)


def _hw(x_FChw: Tensor) -> tuple[int, int]:
    return x_FChw.shape[2], x_FChw.shape[3]


BEYOND: Final[Mapping[str, Method]] = {"residual": residual, "exact flow": exact_flow}
"""By name, as the tables have them."""

"""What the default mode leaves on the table: a way that knows too much to be an option.

`exact_flow`: edited tokens come from where the exact flow says, between tokens by bilinear
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
from tokenflow_batch.tokenflow.propagation import PropagationPass, Shares, near_k


def _blend(neighbours: Sequence[Neighbours], first: Tensor, second: Tensor) -> Tensor:
    weight_N11 = torch.tensor([n.weight for n in neighbours]).to(first).view(-1, 1, 1)
    return weight_N11 * first + (1 - weight_N11) * second


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

    def blended(
        self, site: Site, out_RKLC: Tensor, tokens_NLC: Tensor, shares: Shares | None = None
    ) -> Tensor:
        """See `PropagationPass.blended`."""
        del shares
        frames = len(self.neighbours)
        sides = [
            super(FlowPass, self).blended(site, out_RKLC, tokens_NLC, [share] * frames)
            for share in ((1.0, 0.0), (0.0, 1.0))
        ]
        assert self.grids is not None
        grid, now = self.grids[site.index], self.truth.now
        for side, tokens_RNLC in enumerate(sides):
            for n, near in enumerate(self.neighbours):
                k = near_k(near, side)
                frame = now.keyframes[k]
                if frame == self.truth.batch[n]:
                    continue
                moved = self.truth.sample(out_RKLC[:, k], n, frame, grid)
                hidden = self.truth.hidden(n, frame, grid)
                tokens_RNLC[:, n] = torch.where(hidden, tokens_RNLC[:, n], moved)
        return _blend(self.neighbours, *sides)


def exact_flow(denoiser: Denoiser, hooks: Hooks, now: Moment, x: Tensor) -> Tensor:
    """See `Method`."""
    index, joint = correspondences(now), keyframe_pass(hooks, now)

    def spread(batch: list[int], near: Sequence[Neighbours], **conv: Any) -> PropagationPass:
        own = [field[batch] for field in index]
        made = FlowPass(joint, near, stored_index=own, matching="torch", **conv)
        made.truth = Truth(now, batch)
        return made

    return joined(denoiser, hooks, now, x, joint, spread)


BEYOND: Final[Mapping[str, Method]] = {"exact flow": exact_flow}
"""By name, as the tables have them."""

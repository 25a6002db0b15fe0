"""The propagation pass: ordinary frames get the keyframes' edited tokens.

Shape suffixes: R branches in a batch, N frames in a batch, K keyframes, L tokens, V candidates of a
token, C channels, X those of all branches, h w feature map or latent size. A batch holds its
branches one after the other, (R·N) rows, in the order source, negative, target.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tokenflow_batch.clock import measured
from tokenflow_batch.tokenflow.attention import attend_alone
from tokenflow_batch.tokenflow.correspondence import Backend, match_frames
from tokenflow_batch.tokenflow.focus import Focus
from tokenflow_batch.tokenflow.injection import Site
from tokenflow_batch.tokenflow.keyframes import Neighbours
from tokenflow_batch.tokenflow.modes import Following
from tokenflow_batch.tokenflow.motion import Grid, agreed_motion, between_tokens, voted
from tokenflow_batch.tokenflow.passes import KeyframePass, inject_conv

Shares = Sequence[tuple[float, float]]
"""Per frame, how much the tokens of its first and of its second keyframe count."""


class PropagationPass:
    """Ordinary frames: `attn1` is replaced by the keyframes' edited tokens (paper §4.2, eq. 6).

    Correspondences are either given (`stored_index`) or found in this very pass between the
    batch's source branch and the keyframe pass's, as the published code does.

    Frames can have attention of their `own`. With the source's, that stands where the prompts agree
    in place of what came from the keyframes' source branch: of theirs, only what the edit has
    changed gets there. With every branch's, a share of it comes back where the prompts differ, too.
    """

    def __init__(
        self,
        keyframe_pass: KeyframePass,
        neighbours: Sequence[Neighbours],
        *,
        branches: int,
        inject_conv: bool,
        stored_conv_NChw: Tensor | None,
        stored_index: Sequence[Tensor] | None,
        matching: Backend,
        grids: Sequence[Grid] | None = None,
        following: Following = "agreed",
        focus_K1hw: Tensor | None = None,
        own: int = 0,
        source_focus: Focus | None = None,
    ) -> None:
        """Set up a pass.

        Args:
            keyframe_pass: of the same window and step, performed.
            neighbours: whom each frame looks at, by position among its keyframes.
            branches: R.
            inject_conv: copy the source's convolution features.
            stored_conv_NChw: those; None takes them from the source branch.
            stored_index: γ per site, (N, 2, L) int64; None finds them.
            matching: backend for finding them.
            grids: per site, where correspondences are given; None gathers and blends as the
                published code does.
            following: with grids, by whose correspondences tokens are put together.
            focus_K1hw: at the keyframes, how far the prompts differ, 0 to 1; None where that is not
                asked.
            own: in how many branches frames compute attention of their own: in none, in one, the
                source's, or in all R.
            source_focus: watches the source branch meanwhile.

        Raises:
            ValueError: there is to be own attention without `focus_K1hw` or the source branch, or
                in some branches only.
        """
        if own and (focus_K1hw is None or branches == keyframe_pass.edited):
            raise ValueError("own attention needs the focus and the source branch")
        if own not in (0, 1, branches):
            raise ValueError(f"own attention is of 1 or all {branches} branches, not {own}")
        self.keyframe_pass, self.neighbours, self.branches = keyframe_pass, neighbours, branches
        self.grids, self.following = grids, following
        self.focus_K1hw, self.own, self.source_focus = focus_K1hw, own, source_focus
        self.inject_conv, self.stored_conv_NChw = inject_conv, stored_conv_NChw
        self.stored_index, self.matching = stored_index, matching
        self._candidates: dict[Grid, tuple[Tensor, Tensor]] = {}
        self._focused: dict[Grid, Tensor] = {}
        self._weights: Tensor | None = None

    @property
    def searches(self) -> int:
        """How many times a frame's tokens are searched in a keyframe's during the pass."""
        if self.stored_index is not None:
            return 0
        return sum(1 + (n.first != n.second) for n in self.neighbours if not n.itself)

    @property
    def kept(self) -> int:
        """Rows whose own self-attention is computed: the source's, or all."""
        return len(self.neighbours) * self.own

    @measured("correspondence")
    def self_attention(
        self,
        site: Site,
        attn: Any,
        tokens_NLC: Tensor,
        plain: Callable[[], Tensor],  # noqa: ARG002
    ) -> Tensor:
        """Tokens of the neighbouring keyframes, gathered by correspondence and blended."""
        out_RKLC = self.keyframe_pass.outputs[site.index][-self.branches :]
        moved_RNLC = self.blended(site, out_RKLC, tokens_NLC)
        if not self.own:
            return moved_RNLC.flatten(0, 1)
        own_NLC = attend_alone(attn, tokens_NLC[: self.kept], self.keyframe_pass.attention)
        own_RNLC = own_NLC.unflatten(0, (self.own, len(self.neighbours)))
        differs_NL1 = self._focus(site.index).to(own_NLC)
        moved_RNLC[1:] += (1 - differs_NL1) * (own_RNLC[0] - moved_RNLC[0])
        moved_RNLC[0] = own_RNLC[0]
        if self.own > 1:
            moved_RNLC[1:] += _SHARE * differs_NL1 * (own_RNLC[1:] - moved_RNLC[1:])
        return moved_RNLC.flatten(0, 1)

    def blended(
        self, site: Site, out_RKLC: Tensor, tokens_NLC: Tensor, shares: Shares | None = None
    ) -> Tensor:
        """The keyframes' tokens where correspondences say, both sides summed, (R, N, L, C).

        Args:
            site: which self-attention.
            out_RKLC: what is propagated.
            tokens_NLC: φ, in which correspondences are found if none are given.
            shares: per frame, how much each side counts; as its neighbours' weight says if None.
        """
        share_N2 = self._shares(shares, out_RKLC.device)
        if self.grids is None:
            index_N2L = self._correspondences(site, tokens_NLC)
            sides = (
                propagate(out_RKLC, index_N2L[:, s], self._keyframes(s))
                * share_N2[:, s].to(out_RKLC).view(-1, 1, 1)
                for s in (0, 1)
            )
            return functools.reduce(torch.add, sides)
        bags_NLV, weights_NLV = self.weighted(site.index, share_N2)
        counts = tuple((self._keyframes(s), share_N2[:, s].view(-1, 1, 1)) for s in (0, 1))
        return _mixed(out_RKLC, bags_NLV, weights_NLV, counts)

    def weighted(self, site: int, share_N2: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens that add up to one, in the keyframes' row of tokens, and how much of each.

        Args:
            site: index of the self-attention.
            share_N2: of the two sides.

        Returns:
            (N, L, V) int64 and float32.
        """
        assert self.grids is not None  # noqa: S101 - asked by its callers
        if not self._candidates:
            self._look_around(self.grids)
        bags_NLV, inner_NLV = self._candidates[self.grids[site]]
        share_NLV = share_N2.repeat_interleave(bags_NLV.shape[-1] // 2, 1).unsqueeze(1)
        return bags_NLV, inner_NLV * share_NLV

    def _look_around(self, grids: Sequence[Grid]) -> None:
        """Find every grid's candidates, once for all its sites: from coarse to fine."""
        assert self.stored_index is not None  # noqa: S101 - as the constructor wants it
        device = next(iter(self.keyframe_pass.outputs.values())).device
        sides_2N = torch.tensor([self._keyframes(s) for s in (0, 1)], device=device)
        motion = None
        for grid in sorted(set(grids)):
            given_N2L = self.stored_index[grids.index(grid)].to(device, non_blocking=True)
            match self.following:
                case "agreed":
                    motion = agreed_motion(given_N2L, grid, motion)
                    index_N2LV, inner_N2LV = between_tokens(motion)
                case "voted":
                    index_N2LV, inner_N2LV = voted(given_N2L, grid)
                case "own":
                    index_N2LV = given_N2L.unsqueeze(-1)
                    inner_N2LV = torch.ones_like(index_N2LV, dtype=torch.float32)
            bags_N2LV = index_N2LV + sides_2N.T.unflatten(1, (2, 1, 1)) * given_N2L.shape[-1]
            bags, inner = (x.transpose(1, 2).flatten(2) for x in (bags_N2LV, inner_N2LV))
            self._candidates[grid] = bags, inner

    def _focus(self, site: int) -> Tensor:
        """How far the prompts differ at the tokens of a site, (N, L, 1) float32."""
        assert self.focus_K1hw is not None  # noqa: S101 - asked by its callers
        assert self.grids is not None  # noqa: S101 - as the default mode has it
        grid = self.grids[site]
        if grid not in self._focused:
            pooled_K1hw = functional.adaptive_avg_pool2d(self.focus_K1hw, grid)
            focus_KL1 = pooled_K1hw.flatten(2).transpose(1, 2)
            share_N2 = self._shares(None, focus_KL1.device)
            self._focused[grid] = _summed(focus_KL1, *self.weighted(site, share_N2))
        return self._focused[grid]

    def focus(self) -> Tensor | None:
        """How far the prompts differ, carried from the keyframes like tokens: (N, 1, h, w) float32.

        Of a pass that has been performed, at the size of the latents; None where that is not asked.
        """
        if self.focus_K1hw is None or self.grids is None:
            return None
        finest = max(self.grids)
        fine_NL1 = self._focus(self.grids.index(finest))
        fine_N1hw = fine_NL1.transpose(1, 2).unflatten(2, finest)
        size = self.focus_K1hw.shape[2:]
        return functional.interpolate(fine_N1hw, size=size, mode="bilinear", align_corners=False)

    def _shares(self, shares: Shares | None, device: torch.device) -> Tensor:
        """How much each side of every frame counts, (N, 2) float32."""
        if shares is not None:
            return torch.tensor(shares, device=device)
        if self._weights is None:  # once for all sites: a GPU is waited for at every such copy
            first_N = torch.tensor([n.weight for n in self.neighbours])
            self._weights = torch.stack((first_N, 1 - first_N), dim=1).to(device)
        return self._weights

    def _keyframes(self, side: int) -> list[int]:
        return [near_k(n, side) for n in self.neighbours]

    def pin(self, device: torch.device) -> None:
        """Have the stored features ready for a GPU to fetch by itself, while it computes.

        For the thread that reads ahead. On a CPU there is nothing to do.
        """
        if device.type != "cuda":
            return
        if self.stored_conv_NChw is not None:
            self.stored_conv_NChw = self.stored_conv_NChw.pin_memory()
        if self.stored_index is not None:  # sites of one grid have one tensor, and go on having it
            pinned = {id(index): index.pin_memory() for index in self.stored_index}
            self.stored_index = [pinned[id(index)] for index in self.stored_index]

    def _correspondences(self, site: Site, tokens_NLC: Tensor) -> Tensor:
        if self.stored_index is not None:
            return self.stored_index[site.index].to(tokens_NLC.device, non_blocking=True)
        source_NLC = tokens_NLC.chunk(self.branches)[0]
        keyframes_KLC = self.keyframe_pass.tokens[site.index]
        return match_frames(source_NLC, keyframes_KLC, self.neighbours, self.matching)

    def conv_features(self, features_NChw: Tensor) -> Tensor:
        """Plug-and-Play injection, if this step asks for it."""
        if not self.inject_conv:
            return features_NChw
        edited = self.keyframe_pass.edited
        return inject_conv(features_NChw, self.branches, self.stored_conv_NChw, edited)


def near_k(neighbours: Neighbours, side: int) -> int:
    """The keyframe position on side 0 (first) or 1 (second)."""
    return neighbours.second if side else neighbours.first


def propagate(out_RKLC: Tensor, index_NL: Tensor, keyframe: Sequence[int]) -> Tensor:
    """out[k_n][γ_n[p]] for every frame n and token p: (R, N, L, C)."""
    tokens = out_RKLC.shape[2]
    offset_N1 = torch.tensor(keyframe, device=out_RKLC.device).view(-1, 1) * tokens
    flat = (index_NL.to(out_RKLC.device) + offset_N1).flatten()
    return out_RKLC.flatten(1, 2)[:, flat].unflatten(1, index_NL.shape)


_SHARE = 0.25
"""How much of its edit's own attention a frame takes where the prompts differ, if it takes any."""

_MOST = 1.5
"""As much as a mix of tokens is restored at most: what cancels out nearly has no direction left."""


def _mixed(
    x_RKLC: Tensor,
    bags_NLV: Tensor,
    weights_NLV: Tensor,
    sides: Sequence[tuple[Sequence[int], Tensor]],
) -> Tensor:
    """Each token's candidates, weighted and added up, without loss of contrast, (R, N, L, C).

    A sum of tokens that differ lies nearer to the mean of all than they do, which blurs. It is
    taken away from the mean again, to the distance that they have in the weighted mean, as
    spherical interpolation keeps the length of what it interpolates.

    Args:
        x_RKLC: tokens of the keyframes.
        bags_NLV: the candidates, in their row of tokens.
        weights_NLV: how much each counts.
        sides: the keyframe of every frame and how much it counts, (N, 1, 1).
    """
    # The branches' channels beside each other: what is to be fetched is found once for all.
    x_KLRC = x_RKLC.permute(1, 2, 0, 3).contiguous()
    mean_K1RC = x_KLRC.mean(dim=1, keepdim=True)
    distance_KLR = _length(x_KLRC - mean_K1RC).squeeze(3)
    means = (mean_K1RC[k] * share.to(x_KLRC).unsqueeze(3) for k, share in sides)
    mean_N1RC = functools.reduce(torch.add, means)
    mixed_NLX = _summed(x_KLRC.flatten(2), bags_NLV, weights_NLV)
    apart_NLRC = mixed_NLX.unflatten(2, x_KLRC.shape[2:]).sub_(mean_N1RC)
    wanted_NLR1 = _summed(distance_KLR, bags_NLV, weights_NLV).unsqueeze(3)
    restored_NLR1 = wanted_NLR1 / _length(apart_NLRC).clamp(min=torch.finfo(torch.float32).tiny)
    apart_NLRC.mul_(restored_NLR1.clamp(1, _MOST).to(x_KLRC)).add_(mean_N1RC)
    return apart_NLRC.permute(2, 0, 1, 3).contiguous()


def _length(x: Tensor) -> Tensor:
    """Of the last dimension's vectors, (…, 1), at least float32."""
    precise = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=precise)


def _summed(x_KLC: Tensor, bags_NLV: Tensor, weights_NLV: Tensor) -> Tensor:
    """Each token's candidates, weighted and added up, (N, L, C).

    In one pass over them, where a sum of gathered copies takes one for each candidate.
    """
    summed = functional.embedding_bag(
        bags_NLV.flatten(0, 1),
        x_KLC.flatten(0, 1),
        mode="sum",
        per_sample_weights=weights_NLV.to(x_KLC).flatten(0, 1),
    )
    return summed.unflatten(0, bags_NLV.shape[:2])

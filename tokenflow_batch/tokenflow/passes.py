"""The kinds of UNet pass: source, whole or for its features; joint keyframe edit; propagation.

Shape suffixes: R branches in a batch, N frames in a batch, K keyframes, L tokens, H heads,
D channels per head, C channels, h w feature map size. A batch holds its branches one after the
other, (R·N) rows, in the order source, negative, target.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tokenflow_batch.clock import measured
from tokenflow_batch.tokenflow.attention import (
    AttentionBackend,
    attend,
    merge_heads,
    split_heads,
)
from tokenflow_batch.tokenflow.correspondence import Backend, match_frames, vote
from tokenflow_batch.tokenflow.focus import Focus
from tokenflow_batch.tokenflow.injection import Site
from tokenflow_batch.tokenflow.keyframes import Neighbours

Shares = Sequence[tuple[float, float]]
"""Per frame, how much the tokens of its first and of its second keyframe count."""


class Enough(Exception):  # noqa: N818 - nothing is wrong
    """Raised by a pass to leave the UNet: what comes after is not needed."""


class SourcePass:
    """Plain UNet evaluation of source frames that keeps tokens φ and convolution features.

    Attributes:
        conv: convolution features at the PnP site, (N, C, h, w).
    """

    def __init__(self) -> None:
        self.conv: Tensor | None = None
        self._by_site: dict[int, Tensor] = {}

    def self_attention(
        self,
        site: Site,
        attn: Any,  # noqa: ARG002
        tokens_NLC: Tensor,
        plain: Callable[[], Tensor],
    ) -> Tensor:
        """Keep φ, compute as usual."""
        self._by_site[site.index] = tokens_NLC
        return plain()

    @property
    def tokens(self) -> list[Tensor]:
        """Per site in order, φ (N, L, C)."""
        return [self._by_site[i] for i in sorted(self._by_site)]

    def conv_features(self, features_NChw: Tensor) -> Tensor:
        """Keep the features, change nothing."""
        self.conv = features_NChw
        return features_NChw

    def merged(self, newer: SourcePass, rows_N: Tensor) -> SourcePass:
        """What `newer` saw where `rows_N`, bool, says so, and what this one did elsewhere."""
        if rows_N.all():
            return newer
        both = SourcePass()
        for site, tokens_NLC in self._by_site.items():
            chosen = rows_N.view(-1, 1, 1)
            both._by_site[site] = torch.where(chosen, newer._by_site[site], tokens_NLC)
        if self.conv is not None and newer.conv is not None:
            both.conv = torch.where(rows_N.view(-1, 1, 1, 1), newer.conv, self.conv)
        return both


class FeaturePass:
    """Evaluation of source frames for the convolution features alone; leaves the UNet there.

    Attributes:
        conv: convolution features at the PnP site, (N, C, h, w).
    """

    def __init__(self) -> None:
        self.conv: Tensor | None = None

    def self_attention(
        self,
        site: Site,  # noqa: ARG002
        attn: Any,  # noqa: ARG002
        tokens_NLC: Tensor,  # noqa: ARG002
        plain: Callable[[], Tensor],
    ) -> Tensor:
        """Compute as usual."""
        return plain()

    def conv_features(self, features_NChw: Tensor) -> Tensor:
        """Keep the features and leave.

        Raises:
            Enough: always.
        """
        self.conv = features_NChw
        raise Enough


def inject_conv(
    features: Tensor, branches: int, source_NChw: Tensor | None, edited: int = 2
) -> Tensor:
    """Copy source convolution features over the negative and target branches.

    Args:
        features: (R·N, C, h, w).
        branches: R.
        source_NChw: stored source features, or None to take the batch's own source branch.
        edited: how many of the last branches are not the source's.
    """
    parts = list(features.chunk(branches))
    if source_NChw is None:
        source_NChw = parts[0]
    parts[-edited:] = [source_NChw.to(features, non_blocking=True)] * edited
    return torch.cat(parts)


class KeyframePass:
    """Joint edit of the keyframes by extended attention (paper §4.1, eq. 3).

    In the negative and target branches every keyframe's queries attend to the keys and values of
    all keyframes; the source branch, if the batch has one, attends within its own frame.

    A window of a long clip brings anchors along, A keyframes of the whole clip, in front of its own
    in every branch. They attend among themselves, so that they come out the same in every window;
    the window's keyframes attend to those anchors that are `foreign` to it, and to each other.

    Attributes:
        outputs: per site, the self-attention output of the window's own keyframes after `to_out`,
            (R, K, L, C).
        tokens: per site, the source branch's φ of the same (K, L, C), if `keep_tokens`.
        conv: the source's convolution features of the same (K, C, h, w), if they are injected.
    """

    def __init__(
        self,
        *,
        branches: int,
        inject_qk: bool,
        inject_conv: bool,
        stored_conv_KChw: Tensor | None,
        attention: AttentionBackend,
        keep_tokens: bool = False,
        foreign: Sequence[bool] = (),
        guided: bool = True,
    ) -> None:
        """Set up a pass.

        Args:
            branches: R: source where needed, negative where `guided`, target.
            inject_qk: copy the source's queries and keys at the PnP sites.
            inject_conv: copy its convolution features.
            stored_conv_KChw: those, anchors included; None takes them from the source branch.
            attention: backend.
            keep_tokens: for finding correspondences on the way.
            foreign: per anchor, whether it is none of the window's keyframes.
            guided: whether the batch has the negative branch.
        """
        self.edited = 1 + guided
        if inject_qk and branches == self.edited:
            raise ValueError("injecting queries and keys needs the source branch in the batch")
        if keep_tokens and branches == self.edited:
            raise ValueError("keeping source tokens needs the source branch in the batch")
        self.branches, self.inject_qk, self.inject_conv = branches, inject_qk, inject_conv
        self.stored_conv_KChw, self.attention = stored_conv_KChw, attention
        self.keep_tokens, self.foreign = keep_tokens, tuple(foreign)
        self.outputs: dict[int, Tensor] = {}
        self.tokens: dict[int, Tensor] = {}
        self.conv: Tensor | None = None

    def frame_pairs(self, frames: int) -> int:
        """How many (frame, frame) pairs attend, of all branches, for so many frames a branch."""
        anchors = len(self.foreign)
        seen = frames - anchors + sum(self.foreign)
        joint = anchors**2 + (frames - anchors) * seen
        return self.edited * joint + (self.branches - self.edited) * frames

    def self_attention(
        self,
        site: Site,
        attn: Any,
        tokens_NLC: Tensor,
        plain: Callable[[], Tensor],  # noqa: ARG002
    ) -> Tensor:
        """Extended attention; keeps the output for the propagation pass."""
        frames, anchors = len(tokens_NLC) // self.branches, len(self.foreign)
        if self.keep_tokens:
            self.tokens[site.index] = tokens_NLC[anchors:frames]
        q_RKHLD, k_RKHLD, v_RKHLD = (
            split_heads(project(tokens_NLC), attn.heads).unflatten(0, (self.branches, frames))
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        joined = []
        for r in range(self.branches):
            source = r < self.branches - self.edited
            qk = 0 if self.inject_qk and site.inject_qk else r
            q, k, v = q_RKHLD[qk], k_RKHLD[qk], v_RKHLD[r]
            if source:
                joined.append(merge_heads(attend(q, k, v, attn.scale, self.attention)))
                continue
            if anchors:
                joined.append(self._together(attn, q[:anchors], k[:anchors], v[:anchors]))
                q, k, v = q[anchors:], k[self._seen(frames)], v[self._seen(frames)]
            joined.append(self._together(attn, q, k, v))
        out_NLC: Tensor = attn.to_out[1](attn.to_out[0](torch.cat(joined)))
        self.outputs[site.index] = out_NLC.unflatten(0, (self.branches, frames))[:, anchors:]
        return out_NLC

    def _seen(self, frames: int) -> slice | list[int]:
        """Whom the window's keyframes attend to; a slice, which copies nothing, where it can."""
        if all(self.foreign):
            return slice(None)
        anchors = len(self.foreign)
        return [a for a in range(frames) if a >= anchors or self.foreign[a]]

    def _together(self, attn: Any, q_KHLD: Tensor, k_MHLD: Tensor, v_MHLD: Tensor) -> Tensor:
        """Attention of frames to the tokens of all given ones as one sequence, (K, L, H·D).

        All frames' queries are one sequence too, so that there is one K and one V for all of them;
        both are views of what the projections gave.
        """
        q, k, v = (x.transpose(0, 1).flatten(1, 2).unsqueeze(0) for x in (q_KHLD, k_MHLD, v_MHLD))
        out = merge_heads(attend(q, k, v, attn.scale, self.attention))
        return out.reshape(len(q_KHLD), q_KHLD.shape[2], -1)

    def conv_features(self, features_NChw: Tensor) -> Tensor:
        """Plug-and-Play injection, if this step asks for it."""
        if not self.inject_conv:
            return features_NChw
        source_KChw = self.stored_conv_KChw
        if source_KChw is None:
            source_KChw = features_NChw.chunk(self.branches)[0]
        self.conv = source_KChw[len(self.foreign) :]
        return inject_conv(features_NChw, self.branches, source_KChw, self.edited)


class PropagationPass:
    """Ordinary frames: `attn1` is replaced by the keyframes' edited tokens (paper §4.2, eq. 6).

    Correspondences are either given (`stored_index`) or found in this very pass between the
    batch's source branch and the keyframe pass's, as the published code does.
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
        vote_hw: tuple[int, int] | None = None,
        focus: Focus | None = None,
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
            vote_hw: latent size (h, w) to let neighbouring tokens vote; None for the plain field.
            focus: watches the target branch meanwhile.
        """
        self.keyframe_pass, self.neighbours, self.branches = keyframe_pass, neighbours, branches
        self.vote_hw, self.focus = vote_hw, focus
        self.inject_conv, self.stored_conv_NChw = inject_conv, stored_conv_NChw
        self.stored_index, self.matching = stored_index, matching
        self._voted: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._weights: Tensor | None = None

    @property
    def searches(self) -> int:
        """How many times a frame's tokens are searched in a keyframe's during the pass."""
        if self.stored_index is not None:
            return 0
        return sum(1 + (n.first != n.second) for n in self.neighbours if not n.itself)

    @measured("correspondence")
    def self_attention(
        self,
        site: Site,
        attn: Any,  # noqa: ARG002
        tokens_NLC: Tensor,
        plain: Callable[[], Tensor],  # noqa: ARG002
    ) -> Tensor:
        """Tokens of the neighbouring keyframes, gathered by correspondence and blended."""
        out_RKLC = self.keyframe_pass.outputs[site.index][-self.branches :]
        return self.blended(site, out_RKLC, tokens_NLC).flatten(0, 1)

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
        if self.vote_hw is None:
            index_N2L = self._correspondences(site, tokens_NLC)
            sides = (
                propagate(out_RKLC, index_N2L[:, s], self._keyframes(s))
                * share_N2[:, s].to(out_RKLC).view(-1, 1, 1)
                for s in (0, 1)
            )
            return functools.reduce(torch.add, sides)
        bags_NLV, votes_NLV = self._votes(site, self.vote_hw, tokens_NLC)
        share_NLV = share_N2.repeat_interleave(votes_NLV.shape[-1] // 2, 1).unsqueeze(1)
        weights = (votes_NLV * share_NLV).to(out_RKLC).flatten(0, 1)
        # One pass over the tokens that add up to one, which a sum of gathered copies takes 18 for.
        summed = [
            functional.embedding_bag(
                bags_NLV.flatten(0, 1),
                out_KLC.flatten(0, 1),
                mode="sum",
                per_sample_weights=weights,
            )
            for out_KLC in out_RKLC
        ]
        return torch.stack(summed).unflatten(1, bags_NLV.shape[:2])

    def _shares(self, shares: Shares | None, device: torch.device) -> Tensor:
        """How much each side of every frame counts, (N, 2) float32."""
        if shares is not None:
            return torch.tensor(shares, device=device)
        if self._weights is None:  # once for all sites: a GPU is waited for at every such copy
            first_N = torch.tensor([n.weight for n in self.neighbours])
            self._weights = torch.stack((first_N, 1 - first_N), dim=1).to(device)
        return self._weights

    def _votes(self, site: Site, hw: tuple[int, int], tokens_NLC: Tensor) -> tuple[Tensor, Tensor]:
        """All candidates for a token in the keyframes' row of tokens, and the share of its side
        that each has, (N, L, V): found once for all sites that have the same correspondences."""
        tokens = tokens_NLC.shape[1]
        source = None if self.stored_index is None else self.stored_index[site.index]
        known = self._voted.get(tokens)
        if known is not None and source is not None and known[0] is source:
            return known[1:]
        index_N2L, (_, width) = self._correspondences(site, tokens_NLC), site.grid(hw)
        index_N2LV, weight_N2LV = vote(index_N2L, width)
        sides = torch.tensor([self._keyframes(s) for s in (0, 1)], device=index_N2L.device)
        bags_N2LV = index_N2LV + sides.T.unflatten(1, (2, 1, 1)) * tokens
        bags_NLV, votes_NLV = (x.transpose(1, 2).flatten(2) for x in (bags_N2LV, weight_N2LV))
        if source is not None:
            self._voted[tokens] = source, bags_NLV, votes_NLV
        return bags_NLV, votes_NLV

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
            # Votes are counted where the tokens are.
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

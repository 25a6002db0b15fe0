"""The kinds of UNet pass but propagation: source, whole or for its features; joint keyframe edit.

Shape suffixes: R branches in a batch, N frames in a batch, K keyframes, L tokens, H heads,
D channels per head, C channels, h w feature map size. A batch holds its branches one after the
other, (R·N) rows, in the order source, negative, target.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenflow_batch.tokenflow.attention import (
    AttentionBackend,
    attend,
    merge_heads,
    split_heads,
)
from tokenflow_batch.tokenflow.focus import Focus
from tokenflow_batch.tokenflow.injection import Site
from tokenflow_batch.tokenflow.windows import UNANCHORED, Standing


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
    the window's keyframes attend to those anchors that are `foreign` to it, and to each other. Each
    weighs as many times as it stands for keyframes of the clip, as if those were there instead.

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
        standing: Standing = UNANCHORED,
        guided: bool = True,
        focus: Focus | None = None,
    ) -> None:
        """Set up a pass.

        Args:
            branches: R: source where needed, negative where `guided`, target.
            inject_qk: copy the source's queries and keys at the PnP sites.
            inject_conv: copy its convolution features.
            stored_conv_KChw: those, anchors included; None takes them from the source branch.
            attention: backend.
            keep_tokens: for finding correspondences on the way.
            standing: of anchors and keyframes; none where there are no anchors.
            guided: whether the batch has the negative branch.
            focus: watches the target branch meanwhile.
        """
        self.edited, self.focus = 1 + guided, focus
        if inject_qk and branches == self.edited:
            raise ValueError("injecting queries and keys needs the source branch in the batch")
        if keep_tokens and branches == self.edited:
            raise ValueError("keeping source tokens needs the source branch in the batch")
        self.branches, self.inject_qk, self.inject_conv = branches, inject_qk, inject_conv
        self.stored_conv_KChw, self.attention = stored_conv_KChw, attention
        self.keep_tokens, self.standing = keep_tokens, standing
        self.outputs: dict[int, Tensor] = {}
        self.tokens: dict[int, Tensor] = {}
        self.conv: Tensor | None = None

    def frame_pairs(self, frames: int) -> int:
        """How many (frame, frame) pairs attend, of all branches, for so many frames a branch."""
        anchors = len(self.standing)
        seen = frames - anchors + sum(self.standing.foreign)
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
        frames, anchors = len(tokens_NLC) // self.branches, len(self.standing)
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
                among = self.standing.among
                joined.append(self._together(attn, q[:anchors], k[:anchors], v[:anchors], among))
                q, k, v = q[anchors:], k[self._seen(frames)], v[self._seen(frames)]
            joined.append(self._together(attn, q, k, v, self.standing.seen))
        out_NLC: Tensor = attn.to_out[1](attn.to_out[0](torch.cat(joined)))
        self.outputs[site.index] = out_NLC.unflatten(0, (self.branches, frames))[:, anchors:]
        return out_NLC

    def _seen(self, frames: int) -> slice | list[int]:
        """Whom the window's keyframes attend to; a slice, which copies nothing, where it can."""
        foreign = self.standing.foreign
        if all(foreign):
            return slice(None)
        return [a for a in range(frames) if a >= len(foreign) or foreign[a]]

    def _together(
        self, attn: Any, q_KHLD: Tensor, k_MHLD: Tensor, v_MHLD: Tensor, counts: Sequence[int] = ()
    ) -> Tensor:
        """Attention of frames to the tokens of all given ones as one sequence, (K, L, H·D).

        All frames' queries are one sequence too, so that there is one K and one V for all of them;
        both are views of what the projections gave. `counts` says how many each frame attended to
        stands for, where it isn't one.
        """
        q, k, v = (x.transpose(0, 1).flatten(1, 2).unsqueeze(0) for x in (q_KHLD, k_MHLD, v_MHLD))
        many_M = None
        if any(count != 1 for count in counts):
            many_M = k.new_tensor(counts).repeat_interleave(k_MHLD.shape[2])
        out = merge_heads(attend(q, k, v, attn.scale, self.attention, many_M))
        return out.reshape(len(q_KHLD), q_KHLD.shape[2], -1)

    def conv_features(self, features_NChw: Tensor) -> Tensor:
        """Plug-and-Play injection, if this step asks for it."""
        if not self.inject_conv:
            return features_NChw
        source_KChw = self.stored_conv_KChw
        if source_KChw is None:
            source_KChw = features_NChw.chunk(self.branches)[0]
        self.conv = source_KChw[len(self.standing) :]
        return inject_conv(features_NChw, self.branches, source_KChw, self.edited)

"""Variants of the default method that have to earn their place: see `OPTIONS`.

Each changes how a token of an ordinary frame is put together from the keyframes' edited tokens:
which tokens (the field), how much each counts, or whether it attends for itself instead.

Shape suffixes: F frames, K keyframes, L tokens, M tokens of a keyframe, k candidates per side,
R branches, N frames in a batch, H heads, D channels per head, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from methods import Method, Moment, TokenFlow, correspondences, neighbours, predict
from torch import Tensor

from tokenflow_batch.tokenflow.attention import Hooks, attend, merge_heads, split_heads
from tokenflow_batch.tokenflow.correspondence import normalise, vote
from tokenflow_batch.tokenflow.denoise import Denoiser
from tokenflow_batch.tokenflow.focus import Focus, guided
from tokenflow_batch.tokenflow.injection import Site
from tokenflow_batch.tokenflow.keyframes import Neighbours, segments
from tokenflow_batch.tokenflow.modes import DEFAULT, branch_count
from tokenflow_batch.tokenflow.passes import KeyframePass, PropagationPass, near_k, propagate
from tokenflow_batch.tokenflow.windows import batches


@dataclass(frozen=True)
class Field:
    """What a site's ordinary tokens are made of.

    Attributes:
        index: token of each keyframe, (F, 2, L, k) int64.
        weight: how much each counts, (F, 2, L, k); sums to 1 over sides and candidates.
        similarity: of the best candidate of either side, (F, L).
    """

    index: Tensor
    weight: Tensor
    similarity: Tensor


Restrict = Callable[[Tensor, int], Tensor]
"""(similarities (L, M), tokens per row of the grid) → similarities with some of them ruled out."""


def similarities(tokens_FLC: Tensor, frame: int, keyframe: int) -> Tensor:
    """Cosine of every pair of tokens, (L, M)."""
    return normalise(tokens_FLC[frame]) @ normalise(tokens_FLC[keyframe]).T


def _grid_distance(first_L: Tensor, second_L: Tensor, width: int) -> Tensor:
    """Tokens between two places of a grid, the larger of rows and columns."""
    rows = (first_L // width - second_L // width).abs()
    return torch.maximum(rows, (first_L % width - second_L % width).abs())


@dataclass(frozen=True)
class Building:
    """How a field is made.

    Attributes:
        candidates: k of soft top-k neighbours; 1 takes the best alone.
        temperature: of their softmax over cosines.
        reach: tokens that going to a keyframe and back may miss by, None without that check. Where
            one side fails it and the other does not, the other counts alone.
        radius: of the search, as a share of the grid's side; None searches everywhere.
        shared: one field per resolution, from the mean similarity of its sites.
        vote: each token is the mean of what its 3 × 3 neighbours' matches say about it, weighted
            1-2-1 both ways: from the plain field, so nothing more is stored.
    """

    candidates: int = 1
    temperature: float = 0.05
    reach: int | None = None
    radius: float | None = None
    shared: bool = True
    vote: bool = True

    def fields(self, now: Moment) -> list[Field]:
        """One per site, in order."""
        if not self.shared:
            return [self._field(now, [tokens]) for tokens in now.tokens]
        groups: dict[int, list[Tensor]] = {}
        for tokens in now.tokens:
            groups.setdefault(tokens.shape[1], []).append(tokens)
        made = {length: self._field(now, group) for length, group in groups.items()}
        return [made[tokens.shape[1]] for tokens in now.tokens]

    def _field(self, now: Moment, group: Sequence[Tensor]) -> Field:
        near = neighbours(now)
        frames, length = group[0].shape[:2]
        width = round(length * now.source.shape[3] / now.source.shape[2]) ** 0.5
        index = torch.zeros(frames, 2, length, self.candidates, dtype=torch.int64)
        weight, sound = torch.zeros(index.shape), torch.ones(frames, 2, length, dtype=torch.bool)
        best = torch.zeros(frames, length)
        for f, n in enumerate(near):
            for side, (k, share) in enumerate(((n.first, n.weight), (n.second, 1 - n.weight))):
                both = sum(similarities(t, f, now.keyframes[k]) for t in group)
                assert isinstance(both, Tensor)
                found = self._one(both / len(group), int(width), itself=n.itself)
                index[f, side], inner, sound[f, side], similarity = found
                weight[f, side] = share * inner
                best[f] = torch.maximum(best[f], similarity)
        if self.reach is not None:
            weight = _trust(weight, sound)
        if self.vote:
            index, voted = vote(index[..., 0], int(width))
            weight = voted * weight
        return Field(index, weight, best)

    def _one(
        self, cosine_LM: Tensor, width: int, *, itself: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Candidates and weights (L, k), whether the way back agrees (L,), cosine (L,)."""
        own = torch.arange(len(cosine_LM))
        if itself:
            index = own.unsqueeze(1).repeat(1, self.candidates)
            weight = torch.zeros(index.shape)
            weight[:, 0] = 1
            return index, weight, torch.ones(len(own), dtype=torch.bool), torch.ones(len(own))
        if self.radius is not None:
            far = _grid_distance(own.unsqueeze(1), own.unsqueeze(0), width) > self.radius * width
            cosine_LM = cosine_LM.masked_fill(far, -2)
        cosine, index = cosine_LM.topk(min(self.candidates, len(own)), dim=1)
        missing = (0, self.candidates - cosine.shape[1])  # a coarse site may have fewer tokens
        weight = torch.nn.functional.pad(torch.softmax(cosine / self.temperature, dim=1), missing)
        index = torch.nn.functional.pad(index, missing)
        back = cosine_LM.argmax(dim=0)[index[:, 0]]
        sound = _grid_distance(back, own, width) <= (self.reach or 0)
        return index, weight, sound, cosine[:, 0]


def _trust(weight_F2Lk: Tensor, sound_F2L: Tensor) -> Tensor:
    """Give a side that fails its check to the other one, where that one passes."""
    side = sound_F2L & ~sound_F2L.flip(1)
    share = weight_F2Lk.sum(dim=(1, 3), keepdim=True)
    only = torch.where(side.unsqueeze(-1), weight_F2Lk, torch.zeros(()))
    total = only.sum(dim=(1, 3), keepdim=True)
    # At a keyframe itself, or where a side has no weight to begin with, nothing changes.
    usable = side.any(dim=1, keepdim=True).unsqueeze(-1) & (total > 1e-6)
    return torch.where(usable, only / total.clamp(min=1e-6) * share, weight_F2Lk)


class RememberingPass(KeyframePass):
    """A keyframe pass that keeps keys and values for ordinary frames to attend to."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.keys: dict[int, tuple[Tensor, Tensor]] = {}

    def self_attention(
        self, site: Site, attn: Any, tokens_NLC: Tensor, plain: Callable[[], Tensor]
    ) -> Tensor:
        """As in `KeyframePass`; keeps (R, H, K·L, D) keys and values besides."""
        frames = len(tokens_NLC) // self.branches
        self.keys[site.index] = tuple(
            split_heads(project(tokens_NLC), attn.heads)
            .unflatten(0, (self.branches, frames))
            .transpose(1, 2)
            .flatten(2, 3)
            for project in (attn.to_k, attn.to_v)
        )
        return super().self_attention(site, attn, tokens_NLC, plain)


class FieldPass(PropagationPass):
    """Propagation by a `Field` per site; tokens below `gate` attend to the keyframes themselves."""

    def __init__(
        self, *arguments: Any, fields: Sequence[Field], gate: float | None, **options: Any
    ) -> None:
        super().__init__(*arguments, **options, stored_index=None, matching="torch")
        self.fields, self.gate = fields, gate

    def self_attention(
        self, site: Site, attn: Any, tokens_NLC: Tensor, plain: Callable[[], Tensor]
    ) -> Tensor:
        """Weighted sum of the candidates' edited tokens."""
        del plain
        found = self.fields[site.index]
        out_RKLC = self.keyframe_pass.outputs[site.index][-self.branches :]
        total = torch.zeros(())
        for side in (0, 1):
            keyframes = [near_k(n, side) for n in self.neighbours]
            for c in range(found.index.shape[3]):
                part = propagate(out_RKLC, found.index[:, side, :, c], keyframes)
                total = total + part * found.weight[:, side, :, c, None]
        if self.gate is not None:
            unsure_NL1 = (found.similarity < self.gate).unsqueeze(-1)
            if unsure_NL1.any():
                total = torch.where(unsure_NL1, self._attended(site, attn, tokens_NLC), total)
        return total.flatten(0, 1)

    def _attended(self, site: Site, attn: Any, tokens_NLC: Tensor) -> Tensor:
        """What the frames' own queries find in the keyframes, (R, N, L, C)."""
        assert isinstance(self.keyframe_pass, RememberingPass)
        keys_RHMD, values_RHMD = (x[-self.branches :] for x in self.keyframe_pass.keys[site.index])
        q_RNHLD = split_heads(attn.to_q(tokens_NLC), attn.heads).unflatten(0, (self.branches, -1))
        parts = []
        for q, k, v in zip(q_RNHLD, keys_RHMD, values_RHMD, strict=True):
            k, v = (x.unsqueeze(0).expand(len(q), -1, -1, -1) for x in (k, v))
            out = merge_heads(attend(q, k, v, attn.scale, "sdpa"))
            parts.append(attn.to_out[1](attn.to_out[0](out)))
        return torch.stack(parts)


@dataclass(frozen=True)
class Variant:
    """The default method with another way of putting tokens together."""

    building: Building = Building()
    gate: float | None = None

    def __call__(self, denoiser: Denoiser, hooks: Hooks, now: Moment, x: Tensor) -> Tensor:
        """See `Method`."""
        joint = keyframe_pass(hooks, now, KeyframePass if self.gate is None else RememberingPass)
        fields = self.building.fields(now)

        def spread(batch: list[int], near: Sequence[Neighbours], **conv: Any) -> FieldPass:
            own = [Field(f.index[batch], f.weight[batch], f.similarity[batch]) for f in fields]
            return FieldPass(joint, near, branches=2, fields=own, gate=self.gate, **conv)

        return joined(denoiser, hooks, now, x, joint, spread)


def keyframe_pass(
    hooks: Hooks, now: Moment, kind: type[KeyframePass] = KeyframePass, branches: int | None = None
) -> KeyframePass:
    """The default mode's joint pass at this step, to be performed; `branches` if not its own."""
    conv, qk = now.step < now.injection.conv_steps, now.step < now.injection.qk_steps
    return kind(
        branches=branches or branch_count(DEFAULT, now.injection, now.step, keyframe_pass=True),
        inject_qk=qk,
        inject_conv=conv,
        stored_conv_KChw=now.conv[list(now.keyframes)] if conv else None,
        attention=hooks.attention,
    )


def joined(
    denoiser: Denoiser,
    hooks: Hooks,
    now: Moment,
    x: Tensor,
    joint: KeyframePass,
    spread: Callable[..., PropagationPass],
) -> Tensor:
    """Guided noise of all frames: the joint pass, then one pass for each batch of them.

    Args:
        denoiser: the model.
        hooks: its seams.
        now: the step.
        x: edited latents, (F, C, h, w).
        joint: of the keyframes, not performed yet.
        spread: makes the pass of a batch from its frames, their neighbours and the conv features.
    """
    predict(denoiser, hooks, now, joint, x, list(now.keyframes))
    near, conv, found = neighbours(now), now.step < now.injection.conv_steps, []
    guidance = now.guidance()
    for frames in batches(now.frames, now.thresholds.segment_length):
        batch = list(frames)
        features = {"inject_conv": conv, "stored_conv_NChw": now.conv[batch] if conv else None}
        active = spread(batch, [near[f] for f in batch], **features)
        focus = None
        if guidance.focused(now.step):
            hw = (x.shape[2], x.shape[3])
            focus = Focus(denoiser.unet, now.prompts.source, len(batch), hw)
        *_, negative, target = predict(denoiser, hooks, now, active, x, batch, focus)
        found.append(guided(negative, target, guidance.scale, focus))
    return torch.cat(found)


def middle_keyframes(now: Moment) -> list[int]:
    """The same keyframes at every step: the middle of each segment."""
    length = now.thresholds.segment_length
    return [s.start + len(s) // 2 for s in segments(len(now.source), length)]


OPTIONS: Final[Mapping[str, Method]] = {
    "no vote": TokenFlow(replace(DEFAULT, vote=False)),
    "guidance to 0.8": TokenFlow(interval=(0.0, 0.8)),
    "fixed keyframes": TokenFlow(keyframes=middle_keyframes),
    "forward-backward": Variant(Building(reach=1)),
    "gate 0.6": Variant(gate=0.6),
    "gate 0.8": Variant(gate=0.8),
    "soft top-4": Variant(Building(candidates=4, vote=False)),
    "local search": Variant(Building(radius=0.25)),
    "field per site": Variant(Building(shared=False)),
}
"""Beside the methods of `methods`: what each changes says its `Building`."""

PLAIN: Final = Variant()
"""The default rebuilt from these parts; equal to it but for the order of sums."""


def endpoint_errors(now: Moment, clip: Any, hooks: Hooks) -> dict[str, float]:
    """Mean distance of the correspondences from the exact flow, in tokens, by site.

    Args:
        now: with its tokens.
        clip: the ground truth.
        hooks: for the sites' names.

    Returns:
        Per site's module path; tokens that the keyframe does not show are left out.
    """
    near, index = neighbours(now), correspondences(now)
    sums = {site.name: [0.0, 0] for site in hooks.sites}
    for f, n in enumerate(near):
        for side, k in enumerate((n.first, n.second)):
            to = now.keyframes[k]
            flow, hidden = clip.flow(f, to), clip.occluded(f, to)
            for site in hooks.sites:
                errors = _endpoint(index[site.index][f, side], flow, hidden)
                sums[site.name][0] += float(errors.sum())
                sums[site.name][1] += len(errors)
    return {name: total / max(count, 1) for name, (total, count) in sums.items()}


def _endpoint(index_L: Tensor, flow: Any, hidden: Any) -> Tensor:
    """Distances in tokens, (visible tokens,)."""
    width = round(len(index_L) ** 0.5)
    size = len(flow) // width
    centre = size // 2
    exact = torch.from_numpy(flow[centre::size, centre::size]).reshape(-1, 2) / size
    seen = ~torch.from_numpy(hidden[centre::size, centre::size]).reshape(-1)
    own = torch.arange(len(index_L))
    found = torch.stack([index_L % width - own % width, index_L // width - own // width], dim=1)
    return (found - exact).norm(dim=1)[seen]

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
from methods import Matches, Method, Moment, TokenFlow, neighbours, predict
from torch import Tensor

from tokenflow_batch.tokenflow.attention import Hooks, attend, merge_heads, split_heads
from tokenflow_batch.tokenflow.correspondence import normalise
from tokenflow_batch.tokenflow.denoise import Denoiser, combined
from tokenflow_batch.tokenflow.focus import Focus
from tokenflow_batch.tokenflow.injection import Site
from tokenflow_batch.tokenflow.keyframes import Neighbours, segments
from tokenflow_batch.tokenflow.modes import DEFAULT, Following
from tokenflow_batch.tokenflow.motion import agreed_motion, between_tokens, voted
from tokenflow_batch.tokenflow.passes import KeyframePass
from tokenflow_batch.tokenflow.propagation import PropagationPass, near_k
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
        following: by whose correspondences tokens are put together; None as the default mode does
            at the step.
    """

    candidates: int = 1
    temperature: float = 0.05
    reach: int | None = None
    radius: float | None = None
    shared: bool = True
    following: Following | None = None

    def fields(self, now: Moment) -> list[Field]:
        """One per site, in order."""
        following = self.following or DEFAULT.following_at(now.step, now.steps)
        if not self.shared:
            found = [self._field(now, [tokens]) for tokens in now.tokens]
            return self._followed(found, following)
        groups: dict[int, list[Tensor]] = {}
        for tokens in now.tokens:
            groups.setdefault(tokens.shape[1], []).append(tokens)
        fields = [self._field(now, group) for group in groups.values()]
        fields = self._followed(fields, following)
        made = dict(zip(groups, fields, strict=True))
        return [made[tokens.shape[1]] for tokens in now.tokens]

    def _followed(self, fields: list[Field], following: Following) -> list[Field]:
        """Put together by whom it says."""
        match following:
            case "own":
                return fields
            case "agreed":
                return self._smoothed(fields)
            case "voted":
                return [self._voted(field) for field in fields]

    def _voted(self, field: Field) -> Field:
        """By the votes of the 3 × 3 around."""
        side = round(field.index.shape[2] ** 0.5)
        index, inner = voted(field.index[..., 0], (side, side))
        return Field(index, inner * field.weight.sum(dim=3, keepdim=True), field.similarity)

    def _smoothed(self, fields: Sequence[Field]) -> list[Field]:
        """By the motion that neighbours agree on, from coarse grids to fine."""
        smoothed, coarser, motions = list(fields), None, {}
        for length in sorted({f.index.shape[2] for f in fields}):
            grid = (round(length**0.5), round(length**0.5))
            for n, field in enumerate(fields):
                if field.index.shape[2] != length:
                    continue
                motions[length] = agreed_motion(field.index[..., 0], grid, coarser)
                index, inner = between_tokens(motions[length])
                side = field.weight.sum(dim=3, keepdim=True)
                smoothed[n] = Field(index, inner * side, field.similarity)
            coarser = motions[length]
        return smoothed

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

    def weighted(self, site: int, share_N2: Tensor) -> tuple[Tensor, Tensor]:
        """The field's candidates, whose weights have their side's share already."""
        del share_N2
        found = self.fields[site]
        sides = torch.tensor([[near_k(n, side) for side in (0, 1)] for n in self.neighbours])
        bags = found.index + sides.unflatten(1, (2, 1, 1)) * found.index.shape[2]
        index_NLV, weight_NLV = (x.transpose(1, 2).flatten(2) for x in (bags, found.weight))
        return index_NLV, weight_NLV

    def self_attention(
        self, site: Site, attn: Any, tokens_NLC: Tensor, plain: Callable[[], Tensor]
    ) -> Tensor:
        """Weighted sum of the candidates' edited tokens."""
        total_NLC = super().self_attention(site, attn, tokens_NLC, plain)
        if self.gate is None:
            return total_NLC
        unsure_NL1 = (self.fields[site.index].similarity < self.gate).unsqueeze(-1)
        total_RNLC = total_NLC.unflatten(0, (self.branches, -1))
        attended_RNLC = self._attended(site, attn, tokens_NLC)
        total_RNLC[-2:] = torch.where(unsure_NL1, attended_RNLC, total_RNLC)[-2:]
        return total_RNLC.flatten(0, 1)

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
            return FieldPass(joint, near, fields=own, gate=self.gate, **conv)

        return joined(denoiser, hooks, now, x, joint, spread)

    def matches(self, now: Moment) -> Matches:
        """See `TokenFlow.matches`; of several candidates, the best."""
        fields = replace(self.building, following="own").fields(now)
        return Matches(now.keyframes, neighbours(now), [field.index[..., 0] for field in fields])


def keyframe_pass(
    hooks: Hooks, now: Moment, kind: type[KeyframePass] = KeyframePass
) -> KeyframePass:
    """The default mode's joint pass at this step, to be performed."""
    conv, qk = now.step < now.injection.conv_steps, now.step < now.injection.qk_steps
    return kind(
        branches=now.branches(keyframe_pass=True),
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
        spread: makes the pass of a batch from its frames, their neighbours and what all have.
    """
    guidance, hw = now.guidance(), (x.shape[2], x.shape[3])
    if guidance.focused(now.step):
        joint.focus = Focus(denoiser.unet, now.prompts.source, len(now.keyframes), hw)
    predict(denoiser, hooks, now, joint, x, list(now.keyframes))
    near, conv, found = neighbours(now), now.step < now.injection.conv_steps, []
    shared: dict[str, Any] = {
        "branches": now.branches(keyframe_pass=False),
        "grids": [site.grid(hw) for site in hooks.sites],
        "inject_conv": conv,
        "focus_K1hw": joint.focus.weight() if joint.focus else None,
        "own": guidance.own_branches(now.step),
    }
    for frames in batches(now.frames, now.thresholds.segment_length):
        batch = list(frames)
        shared["stored_conv_NChw"] = now.conv[batch] if conv else None
        active = spread(batch, [near[f] for f in batch], **shared)
        if guidance.returns(now.step):
            active.source_focus = Focus(
                denoiser.unet, now.prompts.target, len(batch), hw, of_source=True
            )
        noise = torch.stack(predict(denoiser, hooks, now, active, x, batch))
        latents = [now.source[batch], x[batch], x[batch]][-active.branches :]
        found.append(combined(noise, latents, active, guidance, now.step, now.alpha))
    return torch.cat(found)


def middle_keyframes(now: Moment) -> list[int]:
    """The same keyframes at every step: the middle of each segment."""
    length = now.thresholds.segment_length
    return [s.start + len(s) // 2 for s in segments(len(now.source), length)]


OPTIONS: Final[Mapping[str, Method]] = {
    "guidance everywhere": TokenFlow(focus=False),
    "own matches": TokenFlow(replace(DEFAULT, following="own", following_late="own")),
    "agreed motion": TokenFlow(replace(DEFAULT, following_late="agreed")),
    "votes": TokenFlow(replace(DEFAULT, following="voted")),
    "no own detail": TokenFlow(detail=False),
    "not back to the source": TokenFlow(back=False),
    "no stronger guidance": TokenFlow(stronger=False),
    "guidance to 0.8": TokenFlow(interval=(0.0, 0.8)),
    "fixed keyframes": TokenFlow(keyframes=middle_keyframes),
    "forward-backward": Variant(Building(reach=1)),
    "gate 0.6": Variant(gate=0.6),
    "gate 0.8": Variant(gate=0.8),
    "soft top-4": Variant(Building(candidates=4, following="own")),
    "local search": Variant(Building(radius=0.25)),
    "field per site": Variant(Building(shared=False)),
}
"""Beside the methods of `methods`: what each changes says its `Building`."""

PLAIN: Final = Variant()
"""The default rebuilt from these parts; equal to it but for the order of sums."""


def endpoint_errors(matches: Matches, clip: Any, sites: Sequence[Site]) -> dict[str, float]:
    """Mean distance of the correspondences from the exact flow, in tokens, by site.

    Args:
        matches: of a method at a moment.
        clip: the ground truth.
        sites: of the tokens.

    Returns:
        Per site's module path; keyframes themselves, and tokens that the keyframe does not show,
        are left out. NaN where no token is left.
    """
    sums = {site.name: [0.0, 0] for site in sites}
    for f, n in enumerate(matches.near):
        for side, k in enumerate((n.first, n.second)):
            to = matches.keyframes[k]
            if to == f or (side == 1 and n.second == n.first):
                continue
            flow, hidden = clip.flow(f, to), clip.occluded(f, to)
            for site in sites:
                errors = _endpoint(matches.index[site.index][f, side], flow, hidden)
                sums[site.name][0] += float(errors.sum())
                sums[site.name][1] += len(errors)
    return {name: total / count if count else float("nan") for name, (total, count) in sums.items()}


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

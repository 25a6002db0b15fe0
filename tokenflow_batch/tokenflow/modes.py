"""Published and default mode, injection thresholds, guidance, evaluations of an inversion: choices,
not code paths.

Plain Python, so that planning can count UNet rows without importing torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tokenflow_batch.tokenflow.keyframes import (
    NeighbourRule,
    published_neighbours,
    true_neighbours,
)

Following = Literal["own", "agreed", "voted"]
"""Whose correspondences say which tokens of a keyframe one is made of (`motion`): its own; all of
those around together, as the motion that they agree on; the 3 × 3 around, each for itself."""

_VOTED = 0.5
"""Share of the steps from which on the default mode goes by votes."""


@dataclass(frozen=True)
class Mode:
    """What distinguishes the published code from the default.

    Attributes:
        neighbours: which two keyframes a frame looks at, with which weights.
        stored_source: correspondences and convolution features of the source come from an earlier
            source pass. Otherwise the source branch goes through both passes and everything is
            found on the way, where deeper blocks see propagated instead of true source features.
        following: by what tokens are put together at the first steps.
        following_late: and from half of the steps on.
    """

    neighbours: NeighbourRule
    stored_source: bool
    following: Following
    following_late: Following

    def following_at(self, step: int, steps: int) -> Following:
        """By what tokens are put together at one of so many steps, 0 the noisiest."""
        return self.following if step < int(steps * _VOTED) else self.following_late


DEFAULT = Mode(
    true_neighbours,
    stored_source=True,
    following="agreed",
    following_late="voted",
)
PUBLISHED = Mode(
    published_neighbours,
    stored_source=False,
    following="own",
    following_late="own",
)
MODES = {"default": DEFAULT, "official": PUBLISHED}


@dataclass(frozen=True)
class Injection:
    """During how many of the first sampling steps the source's features are copied.

    Attributes:
        qk_steps: queries and keys, ⌊T · attn_t⌋.
        conv_steps: convolution features, ⌊T · f_t⌋.
    """

    qk_steps: int = 0
    conv_steps: int = 0

    @classmethod
    def pnp(cls, steps: int, attn_t: float, f_t: float) -> Injection:
        """Plug-and-Play thresholds as shares of the `steps` sampling steps."""
        return cls(int(steps * attn_t), int(steps * f_t))


_OWN = 0.84
"""Share of the steps from which on frames keep their own attention where the prompts agree: most of
what it brings comes from the last steps, and each takes a row more of every frame."""

_DETAIL = 0.92
"""Share of the steps from which on they also keep some of it where the prompts differ."""

_STRONGER = 1.125
"""How much farther guidance goes while it acts in some places only. Limited, it can be stronger
(Kynkäänniemi et al. again), and what frames share has less contrast than each would have alone."""


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance, during which sampling steps, and from when on not everywhere.

    Outside of them the prompt's own prediction is taken, and no negative one is made
    (Kynkäänniemi et al., NeurIPS 2024, who bound the interval by noise levels).

    Attributes:
        scale: g in ε = ε_neg + g · (ε_target − ε_neg).
        first: the first step with guidance.
        stop: one past the last.
        focus: the first step with guidance only where the target's prompt asks for something else
            than the source's (`focus`); elsewhere g is 1.
        own: of these, the first step at which frames also keep their own attention elsewhere.
        detail: of these, the first at which they keep some of it in the places that differ, too.
        stronger: what g − 1 is multiplied by where guidance acts in some places only.
        back: whether frames that keep their own attention elsewhere also go back to the source
            there, where the edit has left it as it is.
    """

    scale: float
    first: int = 0
    stop: int = 1 << 30
    focus: int = 1 << 30
    own: int = 1 << 30
    detail: int = 1 << 30
    stronger: float = _STRONGER
    back: bool = field(default=True, kw_only=True)

    @classmethod
    def within(
        cls, scale: float, steps: int, interval: tuple[float, float], focus: float = 1.0
    ) -> Guidance:
        """From shares of the `steps` sampling steps, 0 the noisiest."""
        shares = (*interval, focus, _OWN, _DETAIL)
        return cls(scale, *(int(steps * share) for share in shares))

    def on(self, step: int) -> bool:
        """Whether a step has a negative branch; g = 1 needs none."""
        return self.first <= step < self.stop and self.scale != 1

    def focused(self, step: int) -> bool:
        """Whether a step has guidance in some places only."""
        return self.on(step) and step >= self.focus

    def scale_at(self, step: int) -> float:
        """g at a step with guidance."""
        return 1 + (self.scale - 1) * self.stronger if self.focused(step) else self.scale

    def keeps(self, step: int) -> bool:
        """Whether at a step frames keep their own attention in the other places."""
        return self.focused(step) and step >= self.own

    def returns(self, step: int) -> bool:
        """Whether at a step places that the edit leaves as they are go back to the source."""
        return self.back and self.keeps(step)

    def own_branches(self, step: int) -> int:
        """In how many branches frames compute attention of their own: the source's, later all."""
        if not self.keeps(step):
            return 0
        return 3 if step >= self.detail else 1


def inversion_evaluations(step: int, iterations: int) -> int:
    """How often an inversion step evaluates the model, which is its UNet rows a frame.

    The second step has one evaluation more: nothing but the cleanest step, which says least about
    noise, tells it where to start, and it is left with the largest residual.

    Args:
        step: 0 the cleanest.
        iterations: those after the first evaluation; 0 is plain DDIM.
    """
    return 1 + iterations + (step == 1) if iterations else 1


def branch_count(
    mode: Mode, injection: Injection, guidance: Guidance, step: int, *, keyframe_pass: bool
) -> int:
    """Rows per frame in a pass: target, negative where there is guidance, source where needed.

    With a stored source the source branch is needed only where queries and keys are injected, and
    where frames keep their own attention.
    """
    injects = keyframe_pass and step < injection.qk_steps
    source = not mode.stored_source or injects or guidance.keeps(step)
    return 1 + guidance.on(step) + source

"""Published and default mode, and the injection thresholds: choices, not code paths.

Plain Python, so that planning can count UNet rows without importing torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenflow_batch.tokenflow.keyframes import (
    NeighbourRule,
    published_neighbours,
    true_neighbours,
)


@dataclass(frozen=True)
class Mode:
    """What distinguishes the published code from the default.

    Attributes:
        neighbours: which two keyframes a frame looks at, with which weights.
        stored_source: correspondences and convolution features of the source come from an earlier
            source pass. Otherwise the source branch goes through both passes and everything is
            found on the way, where deeper blocks see propagated instead of true source features.
        vote: a token is put together from its neighbours' correspondences, too.
    """

    neighbours: NeighbourRule
    stored_source: bool
    vote: bool


DEFAULT = Mode(true_neighbours, stored_source=True, vote=True)
PUBLISHED = Mode(published_neighbours, stored_source=False, vote=False)
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


def branch_count(mode: Mode, injection: Injection, step: int, *, keyframe_pass: bool) -> int:
    """Rows per frame in a pass: 3 with the source branch, else 2.

    With a stored source the source branch is needed only where queries and keys are injected.
    """
    if not mode.stored_source:
        return 3
    return 3 if keyframe_pass and step < injection.qk_steps else 2

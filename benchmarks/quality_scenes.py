"""The scenes of `quality.py`: what is hard about them, and what their edits ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from tokenflow_batch.demo.scenes import Clip, Domain, recoloured
from tokenflow_batch.demo.stills import FIRST, FULL
from tokenflow_batch.demo.textures import GROUNDS

KINDS: Final = ("color", "texture", "ground")
REPEATING: Final = "brick"
"""The ground that looks like itself elsewhere: one stone is like the next."""

VARIANTS: Final[tuple[dict[str, Any], ...]] = (
    {"ground": REPEATING},
    {"dim": 0.12, "flicker": 0.06},
    {"post": True},
    {"two": True},
    {"zoom": 0.2, "turn": 0.3},
)
"""Options of `Clip.random`, in turn; `ground` is put under the clip if the domain knows it."""

DOMAINS: Final = {"first": FIRST, "full": FULL}


@dataclass(frozen=True)
class Scene:
    """A clip and the edit that is asked of it."""

    seed: int
    kind: str
    clip: Clip
    wanted: Clip


def draw_scene(number: int, seed: int, frames: int, domain: Domain, kinds: Sequence[str]) -> Scene:
    """The `number`-th scene of a seed: its kind of edit and its variant take turns."""
    kind, variant = kinds[number % len(kinds)], dict(VARIANTS[number % len(VARIANTS)])
    own, ground = 10_000 * (seed + 1) + number, variant.pop("ground", None)
    clip = Clip.random(own, frames, domain=domain, **variant)
    if ground in domain.grounds:
        clip = recoloured(clip, ground=ground)
    rng = np.random.default_rng([own, 3])
    options: Mapping[str, Sequence[str]] = {
        "color": domain.colors,
        "texture": domain.textures,
        "ground": [g for g in GROUNDS if g in domain.grounds],
    }
    others = [name for name in options[kind] if name != getattr(clip.scene, kind)]
    return Scene(own, kind, clip, recoloured(clip, **{kind: str(rng.choice(others))}))

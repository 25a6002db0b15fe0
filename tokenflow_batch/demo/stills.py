"""Captioned stills of one or two shapes on a textured ground: what the demo model learns from.

`Domain` says which attributes occur; the shipped weights know all of it. Draws follow one
fixed order, so a seed gives the same images in every version of this package.

Array suffixes: H height, W width (pixels, always equal here), C = 3 colour channels (RGB).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from tokenflow_batch.demo import textures
from tokenflow_batch.demo.textures import COLORS, GROUNDS, SHAPES, TEXTURES, FloatArray

_TEXTURE_ODDS: Final = (0.4, 0.2, 0.2, 0.2)

RADIUS_RANGE: Final = (0.17, 0.34)
PAIR_RADIUS_RANGE: Final = (0.13, 0.24)
"""Of each object where there are two, as a fraction of the image side."""

LIGHT_RANGE: Final = (0.82, 1.08)
GAIN_RANGE: Final = (0.9, 1.06)
MAX_ANGLE: Final = 0.35
MARGIN: Final = 0.9
"""An object's centre stays at least this many radii away from the border of the image."""

APART: Final = 1.25
"""Two objects' centres are at least this many times the sum of their radii apart: no overlap."""


@dataclass(frozen=True, slots=True)
class Thing:
    """An object: what it looks like and where it is; the fields mean what they do in a scene."""

    shape: str
    color: str
    texture: str
    center_x: float
    center_y: float
    radius: float
    angle: float

    def __post_init__(self) -> None:
        _require_known(self.shape, SHAPES)
        _require_known(self.color, tuple(COLORS))
        _require_known(self.texture, TEXTURES)


@dataclass(frozen=True, slots=True)
class SceneParams:
    """Everything that determines a still.

    Attributes:
        shape: one of `textures.SHAPES`.
        color: one of `textures.COLORS`.
        texture: one of `textures.TEXTURES`.
        ground: one of `textures.GROUNDS`.
        tile: which of the ground's 12 tiles.
        offset_x: pixels by which the tile is shifted to the left, any integer.
        offset_y: the same, upwards.
        gain: brightness factor of the ground.
        center_x: object centre, as a fraction of the image side from the left border.
        center_y: the same, from the top.
        radius: as a fraction of the image side.
        angle: rotation of the object in radians, clockwise as seen.
        light: brightness factor of everything.
        second: another object, which overlaps with nothing.
    """

    shape: str
    color: str
    texture: str
    ground: str
    tile: int
    offset_x: int
    offset_y: int
    gain: float
    center_x: float
    center_y: float
    radius: float
    angle: float
    light: float = 1.0
    second: Thing | None = None

    def __post_init__(self) -> None:
        _require_known(self.shape, SHAPES)
        _require_known(self.color, tuple(COLORS))
        _require_known(self.texture, TEXTURES)
        _require_known(self.ground, GROUNDS)

    @property
    def objects(self) -> list[Thing | SceneParams]:
        """The one or two objects, the first one first."""
        return [self] if self.second is None else [self, self.second]


def _require_known(value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{value!r} is none of {', '.join(allowed)}")


@dataclass(frozen=True, slots=True)
class Domain:
    """The attributes that scenes may have. `params in domain` tells whether a scene fits.

    Attributes:
        shapes: of the objects.
        colors: of the objects.
        textures: of the objects.
        grounds: of the scenes.
        pairs: share of scenes with two objects.
        light: range of the brightness factor.
    """

    shapes: Sequence[str] = SHAPES
    colors: Sequence[str] = tuple(COLORS)
    textures: Sequence[str] = TEXTURES
    grounds: Sequence[str] = GROUNDS
    pairs: float = 0.0
    light: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        for chosen, known in (
            (self.shapes, SHAPES),
            (self.colors, tuple(COLORS)),
            (self.textures, TEXTURES),
            (self.grounds, GROUNDS),
        ):
            if not chosen or set(chosen) - set(known):
                raise ValueError(f"{list(chosen)} must be one or more of {', '.join(known)}")

    def __contains__(self, params: SceneParams) -> bool:
        return (
            all(
                thing.shape in self.shapes
                and thing.color in self.colors
                and thing.texture in self.textures
                for thing in params.objects
            )
            and params.ground in self.grounds
            and (params.second is None or self.pairs > 0)
            and self.light[0] <= params.light <= self.light[1]
        )


FULL: Final = Domain()
"""Every look there is, one object, unchanging light."""

FIRST: Final = Domain(
    shapes=("circle", "square", "star"),
    colors=("red", "orange", "yellow", "green", "blue", "purple", "pink", "white"),
    textures=("solid", "striped"),
    grounds=("grass", "sand", "water", "night"),
)
"""What the first weights knew (until 0.1.0): for comparing with them."""

TRAINED: Final = Domain(pairs=0.3, light=LIGHT_RANGE)
"""What `scripts/train_demo_model.py` trains on: everything."""


def _sample_any(rng: np.random.Generator) -> SceneParams:
    radius = rng.uniform(*RADIUS_RANGE)
    near, far = radius * MARGIN, 1 - radius * MARGIN
    return SceneParams(
        shape=str(rng.choice(SHAPES)),
        color=str(rng.choice(list(COLORS))),
        texture=str(rng.choice(TEXTURES, p=_TEXTURE_ODDS)),
        ground=str(rng.choice(GROUNDS)),
        tile=int(rng.integers(textures.TILES_PER_GROUND)),
        offset_x=int(rng.integers(textures.TILE_SIZE)),
        offset_y=int(rng.integers(textures.TILE_SIZE)),
        gain=rng.uniform(*GAIN_RANGE),
        center_x=rng.uniform(near, far),
        center_y=rng.uniform(near, far),
        radius=radius,
        angle=rng.uniform(-MAX_ANGLE, MAX_ANGLE),
    )


def _thing(params: SceneParams) -> Thing:
    """The first object of a scene."""
    fields = (params.shape, params.color, params.texture)
    return Thing(*fields, params.center_x, params.center_y, params.radius, params.angle)


def with_second(rng: np.random.Generator, params: SceneParams, domain: Domain) -> SceneParams:
    """Add a second object to a scene, and place both anew so that they don't overlap.

    Args:
        rng: source of the draws.
        params: the scene; its first object keeps its looks.
        domain: which looks the second may have.

    Returns:
        The scene with two objects whose looks differ.
    """
    first = _thing(params)
    while True:
        other = _thing(_sample_any(rng))
        looks = (other.shape, other.color, other.texture)
        known = (
            other.shape in domain.shapes
            and other.color in domain.colors
            and other.texture in domain.textures
        )
        if known and looks != (first.shape, first.color, first.texture):
            break
    while True:
        radii = rng.uniform(*PAIR_RADIUS_RANGE, 2)
        x, y = (rng.uniform(radii * MARGIN, 1 - radii * MARGIN) for _ in range(2))
        if np.hypot(x[1] - x[0], y[1] - y[0]) >= APART * radii.sum():
            break
    return replace(
        params,
        center_x=float(x[0]),
        center_y=float(y[0]),
        radius=float(radii[0]),
        second=replace(other, center_x=float(x[1]), center_y=float(y[1]), radius=float(radii[1])),
    )


def sample(rng: np.random.Generator, domain: Domain = FULL) -> SceneParams:
    """Draw a scene from the training distribution restricted to a domain.

    Args:
        rng: source of the draws. Scenes outside the domain are drawn and thrown away, so that how
            far the generator advances depends on the domain.
        domain: which attributes may occur.

    Returns:
        The scene's parameters.
    """
    params = _sample_any(rng)
    # Pairs and light are drawn afterwards, and only where they occur.
    while params not in replace(domain, light=(1.0, 1.0)):
        params = _sample_any(rng)
    if domain.pairs and rng.random() < domain.pairs:
        params = with_second(rng, params, domain)
    if domain.light[0] < domain.light[1]:
        params = replace(params, light=rng.uniform(*domain.light))
    return params


def _paint(image_HWC: FloatArray, thing: Thing | SceneParams) -> npt.NDArray[np.float32]:
    """Draw an object into an image, in place; returns its opacity (H, W) in [0, 1]."""
    size = len(image_HWC)
    alpha_HW = np.zeros((size, size), np.float32)
    center_x, center_y = thing.center_x * size, thing.center_y * size
    radius = thing.radius * size
    reach = 1.3 * radius  # beyond the tips of the star
    top, bottom = max(0, int(center_y - reach)), min(size, int(center_y + reach) + 2)
    left, right = max(0, int(center_x - reach)), min(size, int(center_x + reach) + 2)
    if bottom > top and right > left:
        box = np.s_[top:bottom, left:right]
        y, x = np.mgrid[box].astype(np.float32)
        x, y = (x + 0.5 - center_x) / radius, (y + 0.5 - center_y) / radius
        cos, sin = np.cos(thing.angle), np.sin(thing.angle)
        own_x, own_y = cos * x + sin * y, -sin * x + cos * y
        edge = 0.5 - textures.outline(thing.shape, own_x, own_y) * radius
        alpha_HW[box] = np.clip(edge, 0, 1).astype(np.float32)
        # The light stays at the top left of the image, whichever way the object turns.
        shade = np.clip(1.02 - 0.18 * (x + y) * 0.7, 0.7, 1.15)[..., None]
        lit = textures.surface(thing.color, thing.texture, own_x, own_y) * shade
        image_HWC[box] = textures.blend(image_HWC[box], np.clip(lit, 0, 1), alpha_HW[box])
    return alpha_HW


def render_layers(
    params: SceneParams, size: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Draw a still, like `render`, and tell the objects apart.

    Args:
        params: what to draw.
        size: side of the image in pixels, at least 1.

    Returns:
        The image (H, W, C) and the opacities (H, W) of the first and of the second object; the
        latter is 0 everywhere where there is none.
    """
    rows = (np.arange(size) + params.offset_y) % textures.TILE_SIZE
    columns = (np.arange(size) + params.offset_x) % textures.TILE_SIZE
    tile = textures.ground_tiles()[params.ground][params.tile]
    image_HWC = tile[np.ix_(rows, columns)] * np.float32(params.gain)
    second_HW = np.zeros((size, size), np.float32)
    if params.second is not None:
        second_HW = _paint(image_HWC, params.second)
    first_HW = _paint(image_HWC, params)
    if params.light != 1:
        image_HWC *= np.float32(params.light)
    return np.clip(image_HWC, 0, 1).astype(np.float32), first_HW, second_HW


def render(
    params: SceneParams, size: int = 128
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Draw a still.

    Args:
        params: what to draw. Objects scale with `size`, the ground does not.
        size: side of the image in pixels, at least 1.

    Returns:
        The image (H, W, C), RGB in [0, 1], and the first object's opacity (H, W) in [0, 1], which
        is fractional along its outline only; both float32, H = W = `size`.
    """
    image_HWC, first_HW, _ = render_layers(params, size)
    return image_HWC, first_HW

"""Captioned stills of one shape on a textured ground: the demo model's training distribution.

`Domain` says which attributes occur; `SHIPPED` is what the shipped weights know. Draws follow one
fixed order, so a seed gives the same images in every version of this package.

Array suffixes: H height, W width (pixels, always equal here), C = 3 colour channels (RGB).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from tokenflow_batch.demo import textures
from tokenflow_batch.demo.textures import COLORS, GROUNDS, SHAPES, TEXTURES

SHAPE_WORDS: Final[dict[str, tuple[str, ...]]] = {
    "circle": ("ball", "circle"),
    "square": ("square", "box"),
    "triangle": ("triangle", "pyramid"),
    "star": ("star",),
    "heart": ("heart",),
}
TEXTURE_WORDS: Final[dict[str, tuple[str, ...]]] = {
    "solid": ("", "", "", "solid", "plain"),
    "striped": ("striped",),
    "checkered": ("checkered", "checkerboard"),
    "dotted": ("dotted", "spotted"),
}
GROUND_WORDS: Final[dict[str, tuple[str, ...]]] = {
    "grass": ("grass", "lawn"),
    "sand": ("sand", "beach"),
    "water": ("water", "sea"),
    "night": ("night sky", "starry sky"),
    "brick": ("brick wall", "bricks"),
    "snow": ("snow",),
}
"""Words for each attribute; the first is the plain one, repeats make a word likelier."""

PREPOSITIONS: Final = ("on", "on", "on the", "in", "in front of", "over the", "on a")
_TEXTURE_ODDS: Final = (0.4, 0.2, 0.2, 0.2)

RADIUS_RANGE: Final = (0.17, 0.34)
GAIN_RANGE: Final = (0.9, 1.06)
MAX_ANGLE: Final = 0.35
MARGIN: Final = 0.9
"""An object's centre stays at least this many radii away from the border of the image."""


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

    def __post_init__(self) -> None:
        for value, allowed in (
            (self.shape, SHAPES),
            (self.color, tuple(COLORS)),
            (self.texture, TEXTURES),
            (self.ground, GROUNDS),
        ):
            if value not in allowed:
                raise ValueError(f"{value!r} is none of {', '.join(allowed)}")


@dataclass(frozen=True, slots=True)
class Domain:
    """The attributes that scenes may have. `params in domain` tells whether a scene fits."""

    shapes: Sequence[str] = SHAPES
    colors: Sequence[str] = tuple(COLORS)
    textures: Sequence[str] = TEXTURES
    grounds: Sequence[str] = GROUNDS

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
            params.shape in self.shapes
            and params.color in self.colors
            and params.texture in self.textures
            and params.ground in self.grounds
        )


FULL: Final = Domain()
SHIPPED: Final = Domain(
    shapes=("circle", "square", "star"),
    colors=("red", "orange", "yellow", "green", "blue", "purple", "pink", "white"),
    textures=("solid", "striped"),
    grounds=("grass", "sand", "water", "night"),
)
"""What the shipped weights were trained on."""


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


def sample(rng: np.random.Generator, domain: Domain = SHIPPED) -> SceneParams:
    """Draw a scene from the training distribution restricted to a domain.

    Args:
        rng: source of the draws. Scenes outside the domain are drawn and thrown away, so that how
            far the generator advances depends on the domain.
        domain: which attributes may occur.

    Returns:
        The scene's parameters.
    """
    while True:
        params = _sample_any(rng)
        if params in domain:
            return params


def render(
    params: SceneParams, size: int = 128
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Draw a still.

    Args:
        params: what to draw. The object scales with `size`, the ground does not.
        size: side of the image in pixels, at least 1.

    Returns:
        The image (H, W, C), RGB in [0, 1], and the object's opacity (H, W) in [0, 1], which is
        fractional along its outline only; both float32, H = W = `size`.
    """
    rows = (np.arange(size) + params.offset_y) % textures.TILE_SIZE
    columns = (np.arange(size) + params.offset_x) % textures.TILE_SIZE
    tile = textures.ground_tiles()[params.ground][params.tile]
    image_HWC = tile[np.ix_(rows, columns)] * np.float32(params.gain)
    alpha_HW = np.zeros((size, size), np.float32)

    center_x, center_y = params.center_x * size, params.center_y * size
    radius = params.radius * size
    reach = 1.3 * radius  # beyond the tips of the star
    top, bottom = max(0, int(center_y - reach)), min(size, int(center_y + reach) + 2)
    left, right = max(0, int(center_x - reach)), min(size, int(center_x + reach) + 2)
    if bottom > top and right > left:
        box = np.s_[top:bottom, left:right]
        y, x = np.mgrid[box].astype(np.float32)
        x, y = (x + 0.5 - center_x) / radius, (y + 0.5 - center_y) / radius
        cos, sin = np.cos(params.angle), np.sin(params.angle)
        own_x, own_y = cos * x + sin * y, -sin * x + cos * y
        edge = 0.5 - textures.outline(params.shape, own_x, own_y) * radius
        alpha_HW[box] = np.clip(edge, 0, 1).astype(np.float32)
        # The light stays at the top left of the image, whichever way the object turns.
        light = np.clip(1.02 - 0.18 * (x + y) * 0.7, 0.7, 1.15)[..., None]
        lit = textures.surface(params.color, params.texture, own_x, own_y) * light
        image_HWC[box] = textures.blend(image_HWC[box], np.clip(lit, 0, 1), alpha_HW[box])
    return np.clip(image_HWC, 0, 1).astype(np.float32), alpha_HW


def _pick(words: Sequence[str], rng: np.random.Generator) -> str:
    return words[int(rng.integers(len(words)))]


def caption(params: SceneParams, rng: np.random.Generator) -> str:
    """Draw a caption from the training grammar.

    Words vary by synonym, order, article, preposition and opening; 5 % leave the colour out, 3 %
    say "shape" for the shape, 6 % leave the ground out.

    Args:
        params: the scene to describe.
        rng: source of the draws.

    Returns:
        The caption, lower case, without a full stop.
    """
    shape = _pick(SHAPE_WORDS[params.shape], rng)
    texture = _pick(TEXTURE_WORDS[params.texture], rng)
    ground = _pick(GROUND_WORDS[params.ground], rng)
    color = params.color
    vague = rng.random()
    if vague < 0.05:
        color = ""
    elif vague < 0.08:
        shape = "shape"
    adjectives = (color, texture) if rng.random() < 0.6 else (texture, color)
    noun = " ".join([word for word in adjectives if word] + [shape])
    article = "an" if noun.startswith("orange") else "a"
    if rng.random() < 0.15:
        article = "the"
    preposition = _pick(PREPOSITIONS, rng)

    form = rng.random()
    if form < 0.06:
        text = f"{article} {noun}"
    elif form < 0.10:
        text = f"{ground}, {article} {noun}"
    else:
        text = f"{article} {noun} {preposition} {ground}"

    opening = rng.random()
    if opening < 0.12:
        return f"a photo of {text}"
    if opening < 0.20:
        return f"an image of {text}"
    if opening < 0.25:
        return f"a picture of {text}"
    return text


def describe(params: SceneParams) -> str:
    """Name a scene plainly, e.g. "a red striped ball on grass"; a solid texture is not named.

    Args:
        params: the scene to describe.

    Returns:
        One caption of the training grammar, always the same for the same attributes.
    """
    words = [params.color, TEXTURE_WORDS[params.texture][0], SHAPE_WORDS[params.shape][0]]
    noun = " ".join(word for word in words if word)
    article = "an" if noun.startswith("orange") else "a"
    return f"{article} {noun} on {GROUND_WORDS[params.ground][0]}"

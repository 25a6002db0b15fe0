"""What the synthetic scenes are made of: palette, shape outlines, object surfaces, ground tiles.

Everything here is part of the distribution that the demo model was trained on: constants, formulas
and the order of random draws are fixed by its weights and must not change.

Array suffixes: H height, W width (both in pixels), C = 3 colour channels (RGB), T = tile side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.floating[Any]]
"""Either precision: geometry runs in float64, and images are stored as float32."""

TILE_SIZE: Final = 256
"""Side of a ground tile in pixels; tiles repeat without a seam."""

TILES_PER_GROUND: Final = 12
_TILE_SEED: Final = 7

COLORS: Final[dict[str, tuple[float, float, float]]] = {
    "red": (0.86, 0.10, 0.10),
    "orange": (0.97, 0.52, 0.06),
    "yellow": (0.96, 0.88, 0.12),
    "green": (0.06, 0.62, 0.16),
    "cyan": (0.10, 0.80, 0.85),
    "blue": (0.10, 0.22, 0.88),
    "purple": (0.52, 0.14, 0.72),
    "pink": (0.98, 0.50, 0.74),
    "white": (0.96, 0.96, 0.96),
    "black": (0.06, 0.06, 0.07),
}
"""Object colours, RGB in [0, 1]."""


def _sigmoid(x: FloatArray) -> FloatArray:
    return 1 / (1 + np.exp(-x))


def _mix(a: npt.ArrayLike, b: npt.ArrayLike, weight_HW: FloatArray) -> FloatArray:
    """Blend colours or images: `a` where the weight is 0, `b` where it is 1."""
    weight = weight_HW[..., None]
    return np.asarray(a, np.float32) * (1 - weight) + np.asarray(b, np.float32) * weight


def blend(a_HWC: FloatArray, b_HWC: FloatArray, weight_HW: FloatArray) -> FloatArray:
    """Composite `b` over `a`.

    Args:
        a_HWC: image below, float.
        b_HWC: image above, float.
        weight_HW: opacity of `b` in [0, 1].

    Returns:
        The blended image (H, W, C), in the weight's precision but at least float32.
    """
    return _mix(a_HWC, b_HWC, weight_HW)


# --- ground ---------------------------------------------------------------------------------------


def _noise(rng: np.random.Generator, sigma_x: float, sigma_y: float) -> FloatArray:
    """Draw tileable Gaussian noise (T, T), float32, unit deviation, blurred by sigma pixels."""
    white = rng.standard_normal((TILE_SIZE, TILE_SIZE)).astype(np.float32)
    frequency = np.fft.fftfreq(TILE_SIZE)
    transfer = np.exp(
        -2 * np.pi**2 * ((frequency[None, :] * sigma_x) ** 2 + (frequency[:, None] * sigma_y) ** 2)
    )
    # Filtering in Fourier space is circular: that is what makes the tile seamless.
    blurred = np.fft.ifft2(np.fft.fft2(white) * transfer).real.astype(np.float32)
    return np.asarray(blurred / blurred.std())


def _grass(rng: np.random.Generator) -> FloatArray:
    blades = _mix((0.13, 0.36, 0.09), (0.42, 0.66, 0.22), _sigmoid(1.2 * _noise(rng, 0.8, 3)))
    return blades + 0.03 * _noise(rng, 14, 14)[..., None]


def _sand(rng: np.random.Generator) -> FloatArray:
    dunes = _mix((0.78, 0.64, 0.42), (0.93, 0.82, 0.60), _sigmoid(1.3 * _noise(rng, 7, 2.2)))
    return dunes + 0.025 * _noise(rng, 0.7, 0.7)[..., None]


def _water(rng: np.random.Generator) -> FloatArray:
    return _mix((0.06, 0.32, 0.52), (0.36, 0.70, 0.82), _sigmoid(1.6 * _noise(rng, 9, 2.2) - 0.4))


def _night(rng: np.random.Generator) -> FloatArray:
    sky = _mix((0.02, 0.02, 0.10), (0.10, 0.07, 0.24), _sigmoid(_noise(rng, 20, 20)))
    for _ in range(70):
        star_x, star_y = rng.uniform(0, TILE_SIZE), rng.uniform(0, TILE_SIZE)
        sigma, brightness = rng.uniform(0.6, 1.5), rng.uniform(0.5, 1)
        # At ten sigma the glow is below float64's resolution: the rest of the tile can't change.
        reach = np.arange(-int(10 * sigma) - 1, int(10 * sigma) + 2)
        y, x = (int(star_y) + reach) % TILE_SIZE, (int(star_x) + reach) % TILE_SIZE
        dx = np.minimum(abs(x - star_x), TILE_SIZE - abs(x - star_x))[None, :]
        dy = np.minimum(abs(y - star_y), TILE_SIZE - abs(y - star_y))[:, None]
        glow = brightness * np.exp(-(dx**2 + dy**2) / (2 * sigma * sigma))
        sky[np.ix_(y, x)] = _mix(sky[np.ix_(y, x)], (1, 1, 0.9), glow)
    return sky


def _brick(rng: np.random.Generator) -> FloatArray:
    y, x = np.mgrid[:TILE_SIZE, :TILE_SIZE].astype(np.float32)
    height, width = 16, 32
    row = (y // height).astype(int)
    x = x + (row % 2) * width / 2
    column = (x // width).astype(int) % (TILE_SIZE // width)
    tone = rng.uniform(0, 1, (TILE_SIZE // height, TILE_SIZE // width))[row, column]
    bricks = _mix((0.52, 0.24, 0.17), (0.68, 0.36, 0.26), tone.astype(np.float32))
    bricks = bricks + 0.03 * _noise(rng, 1, 1)[..., None]
    to_joint = np.minimum.reduce([y % height, height - y % height, x % width, width - x % width])
    return _mix((0.74, 0.70, 0.64), bricks, np.clip(to_joint - 1, 0, 1))


def _snow(rng: np.random.Generator) -> FloatArray:
    return _mix((0.82, 0.87, 0.94), (0.97, 0.98, 1.0), _sigmoid(1.3 * _noise(rng, 6, 5)))


# The order matters: all tiles come from one stream of random numbers.
_GROUND_TILES: Final[dict[str, Callable[[np.random.Generator], FloatArray]]] = {
    "grass": _grass,
    "sand": _sand,
    "water": _water,
    "night": _night,
    "brick": _brick,
    "snow": _snow,
}
GROUNDS: Final[Sequence[str]] = tuple(_GROUND_TILES)


@cache
def ground_tiles() -> dict[str, tuple[npt.NDArray[np.float32], ...]]:
    """Build the ground textures, once per process (under a second, 57 MB).

    Returns:
        For each ground its 12 tiles, each (T, T, C) float32 in [0, 1], read-only.
    """
    rng = np.random.default_rng(_TILE_SEED)

    def draw(paint: Callable[[np.random.Generator], FloatArray]) -> npt.NDArray[np.float32]:
        tile = np.clip(paint(rng), 0, 1).astype(np.float32)
        tile.flags.writeable = False
        return tile

    return {
        name: tuple(draw(paint) for _ in range(TILES_PER_GROUND))
        for name, paint in _GROUND_TILES.items()
    }


# --- object ---------------------------------------------------------------------------------------


def _circle(x: FloatArray, y: FloatArray) -> FloatArray:
    return np.asarray(np.hypot(x, y) - 1)


def _square(x: FloatArray, y: FloatArray) -> FloatArray:
    return np.asarray(np.maximum(abs(x), abs(y)) - 0.86)


def _triangle(x: FloatArray, y: FloatArray) -> FloatArray:
    sides = np.maximum(0.866 * x - 0.5 * y, -0.866 * x - 0.5 * y) - 0.56
    return np.asarray(np.maximum(y - 0.62, sides))


def _star(x: FloatArray, y: FloatArray) -> FloatArray:
    # Five points are five mirrored copies of one edge, which runs from a tip to the next notch.
    sector = 2 * np.pi / 5
    azimuth, radius = np.arctan2(x, -y), np.hypot(x, y)
    azimuth = np.abs((azimuth + sector / 2) % sector - sector / 2)
    px, py = radius * np.cos(azimuth), radius * np.sin(azimuth)
    tip_x, tip_y = 1.12, 0.0
    edge_x = 0.5 * np.cos(sector / 2) - tip_x
    edge_y = 0.5 * np.sin(sector / 2) - tip_y
    distance = ((px - tip_x) * edge_y - (py - tip_y) * edge_x) / np.hypot(edge_x, edge_y)
    return np.asarray(distance)


def _heart(x: FloatArray, y: FloatArray) -> FloatArray:
    scale = 1.72
    u, v = np.abs(x) / scale, (0.88 - y) / scale
    lobe = np.hypot(u - 0.25, v - 0.75) - 0.35355
    foot = 0.5 * np.maximum(u + v, 0)
    to_cleft, to_flank = u**2 + (v - 1) ** 2, (u - foot) ** 2 + (v - foot) ** 2
    body = np.sqrt(np.minimum(to_cleft, to_flank)) * np.sign(u - v)
    return np.asarray(np.where(u + v > 1, lobe, body) * scale)


_OUTLINES: Final[dict[str, Callable[[FloatArray, FloatArray], FloatArray]]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
}
SHAPES: Final[Sequence[str]] = tuple(_OUTLINES)


def outline(shape: str, x_HW: FloatArray, y_HW: FloatArray) -> FloatArray:
    """Distance to the outline of a shape of radius 1 about the origin.

    Args:
        shape: one of `SHAPES`.
        x_HW: coordinates to the right, in radii.
        y_HW: coordinates downwards, in radii.

    Returns:
        (H, W) signed distance in radii (approximate away from the outline), negative inside.

    Raises:
        KeyError: no such shape.
    """
    return _OUTLINES[shape](x_HW, y_HW)


def _stripes(x: FloatArray, _y: FloatArray) -> FloatArray:
    return np.asarray(np.clip(0.5 + 3 * np.sin(x * 2 * np.pi / 0.62), 0, 1))


def _checks(x: FloatArray, y: FloatArray) -> FloatArray:
    checks = np.sin(x * np.pi / 0.42) * np.sin(y * np.pi / 0.42)
    return np.asarray(np.clip(0.5 + 5 * checks, 0, 1))


def _dots(x: FloatArray, y: FloatArray) -> FloatArray:
    pitch = 0.56
    u, v = (x + pitch / 2) % pitch - pitch / 2, (y + pitch / 2) % pitch - pitch / 2
    return np.asarray(np.clip((0.17 - np.hypot(u, v)) * 14 + 0.5, 0, 1))


def _plain(x: FloatArray, _y: FloatArray) -> FloatArray:
    return np.zeros_like(x)


_PATTERNS: Final[dict[str, Callable[[FloatArray, FloatArray], FloatArray]]] = {
    "solid": _plain,
    "striped": _stripes,
    "checkered": _checks,
    "dotted": _dots,
}
TEXTURES: Final[Sequence[str]] = tuple(_PATTERNS)


def second_color(color: str) -> npt.NDArray[np.float32]:
    """Colour of an object's stripes, checks or dots, (C,) float32: a pale tint, or a grey."""
    if color == "white":
        return np.array((0.45, 0.45, 0.48), np.float32)
    if color == "black":
        return np.array((0.62, 0.62, 0.62), np.float32)
    return np.array(COLORS[color], np.float32) * 0.22 + 0.78


def surface(color: str, texture: str, x_HW: FloatArray, y_HW: FloatArray) -> FloatArray:
    """Colour of an unlit object at given places.

    Args:
        color: one of `COLORS`.
        texture: one of `TEXTURES`.
        x_HW: coordinates in the object's own frame, in radii; the texture turns with the object.
        y_HW: the same, downwards.

    Returns:
        (H, W, C) RGB in [0, 1], in the precision of the coordinates.

    Raises:
        KeyError: no such colour or texture.
    """
    first = np.array(COLORS[color], np.float32)
    return _mix(first, second_color(color), _PATTERNS[texture](x_HW, y_HW))

"""Motion in closed form: any frame's value without the frames before it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, TypedDict

import numpy as np

from tokenflow_batch.demo.stills import APART, MARGIN, PAIR_RADIUS_RANGE

_PAIR_RADIUS: Final = 0.19
"""Largest radius of two objects that move in their halves of the image."""


@dataclass(frozen=True, slots=True)
class Wave:
    """A quantity that swings about a centre: bounded over any number of frames.

    Attributes:
        centre: the mean.
        amplitude: largest distance from it, in the same unit.
        period: frames per swing; `math.inf` for a constant.
        phase: radians at frame 0.
    """

    centre: float
    amplitude: float = 0.0
    period: float = math.inf
    phase: float = 0.0

    def at(self, index: int) -> float:
        """Value at a frame."""
        return self.centre + self.amplitude * math.sin(math.tau * index / self.period + self.phase)


class Place(TypedDict):
    """An object's place in one frame, named like the fields of a scene."""

    center_x: float
    center_y: float
    radius: float
    angle: float


@dataclass(frozen=True, slots=True)
class Track:
    """How an object moves.

    Attributes:
        x: centre from the left border, as a fraction of the image side.
        y: the same, from the top.
        radius: as a fraction of the image side.
        angle: in radians.
    """

    x: Wave
    y: Wave
    radius: Wave
    angle: Wave

    def at(self, index: int) -> Place:
        """Values at a frame."""
        return {
            "center_x": self.x.at(index),
            "center_y": self.y.at(index),
            "radius": self.radius.at(index),
            "angle": self.angle.at(index),
        }


@dataclass(frozen=True, slots=True)
class Post:
    """A grey upright bar in front of everything, which passes through the image again and again.

    Attributes:
        width: in pixels, at least 1.
        start: left edge at frame 0, in pixels.
        speed: whole pixels per frame to the right.
    """

    width: int
    start: int
    speed: int

    def left(self, index: int, size: int) -> int:
        """Left edge at a frame, in pixels, in [-width, size)."""
        # Wrapping at size + width means that the post is out of sight where it jumps.
        return (self.start + self.speed * index + self.width) % (size + self.width) - self.width


def clamp(value: float, low: float, high: float) -> float:
    """The value nearest to `value` in [low, high]."""
    return min(max(value, low), high)


def swing(rng: np.random.Generator, centre: float, amplitude: float) -> Wave:
    """Draw a slow swing (80 to 160 frames) about a value, in that value's unit."""
    return Wave(centre, amplitude, rng.uniform(80, 160), rng.uniform(0, math.tau))


def sweep(
    rng: np.random.Generator, room: float, velocity: float, middle: float = 0.5, span: float = 0.5
) -> Wave:
    """Draw one coordinate of a path through the image or a part of it.

    Args:
        rng: source of the draws.
        room: distance to keep from either border, as a fraction of the image side, below `span`.
        velocity: largest one, in image sides per frame; 0 draws a place to stay at.
        middle: of the part, as a fraction of the image side.
        span: from the middle to either border.

    Returns:
        The coordinate as a fraction of the image side, within span - room of the middle.
    """
    half = span - room
    amplitude = rng.uniform(0.6, 1) * half
    centre = middle + rng.uniform(-1, 1) * (half - amplitude)
    phase = rng.uniform(0, math.tau)
    period = math.tau * amplitude / velocity if velocity else math.inf
    return Wave(centre, amplitude, period, phase)


def half_track(
    rng: np.random.Generator,
    middle: float,
    mean: float,
    *,
    zoom: float,
    turn: float,
    velocity: float,
) -> Track:
    """Draw a path within the left (`middle` 0.25) or right half of the image (0.75)."""
    mean = clamp(mean, PAIR_RADIUS_RANGE[0] / (1 - zoom), _PAIR_RADIUS / (1 + zoom))
    largest = mean * (1 + zoom)
    across = 0.25 - APART * largest
    return Track(
        # Slower across, where there is less room: at full speed it would be a tremor.
        x=sweep(rng, APART * largest, velocity * across / 0.25, middle, 0.25),
        y=sweep(rng, MARGIN * largest, velocity),
        radius=swing(rng, mean, zoom * mean),
        angle=swing(rng, 0.0, turn),
    )


def draw_post(rng: np.random.Generator, size: int) -> Post:
    """Draw a post of 6 to 10 % of the image's `size` (pixels), moving 1 or 2 pixels a frame."""
    width = max(1, round(size * rng.uniform(0.06, 0.1)))
    return Post(width, start=int(rng.uniform(0, size)), speed=int(rng.choice((-2, -1, 1, 2))))

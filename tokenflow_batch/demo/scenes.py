"""Synthetic videos of the demo model's domain, of any length, with exact ground truth.

A `Clip` is a function of the frame index: nothing of the clip's length is ever held, and a frame
does not depend on how long the clip is. One or two objects move over a ground that pans by whole
pixels per frame; a post may pass in front. So every pixel belongs to one of four layers whose
motion is known in closed form, and flow, masks and occlusions are exact rather than estimated.
Pixels along an object's outline mix two layers; they count to the layer with the larger share.
Colours are constant along the flow with three exceptions: the ground's, where `flicker` is on, all,
where `dim` is, and the shading of a turning object, as the light always comes from the top left of
the image.

    clip = Clip.random(seed=3, frames=48)
    edit = recoloured(clip, color="red")
    edit.caption      # the editing prompt: "a red striped ball on grass"
    edit.frame(7)     # what a perfect edit of clip.frame(7) looks like

Pixel (x, y) has its centre at (x, y). Array suffixes: H height, W width (pixels, equal here),
C = 3 colour channels (RGB), 2 = (x, y).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from tokenflow_batch.demo.captions import caption, describe
from tokenflow_batch.demo.motion import (
    Post,
    Track,
    Wave,
    clamp,
    draw_post,
    half_track,
    sweep,
    swing,
)
from tokenflow_batch.demo.stills import (
    FULL,
    GAIN_RANGE,
    LIGHT_RANGE,
    MARGIN,
    MAX_ANGLE,
    RADIUS_RANGE,
    Domain,
    SceneParams,
    Thing,
    render,
    render_layers,
    sample,
    with_second,
)
from tokenflow_batch.demo.textures import TILE_SIZE

__all__ = [
    "FULL",
    "GROUND",
    "OBJECT",
    "POST",
    "SECOND",
    "Clip",
    "Domain",
    "Post",
    "SceneParams",
    "Thing",
    "Track",
    "Wave",
    "caption",
    "describe",
    "recoloured",
    "render",
    "sample",
]

_REFERENCE_SIZE: Final = 128
_POST_RGB: Final = (70, 66, 62)

GROUND, OBJECT, SECOND, POST = 0, 1, 2, 3
"""Layers, from the back to the front."""


@dataclass(frozen=True, slots=True)
class Clip:
    """A video of one or two moving objects, known exactly.

    Attributes:
        scene: what there is to see, and the ground's offset at frame 0; the fields below replace
            the objects' position, radius and angle, the gain and the light.
        first: how the object moves.
        second: how the second object moves, if there is one.
        gain: brightness factor of the ground.
        light: brightness factor of everything but the post.
        pan: whole pixels per frame by which the ground moves (right, down).
        post: what passes in front, if anything.
        size: image side in pixels.
        length: number of frames.
    """

    scene: SceneParams
    first: Track
    second: Track | None
    gain: Wave
    light: Wave
    pan: tuple[int, int]
    post: Post | None
    size: int
    length: int

    @classmethod
    def random(
        cls,
        seed: int,
        frames: int,
        size: int = 128,
        domain: Domain = FULL,
        *,
        speed: float = 1.5,
        turn: float = 0.15,
        zoom: float = 0.0,
        flicker: float = 0.0,
        dim: float = 0.0,
        two: bool = False,
        pan: tuple[int, int] | None = None,
        post: bool = False,
    ) -> Clip:
        """Draw a clip; its frames depend on all arguments but `frames`.

        Args:
            seed: of all draws; the options below do not shift them, so that clips of one seed that
                differ in one option are alike in everything else.
            frames: length of the clip, at least 1.
            size: image side in pixels.
            domain: which attributes may occur.
            speed: root-mean-square speed of the object in pixels per frame of a 128-pixel image
                (in proportion at other sizes); 0 keeps it in place.
            turn: largest rotation from the mean angle in radians, at most 0.35.
            zoom: largest relative change of the object's radius, at most 0.3.
            flicker: largest change of the ground's brightness factor, at most 0.08.
            dim: largest change of the light on everything, at most 0.13; 0 leaves it at 1.
            two: whether there is a second object; the two keep to their halves of the image, and
                `zoom` is at most 0.15.
            pan: whole pixels per frame by which the ground moves (right, down); None draws each
                from -1, 0, 1.
            post: whether a post passes in front.

        Returns:
            The clip. Position, angle, radius and gain stay within the training distribution.

        Raises:
            ValueError: an option is out of its range.
        """
        _require("frames", frames, 1, math.inf)
        _require("size", size, 1, math.inf)
        _require("speed", speed, 0, math.inf)
        _require("turn", turn, 0, MAX_ANGLE)
        _require("zoom", zoom, 0, 0.15 if two else 0.3)
        _require("flicker", flicker, 0, 0.08)
        _require("dim", dim, 0, (LIGHT_RANGE[1] - LIGHT_RANGE[0]) / 2)
        rng = np.random.default_rng(seed)
        scene = sample(rng, domain)

        mean_radius = clamp(
            scene.radius, RADIUS_RANGE[0] / (1 - zoom), RADIUS_RANGE[1] / (1 + zoom)
        )
        mean_angle = clamp(scene.angle, turn - MAX_ANGLE, MAX_ANGLE - turn)
        mean_gain = clamp(scene.gain, GAIN_RANGE[0] + flicker, GAIN_RANGE[1] - flicker)
        radius = swing(rng, mean_radius, zoom * mean_radius)
        angle = swing(rng, mean_angle, turn)
        gain = swing(rng, mean_gain, flicker)
        room = MARGIN * mean_radius * (1 + zoom)
        # A sine's mean square is half its peak's: the peak velocity is √2 of what is asked for.
        velocity = math.sqrt(2) * speed / _REFERENCE_SIZE
        heading = rng.uniform(0, math.tau)
        x = sweep(rng, room, velocity * abs(math.cos(heading)))
        y = sweep(rng, room, velocity * abs(math.sin(heading)))
        drawn_pan = (int(rng.integers(-1, 2)), int(rng.integers(-1, 2)))
        drawn_post = draw_post(rng, size)
        first, second = Track(x, y, radius, angle), None
        if two:
            scene = with_second(rng, scene, domain)
            first, second = (
                half_track(rng, middle, thing.radius, zoom=zoom, turn=turn, velocity=velocity)
                for middle, thing in zip((0.25, 0.75), scene.objects, strict=True)
            )
        middle_light = sum(LIGHT_RANGE) / 2 if dim else scene.light
        return cls(
            scene=scene,
            first=first,
            second=second,
            gain=gain,
            light=swing(np.random.default_rng([seed, 1]), middle_light, dim),
            pan=drawn_pan if pan is None else pan,
            post=drawn_post if post else None,
            size=size,
            length=frames,
        )

    def __len__(self) -> int:
        return self.length

    @property
    def caption(self) -> str:
        """Plain description, e.g. "a red striped ball on grass": source prompt or edit prompt."""
        return describe(self.scene)

    def params(self, index: int) -> SceneParams:
        """Parameters of one frame as a still (the post is not part of them).

        Raises:
            IndexError: the clip has no such frame.
        """
        if not 0 <= index < self.length:
            raise IndexError(f"frame {index} of a clip of {self.length} frames")
        second = None
        if self.scene.second is not None and self.second is not None:
            second = replace(self.scene.second, **self.second.at(index))
        return replace(
            self.scene,
            # Moving the ground to the right means reading the tile further to the left.
            offset_x=(self.scene.offset_x - self.pan[0] * index) % TILE_SIZE,
            offset_y=(self.scene.offset_y - self.pan[1] * index) % TILE_SIZE,
            gain=self.gain.at(index),
            light=self.light.at(index),
            second=second,
            **self.first.at(index),
        )

    def frame(self, index: int) -> npt.NDArray[np.uint8]:
        """One frame, (H, W, C) uint8 RGB.

        Raises:
            IndexError: the clip has no such frame.
        """
        image_HWC, _ = render(self.params(index), self.size)
        frame_HWC = np.rint(image_HWC * 255).astype(np.uint8)
        frame_HWC[:, self._post_columns(index)] = _POST_RGB
        return frame_HWC

    def frames(self) -> Iterator[npt.NDArray[np.uint8]]:
        """All frames in order, one at a time."""
        return (self.frame(index) for index in range(self.length))

    def alpha(self, index: int) -> npt.NDArray[np.float32]:
        """How much of each pixel the first object takes up, (H, W) float32 in [0, 1].

        0 behind the post.

        Raises:
            IndexError: the clip has no such frame.
        """
        return self._alphas(index)[0]

    def _alphas(self, index: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Of the first and of the second object."""
        _, first_HW, second_HW = render_layers(self.params(index), self.size)
        for alpha_HW in (first_HW, second_HW):
            alpha_HW[:, self._post_columns(index)] = 0
        return first_HW, second_HW

    def mask(self, index: int) -> npt.NDArray[np.bool_]:
        """Pixels that show the first object, (H, W) bool: `alpha` above one half.

        Raises:
            IndexError: the clip has no such frame.
        """
        return self.alpha(index) > 0.5

    def layers(self, index: int) -> npt.NDArray[np.uint8]:
        """The layer that each pixel shows: `GROUND`, `OBJECT`, `SECOND` or `POST`, (H, W) uint8.

        Raises:
            IndexError: the clip has no such frame.
        """
        first_HW, second_HW = self._alphas(index)
        layers_HW = np.full(first_HW.shape, GROUND, np.uint8)
        layers_HW[second_HW > 0.5] = SECOND
        layers_HW[first_HW > 0.5] = OBJECT
        layers_HW[:, self._post_columns(index)] = POST
        return layers_HW

    def flow(self, index: int, to: int | None = None) -> npt.NDArray[np.float32]:
        """Where each pixel of a frame goes, whether it stays visible or not.

        Args:
            index: of the frame that the flow starts from.
            to: of the frame that it leads to; by default the next one, which the last frame lacks.

        Returns:
            (H, W, 2) float32 displacement (x, y) in pixels: whole pixels for ground and post, a
            similarity transform (shift, turn, zoom) for an object.

        Raises:
            IndexError: the clip has no such frame.
        """
        to = index + 1 if to is None else to
        layers_HW = self.layers(index)
        flow_HW2 = np.empty((self.size, self.size, 2), np.float32)
        flow_HW2[:] = [step * (to - index) for step in self.pan]
        if self.post is not None:
            moved = self.post.left(to, self.size) - self.post.left(index, self.size)
            flow_HW2[layers_HW == POST] = (moved, 0)
        now, then = self.params(index), self.params(to)
        self._add_flow(flow_HW2, layers_HW == OBJECT, now, then)
        if now.second is not None and then.second is not None:
            self._add_flow(flow_HW2, layers_HW == SECOND, now.second, then.second)
        return flow_HW2

    def _add_flow(
        self,
        flow_HW2: npt.NDArray[np.float32],
        mask_HW: npt.NDArray[np.bool_],
        now: SceneParams | Thing,
        then: SceneParams | Thing,
    ) -> None:
        """Write an object's motion into the flow, in place."""
        growth, turn = then.radius / now.radius, then.angle - now.angle
        cos, sin = growth * math.cos(turn), growth * math.sin(turn)
        rows, columns = np.nonzero(mask_HW)
        # The renderer counts from pixel corners; centres lie half a pixel further.
        x = columns + 0.5 - now.center_x * self.size
        y = rows + 0.5 - now.center_y * self.size
        shift_x = (then.center_x - now.center_x) * self.size
        shift_y = (then.center_y - now.center_y) * self.size
        flow_HW2[rows, columns, 0] = cos * x - sin * y - x + shift_x
        flow_HW2[rows, columns, 1] = sin * x + cos * y - y + shift_y

    def occluded(self, index: int, to: int | None = None) -> npt.NDArray[np.bool_]:
        """Pixels of a frame that another frame does not show.

        Args:
            index: of the frame.
            to: of the other one; by default the next, which the last frame lacks.

        Returns:
            (H, W) bool: the flow leads out of the image (beyond the outermost pixel centres), or
            behind an object or the post.

        Raises:
            IndexError: the clip has no such frame.
        """
        to = index + 1 if to is None else to
        flow_HW2 = self.flow(index, to)
        y_HW, x_HW = np.mgrid[: self.size, : self.size] + np.moveaxis(flow_HW2[..., ::-1], -1, 0)
        last = self.size - 1
        outside_HW = (x_HW < 0) | (x_HW > last) | (y_HW < 0) | (y_HW > last)
        to_x, to_y = (np.rint(np.clip(to, 0, last)).astype(int) for to in (x_HW, y_HW))
        # Ground and post move by whole pixels, so that the nearest pixel is exact for both; the
        # object is compared with the post alone, whose edges are whole pixels too.
        covering_HW = self.layers(to)[to_y, to_x]
        return np.asarray(outside_HW | (covering_HW > self.layers(index)))

    def _post_columns(self, index: int) -> slice:
        if self.post is None:
            return slice(0, 0)
        left = self.post.left(index, self.size)
        return slice(max(0, left), max(0, left + self.post.width))


def _require(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name}={value} must lie between {low} and {high}")


def recoloured(
    clip: Clip,
    color: str | None = None,
    texture: str | None = None,
    ground: str | None = None,
) -> Clip:
    """Change what a clip looks like and nothing about how it moves.

    Args:
        clip: the source.
        color: new colour of the object, None to keep it.
        texture: new texture of the object, None to keep it.
        ground: new ground, None to keep it.

    Returns:
        The ground truth of an edit: its caption is the editing prompt, its frames are the perfect
        result; masks, flow and occlusions equal the source's.

    Raises:
        ValueError: no such colour, texture or ground.
    """
    scene = clip.scene
    return replace(
        clip,
        scene=replace(
            scene,
            color=scene.color if color is None else color,
            texture=scene.texture if texture is None else texture,
            ground=scene.ground if ground is None else ground,
        ),
    )

"""Which pixels of a source frame the model works on, and the way back.

A latent diffusion model needs sides that are multiples of a few pixels (8 for the VAE, usually 64
for the UNet). A `Geometry` is two rectangles of whole pixels: a `region` of the source frame is
scaled onto the `inner` part of the working frame; where `inner` doesn't fill the working frame,
its edge pixels are repeated. Resizing, cropping and padding are all of this one form.

All rectangles are (left, top, right, bottom), all sizes (width, height), in pixels; frames are
arrays of uint8 (height, width, channels). Nothing is scaled where the sizes already agree, so such
a frame passes through unchanged; elsewhere Pillow's fixed-point Lanczos gives the same bits on
every machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Frame = NDArray[np.uint8]
Size = tuple[int, int]
Box = tuple[int, int, int, int]


class Fit(StrEnum):
    """What gives way when the source's shape is not the working shape."""

    RESIZE = "resize"
    """Each side is scaled on its own: everything is kept, the picture is stretched."""
    CROP = "crop"
    """Scaled to cover the working frame, centred; what sticks out is not edited."""
    PAD = "pad"
    """Scaled to fit inside the working frame, centred; the margin repeats the edge pixels."""


@dataclass(frozen=True)
class Geometry:
    """A size rule worked out for one source size; made by `plan_geometry`."""

    source: Size
    working: Size
    fit: Fit
    region: Box
    inner: Box

    def apply(self, frame: Frame) -> Frame:
        """Bring a source frame to the working size.

        Args:
            frame: uint8 (source height, source width, channels).

        Returns:
            uint8 (working height, working width, channels), C-contiguous; may share memory.

        Raises:
            ValueError: the frame has another size or type than the geometry was planned for.
        """
        _require(frame, self.source, "source frame")
        left, top, right, bottom = self.inner
        width, height = self.working
        scaled = _scale(_cut(frame, self.region), _size(self.inner))
        margins = ((top, height - bottom), (left, width - right), (0, 0))
        if any(side for pair in margins for side in pair):
            scaled = np.pad(scaled, margins, mode="edge")
        return np.ascontiguousarray(scaled)

    def undo(self, frame: Frame, source_frame: Frame | None = None) -> Frame:
        """Bring a working frame back to the source's size.

        Args:
            frame: uint8 (working height, working width, channels).
            source_frame: uint8 (source height, source width, channels), needed where the source
                was cropped: it fills what the model never saw.

        Returns:
            uint8 (source height, source width, channels), C-contiguous; may share memory.

        Raises:
            ValueError: a frame of the wrong size or type, or no `source_frame` where one is needed.
        """
        _require(frame, self.working, "working frame")
        scaled = _scale(_cut(frame, self.inner), _size(self.region))
        if not self.crops:
            return np.ascontiguousarray(scaled)
        if source_frame is None:
            raise ValueError(f"{self.describe()}: undoing the crop needs the source frame")
        _require(source_frame, self.source, "source frame")
        left, top, right, bottom = self.region
        whole = source_frame.copy()
        whole[top:bottom, left:right] = scaled
        return whole

    @property
    def crops(self) -> bool:
        """Whether parts of the source lie outside the working frame."""
        return _size(self.region) != self.source

    def working_aspect(self, sample_aspect_ratio: Fraction) -> Fraction:
        """The pixel aspect ratio with which a working frame looks like the source.

        Args:
            sample_aspect_ratio: width : height of one source pixel.

        Returns:
            Width : height of one working pixel. Cropping and padding keep the source's; stretching
            changes it.
        """
        if self.fit is not Fit.RESIZE:
            return sample_aspect_ratio
        (width, height), (to_width, to_height) = self.source, self.working
        return sample_aspect_ratio * Fraction(width * to_height, height * to_width)

    def describe(self) -> str:
        """One sentence for people, such as ``512×288 of 1280×720: resized``."""
        region, inner = _size(self.region), _size(self.inner)
        steps = []
        if self.crops:
            steps.append(f"centre {_text(region)} cut out")
        if region != inner:
            steps.append(f"resized to {_text(inner)}")
        if inner != self.working:
            steps.append("padded by repeating the edges")
        how = ", ".join(steps) if steps else "unchanged"
        return f"{_text(self.working)} of {_text(self.source)}: {how}"


def plan_geometry(source: Size, resolution: Size | None, fit: Fit, multiple: int) -> Geometry:
    """Work out the size rule for a source.

    Without a `resolution` the working size stays as near to the source's as `fit` allows: each side
    is cut down to a multiple (`CROP`), padded up to one (`PAD`) or scaled to the nearest one
    (`RESIZE`), and never less than one multiple.

    Args:
        source: upright source size, (width, height) in pixels.
        resolution: the working size, (width, height) in pixels, or None.
        fit: what gives way where the shapes differ.
        multiple: both working sides must be multiples of this many pixels.

    Returns:
        The geometry.

    Raises:
        ValueError: a size is not positive, or `resolution` is not made of multiples (the message
            names the nearest ones that are).
    """
    if min(*source, multiple) < 1:
        raise ValueError(f"source size {_text(source)} and multiple {multiple} must be positive")
    if resolution is None:
        working = _natural_size(source, fit, multiple)
    else:
        working = _checked(resolution, multiple)
    whole = (0, 0, *source)
    if fit is Fit.CROP:
        # Without a wish for a resolution, cropping alone does it: no pixel is resampled.
        fits = resolution is None and working[0] <= source[0] and working[1] <= source[1]
        region = working if fits else _inside(source, working)
        return Geometry(source, working, fit, _centred(region, source), (0, 0, *working))
    if fit is Fit.PAD:
        inner = source if resolution is None else _inside(working, source)
        return Geometry(source, working, fit, whole, _centred(inner, working))
    return Geometry(source, working, fit, whole, (0, 0, *working))


def _natural_size(source: Size, fit: Fit, multiple: int) -> Size:
    add = {Fit.CROP: 0, Fit.PAD: multiple - 1, Fit.RESIZE: multiple // 2}[fit]
    width, height = (max(multiple, (side + add) // multiple * multiple) for side in source)
    return width, height


def _checked(resolution: Size, multiple: int) -> Size:
    if min(resolution) >= 1 and not any(side % multiple for side in resolution):
        return resolution
    down, up = (
        tuple(max(multiple, (side + add) // multiple * multiple) for side in resolution)
        for add in (0, multiple - 1)
    )
    raise ValueError(
        f"resolution {_text(resolution)} is not made of multiples of {multiple}; "
        f"the nearest sizes that are: {_text(down)} and {_text(up)}"
    )


def _inside(frame: Size, shape: Size) -> Size:
    """The largest size within `frame` that has the proportions of `shape`, to the nearest pixel."""
    width, height = frame
    across, down = shape
    if width * down > height * across:
        return max(1, _divide(height * across, down)), height
    return width, max(1, _divide(width * down, across))


def _divide(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)


def _centred(size: Size, frame: Size) -> Box:
    left, top = (frame[0] - size[0]) // 2, (frame[1] - size[1]) // 2
    return left, top, left + size[0], top + size[1]


def _size(box: Box) -> Size:
    return box[2] - box[0], box[3] - box[1]


def _cut(frame: Frame, box: Box) -> Frame:
    left, top, right, bottom = box
    return frame[top:bottom, left:right]


def _scale(frame: Frame, size: Size) -> Frame:
    if (frame.shape[1], frame.shape[0]) == size:
        return frame
    image = Image.fromarray(np.ascontiguousarray(frame))
    # A copy, because Pillow lends its memory read-only and callers hand frames on to torch.
    return np.array(image.resize(size, Image.Resampling.LANCZOS))


def _require(frame: Frame, size: Size, what: str) -> None:
    if frame.dtype != np.uint8 or frame.ndim != 3 or (frame.shape[1], frame.shape[0]) != size:
        raise ValueError(
            f"{what} must be uint8 of {_text(size)} pixels with channels last, "
            f"not {frame.dtype} of shape {frame.shape}"
        )


def _text(size: tuple[int, ...]) -> str:
    return "×".join(map(str, size))

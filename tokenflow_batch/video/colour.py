"""Between the colours of video and the RGB that models know.

**In.** Frames become 8-bit full-range RGB by the matrix and range that their tags name. Without a
matrix tag, or with one that libswscale can't undo, BT.709 is taken for pictures at least 1280 wide
or more than 576 high, and BT.601 for smaller ones, as mpv does; without a range tag, limited range.
The transfer function and primaries are left alone (high dynamic range is not tone-mapped), alpha is
dropped, and the fields of interlaced video stay woven.

**Out.** Frames are BT.709, limited range, and tagged so. With 4:2:0, chroma is taken on the left
column of each pair, as players assume of H.264; libswscale would take it between the columns, which
shifts colours by half a pixel.
"""

from __future__ import annotations

from typing import cast

import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from numpy.typing import NDArray

from tokenflow_batch.video.facts import VideoFacts

BT709, LIMITED = 1, 1
_BT601, _RGB = 6, 0
_MATRICES = {_RGB, BT709, 4, 5, _BT601, 7, 9}  # what libswscale knows; 4 FCC, 7 SMPTE 240M, 9 2020
# Every chroma sample is interpolated, and the bits are the same on every processor.
_SCALING = (
    Interpolation.BICUBIC
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
    | Interpolation.ACCURATE_RND
    | Interpolation.BITEXACT
)


class ToRgb:
    """Turns decoded frames of one video into upright RGB arrays of one size."""

    def __init__(self, facts: VideoFacts) -> None:
        turned = facts.rotation % 180 != 0
        size = (facts.height, facts.width) if turned else (facts.width, facts.height)
        self._size, self._facts = size, facts
        self._matrix = _matrix(facts.colour.matrix, *size)
        self._reformatter = VideoReformatter()

    def __call__(self, frame: VideoFrame) -> NDArray[np.uint8]:
        """Convert a frame to uint8 (height, width, 3), contiguous and writable."""
        frame.colorspace = self._matrix
        width, height = self._size  # named, for videos that change size on the way
        rgb = self._reformatter.reformat(
            frame, width, height, "rgb24", interpolation=_SCALING, threads=1
        )
        pixels = cast(NDArray[np.uint8], rgb.to_ndarray())
        if self._facts.mirrored:
            pixels = pixels[:, ::-1]
        # A copy: of a source that is RGB already, these may be pixels the decoder still refers to.
        return np.array(np.rot90(pixels, self._facts.rotation // 90), order="C")


def _matrix(tag: int, width: int, height: int) -> int:
    if tag in _MATRICES:
        return tag
    return BT709 if width >= 1280 or height > 576 else _BT601


class ToYuv:
    """Turns RGB arrays into BT.709 frames of the coded size."""

    def __init__(self, width: int, height: int, *, subsampled: bool) -> None:
        self._width, self._height, self._subsampled = width, height, subsampled
        self._reformatter = VideoReformatter()

    def __call__(self, rgb: NDArray[np.uint8]) -> VideoFrame:
        """Convert uint8 (height, width, 3), growing it at the right and the bottom if too small."""
        margins = (self._height - rgb.shape[0], self._width - rgb.shape[1])
        if any(margins):
            rgb = np.pad(rgb, ((0, margins[0]), (0, margins[1]), (0, 0)), mode="edge")
        frame = self._reformatter.reformat(
            VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24"),
            format="yuv444p",
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
            interpolation=_SCALING,
            threads=1,
        )
        if self._subsampled:
            y, u, v = cast(NDArray[np.uint8], frame.to_ndarray())
            planes = np.concatenate([y.ravel(), _halve(u).ravel(), _halve(v).ravel()])
            frame = VideoFrame.from_ndarray(planes.reshape(-1, self._width), format="yuv420p")
        frame.colorspace = frame.color_trc = frame.color_primaries = BT709
        frame.color_range = LIMITED
        return frame


def _halve(plane: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Chroma for 4:2:0: between the rows of a pair, on its left column (weights 1, 2, 1)."""
    rows = plane[0::2].astype(np.uint16) + plane[1::2]
    before = np.concatenate([rows[:, :1], rows[:, 1:-1:2]], axis=1)
    mean: NDArray[np.uint16] = (before + 2 * rows[:, 0::2] + rows[:, 1::2] + 4) >> 3
    return mean.astype(np.uint8)

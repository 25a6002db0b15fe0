"""What a file's header says, for plans: in milliseconds, and not always the truth."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av

from tokenflow_batch.errors import VideoError
from tokenflow_batch.video.reader import open_source, oriented, picture_stream


@dataclass(frozen=True)
class Header:
    """A video's length and upright size as its header has them.

    Attributes:
        frames: how many; a guess from the duration where the header doesn't count them.
        rate: frames per second.
        width, height: upright, in pixels.
    """

    frames: int
    rate: float
    width: int
    height: int


def read_header(path: Path) -> Header:
    """Read a file's header and its first frame.

    Raises:
        VideoError: the file can't be read or has no picture.
    """
    with open_source(path) as container:
        stream = picture_stream(container, path)
        try:
            frame = next(container.decode(stream), None)
        except av.FFmpegError as error:
            raise VideoError(f"{path}: its first frame can't be decoded: {error}") from None
        if frame is None:
            raise VideoError(f"{path}: no frame can be decoded")
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        if stream.duration is not None and stream.time_base is not None:
            seconds = stream.duration * stream.time_base
        else:
            seconds = Fraction(container.duration or 0, av.time_base)
        frames = stream.frames or max(1, round(seconds * rate))
        _, rotation = oriented(frame)
        width, height = frame.width, frame.height
        if rotation % 180:
            width, height = height, width
        return Header(frames, float(rate), width, height)

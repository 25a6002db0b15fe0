"""What is true of a video file, as far as decoding it once can tell.

All times are exact: integers counted in `time_base`, a `Fraction` of a second.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

PQ, HLG = 16, 18
"""Transfer characteristics of high dynamic range video (ITU-T H.273)."""


@dataclass(frozen=True)
class ColourTags:
    """How the stored numbers mean colours: code points of ITU-T H.273, 2 where a tag is missing."""

    primaries: int
    transfer: int
    matrix: int
    range: int
    """0 missing, 1 limited (16-235), 2 full (0-255)."""


@dataclass(frozen=True)
class AudioFacts:
    """One audio stream of a file."""

    index: int
    """Number of the stream in its file."""
    codec: str
    rate: int
    """Samples per second; 0 where this build of FFmpeg can't read the stream."""
    channels: int
    language: str | None


def average_rate(
    rates: Iterable[Fraction], pts: NDArray[np.int64], last_duration: int, time_base: Fraction
) -> Fraction:
    """The first of the rates whose grid has all timestamps to within a tick, or the measured one.

    Args:
        rates: frames per second that are likely.
        pts: (F,), in `time_base`.
        last_duration: of the last frame, in `time_base`.
        time_base: seconds per tick.
    """
    for rate in rates:
        grid = np.arange(len(pts)) * float(1 / (rate * time_base))
        if np.abs(pts - pts[0] - grid).max() <= 1:
            return rate
    measured = len(pts) / ((int(pts[-1]) + last_duration - int(pts[0])) * time_base)
    return measured.limit_denominator(1_000_000)


@dataclass(frozen=True, eq=False)
class VideoFacts:
    """The picture track of a file, frame by frame, and what goes with it.

    Frames are those that decode, in the order shown. Sizes are upright: turned and mirrored as the
    file asks.
    """

    pts: NDArray[np.int64] = field(repr=False)
    """(F,), strictly increasing: when each frame is shown, in `time_base`."""
    last_duration: int
    """How long the last frame is shown, in `time_base`; at least 1."""
    time_base: Fraction
    """Seconds per tick."""
    rate: Fraction
    """Average frames per second."""
    origin: int
    """What is time zero for a player, in `time_base`; see `reader`."""
    width: int
    height: int
    rotation: int
    """Degrees counter-clockwise (0, 90, 180, 270) by which decoded frames are turned upright."""
    mirrored: bool
    """Whether decoded frames are flipped left to right before that."""
    sample_aspect_ratio: Fraction
    """Width : height of one upright pixel; 1 where the file doesn't say."""
    stream: int
    """Number of the picture stream in its file."""
    codec: str
    pixel_format: str
    colour: ColourTags
    audio: tuple[AudioFacts, ...]
    damaged: int
    """Packets that could not be decoded, and frames the decoder itself called corrupt."""
    retimed: int
    """Frames whose timestamp was missing or not later than the one before; see `reader`."""
    skipped: int | None = None
    """Frames of the file before the first of these, where they are a part of it; else None."""

    @property
    def frames(self) -> int:
        """Number of frames, F."""
        return len(self.pts)

    @property
    def zero(self) -> int:
        """What becomes time zero of an edited video, in `time_base`.

        A part begins with its first frame; a whole video when its source does.
        """
        return self.origin if self.skipped is None else int(self.pts[0])

    @property
    def duration(self) -> Fraction:
        """Seconds from the start of the first frame to the end of the last."""
        return (int(self.pts[-1]) + self.last_duration - int(self.pts[0])) * self.time_base

    @property
    def high_dynamic_range(self) -> bool:
        """Whether the picture is tagged PQ or HLG, which 8-bit BT.709 output can't carry."""
        return self.colour.transfer in (PQ, HLG)

    def durations(self) -> NDArray[np.int64]:
        """(F,): how long each frame is shown, in `time_base`."""
        return np.diff(self.pts, append=self.pts[-1] + self.last_duration)

    def to_json(self) -> dict[str, Any]:
        """Everything but `pts`, in types that JSON has; ratios are strings such as ``1/25``."""
        plain = {name: value for name, value in vars(self).items() if name != "pts"}
        for name, value in plain.items():
            if isinstance(value, Fraction):
                plain[name] = str(value)
        plain["colour"] = asdict(self.colour)
        plain["audio"] = [asdict(stream) for stream in self.audio]
        return {"frames": self.frames, **plain}

    @classmethod
    def from_json(cls, data: dict[str, Any], pts: NDArray[np.int64]) -> VideoFacts:
        """The inverse of `to_json`.

        Args:
            data: what `to_json` returned.
            pts: int64 (F,), kept beside it.

        Raises:
            ValueError: `pts` has another length than `data` says, or `data` has other fields.
        """
        values = dict(data)
        frames = values.pop("frames", None)
        if frames != len(pts):
            raise ValueError(f"facts of {frames} frames came with {len(pts)} timestamps")
        try:
            for name in ("time_base", "rate", "sample_aspect_ratio"):
                values[name] = Fraction(values[name])
            values["colour"] = ColourTags(**values["colour"])
            values["audio"] = tuple(AudioFacts(**stream) for stream in values["audio"])
            return cls(pts=np.asarray(pts, np.int64), **values)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not the facts of a video: {error}") from error

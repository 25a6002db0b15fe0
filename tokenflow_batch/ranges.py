"""Parts of a video: which frames, or which time, a clip is made of. Exact, and without torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from tokenflow_batch.errors import VideoError

_CLOCK = re.compile(r"(?:(?:(\d{1,4}):)?(\d{1,4}):)?(\d{1,7}(?:\.\d{1,9})?)")
_LONGEST = 10**7
"""Seconds: nothing later is asked for, and all sums stay far inside 64 bits."""


@dataclass(frozen=True)
class Part:
    """The frames of a video from `start` up to, not including, `stop`.

    Attributes:
        unit: `frames`, counted from 0, or `seconds` on the player's clock: then the part has the
            frames whose timestamps are in the range.
        start, stop: in that unit.
        where: manifest file and line, for messages; no part of what is asked for.
    """

    unit: Literal["frames", "seconds"]
    start: Fraction
    stop: Fraction
    where: str = field(default="", compare=False)

    def __str__(self) -> str:
        kind = "frames" if self.unit == "frames" else "time"
        return f"{kind} [{plain(self.start)}, {plain(self.stop)}]"

    @property
    def label(self) -> str:
        """For names: `12-48`, or `1.5s-90s`."""
        mark = "s" if self.unit == "seconds" else ""
        return f"{plain(self.start)}{mark}-{plain(self.stop)}{mark}"

    def described(self) -> list[str]:
        """What a key says of it."""
        return [self.unit, str(self.start), str(self.stop)]


def part_frames(part: Part, frames: int, rate: float, path: Path) -> int:
    """About how many frames a part has, by what a header says.

    Args:
        part: what is wanted.
        frames: of the whole video.
        rate: frames per second.
        path: the video, for messages.

    Raises:
        VideoError: by the header it reaches beyond the end, by more than headers are wrong about.
    """
    scale = 1.0 if part.unit == "frames" else rate
    start, stop = float(part.start) * scale, float(part.stop) * scale
    if start >= frames or stop > frames + max(1.0, rate / 2):
        raise beyond_end(part, path, f"{frames} frames, {frames / rate:.3f} s by its header")
    return max(1, round(min(stop, frames)) - round(start))


def beyond_end(part: Part, path: Path, length: str) -> VideoError:
    """The error for a part that a video doesn't have."""
    return VideoError(
        f"{path}: {part} reaches beyond the end: the video has {length} ({part.where})",
        hint="ranges end before their second number; frames count from 0",
    )


def plain(value: Fraction) -> str:
    """An exact decimal as text, at most nine digits after the point."""
    digits = Decimal(value.numerator) / Decimal(value.denominator)
    return f"{digits.quantize(Decimal(10) ** -9):f}".rstrip("0").rstrip(".")


def seconds(value: Any) -> Fraction:
    """A time as a manifest gives it: seconds, or "mm:ss" or "hh:mm:ss", all with a fraction.

    Binary floats are taken to the microsecond, so that 0.1 is a tenth.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError('must be seconds or a text such as "1:30.5"')
    text = f"{value:.6f}" if isinstance(value, float) else str(value)
    found = _CLOCK.fullmatch(text.strip())
    if found is None:
        raise ValueError('must be seconds, not negative, or a text such as "1:30.5"')
    hours, minutes, rest = found.groups(default="0")
    if found[2] is not None and (Fraction(rest) >= 60 or (found[1] and int(minutes) >= 60)):
        raise ValueError("has 60 or more behind a colon")
    total = int(hours) * 3600 + int(minutes) * 60 + Fraction(rest)
    if total > _LONGEST:
        raise ValueError(f"must be at most {_LONGEST} seconds")
    return total

"""Which frames of a file a part of it has, by exact arithmetic on their timestamps."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tokenflow_batch.errors import VideoError
from tokenflow_batch.ranges import Part, beyond_end
from tokenflow_batch.video.facts import VideoFacts, average_rate


def behind(part: Part, frames: int, time: int, time_base: Fraction) -> bool:
    """Whether the frame just read comes after the part.

    Args:
        part: what is wanted.
        frames: how many have been read, this one included.
        time: when it is shown, since time zero, in `time_base`.
        time_base: seconds per tick.
    """
    return frames > part.stop if part.unit == "frames" else time * time_base >= part.stop


def cut(facts: VideoFacts, part: Part, path: Path, *, more: bool) -> VideoFacts:
    """The facts of a part.

    Args:
        facts: of the whole file, or of all frames up to the first one behind the part.
        part: what is wanted.
        path: the file, for messages.
        more: whether the last frame of `facts` is one behind the part.

    Raises:
        VideoError: the part reaches beyond the end of the video, or has no frame.
    """
    pts = facts.pts
    end = None if more else int(pts[-1]) + facts.last_duration - facts.origin
    start, stop = _frames_of(part, pts - facts.origin, end, facts.time_base, path)
    last = facts.last_duration if stop == len(pts) else int(pts[stop] - pts[stop - 1])
    rate = average_rate([facts.rate], pts[start:stop], last, facts.time_base)
    return replace(facts, pts=pts[start:stop], last_duration=last, rate=rate, skipped=start)


def _frames_of(
    part: Part, times: NDArray[np.int64], end: int | None, time_base: Fraction, path: Path
) -> tuple[int, int]:
    """First frame and one after the last.

    Args:
        part: what is wanted.
        times: (F,), when frames are shown since time zero, in `time_base`, ascending; all of the
            file's, or all up to the first one behind the part.
        end: when the last frame ends, where the file ends there; None where it goes on.
        time_base: seconds per tick.
        path: the file, for messages.

    Raises:
        VideoError: the part reaches beyond the end of the video, or has no frame.
    """
    if part.unit == "frames":
        start, stop = int(part.start), int(part.stop)
        beyond = end is not None and stop > len(times)
    else:
        start, stop = (_first(times, at / time_base) for at in (part.start, part.stop))
        beyond = end is not None and part.stop > end * time_base
    if beyond and end is not None:
        raise beyond_end(part, path, f"{len(times)} frames, {float(end * time_base):.3f} s")
    if start >= stop:
        raise VideoError(
            f"{path}: {part}: no frame begins in that time ({part.where})",
            hint="make the range longer: a frame belongs to it if it appears within",
        )
    return start, stop


def _first(times: NDArray[np.int64], at: Fraction) -> int:
    """How many frames are shown before the moment `at`, in ticks."""
    return int(np.searchsorted(times, math.ceil(at)))

"""From RGB frames to H.264 segments: pieces of a video that are written apart and joined later.

A segment holds one packet per frame in the order shown (no B-frames), starts with a frame that
needs no other (closed groups of pictures) and has the same stream header as every other segment
written with the same settings, so segments join by copying packets. Written twice, it is the same
bytes: the number of threads is a setting, never the machine's.

**Odd sizes.** 4:2:0 has no odd sizes, and H.264 can't crop it to one. Odd sides grow by one pixel
that repeats the edge: that plays everywhere. 4:4:4 keeps odd sizes, but few players in browsers or
hardware decode it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import chain
from pathlib import Path

import av
import numpy as np
from av.container import OutputContainer
from av.video.stream import VideoStream
from numpy.typing import NDArray

from tokenflow_batch.clock import measured
from tokenflow_batch.errors import VideoError
from tokenflow_batch.video.colour import BT709, LIMITED, ToYuv

PRESETS = (
    "ultrafast",
    "superfast",
    "veryfast",
    "faster",
    "fast",
    "medium",
    "slow",
    "slower",
    "veryslow",
)
PIXEL_FORMATS = ("yuv420p", "yuv444p")


@dataclass(frozen=True)
class Encoding:
    """How x264 encodes; all segments of a video need the same."""

    crf: int = 16
    """Constant rate factor, 1 (best) to 51; x264's own default is 23, 16 can't be told apart."""
    preset: str = "medium"
    """One of `PRESETS`: slower ones give smaller files."""
    pixel_format: str = "yuv420p"
    """One of `PIXEL_FORMATS`."""
    threads: int = 4
    """A setting and not the number of processors, because the bits depend on it."""

    def __post_init__(self) -> None:
        if not 1 <= self.crf <= 51:
            raise ValueError(f"crf is {self.crf}, must be 1 to 51")
        if self.preset not in PRESETS:
            raise ValueError(f"no preset {self.preset!r}; there are {', '.join(PRESETS)}")
        if self.pixel_format not in PIXEL_FORMATS:
            raise ValueError(f"no pixel format {self.pixel_format!r}; use {PIXEL_FORMATS}")
        if self.threads < 1:
            raise ValueError(f"threads is {self.threads}, must be at least 1")

    def coded_size(self, width: int, height: int) -> tuple[int, int]:
        """The (width, height) in pixels that frames of a size are written with."""
        if self.pixel_format == "yuv420p":
            return width + width % 2, height + height % 2
        return width, height


@measured("video")
def write_segment(
    path: Path,
    frames: Iterable[NDArray[np.uint8]],
    pts: Sequence[int] | NDArray[np.int64],
    *,
    time_base: Fraction,
    rate: Fraction,
    encoding: Encoding,
    sample_aspect_ratio: Fraction = Fraction(1),
) -> None:
    """Encode consecutive frames into a file of their own.

    The file is an MP4 that counts time from its own first frame. It is neither fsynced nor written
    under a temporary name: that is for whoever commits it.

    Args:
        path: the file to write; replaced if it is there, removed if writing fails.
        frames: at least one, uint8 (height, width, 3), RGB, all of one size; taken one at a time.
        pts: (number of frames,), strictly increasing, in `time_base`.
        time_base: seconds per tick.
        rate: frames per second of the whole video, which guides x264; timing is by `pts`.
        encoding: quality and speed.
        sample_aspect_ratio: width : height of one pixel.

    Raises:
        ValueError: no frames, a frame of another size or type, not one timestamp per frame, or
            timestamps that don't increase.
        VideoError: encoding or writing failed.
    """
    if (np.diff(pts) <= 0).any():  # x264 would let two frames share a moment
        raise ValueError(f"{path}: timestamps must increase")
    iterator = iter(frames)
    first = next(iterator, None)
    if first is None:
        raise ValueError(f"{path}: no frames to write")
    try:
        with av.open(f"file:{path}", "w", format="mp4") as container:
            stream = _add_stream(container, first, time_base, rate, encoding, sample_aspect_ratio)
            _encode(container, stream, chain([first], iterator), pts, time_base)
    except av.FFmpegError as error:
        path.unlink(missing_ok=True)
        raise VideoError(f"{path}: writing failed: {error.strerror}") from error
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _add_stream(
    container: OutputContainer,
    frame: NDArray[np.uint8],
    time_base: Fraction,
    rate: Fraction,
    encoding: Encoding,
    sample_aspect_ratio: Fraction,
) -> VideoStream:
    options = {
        "crf": str(encoding.crf),
        "preset": encoding.preset,
        "bf": "0",
        "flags": "+cgop",
        **repeatable_assembly(),
    }
    stream = container.add_stream("libx264", rate=rate, options=options)
    stream.width, stream.height = encoding.coded_size(frame.shape[1], frame.shape[0])
    stream.pix_fmt = encoding.pixel_format
    context = stream.codec_context
    context.thread_count = encoding.threads
    context.time_base = time_base
    context.sample_aspect_ratio = sample_aspect_ratio
    context.color_primaries = context.color_trc = context.colorspace = BT709
    context.color_range = LIMITED
    return stream


@cache
def repeatable_assembly() -> dict[str, str]:
    """Options that keep x264 from using AVX-512.

    With it, x264 (core 165) gives other bits for the same frames once in some hundred runs,
    depending on what the process did before, whatever the number of threads. Its AVX2 code gives
    the usual bits every time.
    """
    try:
        has_avx512 = " avx512f " in Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return {}
    return {"x264-params": "asm=AVX2"} if has_avx512 else {}


def _encode(
    container: OutputContainer,
    stream: VideoStream,
    frames: Iterator[NDArray[np.uint8]],
    pts: Sequence[int] | NDArray[np.int64],
    time_base: Fraction,
) -> None:
    convert = ToYuv(stream.width, stream.height, subsampled=stream.pix_fmt == "yuv420p")
    shape = None
    for frame, time in zip(frames, pts, strict=True):
        shape = shape or frame.shape
        if frame.shape != shape or frame.ndim != 3 or frame.dtype != np.uint8:
            raise ValueError(f"a frame is {frame.dtype} {frame.shape}, the first was {shape}")
        picture = convert(frame)
        picture.pts, picture.time_base = int(time) - int(pts[0]), time_base
        container.mux(stream.encode(picture))
    container.mux(stream.encode(None))

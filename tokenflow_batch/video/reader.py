"""From a video file to facts and upright RGB frames.

Frames are counted by decoding, not by reading headers, and always decoded from the beginning on one
thread. Seeking lands on other frames in open groups of pictures, and threads conceal damage in
whatever order they run; this way frame i is the same bits whichever part of the file is asked for.

**Timestamps.** A frame is shown at its presentation timestamp. Where that is missing or not later
than the frame before, as in joined or damaged recordings, the frame follows its predecessor after
the median of the last five intervals (to begin with, the period of the header's frame rate). MPEG
transport and program streams count from an arbitrary moment and may start again at another; in
these, a leap of more than ten seconds is taken for that and closed in the same way.

**Time zero** is 0, except in those streams: there, it is the start of the earliest track. A picture
before zero moves zero.
"""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from statistics import median_low
from typing import TypeVar, cast

import av
import numpy as np
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.format import Flags as FormatFlags
from av.packet import Packet
from av.stream import Disposition, Stream
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from tokenflow_batch.ahead import ahead
from tokenflow_batch.clock import measured, timed
from tokenflow_batch.errors import VideoError
from tokenflow_batch.ranges import Part
from tokenflow_batch.video.colour import ToRgb
from tokenflow_batch.video.facts import AudioFacts, ColourTags, VideoFacts, average_rate
from tokenflow_batch.video.parts import behind, cut

StreamT = TypeVar("StreamT", bound=Stream)

_NO_MOVING_PICTURE = Disposition.attached_pic | Disposition.timed_thumbnails
_FOREVER = Fraction(2**63)
_DEFAULT_RATE = Fraction(25)
_AHEAD = 4
"""Decoded frames kept ready."""


@measured("video")
def probe(
    path: Path, progress: Callable[[int], None] | None = None, part: Part | None = None
) -> VideoFacts:
    """Decode a file once, up to the end of the part, and report what is in it.

    Args:
        path: a video file.
        progress: called with the number of frames decoded so far.
        part: whose facts are wanted; the whole video's where None.

    Returns:
        The facts. Takes 8 bytes of memory a frame.

    Raises:
        VideoError: the file is missing, empty, a folder, unreadable, no video, has sound only, or
            not one frame of it can be decoded; or the part is not in it.
    """
    with open_source(path) as container:
        stream = picture_stream(container, path)
        decoder, clock = _Decoder(container, stream, path), _Clock(container, stream)
        stamps = array("q")
        first = last = None
        more = False
        for last in decoder:
            first = first or last
            stamps.append(clock.time_of(last))
            if progress is not None:
                progress(len(stamps))
            more = part is not None and behind(
                part,
                len(stamps),
                stamps[-1] - _origin(container, stamps[0], clock.time_base),
                clock.time_base,
            )
            if more:
                break
        if first is None or last is None:
            raise VideoError(
                f"{path}: no frame can be decoded ({decoder.damaged} damaged packets)",
                hint="play the file: if that fails too, get another copy of it",
            )
        pts = np.array(stamps, np.int64)
        facts = _facts(container, stream, pts, (first, last), decoder, clock)
        return facts if part is None else cut(facts, part, path, more=more)


def _facts(
    container: InputContainer,
    stream: VideoStream,
    pts: NDArray[np.int64],
    ends: tuple[VideoFrame, VideoFrame],
    decoder: _Decoder,
    clock: _Clock,
) -> VideoFacts:
    first, last = ends
    mirrored, rotation = oriented(first)
    aspect = stream.sample_aspect_ratio or Fraction(1)
    width, height = first.width, first.height
    if rotation % 180:
        width, height, aspect = height, width, 1 / aspect
    last_duration = _last_duration(last, pts, clock)
    rates = [rate for rate in (stream.average_rate, stream.guessed_rate) if rate]
    return VideoFacts(
        pts=pts,
        last_duration=last_duration,
        time_base=clock.time_base,
        rate=average_rate(rates, pts, last_duration, clock.time_base),
        origin=_origin(container, int(pts[0]), clock.time_base),
        width=width,
        height=height,
        rotation=rotation,
        mirrored=mirrored,
        sample_aspect_ratio=aspect,
        stream=stream.index,
        codec=stream.codec_context.codec.canonical_name,
        pixel_format=first.format.name,
        colour=ColourTags(
            first.color_primaries, first.color_trc, first.colorspace, first.color_range
        ),
        audio=_audio_facts(container),
        damaged=decoder.damaged,
        retimed=clock.retimed,
    )


def read_frames(
    path: Path, facts: VideoFacts, start: int = 0, stop: int | None = None
) -> Iterator[NDArray[np.uint8]]:
    """Read frames in the order shown, one at a time, decoding a few ahead in a thread.

    The frames before `start` are decoded too, but not converted.

    Args:
        path: the file that `facts` came from.
        facts: what `probe` said about it, or about a part of it.
        start: first frame, counted from 0 at the beginning of the part.
        stop: one after the last frame; all that follow where None.

    Yields:
        `stop - start` frames: uint8 (height, width, 3), RGB, upright, contiguous and writable.

    Raises:
        ValueError: not 0 <= start <= stop <= facts.frames.
        VideoError: the file can't be read, or no longer is the one that was probed.
    """
    stop = facts.frames if stop is None else stop
    if not 0 <= start <= stop <= facts.frames:
        raise ValueError(f"frames {start} to {stop} of a video of {facts.frames}")
    if start == stop:
        return iter(())
    frames = timed("video", _frames(path, facts, start, stop))
    return ahead(frames, _AHEAD, computed=True)


def _frames(path: Path, facts: VideoFacts, start: int, stop: int) -> Iterator[NDArray[np.uint8]]:
    changed = VideoError(
        f"{path}: not the file that was probed: its frames or their timestamps differ",
        hint="let the job start anew with the file as it is now, or bring the old one back",
    )
    convert = ToRgb(facts)
    with open_source(path) as container:
        stream = picture_stream(container, path)
        clock = _Clock(container, stream)
        seen, part = -(facts.skipped or 0), facts.skipped is not None
        for frame in _Decoder(container, stream, path):
            time = clock.time_of(frame)
            if part and seen == facts.frames:
                return  # the file goes on
            if seen >= facts.frames or (seen >= 0 and time != facts.pts[seen]):
                raise changed
            if seen == stop:
                return
            if seen >= start:
                yield convert(frame)
            seen += 1
    if seen != facts.frames:
        raise changed


@contextmanager
def open_source(path: Path) -> Iterator[InputContainer]:
    """Open a media file for reading; closed at the end.

    Args:
        path: the file.

    Raises:
        VideoError: it is missing, empty, a folder, unreadable, or no media file.
    """
    try:
        if path.is_dir():
            raise VideoError(f"{path} is a folder, not a video", hint="name the file in it")
        if path.stat().st_size == 0:
            raise VideoError(f"{path} is empty", hint="was the copy or download finished?")
        # "file:" keeps a colon in a name from being taken for a protocol. Metadata in other
        # encodings than UTF-8 is common and of no interest here.
        container = av.open(f"file:{path}", metadata_errors="replace")
    except FileNotFoundError as error:
        raise VideoError(f"{path}: no such file", hint="check the path") from error
    except PermissionError as error:
        raise VideoError(f"{path}: permission denied", hint="make it readable") from error
    except (av.FFmpegError, OSError) as error:
        raise VideoError(
            f"{path} can't be opened as a video: {error.strerror}",
            hint="is it a video, and complete? one cut off while recorded may lack its index",
        ) from error
    with container:
        _refuse_what_only_looks_like_video(container, path)
        yield container


def demux(container: InputContainer, stream: StreamT, path: Path) -> Iterator[Packet[StreamT]]:
    """Read the packets of one stream, and an empty one at the end.

    Args:
        container: an open file.
        stream: one of its streams.
        path: the file's name, for messages.

    Raises:
        av.InvalidDataError: the file's structure is damaged from here on.
        VideoError: the file can't be read any more.
    """
    try:
        yield from cast("Iterator[Packet[StreamT]]", container.demux(stream))
    except IndexError:
        return  # PyAV's answer, at the very end, to streams that turned up while reading
    except av.InvalidDataError:
        raise
    except (av.FFmpegError, OSError) as error:
        raise VideoError(f"{path}: reading failed: {error.strerror}") from error


def longest_leap(container: InputContainer) -> Fraction:
    """How many seconds apart two timestamps of a file may be and still belong to one clock."""
    return Fraction(10) if _starts_anywhere(container) else _FOREVER


def _starts_anywhere(container: InputContainer) -> bool:
    return bool(container.format.flags & cast(int, FormatFlags.ts_discont.value))


def _refuse_what_only_looks_like_video(container: InputContainer, path: Path) -> None:
    # FFmpeg draws text files as terminal screens, and follows playlists to other files.
    names = set(container.format.name.split(","))
    if names & {"tty", "bin", "xbin", "adf", "idf"}:
        raise VideoError(f"{path} is a text file, not a video", hint="name a video file")
    if names & {"concat", "hls", "dash"}:
        raise VideoError(f"{path} is a playlist, not a video", hint="name the file it plays")


def picture_stream(container: InputContainer, path: Path) -> VideoStream:
    """The first stream of moving pictures.

    Raises:
        VideoError: there is none, or FFmpeg has no decoder for it.
    """
    moving = [s for s in container.streams.video if not s.disposition & _NO_MOVING_PICTURE]
    if not moving:
        what = "sound but no picture" if container.streams.audio else "no picture"
        raise VideoError(f"{path} has {what}", hint="name a file with a video track")
    # The stubs don't know it, but a stream that FFmpeg has no decoder for comes without a context.
    if cast(object, moving[0].codec_context) is None:
        raise VideoError(
            f"{path}: this build of FFmpeg has no decoder for its video track",
            hint="convert the file to H.264 first",
        )
    return moving[0]


def _audio_facts(container: InputContainer) -> tuple[AudioFacts, ...]:
    return tuple(_audio_stream_facts(stream) for stream in container.streams.audio)


def _audio_stream_facts(stream: AudioStream) -> AudioFacts:
    context = stream.codec_context
    if cast(object, context) is None:  # as for pictures: FFmpeg has no decoder for it
        return AudioFacts(stream.index, "unknown", 0, 0, stream.language)
    return AudioFacts(
        stream.index,
        context.codec.canonical_name,
        context.sample_rate,
        context.channels,
        stream.language,
    )


class _Decoder:
    """Frames of a stream in the order shown; what can't be decoded is skipped and counted."""

    def __init__(self, container: InputContainer, stream: VideoStream, path: Path) -> None:
        stream.codec_context.thread_count = 1
        self._container, self._stream, self._path = container, stream, path
        self.damaged = 0

    def __iter__(self) -> Iterator[VideoFrame]:
        try:
            for packet in demux(self._container, self._stream, self._path):
                yield from self._decode(packet)  # the last, empty one drains the decoder
        except av.InvalidDataError:
            self.damaged += 1
            yield from self._decode(None)

    def _decode(self, packet: Packet[VideoStream] | None) -> list[VideoFrame]:
        try:
            frames = self._stream.decode(packet)
        except av.FFmpegError as error:  # decoding reads no file: whatever it is, it's the data
            if isinstance(error, MemoryError):
                raise
            self.damaged += 1
            return []
        self.damaged += sum(frame.is_corrupt for frame in frames)
        return frames


class _Clock:
    """Gives each frame its time by the rule at the head of this file."""

    def __init__(self, container: InputContainer, stream: VideoStream) -> None:
        self.time_base = stream.time_base or 1 / _DEFAULT_RATE
        rate = stream.average_rate or stream.guessed_rate or _DEFAULT_RATE
        self._intervals = deque([max(1, round(1 / (rate * self.time_base)))], maxlen=5)
        self.retimed = 0
        self._leap = longest_leap(container) / self.time_base
        self._last: int | None = None

    def time_of(self, frame: VideoFrame) -> int:
        """When the next frame is shown, in `time_base`."""
        time, last = frame.pts, self._last
        if time is None or (last is not None and not last < time <= last + self._leap):
            self.retimed += 1
            time = 0 if last is None else last + self.period
        if last is not None:
            self._intervals.append(time - last)
        self._last = time
        return time

    @property
    def period(self) -> int:
        """How long frames have been shown lately, in `time_base`."""
        return median_low(self._intervals)


def oriented(frame: VideoFrame) -> tuple[bool, int]:
    """Whether to mirror a frame left to right, and how far to turn it then, from its matrix."""
    side_data = cast(Mapping[str, bytes], frame.side_data)
    matrix = side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, 0
    # x' = a x + c y and y' = b x + d y, with y downwards; rows of three 32-bit numbers.
    a, b, _, c, d = (int(n) for n in np.frombuffer(matrix, np.int32)[:5])
    mirrored = a * d - b * c < 0
    if mirrored:
        a, b = -a, -b
    return mirrored, round(math.degrees(math.atan2(-b, a)) / 90) % 4 * 90


def _last_duration(last: VideoFrame, pts: NDArray[np.int64], clock: _Clock) -> int:
    if last.duration > 0:
        return last.duration
    return int(pts[-1] - pts[-2]) if len(pts) > 1 else clock.period


def _origin(container: InputContainer, first: int, time_base: Fraction) -> int:
    if _starts_anywhere(container) and container.start_time is not None:
        # Rounded to microseconds by FFmpeg; rounding to ticks brings the exact value back.
        return min(first, round(Fraction(container.start_time, av.time_base) / time_base))
    return min(first, 0)

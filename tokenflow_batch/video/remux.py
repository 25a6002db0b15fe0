"""From segments and a source's sound to the finished file, without decoding either.

The picture gets the source's timestamps to the tick, so variable frame rates and gaps survive. The
source's time zero (`VideoFacts.zero`) becomes zero. Subtitles, chapters and data tracks are not
taken along.

The output is always an MP4 with its index in front, ready to be streamed. It appears under its name
only when it is complete and on disk.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from av.container import OutputContainer
from av.packet import Packet
from av.video.stream import VideoStream

from tokenflow_batch.clock import measured
from tokenflow_batch.errors import VideoError
from tokenflow_batch.files import replacing
from tokenflow_batch.video.audio import AudioTrack
from tokenflow_batch.video.facts import VideoFacts
from tokenflow_batch.video.reader import open_source

SUFFIXES = (".mp4", ".m4v")
_MOVIE_TIMESCALE = 1000  # FFmpeg's and QuickTime's habit


@measured("video")
def join(
    segments: Sequence[Path],
    facts: VideoFacts,
    source: Path | None,
    output: Path,
    audio: bool = True,
) -> list[str]:
    """Join segments into one video that keeps the source's timing and sound.

    Beyond a few packets, memory is taken only by the index of the MP4, some hundred bytes a packet.

    Args:
        segments: files by `write_segment`, in order, all with the same encoding; together they have
            `facts.frames` frames.
        facts: what `probe` said about the source.
        source: the source, for its sound; not read where `audio` is False or it has none.
        output: the file to write, ending in one of `SUFFIXES`; replaced if it is there, its folder
            made if it isn't.
        audio: whether to take the source's sound along.

    Returns:
        Sentences about sound that could not be kept as it was.

    Raises:
        ValueError: `output` has another ending, or there are no segments.
        VideoError: segments don't fit together or to `facts`, or reading or writing failed; there
            is no new file then.
    """
    if output.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{output}: must end in {' or '.join(SUFFIXES)}")
    if not segments:
        raise ValueError(f"{output}: no segments to join")
    try:
        with replacing(output) as temporary:
            return _write(segments, facts, source if audio else None, temporary)
    except (av.FFmpegError, OSError) as error:
        raise VideoError(f"{output}: writing failed: {error.strerror}") from error


def _write(
    segments: Sequence[Path], facts: VideoFacts, source: Path | None, output: Path
) -> list[str]:
    warnings = []
    with ExitStack() as stack:
        tracks = []
        for stream in facts.audio:
            if source is None:
                break
            if not stream.rate:
                warnings.append(f"audio track {stream.index} left out: no decoder for it")
                continue
            track = AudioTrack(stack, source, stream, facts)
            if not track.empty:
                tracks.append(track)
        options = _timescales(facts, tracks)
        container = stack.enter_context(
            av.open(f"file:{output}", "w", format="mp4", container_options=options)
        )
        picture = _add_picture(container, segments[0], facts)
        for track in tracks:
            track.attach(container)
        queues: list[Iterator[Packet[Any]]] = [_picture_packets(segments, facts, picture)]
        queues += [track.packets() for track in tracks]
        refused = 0
        for packet in heapq.merge(*queues, key=_decoding_time):
            try:
                container.mux(packet)
            except (av.InvalidDataError, av.ArgumentError):
                if packet.stream is picture:
                    raise
                refused += 1  # AAC from a damaged transport stream, whose headers go here
        if refused:
            warnings.append(f"{refused} damaged packets of sound left out")
    return warnings + [sentence for track in tracks for sentence in track.warnings]


def _timescales(facts: VideoFacts, tracks: Sequence[AudioTrack]) -> dict[str, str]:
    """Options for FFmpeg's MP4 writer that let it say every time exactly."""
    picture = facts.time_base.denominator
    while picture < 10_000:  # as FFmpeg would, for players that dislike coarse clocks
        picture *= 2
    # Where a track starts late, that is said in units of the movie's clock, not of the track's.
    late = [t.facts.rate for t in tracks if t.start > 0 or facts.skipped is not None]
    movie = math.lcm(_MOVIE_TIMESCALE, *late, _start(facts).denominator)
    longest = int(facts.durations().max()) * facts.time_base * picture
    if max(picture, movie) >= 2**31 or longest >= 2**32:
        raise VideoError(
            f"an MP4 can't count in units of {facts.time_base} s up to {float(facts.duration)} s"
        )
    return {
        "movflags": "+faststart",
        "video_track_timescale": str(picture),
        "movie_timescale": str(movie),
    }


def _start(facts: VideoFacts) -> Fraction:
    return (int(facts.pts[0]) - facts.zero) * facts.time_base


def _add_picture(container: OutputContainer, segment: Path, facts: VideoFacts) -> VideoStream:
    with open_source(segment) as first:
        picture = container.add_stream_from_template(first.streams.video[0], opaque=True)
    picture.time_base = facts.time_base
    return picture


def _picture_packets(
    segments: Sequence[Path], facts: VideoFacts, picture: VideoStream
) -> Iterator[Packet[VideoStream]]:
    """All packets of all segments, put at the source's times."""
    durations = facts.durations()
    header = None
    count = 0
    for path in segments:
        with open_source(path) as segment:
            stream = segment.streams.video[0]
            header = header or stream.codec_context.extradata
            if stream.codec_context.extradata != header:
                raise VideoError(
                    f"{path} was encoded with other settings than {segments[0]}",
                    hint="render all segments anew",
                )
            for packet in segment.demux(stream):
                if not packet.size:
                    continue
                if count == facts.frames:
                    raise _wrong_count(segments, facts)
                packet.stream = picture
                packet.time_base = facts.time_base
                packet.pts = packet.dts = int(facts.pts[count]) - facts.zero
                packet.duration = int(durations[count])
                count += 1
                yield packet
    if count != facts.frames:
        raise _wrong_count(segments, facts)


def _wrong_count(segments: Sequence[Path], facts: VideoFacts) -> VideoError:
    return VideoError(
        f"{len(segments)} segments from {segments[0]} on don't hold {facts.frames} frames",
        hint="one is missing, doubled or cut short: render them anew",
    )


def _decoding_time(packet: Packet[Any]) -> Fraction:
    return (packet.dts or 0) * packet.time_base

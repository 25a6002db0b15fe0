"""The sound of a source, as packets for the file that is joined.

Packets are copied unchanged wherever an MP4 can carry them in a way players know; other codecs are
converted to AAC.

**Timestamps** are counted in samples. Containers that round them (Matroska to milliseconds, MPEG to
1/90000 s) would make a copied track stutter by fractions of a frame, so as long as a rounded
timestamp agrees with where the samples so far end, that is where the packet goes. So it does where
its timestamp is missing, goes back, or leaps as the rules for pictures in `reader` don't allow.

**Parts.** Packets are the smallest piece that can be copied. Of a part's sound all that reach into
it are taken whole, so it may go on for the rest of its last packet. Before its first sample lie
packets of a tenth of a second, which decoders need to start with; they stand before time zero,
where an MP4's edit list keeps players from playing them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer, OutputContainer
from av.packet import Packet

from tokenflow_batch.video.facts import AudioFacts, VideoFacts
from tokenflow_batch.video.reader import demux, longest_leap, open_source

COPIED = frozenset({"aac", "ac3", "alac", "dts", "eac3", "flac", "mp2", "mp3", "opus"})
"""Codecs that players know in an MP4."""

_LAYOUTS = {1: "mono", 6: "5.1", 8: "7.1"}  # by channels; anything else is mixed to stereo
_BITS_PER_CHANNEL = 96_000
_FALLBACK_RATE = 48_000
_LEAD_IN = Fraction(1, 10)


class AudioTrack:
    """One audio stream of a source, on its way into an output file.

    Every track opens the source for itself, so that tracks can be read side by side however the
    source interleaves them.
    """

    def __init__(
        self, stack: ExitStack, path: Path, facts: AudioFacts, picture: VideoFacts
    ) -> None:
        """Open a stream.

        Args:
            stack: closes the source.
            path: the source.
            facts: which of its streams.
            picture: what it sounds to.

        Raises:
            VideoError: the source can't be opened.
        """
        container = stack.enter_context(open_source(path))
        self.facts = facts
        self.warnings: list[str] = []
        self._stream = next(s for s in container.streams.audio if s.index == facts.index)
        self._path, self._leap = path, longest_leap(container)
        self._origin = picture.origin * picture.time_base
        self._cut_off = round((picture.zero - picture.origin) * picture.time_base * facts.rate)
        self._length = None
        if picture.skipped is not None:
            self._length = math.ceil(picture.duration * facts.rate)
        self._packets = self._read(container)
        first = next(self._packets, None)
        self.empty = first is None
        self.start = Fraction(0)
        """When the track begins, in seconds."""
        if first is not None:
            self._packets = chain([first], self._packets)
            self.start = self._time(first.pts, first.time_base) or self.start
        self._output: AudioStream | None = None

    def attach(self, container: OutputContainer) -> None:
        """Announce the track to an output file; before anything is written to it."""
        if self.facts.codec in COPIED:
            self._output = container.add_stream_from_template(self._stream)
            self._output.time_base = Fraction(1, self.facts.rate)
        else:
            self._output = self._add_aac(container)
            self.warnings.append(
                f"audio track {self.facts.index}: {self.facts.codec} converted to AAC, "
                "because players don't expect it in an MP4"
            )
        if self.facts.language is not None:
            self._output.metadata["language"] = self.facts.language
        self._output.disposition = self._stream.disposition

    def packets(self) -> Iterator[Packet[AudioStream]]:
        """The track's packets in order, addressed to the stream that `attach` made."""
        if self._output is None:
            raise RuntimeError("attach the track to an output first")
        if self.facts.codec in COPIED:
            return self._copied(self._output)
        return self._converted(self._output)

    def _add_aac(self, container: OutputContainer) -> AudioStream:
        rates = av.Codec("aac", "w").audio_rates or ()
        stream = container.add_stream(
            "aac", rate=self.facts.rate if self.facts.rate in rates else _FALLBACK_RATE
        )
        stream.layout = _LAYOUTS.get(self.facts.channels, "stereo")
        stream.bit_rate = _BITS_PER_CHANNEL * stream.layout.nb_channels
        return stream

    def _read(self, container: InputContainer) -> Iterator[Packet[AudioStream]]:
        try:
            for packet in demux(container, self._stream, self._path):
                if packet.size:
                    yield packet
        except av.InvalidDataError:
            self.warnings.append(f"audio track {self.facts.index} breaks off: damaged source")

    def _time(self, stamp: int | None, time_base: Fraction | None) -> Fraction | None:
        if stamp is None or time_base is None:
            return None
        return stamp * time_base - self._origin

    def _clock(self) -> _SampleClock:
        return _SampleClock(self.facts.rate, self._stream.time_base or Fraction(0), self._leap)

    def _copied(self, output: AudioStream) -> Iterator[Packet[AudioStream]]:
        clock = self._clock()
        for packet in self._packets:
            stamp = packet.dts if packet.pts is None else packet.pts
            samples = self._samples(packet, clock.coarse)
            time = clock.place(self._time(stamp, packet.time_base), samples) - self._cut_off
            if not self._heard(time, samples):
                continue
            packet.stream = output
            packet.time_base = Fraction(1, self.facts.rate)
            packet.pts = packet.dts = time
            packet.duration = samples
            yield packet

    def _heard(self, time: int, samples: int) -> bool:
        """Whether samples at `time` belong to the part, or lead into it."""
        if self._length is None:
            return True
        return -_LEAD_IN * self.facts.rate < time + samples and time < self._length

    def _samples(self, packet: Packet[AudioStream], coarse: bool) -> int:
        """How many samples a packet holds: counted, where the container only says roughly."""
        counted = 0
        if coarse:
            counted = self._stream.codec_context.frame_size
            if not counted:
                with suppress(av.FFmpegError):
                    counted = sum(frame.samples for frame in self._stream.decode(packet))
        return counted or round((packet.duration or 0) * packet.time_base * self.facts.rate)

    def _converted(self, output: AudioStream) -> Iterator[Packet[AudioStream]]:
        clock, begun = self._clock(), False
        for frame in self._decoded():
            time = clock.place(self._time(frame.pts, frame.time_base), frame.samples)
            frame.pts = time - self._cut_off
            if not self._heard(frame.pts, frame.samples):
                continue
            frame.time_base = Fraction(1, self.facts.rate)
            yield from output.encode(frame)
            begun = True
        if begun:
            yield from output.encode(None)

    def _decoded(self) -> Iterator[AudioFrame]:
        damaged = 0
        for packet in chain(self._packets, [None]):
            try:
                yield from self._stream.decode(packet)
            except av.InvalidDataError:
                damaged += 1
        if damaged:
            self.warnings.append(
                f"audio track {self.facts.index}: {damaged} damaged packets left out"
            )


class _SampleClock:
    """Turns rounded timestamps into sample counts by the rule at the head of this file."""

    def __init__(self, rate: int, tick: Fraction, leap: Fraction) -> None:
        """Start a track.

        Args:
            rate: samples per second.
            tick: seconds that the container counts in.
            leap: seconds beyond which a timestamp is not believed.
        """
        self.coarse = tick * rate > 1
        """Whether the container rounds to more than a sample."""
        self._rate, self._leap = rate, leap * rate
        self._slack = tick * rate if self.coarse else Fraction(0)
        self._last: int | None = None
        self._end = 0

    def place(self, time: Fraction | None, samples: int) -> int:
        """Where the next samples go.

        Args:
            time: seconds by the container, None where it doesn't say.
            samples: how many there are.

        Returns:
            Samples since time zero; later than what was returned before.
        """
        at, last = self._end, self._last
        if time is not None:
            exact = time * self._rate
            agrees = abs(exact - self._end) <= self._slack
            if last is None or (not agrees and last < round(exact) <= last + self._leap):
                at = round(exact)
        self._last, self._end = at, at + max(1, samples)
        return at

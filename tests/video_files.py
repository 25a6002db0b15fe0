"""Video files for the tests, made on the spot."""

from fractions import Fraction
from itertools import pairwise

import av
import numpy as np

from tokenflow_batch.video import Encoding, probe, read_frames, write_segment
from tokenflow_batch.video.writer import repeatable_assembly

FAST = Encoding(preset="veryfast", threads=2)
NTSC = Fraction(30000, 1001)
TICK = Fraction(1, 90000)


def picture(number, size=(96, 64)):
    """A smooth picture, every one different, with a light top left corner."""
    y, x = np.mgrid[: size[1], : size[0]]
    rgb = np.stack([x * 2, y * 3, (x + y + 9 * number) % 200], axis=-1).astype(np.uint8)
    rgb[:16, :16] = 255
    return rgb


def make(
    path,
    pts,
    time_base,
    *,
    rate=Fraction(20),
    size=(96, 64),
    codec="libx264",
    pixel_format="yuv420p",
    sound=(),
    sound_rate=44100,
    sound_start=0,
    setup=None,
    **container_options,
):
    """Encode a file with B-frames, and tracks of a sine that is quiet but for a click at 1/4 s."""
    with av.open(f"file:{path}", "w", container_options=container_options) as container:
        # Or two encodings of the same clip differ now and then.
        steady = repeatable_assembly() if codec == "libx264" else {}
        stream = container.add_stream(codec, rate=rate, options={"preset": "veryfast", **steady})
        stream.width, stream.height, stream.pix_fmt = *size, pixel_format
        stream.codec_context.time_base = time_base
        if setup:
            setup(stream)
        tracks = [container.add_stream(name, rate=sound_rate) for name in sound]
        for track, language in zip(tracks, ("fra", "deu"), strict=False):
            track.layout = "stereo"
            track.metadata["language"] = language
        for number, time in enumerate(pts):
            frame = av.VideoFrame.from_ndarray(picture(number, size), format="rgb24")
            frame.pts, frame.time_base = time, time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        seconds = (pts[-1] - pts[0]) * time_base
        for track in tracks:
            add_sound(container, track, sound_rate, sound_start, seconds)
    return path


def add_sound(container, track, rate, start, seconds):
    wave = 0.05 * np.sin(np.arange(int(rate * seconds)) * 0.06)
    wave[rate // 4 : rate // 4 + 200] *= 18
    for first in range(0, len(wave) // 1024 * 1024, 1024):
        block = wave[first : first + 1024].astype(np.float32)
        frame = av.AudioFrame.from_ndarray(np.stack([block, block]), "fltp", "stereo")
        frame.sample_rate, frame.pts, frame.time_base = rate, first + start, Fraction(1, rate)
        container.mux(track.encode(frame))
    container.mux(track.encode(None))


def steps(count, step, first=0):
    return list(range(first, first + count * step, step))


VFR = [0, 3000, 4711, 20001, 31000, 60000, 60900, 99000, 130000]
SOURCES = {
    "cfr.mp4": {"pts": steps(12, 1), "time_base": Fraction(1, 20), "sound": ["aac"]},
    "ntsc.mp4": {"pts": steps(9, 1), "time_base": 1 / NTSC, "rate": NTSC},
    "ntsc.mkv": {"pts": steps(25, 1), "time_base": 1 / NTSC, "rate": NTSC, "sound": ["aac"]},
    "vfr.mp4": {"pts": VFR, "time_base": TICK, "sound": ["aac", "aac"]},
    "vfr.mkv": {"pts": VFR, "time_base": TICK, "sound": ["flac"]},
    "late.mp4": {
        "pts": steps(9, 4500, 12345),
        "time_base": TICK,
        "sound": ["aac"],
        "sound_start": 4321,
        "movie_timescale": "90000",  # or FFmpeg rounds the start to milliseconds
    },
    "clock.ts": {"pts": steps(12, 4500), "time_base": TICK, "sound": ["aac"]},
    "old.avi": {"pts": steps(9, 1), "time_base": Fraction(1, 20), "codec": "mpeg4"},
    "single.mp4": {"pts": [0], "time_base": Fraction(1, 20)},
    "odd.mkv": {
        "pts": steps(5, 1),
        "time_base": Fraction(1, 20),
        "size": (95, 63),
        "pixel_format": "yuv444p",
    },
}


def segments_of(path, facts, cuts, encoding=FAST):
    """Write the frames between `cuts` to segments as the render stage does."""
    written = []
    for start, stop in pairwise([0, *cuts, facts.frames]):
        written.append(path.with_name(f"segment{start}.mp4"))
        write_segment(
            written[-1],
            read_frames(path, facts, start, stop),
            facts.pts[start:stop],
            time_base=facts.time_base,
            rate=facts.rate,
            encoding=encoding,
            sample_aspect_ratio=facts.sample_aspect_ratio,
        )
    return written


def packets_of(path, index):
    with av.open(f"file:{path}") as container:
        return [
            (packet.pts * packet.time_base, packet.duration * packet.time_base, bytes(packet))
            for packet in container.demux(container.streams[index])
            if packet.size
        ]


def frames_of(path):
    return np.stack(list(read_frames(path, probe(path))))

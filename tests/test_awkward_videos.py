"""Awkward files, one row each: the right output, or a refusal that says why (docs/videos.md)."""

from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
import pytest
from video_files import TICK, VFR, frames_of, make, picture, segments_of, steps

from tokenflow_batch.errors import VideoError
from tokenflow_batch.video import join, probe

TWENTIETH = Fraction(1, 20)
COLOURS = 14
"""Mean difference of 8-bit values that coding twice may cost."""


@dataclass(frozen=True)
class Row:
    """What a file is, and what comes out.

    Attributes:
        name: the file's name.
        made: arguments of `make`.
        frames: how many come out; a range where damage decides.
        sound: codecs of the tracks that come out.
        size: of the output in pixels.
        aspect: of the output's pixels.
        damaged: whether damage is counted.
        refused: what the error says, where there is no output.
        change: done to the file once it is written.
    """

    name: str
    made: dict
    frames: object = 6
    sound: tuple = ()
    size: tuple = (96, 64)
    aspect: Fraction = Fraction(1)
    damaged: bool = False
    refused: str | None = None
    change: object = None


def plain(count=6, **more):
    return {"pts": steps(count, 1), "time_base": TWENTIETH, **more}


def turned(stream):
    stream.set_display_rotation(90)


def wide_pixels(stream):
    stream.codec_context.sample_aspect_ratio = Fraction(4, 3)


def full_range(stream):
    stream.codec_context.color_range = 2


def rename(name):
    return lambda path: path.rename(path.with_name(name))


def keep_half(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


def keep_head(path):
    data = path.read_bytes()
    path.write_bytes(data[: data.find(b"mdat") + 20])
    return path


def spoil(path):
    data = np.frombuffer(path.read_bytes(), np.uint8).copy()
    begin = bytes(data).find(b"mdat") + 2500
    data[np.random.default_rng(1).integers(begin, len(data), 40)] ^= 0x55
    path.write_bytes(data.tobytes())
    return path


def sound_only(path):
    to = path.with_name("sound.m4a")
    with av.open(str(path)) as source, av.open(str(to), "w", format="mp4") as target:
        stream = target.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(audio=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    return to


def interlaced(stream):
    stream.codec_context.options = {"x264-params": "interlaced=1:tff=1"}


EARLY = {"pts": steps(8, 1, -3), "time_base": TWENTIETH}
FRONT = {"movflags": "faststart"}
ROWS = {
    "variable frame rate": Row("vfr.mp4", {"pts": VFR, "time_base": TICK}, frames=9),
    "rotation flag": Row("turned.mp4", plain(setup=turned), size=(64, 96)),
    "10-bit HEVC": Row("ten.mp4", plain(codec="libx265", pixel_format="yuv420p10le")),
    "yuv444": Row("444.mp4", plain(pixel_format="yuv444p")),
    "yuv422, 10 bits": Row("422.mkv", plain(pixel_format="yuv422p10le")),
    "grey": Row("grey.mp4", plain(pixel_format="gray")),
    "alpha": Row("alpha.mov", plain(codec="qtrle", pixel_format="argb")),
    "odd size": Row("odd.mkv", plain(size=(95, 63), pixel_format="yuv444p"), size=(96, 64)),
    "one frame": Row("one.mp4", plain(1), frames=1),
    "no sound": Row("mute.mp4", plain()),
    "two sound tracks": Row("two.mp4", plain(sound=["aac", "aac"]), sound=("aac", "aac")),
    "sound that MP4 lacks": Row("pcm.mov", plain(sound=["pcm_s16le"]), sound=("aac",)),
    "truncated, index in front": Row(
        "cut.mp4", plain(40, **FRONT), frames=range(5, 35), damaged=True, change=keep_half
    ),
    "truncated, index lost": Row("lost.mp4", plain(), refused="can't be opened", change=keep_half),
    "damaged packets": Row(
        "bad.mp4", plain(40, **FRONT), frames=range(10, 41), damaged=True, change=spoil
    ),
    "wrong extension": Row("really.mp4", plain(), change=rename("film.avi")),
    "no extension": Row("named.mp4", plain(), change=rename("film")),
    "negative timestamps": Row("early.ts", EARLY | {"avoid_negative_ts": "disabled"}, frames=8),
    "cut off by an edit list": Row("edited.mp4", EARLY | {"sound": ["aac"]}, 5, ("aac",)),
    "interlaced": Row("fields.mp4", plain(setup=interlaced)),
    "240 frames a second": Row(
        "fast.mp4",
        {"pts": steps(24, 1), "time_base": Fraction(1, 240), "rate": Fraction(240)},
        frames=24,
    ),
    "one frame a minute": Row(
        "slow.mp4",
        {"pts": steps(3, 60), "time_base": Fraction(1), "rate": Fraction(1, 60)},
        frames=3,
    ),
    "sound only": Row(
        "clip.mp4", plain(9, sound=["aac"]), refused="sound but no picture", change=sound_only
    ),
    "no frames": Row(
        "none.mp4", plain(**FRONT), refused="no frame can be decoded", change=keep_head
    ),
    "non-square pixels": Row("wide.mp4", plain(setup=wide_pixels), aspect=Fraction(4, 3)),
    "full-range colour": Row("full.mp4", plain(pixel_format="yuvj420p", setup=full_range)),
    "animated GIF": Row("a.gif", plain(codec="gif", pixel_format="rgb8")),
    "still image": Row("still.png", plain(1, codec="png", pixel_format="rgb24"), frames=1),
}
OTHER_PICTURES = {"damaged packets", "truncated, index in front", "cut off by an edit list"}
EXACT = set(ROWS) - OTHER_PICTURES - {"rotation flag", "odd size"}
COARSE = {"grey": 60, "animated GIF": 30}
"""Formats that hold fewer colours."""


@pytest.mark.parametrize("what", ROWS)
def test_an_awkward_file_gives_the_right_output_or_a_clear_refusal(tmp_path, what):
    row = ROWS[what]
    codec = row.made.get("codec", "libx264")
    if codec not in av.codecs_available:
        pytest.skip(f"this build of FFmpeg has no {codec}")
    path = make(tmp_path / row.name, **row.made)
    path = row.change(path) if row.change else path
    if row.refused:
        with pytest.raises(VideoError, match=row.refused) as caught:
            probe(path)
        assert str(path) in caught.value.message
        assert caught.value.hint
        return
    facts, output = probe(path), tmp_path / "output.mp4"
    join(
        segments_of(path, facts, [facts.frames // 2] if facts.frames > 1 else []),
        facts,
        path,
        output,
    )
    made = probe(output)
    assert made.frames in (row.frames if isinstance(row.frames, range) else [row.frames])
    assert made.frames == facts.frames
    times = [(int(t) - facts.origin) * facts.time_base for t in facts.pts]
    assert [int(t) * made.time_base for t in made.pts] == times
    assert (made.width, made.height) == row.size
    assert made.sample_aspect_ratio == row.aspect
    assert tuple(track.codec for track in made.audio) == row.sound
    assert (facts.damaged > 0) == row.damaged
    assert (made.rotation, made.damaged, made.retimed) == (0, 0, 0)
    if what in EXACT:
        wanted = np.stack([picture(n, row.size) for n in range(made.frames)])
        difference = np.abs(frames_of(output).astype(int) - wanted).mean()
        assert difference < COARSE.get(what, COLOURS)

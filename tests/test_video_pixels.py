"""What becomes of pixels between arrays and files: colour, chroma, odd sizes, bit depth."""

from fractions import Fraction

import av
import numpy as np
import pytest
from video_files import FAST, NTSC, TICK, frames_of, make, picture, steps

from tokenflow_batch.errors import VideoError
from tokenflow_batch.video import Encoding, probe, read_frames, write_segment


def test_colours_survive_writing_and_reading(tmp_path):
    colours = np.array(
        [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [0, 0, 0], [255, 255, 255]]
    )
    frame = np.repeat(np.repeat(colours[None], 32, axis=0), 16, axis=1).astype(np.uint8)
    for pixel_format, crf, most in (("yuv444p", 1, 4), ("yuv420p", 16, 12)):
        path = tmp_path / f"{pixel_format}.mp4"
        write_segment(
            path,
            [frame] * 3,
            [0, 1, 2],
            time_base=Fraction(1, 20),
            rate=Fraction(20),
            encoding=Encoding(crf, "medium", pixel_format, 2),
        )
        facts = probe(path)
        assert facts.pixel_format == pixel_format
        tags = facts.colour
        assert (tags.primaries, tags.transfer, tags.matrix, tags.range) == (1, 1, 1, 1)
        middles = frames_of(path)[:, 8:24, 8::16].astype(int) - frame[8:24, 8::16]
        assert np.abs(middles).max() <= most


def test_half_resolution_chroma_is_not_shifted(tmp_path):
    """A slope of pure blue comes back where it was, not half a pixel aside."""
    frame = np.zeros((32, 96, 3), np.uint8)
    frame[..., 2] = np.arange(96) * 2 + 30
    path = tmp_path / "slope.mp4"
    write_segment(
        path, [frame], [0], time_base=TICK, rate=NTSC, encoding=Encoding(1, "medium", threads=1)
    )
    error = frames_of(path)[0, 4:-4, 8:-8, 2].astype(int) - frame[4:-4, 8:-8, 2]
    assert abs(error.mean()) < 0.5


@pytest.mark.parametrize(
    ("matrix", "meant", "width"), [(1, 1, 64), (6, 6, 64), (9, 9, 64), (2, 6, 64), (2, 1, 1280)]
)
@pytest.mark.parametrize("full", [False, True])
def test_tags_decide_what_colours_mean(tmp_path, matrix, meant, width, full):
    luma, red = 120, 180  # of Y and Cr; Cb is neutral

    path = tmp_path / "tagged.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=20, options={"qp": "1"})
        stream.width, stream.height, stream.pix_fmt = width, 64, "yuv420p"
        stream.codec_context.colorspace = matrix
        stream.codec_context.color_range = 2 if full else 1
        planes = np.repeat([luma, 128, red], [width * 64, width * 16, width * 16])
        planes = planes.astype(np.uint8).reshape(96, width)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(planes, "yuv420p")))
        container.mux(stream.encode(None))
    kr, kb = {1: (0.2126, 0.0722), 6: (0.299, 0.114), 9: (0.2627, 0.0593)}[meant]
    y = luma if full else (luma - 16) * 255 / 219
    cr = (red - 128) * (1 if full else 255 / 224)
    wanted = np.array([y + 2 * (1 - kr) * cr, y - 2 * (1 - kr) * kr / (1 - kr - kb) * cr, y])
    assert np.abs(frames_of(path)[0, 32, 32] - wanted.clip(0, 255)).max() <= 2


def test_ten_bits_and_hevc_are_read(tmp_path):
    if "libx265" not in av.codecs_available:
        pytest.skip("this build of FFmpeg has no x265")
    path = make(
        tmp_path / "ten.mp4",
        steps(5, 1),
        Fraction(1, 20),
        codec="libx265",
        pixel_format="yuv420p10le",
    )
    facts = probe(path)
    assert (facts.codec, facts.pixel_format, facts.frames) == ("hevc", "yuv420p10le", 5)
    assert np.abs(frames_of(path)[2].astype(int) - picture(2)).mean() < 12
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.codec.canonical_name == "hevc"


def test_frames_may_be_drawn_on_while_reading(tmp_path):
    """Even where the decoder builds the next frame on the last one, in RGB."""
    path = make(
        tmp_path / "rle.mov",
        steps(4, 1),
        Fraction(1, 20),
        size=(64, 64),  # rows without a gap, or the array would be a copy anyway
        codec="qtrle",
        pixel_format="rgb24",
    )
    for number, frame in enumerate(read_frames(path, probe(path))):
        assert np.array_equal(frame, picture(number, (64, 64)))
        frame[:] = 0


def test_odd_sizes_grow_by_a_pixel_that_repeats_the_edge(tmp_path):
    frame = picture(0, (95, 63))
    sizes = {"yuv420p": (96, 64), "yuv444p": (95, 63)}
    for pixel_format, size in sizes.items():
        path = tmp_path / f"{pixel_format}.mp4"
        encoding = Encoding(4, "medium", pixel_format, 1)
        assert encoding.coded_size(95, 63) == size
        write_segment(path, [frame], [7], time_base=TICK, rate=NTSC, encoding=encoding)
        facts = probe(path)
        assert (facts.width, facts.height) == size
    grown = frames_of(tmp_path / "yuv420p.mp4")[0].astype(int)
    assert np.abs(grown[:, -1] - grown[:, -2]).max() < 24
    assert np.abs(grown[-1] - grown[-2]).max() < 24


def test_a_segment_that_fails_is_not_left_behind(tmp_path):
    path = tmp_path / "segment.mp4"
    kinds = {"time_base": TICK, "rate": NTSC, "encoding": FAST}
    wrong = [[], [picture(0)] * 2, [picture(0), picture(0, (64, 64)), picture(1)]]
    for frames in wrong:
        with pytest.raises(ValueError, match=r"no frames|zip|the first was"):
            write_segment(path, frames, [0, 1, 2], **kinds)
        assert not path.exists()
    with pytest.raises(ValueError, match="must increase"):
        write_segment(path, [picture(0)] * 2, [5, 5], **kinds)
    with pytest.raises(VideoError, match="writing failed"):
        write_segment(tmp_path / "nowhere" / "segment.mp4", [picture(0)], [0], **kinds)
    for wrong in ({"crf": 0}, {"preset": "best"}, {"pixel_format": "rgb24"}, {"threads": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong)).replace("_", " ")):
            Encoding(**wrong)

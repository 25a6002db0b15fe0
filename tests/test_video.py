"""Video files read and joined: timing, sound, orientation, damage, the same bits."""

import hashlib
from fractions import Fraction
from itertools import pairwise

import av
import numpy as np
import pytest
from av.stream import Disposition
from hypothesis import given
from hypothesis import strategies as st
from video_files import (
    SOURCES,
    TICK,
    VFR,
    add_sound,
    frames_of,
    make,
    packets_of,
    segments_of,
    steps,
)

from tokenflow_batch.errors import VideoError
from tokenflow_batch.video import Encoding, VideoFacts, join, probe, read_frames
from tokenflow_batch.video.audio import _SampleClock


@pytest.fixture(params=SOURCES)
def source(request, tmp_path):
    return make(tmp_path / request.param, **SOURCES[request.param])


@pytest.fixture
def plain(tmp_path):
    return make(tmp_path / "plain.mp4", **SOURCES["cfr.mp4"])


def test_facts_are_those_of_the_file(source, request):
    made = SOURCES[request.node.callspec.params["source"]]
    facts = probe(source)
    assert facts.frames == len(made["pts"])
    assert (facts.width, facts.height) == made.get("size", (96, 64))
    times = [time * made["time_base"] for time in made["pts"]]
    got = [int(time) * facts.time_base for time in facts.pts]
    shift = facts.pts[0] * facts.time_base - times[0] if source.suffix == ".ts" else 0
    assert all(abs(a - b - shift) <= facts.time_base / 2 for a, b in zip(got, times, strict=True))
    if made["pts"] == VFR:
        assert abs(facts.rate * facts.duration - facts.frames) < Fraction(1, 1000)
    else:
        assert facts.rate == made.get("rate", 20)
        assert abs(facts.duration * facts.rate - facts.frames) < Fraction(1, 20)
    assert facts.damaged == facts.retimed == facts.rotation == 0
    assert [track.codec for track in facts.audio] == made.get("sound", [])
    again = VideoFacts.from_json(facts.to_json(), facts.pts)
    assert repr(again) == repr(facts)
    assert np.array_equal(again.pts, facts.pts)


def test_segments_join_to_the_source_s_time_and_sound(source, tmp_path):
    facts = probe(source)
    cuts = [1, 4] if facts.frames > 4 else []
    segments = segments_of(source, facts, cuts)
    output = tmp_path / "out.mp4"
    assert join(segments, facts, source, output) == []
    joined = probe(output)
    wanted = [(int(time) - facts.origin) * facts.time_base for time in facts.pts]
    assert [int(time) * joined.time_base for time in joined.pts] == wanted
    assert [time for time, _, _ in packets_of(output, joined.stream)] == wanted
    assert joined.duration == facts.duration
    assert (joined.retimed, joined.damaged) == (0, 0)
    assert np.array_equal(frames_of(output), np.concatenate([frames_of(s) for s in segments]))
    assert not list(tmp_path.glob(".*"))

    origin = facts.origin * facts.time_base
    rounding = 0 if source.suffix == ".mp4" else Fraction(1, 1000)
    for old, new in zip(facts.audio, joined.audio, strict=True):
        assert (old.codec, old.rate, old.channels) == (new.codec, new.rate, new.channels)
        assert old.language == new.language
        before, after = packets_of(source, old.index), packets_of(output, new.index)
        for (time, length, data), (new_time, new_length, new_data) in zip(
            before, after, strict=True
        ):
            assert abs(time - origin - new_time) <= rounding
            assert abs(length - new_length) <= rounding
            # A transport stream frames AAC with a header that an MP4 has once for all.
            assert data == new_data or (source.suffix == ".ts" and data.endswith(new_data))


def test_the_index_is_in_front_and_sound_lies_beside_its_picture(tmp_path):
    # Longer than the ten seconds that FFmpeg would hold back to sort packets itself.
    path = make(
        tmp_path / "long.mp4", steps(20, 1), Fraction(2), sound=["aac", "aac"], sound_rate=8000
    )
    facts = probe(path)
    output = tmp_path / "out.mp4"
    join(segments_of(path, facts, [10]), facts, path, output)
    data = output.read_bytes()
    assert 0 < data.find(b"moov") < data.find(b"mdat")
    with av.open(str(output)) as container:
        packets = [p for p in container.demux() if p.size]
    times = [p.dts * p.time_base for p in sorted(packets, key=lambda p: p.pos)]
    assert all(b - a > Fraction(-1, 5) for a, b in pairwise(times))
    assert join(segments_of(path, facts, [10]), facts, path, output, audio=False) == []
    assert probe(output).audio == ()


@pytest.mark.parametrize(("suffix", "codec"), [("mov", "pcm_s16le"), ("mkv", "pcm_s24le")])
@pytest.mark.parametrize("rate", [44100, 37000])
def test_sound_that_mp4_players_do_not_know_becomes_aac_in_time(tmp_path, suffix, codec, rate):
    path = make(
        tmp_path / f"pcm.{suffix}",
        steps(20, 1),
        Fraction(1, 20),
        sound=[codec],
        sound_rate=rate,
        sound_start=1000,
    )
    facts = probe(path)
    output = tmp_path / "out.mp4"
    (warning,) = join(segments_of(path, facts, []), facts, path, output)
    assert warning.startswith(f"audio track 1: {codec} converted to AAC")
    (track,) = probe(output).audio
    assert (track.codec, track.channels, track.language) == ("aac", 2, "fra")

    click = Fraction(1000, rate) + Fraction(1, 4)
    with av.open(str(output)) as container:
        for frame in container.decode(audio=0):
            loud = np.flatnonzero(np.abs(frame.to_ndarray()[0]) > 0.3)
            if loud.size:
                start = frame.pts * frame.time_base + Fraction(int(loud[0]), frame.sample_rate)
                break
    assert abs(start - click) < Fraction(3, 1000)


@pytest.mark.parametrize(
    ("degrees", "mirror", "corner"),
    [
        (90, False, (-1, 0)),
        (-90, False, (0, -1)),
        (180, False, (-1, -1)),
        (0, True, (0, -1)),
        (90, True, (-1, -1)),
    ],
)
def test_frames_come_out_upright(tmp_path, degrees, mirror, corner):
    def setup(stream):
        stream.set_display_rotation(degrees, hflip=mirror)
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)

    path = make(tmp_path / "turned.mp4", steps(2, 1), Fraction(1, 20), setup=setup)
    facts = probe(path)
    turned = degrees in (90, -90)
    assert (facts.width, facts.height) == ((64, 96) if turned else (96, 64))
    assert facts.sample_aspect_ratio == (Fraction(3, 4) if turned else Fraction(4, 3))
    (frame,) = read_frames(path, facts, 0, 1)
    assert frame.shape == (facts.height, facts.width, 3)
    light = {c: frame[c].min() > 200 for c in ((0, 0), (0, -1), (-1, 0), (-1, -1))}
    assert [c for c, is_light in light.items() if is_light] == [corner]
    output = tmp_path / "out.mp4"
    join(segments_of(path, facts, []), facts, path, output)
    joined = probe(output)
    assert (joined.width, joined.height, joined.rotation) == (facts.width, facts.height, 0)
    assert joined.sample_aspect_ratio == facts.sample_aspect_ratio


def test_the_same_frames_are_the_same_bytes(plain, tmp_path):
    facts = probe(plain)
    digests = set()
    for name in ("once", "twice"):
        folder = tmp_path / name
        folder.mkdir()
        copy = folder / "plain.mp4"
        copy.write_bytes(plain.read_bytes())
        segments = segments_of(copy, facts, [5], Encoding(threads=3))
        join(segments, facts, copy, folder / "out.mp4")
        digests.add(tuple(p.read_bytes() for p in (*segments, folder / "out.mp4")))
    assert len(digests) == 1


def test_any_part_of_a_file_is_the_same_frames(plain):
    facts = probe(plain)
    whole = frames_of(plain)
    for start, stop in ((0, 12), (3, 7), (11, 12), (5, 5), (12, 12), (4, None)):
        part = list(read_frames(plain, facts, start, stop))
        assert np.array_equal(np.array(part).reshape(-1, 64, 96, 3), whole[start:stop])
        assert all(f.flags.writeable and f.flags.c_contiguous for f in part)
    for start, stop in ((-1, 3), (4, 3), (0, 13)):
        with pytest.raises(ValueError, match="of a video of 12"):
            read_frames(plain, facts, start, stop)


def test_a_changed_file_is_noticed(plain):
    facts = probe(plain)
    for pts in (steps(11, 1), steps(13, 1), [0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12]):
        make(plain, pts, Fraction(1, 20))
        with pytest.raises(VideoError, match="not the file that was probed"):
            list(read_frames(plain, facts))


def test_what_is_no_video_is_refused_with_a_reason(tmp_path, plain):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "notes.txt").write_text("not a video\n" * 50)
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "cut.mp4").write_bytes(plain.read_bytes()[:900])
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXTINF:1,\nplain.mp4\n#EXT-X-ENDLIST\n")
    with av.open(str(tmp_path / "sound.m4a"), "w", format="mp4") as container:
        track = container.add_stream("aac", rate=44100)
        cover = container.add_stream("png", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 64, "rgb24"
        cover.disposition = Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame(64, 64, "rgb24")))
        add_sound(container, track, 44100, 0, 1)
    reasons = {
        "missing.mp4": "no such file",
        "": "is a folder",
        "empty.mp4": "is empty",
        "notes.txt": "is a text file",
        "noise.mp4": "can't be opened as a video",
        "cut.mp4": "can't be opened as a video",
        "list.m3u8": "is a playlist|can't be opened",
        "sound.m4a": "has sound but no picture",
    }
    for name, reason in reasons.items():
        with pytest.raises(VideoError, match=reason) as caught:
            probe(tmp_path / name)
        assert str(tmp_path / name) in caught.value.message
        assert caught.value.hint


def test_a_colon_in_a_name_is_no_protocol(plain):
    assert probe(plain.rename(plain.with_name("a:%03d.mp4"))).frames == 12


def test_what_can_be_saved_of_a_damaged_file_is(tmp_path):
    path = make(tmp_path / "whole.mp4", steps(40, 1), TICK * 4500, movflags="faststart")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    cut = probe(path)
    assert 5 < cut.frames < 35
    assert len(list(read_frames(path, cut))) == cut.frames

    start = data.find(b"mdat")
    path.write_bytes(data[: start + 30])
    with pytest.raises(VideoError, match="no frame can be decoded"):
        probe(path)

    broken = np.frombuffer(data, np.uint8).copy()
    where = np.random.default_rng(1).integers(start + 2500, len(data), 40)
    broken[where] ^= 0x55
    path.write_bytes(broken.tobytes())
    counts = []
    facts = probe(path, counts.append)
    assert counts == steps(facts.frames, 1, 1)
    assert facts.damaged > 0
    assert (np.diff(facts.pts) > 0).all()
    whole = hashlib.sha256(frames_of(path)).digest()
    parts = [f for a, b in ((0, 9), (9, None)) for f in read_frames(path, facts, a, b)]
    assert hashlib.sha256(np.stack(parts)).digest() == whole
    join(segments_of(path, facts, [9]), facts, path, tmp_path / "out.mp4")
    assert probe(tmp_path / "out.mp4").frames == facts.frames


@pytest.mark.parametrize("first", [0, 90000 * 3600])
def test_a_recording_whose_clock_starts_again_goes_on_evenly(tmp_path, first):
    later = make(tmp_path / "later.ts", steps(6, 4500, first), TICK, sound=["aac"]).read_bytes()
    path = make(tmp_path / "joined.ts", steps(6, 4500), TICK, sound=["aac"])
    path.write_bytes(path.read_bytes() + later)
    facts = probe(path)
    assert facts.retimed == 6
    assert np.diff(facts.pts).tolist() == [4500] * 11
    output = tmp_path / "out.mp4"
    join(segments_of(path, facts, []), facts, path, output)
    times = [time for time, _, _ in packets_of(output, 1)]
    assert {b - a for a, b in pairwise(times)} == {Fraction(1024, 44100)}


def test_segments_that_do_not_fit_leave_the_old_output_alone(plain, tmp_path):
    facts = probe(plain)
    segments = segments_of(plain, facts, [4])
    output = tmp_path / "out.mp4"
    output.write_text("before")
    slower = segments_of(plain, facts, [3], Encoding(preset="slow"))  # segment0, segment3
    faults = {
        "don't hold 12 frames": [segments[1]],
        "don't hold 12": [*slower, slower[0]],
        "other settings": [segments[1], slower[0]],
        "no such file": [segments[1], tmp_path / "gone.mp4"],
    }
    for message, wrong in faults.items():
        with pytest.raises(VideoError, match=message):
            join(wrong, facts, plain, output)
    assert output.read_text() == "before"
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(VideoError, match="writing failed"):
        join(slower, facts, plain, output / "out.mp4")
    for name, parts in (("out.mkv", slower), ("out.mp4", [])):
        with pytest.raises(ValueError, match=r"must end in|no segments"):
            join(parts, facts, plain, tmp_path / name)


@given(
    rate=st.sampled_from([8000, 44100, 48000]),
    lengths=st.lists(st.sampled_from([960, 1024, 1152, 4608]), max_size=50),
    start=st.integers(-3000, 100_000),
)
def test_rounded_sound_timestamps_come_out_gapless(rate, lengths, start):
    clock = _SampleClock(rate, Fraction(1, 1000), Fraction(10))
    placed, at = [], start
    for samples in lengths:
        placed.append(clock.place(Fraction(round(Fraction(at, rate) * 1000), 1000), samples))
        at += samples
    assert [b - a for a, b in pairwise(placed)] == lengths[:-1]
    if placed:
        assert abs(Fraction(placed[0] - start, rate)) <= Fraction(1, 1000)


def test_gaps_in_sound_stay_but_its_clock_neither_goes_back_nor_leaps():
    clock = _SampleClock(48000, Fraction(1, 1000), Fraction(10))
    times = [Fraction(0), Fraction(21, 1000), Fraction(1), Fraction(1, 2), None, Fraction(99)]
    placed = [clock.place(time, 1024) for time in times]
    assert placed == [0, 1024, *steps(4, 1024, 48000)]

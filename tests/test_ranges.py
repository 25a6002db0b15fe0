"""Parts of videos: which frames, which sound, which names and keys, and what is wrong with them."""

import json
from fractions import Fraction
from itertools import pairwise

import av
import numpy as np
import pytest
from jobs import clip, command, published, write_manifest
from video_files import NTSC, SOURCES, TICK, VFR, frames_of, make, packets_of, segments_of, steps

from tokenflow_batch.errors import ManifestError, VideoError
from tokenflow_batch.inputs import Inputs
from tokenflow_batch.manifest import load
from tokenflow_batch.ranges import Part, seconds
from tokenflow_batch.video import VideoFacts, join, probe, read_frames

TIMES = {
    0: 0,
    7: 7,
    0.1: Fraction(1, 10),
    "1:30.5": Fraction(181, 2),
    "0:01": 1,
    "61:02": 3662,
    "1:00:00.25": Fraction(14401, 4),
    "12.000000001": Fraction(12000000001, 10**9),
}


@pytest.mark.parametrize(("given", "meant"), TIMES.items(), ids=map(str, TIMES))
def test_times_are_exact(given, meant):
    assert seconds(given) == meant


@pytest.mark.parametrize(
    "given", [True, None, [1], "", "1:60", "1:60:00", "-1", -0.5, "1e3", "1:2:3:4", 10**8, 1e300]
)
def test_what_is_no_time_is_refused(given):
    with pytest.raises(ValueError, match=r"must|60 or more"):
        seconds(given)


def frames(start, stop):
    return Part("frames", Fraction(start), Fraction(stop), "m.yaml:7")


def time(start, stop):
    return Part("seconds", Fraction(start), Fraction(stop), "m.yaml:7")


# (source, part, the frames it has)
PARTS = {
    "frames": ("cfr.mp4", frames(3, 9), (3, 9)),
    "all frames": ("cfr.mp4", frames(0, 12), (0, 12)),
    "to the end": ("cfr.mp4", frames(11, 12), (11, 12)),
    "time": ("cfr.mp4", time("0.15", "0.45"), (3, 9)),
    "time between frames": ("cfr.mp4", time("0.101", "0.449"), (3, 9)),
    "all time": ("cfr.mp4", time(0, "0.6"), (0, 12)),
    "the tick of a frame": ("ntsc.mp4", time(3 / NTSC, 6 / NTSC), (3, 6)),
    "just past the tick": ("ntsc.mp4", time(3 / NTSC + Fraction(1, 10**9), 6 / NTSC), (4, 6)),
    "variable rate": ("vfr.mp4", time(4711 * TICK, 60900 * TICK), (2, 6)),
    "rounded timestamps": ("ntsc.mkv", time("0.2", "0.5"), (6, 15)),
    "a late start counts": ("late.mp4", time("0.13", "0.24"), (0, 3)),
    "a clock from anywhere": ("clock.ts", frames(4, 7), (4, 7)),
}


@pytest.mark.parametrize(("name", "part", "wanted"), PARTS.values(), ids=PARTS.keys())
def test_a_part_has_the_frames_of_its_range(tmp_path, name, part, wanted):
    path = make(tmp_path / name, **SOURCES[name])
    whole, (start, stop) = probe(path), wanted
    facts = probe(path, part=part)
    assert facts.pts.tolist() == whole.pts[start:stop].tolist()
    assert facts.durations().tolist() == whole.durations()[start:stop].tolist()
    assert facts.zero == whole.pts[start]
    pictures = frames_of(path)[start:stop]
    assert np.array_equal(np.stack(list(read_frames(path, facts))), pictures)
    if len(pictures) > 2:
        middle = list(read_frames(path, facts, 1, len(pictures) - 1))
        assert np.array_equal(np.stack(middle), pictures[1:-1])
    again = VideoFacts.from_json(json.loads(json.dumps(facts.to_json())), facts.pts)
    assert repr(again) == repr(facts)


def test_neighbouring_ranges_share_no_frame_and_lose_none(tmp_path):
    path = make(tmp_path / "vfr.mp4", pts=VFR, time_base=TICK)
    end = probe(path).duration
    borders = [Fraction(0), *(Fraction(n, 7) for n in (1, 3, 5)), end]
    parts = [probe(path, part=time(a, b)) for a, b in pairwise(borders)]
    assert [t for facts in parts for t in facts.pts.tolist()] == VFR


@pytest.mark.parametrize(
    ("part", "says"),
    [
        (frames(3, 13), r"frames \[3, 13\] reaches beyond the end: .* 12 frames, 0.600 s"),
        (frames(12, 14), "beyond the end"),
        (time("0.1", "0.601"), r"time \[0.1, 0.601\] reaches beyond the end"),
        (time("0.51", "0.54"), "no frame begins in that time"),
    ],
)
def test_a_part_that_is_not_there_is_told_with_file_and_line(tmp_path, part, says):
    path = make(tmp_path / "cfr.mp4", **SOURCES["cfr.mp4"])
    with pytest.raises(VideoError, match=says) as caught:
        probe(path, part=part)
    assert "(m.yaml:7)" in caught.value.message
    assert caught.value.hint


def clicks(path):
    """When the loud moment of the sound is heard, in seconds, as a player would play the file."""
    with av.open(str(path)) as container:
        for frame in container.decode(audio=0):
            wave = frame.to_ndarray()[0]
            full = np.iinfo(wave.dtype).max if wave.dtype.kind == "i" else 1
            loud = np.flatnonzero(np.abs(wave[:: 2 if full > 1 else 1]) > 0.3 * full)
            if loud.size:
                return frame.pts * frame.time_base + Fraction(int(loud[0]), frame.sample_rate)
    return None


@pytest.mark.parametrize("name", ["long.mp4", "long.mkv", "long.ts", "pcm.mov"])
def test_the_sound_of_a_part_is_cut_between_packets_and_stays_in_time(tmp_path, name):
    codec = "pcm_s16le" if name == "pcm.mov" else "aac"
    path = make(tmp_path / name, steps(30, 4500), TICK, sound=[codec, codec])
    part = probe(path, part=frames(3, 17))
    output = tmp_path / "out.mp4"
    warnings = join(segments_of(path, part, [5]), part, path, output)
    assert len(warnings) == (2 if codec != "aac" else 0)
    joined = probe(output)
    assert joined.pts[0] == 0
    assert joined.duration == part.duration == Fraction(14, 20)
    assert len(joined.audio) == 2
    assert abs(clicks(output) - (clicks(path) - part.zero * part.time_base)) < Fraction(3, 1000)
    with av.open(str(output)) as container:
        heard = list(container.decode(audio=0))
    assert abs(heard[0].pts * heard[0].time_base) < Fraction(1, 40)
    if codec == "aac":
        before = [data for _, _, data in packets_of(path, part.audio[0].index)]
        after = [data for _, _, data in packets_of(output, 1)]
        assert 30 < len(after) < 40 < len(before)  # 0.7 of 1.5 seconds, in packets of 1024 samples
        ends = [i for i, data in enumerate(before) if data.endswith(after[0])]
        assert any(
            all(b.endswith(a) for a, b in zip(after, before[i : i + len(after)], strict=True))
            for i in ends
        )


def test_a_part_after_the_end_of_the_sound_has_none(tmp_path):
    path = make(tmp_path / "short.mp4", steps(10, 1), Fraction(1, 20), sound=["aac"])
    facts = probe(path, part=frames(9, 10))
    assert facts.audio
    output = tmp_path / "out.mp4"
    assert join(segments_of(path, facts, []), facts, path, output) == []
    assert probe(output).frames == 1


GOOD = """\
version: 1
model: demo
clips:
  - video: wolf.mp4
    frames: [4, 8]
    edits: [{name: x, prompt: y}]
  - video: wolf.mp4
    time: ["0:01", 2.5]
    edits: [{name: x, prompt: y}]
"""

MISTAKES = {
    "not ascending": ("[4, 8]", "[8, 8]", 5, "frames [8, 8] is empty"),
    "backwards": ('["0:01", 2.5]', '["0:03", 2.5]', 8, "time [3, 2.5] is empty"),
    "negative": ("[4, 8]", "[-4, 8]", 5, "greater than or equal to 0"),
    "one number": ("[4, 8]", "[4]", 5, "frames"),
    "three numbers": ("[4, 8]", "[4, 8, 9]", 5, "frames"),
    "no numbers": ("[4, 8]", "[4, b]", 5, "whole number"),
    "half a frame": ("[4, 8]", "[4, 8.5]", 5, "whole number"),
    "no time": ('"0:01"', '"one"', 8, 'such as "1:30.5"'),
    "seconds past the minute": ('"0:01"', '"0:61"', 8, "60 or more behind a colon"),
    "both": ("[4, 8]", "[4, 8]\n    time: [1, 2]", 6, "not both"),
    "one part twice": ('time: ["0:01", 2.5]', "frames: [4, 8]", 9, "already defined"),
    "two parts, one name": (
        "wolf.mp4\n    frames",
        "wolf.mp4\n    name: wolf-1s-2.5s\n    frames",
        10,
        "would write the same files",
    ),
    "in the defaults": ("clips:", "defaults: {frames: [1, 2]}\nclips:", 3, "unknown key"),
}


@pytest.mark.parametrize(("old", "new", "line", "says"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_wrong_range_is_told_with_file_and_line(tmp_path, old, new, line, says):
    assert GOOD.count(old) == 1
    path = tmp_path / "m.yaml"
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(ManifestError) as caught:
        load(path)
    assert f"{path}:{line}:" in caught.value.message
    assert says in caught.value.message


def test_two_ranges_of_a_file_are_two_clips_with_names_and_keys_of_their_own(tmp_path):
    clip(tmp_path / "wolf.mp4", 40)
    path = tmp_path / "m.yaml"
    path.write_text(GOOD)
    batch = load(path)
    assert [job.clip for job in batch.jobs] == ["wolf-4-8", "wolf-1s-2.5s"]
    assert [job.part.where for job in batch.jobs] == [f"{path}:5", f"{path}:8"]
    path.write_text(GOOD.replace('"0:01", 2.5', "1.0, 0:02.5").replace("wolf.mp4", "./wolf.mp4"))
    first, second = (Inputs.of(b) for b in (batch, load(path)))
    keys = [[i.keys(job)["encode"].key for job in i.batch.jobs] for i in (first, second)]
    assert keys[0] == keys[1]  # however the same times are written
    path.write_text(GOOD.replace("    frames: [4, 8]\n", ""))
    third = Inputs.of(load(path))
    assert len({*keys[0], third.keys(third.batch.jobs[0])["encode"].key}) == 3


def test_parts_go_through_all_stages_and_one_beyond_the_end_fails_alone(tmp_path, tiny_model):
    clip(tmp_path / "a.mp4", 12)
    edits = [{"name": "e", "prompt": "a blue ball"}]
    ranges = [{"frames": [2, 7]}, {"time": [0.5, "0:01"]}, {"frames": [3, 30]}]
    clips = [{"video": "a.mp4", **given, "edits": edits} for given in ranges]
    manifest = write_manifest(tmp_path, tiny_model, clips=clips, steps=1)
    plan = json.loads(command("plan", manifest, "--json").stdout)
    assert [job["frames"] for job in plan["jobs"]] == [5, 5, None]
    line = manifest.read_text().splitlines().index("  - 3") + 1
    assert f"(%s:{line - 1})" % manifest in plan["jobs"][2]["error"]
    answer = command("run", manifest, "--json")
    assert answer.exit_code == 4
    (error,) = [j["error"] for j in json.loads(answer.stdout)["jobs"] if j["error"]]
    assert "frames [3, 30] reaches beyond the end: the video has 12 frames" in error["message"]
    assert published(tmp_path)[::4] == ["a-0.5s-1s/e.mp4", "a-2-7/e.mp4"]
    part = probe(tmp_path / "a.mp4", part=frames(2, 7))
    made = probe(tmp_path / "out" / "a-2-7" / "e.mp4")
    assert (made.frames, made.duration) == (5, part.duration)
    assert len(made.audio) == 1
    plan = json.loads(command("plan", manifest, "--json").stdout)
    assert [job["frames_exact"] for job in plan["jobs"]] == [True, True, False]

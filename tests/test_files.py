"""Files that appear whole or not at all, and the memory of their digests."""

import json
import os

import pytest

from tokenflow_batch.files import DigestMemory, digest, replacing


@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt()])
def test_what_fails_leaves_nothing_behind_and_the_old_file_as_it_was(tmp_path, error):
    path = tmp_path / "deep" / "video.mp4"

    def fail():
        with replacing(path) as partial:
            partial.write_bytes(b"half")
            assert partial.suffix == ".mp4"
            assert partial.name.startswith(".")
            raise error

    for before in ([], ["video.mp4"]):
        with pytest.raises(type(error)):
            fail()
        assert [found.name for found in path.parent.iterdir()] == before
        with replacing(path) as partial:
            partial.write_bytes(b"whole")
        assert path.read_bytes() == b"whole"
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_digest_is_remembered_until_the_file_changes(tmp_path):
    memory, video = tmp_path / "work" / "digests.json", tmp_path / "a.mp4"
    video.write_bytes(b"one")
    assert DigestMemory(memory).peek(video) is None
    first = DigestMemory(memory).digest(video)
    assert first == digest(video)
    assert DigestMemory(memory).peek(video) == first
    written = memory.stat().st_mtime_ns
    assert DigestMemory(memory).digest(video) == first
    assert memory.stat().st_mtime_ns == written
    os.utime(video, ns=(1, 1))
    assert DigestMemory(memory).peek(video) is None
    assert DigestMemory(memory).digest(video) == first
    video.write_bytes(b"two")
    assert DigestMemory(memory).digest(video) == digest(video) != first


@pytest.mark.parametrize("text", ["", "[]", "7", '{"x": 1}', "PATH", "LIST", "\xff"])
def test_a_spoilt_digest_memory_is_only_forgotten(tmp_path, text):
    memory, video = tmp_path / "digests.json", tmp_path / "a.mp4"
    video.write_bytes(b"one")
    if text == "PATH":
        text = json.dumps({str(video): {"sha256": "0"}})
    if text == "LIST":
        text = json.dumps({str(video): ["0"]})
    memory.write_bytes(text.encode("latin-1"))
    assert DigestMemory(memory).peek(video) is None
    assert DigestMemory(memory).digest(video) == digest(video)
    assert DigestMemory(memory).peek(video) == digest(video)

"""Edits of one clip side by side: one reading of the source, and each with the bits it has alone."""

import itertools
import threading

import pytest
from jobs import clip, folder_of, outcome, run, same, silent, write_manifest
from torch.distributed import HashStore

from tokenflow_batch import ledger
from tokenflow_batch import runner as runner_module
from tokenflow_batch.distributed import Team
from tokenflow_batch.manifest import load
from tokenflow_batch.runner import Runner
from tokenflow_batch.stages.memory import MemoryUse
from tokenflow_batch.store import ArrayStore, Reads
from tokenflow_batch.turns import side_by_side

EDITS = [
    {"name": "blue", "prompt": "a blue ball on grass", "negative_prompt": "sand"},
    {"name": "late", "prompt": "a green ball", "technique": "sdedit", "strength": 0.7},
    {"name": "free", "prompt": "a cube on grass", "guidance_scale": 2.0, "attn_t": 0.0},
]
# Three segments in two overlapping windows with an anchor, three chunks.
JOB = {"chunk_frames": 3, "window_segments": 2, "window_overlap": 1, "anchors": 1}
CLIP = [{"video": "clip.mp4", "edits": EDITS}]


# -- turns ---------------------------------------------------------------------------------------


def walk(log, name, places, result=None):
    for place in places:
        yield place
        log.append((name, place))
    return result


def test_whoever_is_furthest_behind_comes_next():
    log = []
    found = side_by_side(
        [walk(log, "a", [(0, 2), (0, 3), (1,)], "A"), walk(log, "b", [(0, 0), (0, 3), (0, 4)], "B")]
    )
    assert found == ["A", "B"]
    order = [("b", (0, 0)), ("a", (0, 2)), ("a", (0, 3)), ("b", (0, 3)), ("b", (0, 4)), ("a", (1,))]
    assert log == order


def test_an_error_closes_the_others():
    log = []

    def watched():
        try:
            yield (0,)
            yield (2,)
        finally:
            log.append("closed")

    def failing():
        yield (1,)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        side_by_side([watched(), failing()])
    assert log == ["closed"]


# -- edits ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny_model):
    """The edits one at a time: a manifest that is done."""
    folder = tmp_path_factory.mktemp("alone")
    clip(folder / "clip.mp4", 9)
    manifest = write_manifest(folder, tiny_model, clips=CLIP, runtime={"edits_together": 1}, **JOB)
    assert all(result.error is None for result in run(manifest))
    return manifest


@pytest.fixture
def fresh(alone, tmp_path, tiny_model):
    (tmp_path / "clip.mp4").symlink_to(alone.parent / "clip.mp4")
    return write_manifest(tmp_path, tiny_model, clips=CLIP, **JOB)


@pytest.fixture
def source_reads(monkeypatch):
    """What edits read of the source, as it happens: (stage, array, step, frames)."""
    found, read = [], ArrayStore.read

    def counted(self, name, block, frames=None):
        if self.stage.stage == "match":
            found.append((self.stage.stage, name, block, tuple(frames)))
        return read(self, name, block, frames)

    monkeypatch.setattr(ArrayStore, "read", counted)
    return found


def assert_as_alone(manifest, alone):
    for job in range(len(EDITS)):
        assert same(outcome(manifest, job), outcome(alone, job)), EDITS[job]["name"]


def test_they_read_the_source_once_and_end_with_the_bits_they_have_alone(
    alone, fresh, source_reads, monkeypatch
):
    held = []
    monkeypatch.setattr(runner_module, "Reads", lambda: held.append(Reads()) or held[-1])
    assert all(result.error is None for result in run(fresh))
    assert_as_alone(fresh, alone)
    assert len(source_reads) == len(set(source_reads)) > 0
    (reads,) = held
    assert reads.saved > reads.largest > 0


class Died(BaseException):
    """Stops this process's run where SIGKILL could have stopped it."""


def test_one_that_is_further_along_waits_for_the_others(alone, fresh, source_reads, monkeypatch):
    batch, write = load(fresh), ledger.write_json
    run(fresh, ("encode", "invert", "match"))

    def dying(path, value):
        write(path, value)
        if path.name == "window-00001-00001-00000.json":
            raise Died

    with monkeypatch.context() as patch:  # the first edit alone, to its second step
        patch.setattr(ledger, "write_json", dying)
        with pytest.raises(Died):
            Runner(batch.only(["clip/blue"]), silent).run()
    assert folder_of(fresh, "edit").committed("window-00001-00000-00000")
    source_reads.clear()
    assert all(result.error is None for result in run(fresh))
    assert_as_alone(fresh, alone)
    assert len(source_reads) == len(set(source_reads))


def test_one_that_fails_does_not_stop_the_others(alone, fresh, tiny_model):
    bad = {"name": "bad", "prompt": "ball " * 200}
    edits = [EDITS[0], bad, *EDITS[1:]]
    clips = [{"video": "clip.mp4", "edits": edits}]
    manifest = write_manifest(fresh.parent, tiny_model, clips=clips, **JOB)
    results = run(manifest)
    assert [result.error is None for result in results] == [True, False, True, True]
    assert "prompt" in results[1].error.message
    assert_as_alone(fresh, alone)


def test_the_same_edit_under_two_names_is_made_once(alone, fresh, tiny_model):
    twice = [EDITS[0], {**EDITS[0], "name": "again"}]
    clips = [{"video": "clip.mp4", "edits": twice}]
    manifest = write_manifest(fresh.parent, tiny_model, clips=clips, **JOB)
    first, second = run(manifest)
    assert first.error is None
    assert "edit" in first.ran
    assert second.ran == []
    assert second.outputs[0].read_bytes() == first.outputs[0].read_bytes()


def test_two_processes_share_them_out_and_the_bits_stay(alone, fresh):
    store, found = HashStore(), {}

    def member(rank):
        found[rank] = Runner(load(fresh), silent, Team(store, rank, 2)).run()

    threads = [threading.Thread(target=member, args=(n,), daemon=True) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert all(result.error is None for rank in (0, 1) for result in found[rank])
    assert_as_alone(fresh, alone)


def test_what_is_held_does_not_grow_with_the_clip(tmp_path, tiny_model, monkeypatch):
    held, taken = [], []
    monkeypatch.setattr(runner_module, "Reads", lambda: held.append(Reads()) or held[-1])
    facts = MemoryUse.facts
    monkeypatch.setattr(MemoryUse, "facts", lambda *a: taken.append(facts(*a)) or taken[-1])
    for frames in (12, 24):
        folder = tmp_path / str(frames)
        folder.mkdir()
        clip(folder / "clip.mp4", frames)
        manifest = write_manifest(folder, tiny_model, clips=CLIP, **{**JOB, "steps": 1})
        run(manifest, ("encode", "invert", "match", "edit"))
    assert held[0].largest == held[1].largest > 0
    assert all("memory" in told for told in taken)


def test_as_many_go_side_by_side_as_are_asked_for_and_processes_leave():
    class Fake:
        def __init__(self, clip, edit):
            self.clip, self.name = clip, f"{clip}/{edit}"

    jobs = [Fake("a", n) for n in range(10)] + [Fake("b", n) for n in range(3)]
    sizes = {
        (together, processes): [
            len(group) for group in runner_module.groups(jobs, together, processes)
        ]
        for together, processes in itertools.product((1, 4, 16), (1, 2, 8))
    }
    assert sizes[1, 1] == [1] * 13
    assert sizes[4, 1] == [4, 4, 2, 3]
    assert sizes[16, 1] == [10, 3]
    assert sizes[16, 2] == [5, 5, 2, 1]
    assert sizes[16, 8] == [2] * 5 + [1] * 3

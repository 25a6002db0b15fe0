"""Edits of a clip side by side: one reading of the source, and each has the bits it has alone."""

import itertools
import shutil
import threading

import numpy as np
import pytest
from jobs import (
    SIZE,
    clip,
    copy_of,
    edited_latents,
    folder_of,
    run,
    silent,
    write_manifest,
)
from torch.distributed import HashStore

from tokenflow_batch import ledger
from tokenflow_batch import runner as runner_module
from tokenflow_batch.costs import ClipSize, JobSizes, Known
from tokenflow_batch.distributed import Team
from tokenflow_batch.inputs import Inputs
from tokenflow_batch.manifest import load
from tokenflow_batch.measured import Measured
from tokenflow_batch.model_shape import ModelShape
from tokenflow_batch.runner import Runner
from tokenflow_batch.stage_names import STAGES
from tokenflow_batch.store import ArrayStore, Reads
from tokenflow_batch.turns import groups, side_by_side

EDITS = [
    {"name": "blue", "prompt": "a blue ball on grass", "negative_prompt": "sand"},
    {"name": "late", "prompt": "a green ball", "technique": "sdedit", "strength": 0.7},
    {"name": "free", "prompt": "a cube on grass", "guidance_scale": 2.0, "attn_t": 0.0},
]
# Three segments in two overlapping windows with an anchor, three chunks.
JOB = {
    "inversion_steps": 2,
    "chunk_frames": 3,
    "window_segments": 2,
    "window_overlap": 1,
    "anchors": 1,
    "steps": 2,
}
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
    """The edits one at a time: a manifest that is done as far as that."""
    folder = tmp_path_factory.mktemp("alone")
    clip(folder / "clip.mp4", 9)
    manifest = write_manifest(folder, tiny_model, clips=CLIP, runtime={"edits_together": 1}, **JOB)
    assert all(result.error is None for result in run(manifest, STAGES[:4]))
    return manifest


@pytest.fixture
def fresh(alone, tmp_path, tiny_model):
    """The same before its edits, which may go side by side."""
    copy_of(alone.parent, tmp_path / "job")
    shutil.rmtree(tmp_path / "job" / "out" / ".work" / "edit")
    return write_manifest(tmp_path / "job", tiny_model, clips=CLIP, **JOB)


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
        latents = edited_latents(manifest, job)
        assert np.array_equal(latents, edited_latents(alone, job)), EDITS[job]["name"]


def test_they_read_the_source_once_and_end_with_the_bits_they_have_alone(
    alone, fresh, source_reads, monkeypatch
):
    held = []
    monkeypatch.setattr(runner_module, "Reads", lambda: held.append(Reads()) or held[-1])
    assert all(result.error is None for result in run(fresh, ("edit",)))
    assert_as_alone(fresh, alone)
    assert len(source_reads) == len(set(source_reads)) > 0
    (reads,) = held
    assert reads.saved > reads.largest > 0


class Died(BaseException):
    """Stops this process's run where SIGKILL could have stopped it."""


def test_one_that_is_further_along_waits_for_the_others(alone, fresh, source_reads, monkeypatch):
    batch, write = load(fresh), ledger.write_json

    def dying(path, value):
        write(path, value)
        if path.name == "window-00001-00001-00000.json":
            raise Died

    with monkeypatch.context() as patch:  # the first edit alone, to its second step
        patch.setattr(ledger, "write_json", dying)
        with pytest.raises(Died):
            Runner(batch.only(["clip/blue"]), silent).run(("edit",))
    assert folder_of(fresh, "edit").committed("window-00001-00000-00000")
    source_reads.clear()
    assert all(result.error is None for result in run(fresh, ("edit",)))
    assert_as_alone(fresh, alone)
    assert len(source_reads) == len(set(source_reads))


def test_one_that_fails_does_not_stop_the_others(alone, fresh, tiny_model):
    bad = {"name": "bad", "prompt": "ball " * 200}
    clips = [{"video": "clip.mp4", "edits": [*EDITS, bad]}]
    manifest = write_manifest(fresh.parent, tiny_model, clips=clips, **JOB)
    results = run(manifest, ("edit",))
    assert [result.error is None for result in results] == [True, True, True, False]
    assert "prompt" in results[3].error.message
    assert_as_alone(fresh, alone)


def test_the_same_edit_under_two_names_is_made_once(fresh, tiny_model):
    twice = [EDITS[0], {**EDITS[0], "name": "again"}]
    clips = [{"video": "clip.mp4", "edits": twice}]
    manifest = write_manifest(fresh.parent, tiny_model, clips=clips, **JOB)
    first, second = run(manifest, ("edit",))
    assert (first.error, first.ran, first.skipped) == (None, ["edit"], [])
    assert (second.error, second.ran, second.skipped) == (None, [], ["edit"])


def test_two_processes_share_them_out_and_the_bits_stay(alone, fresh):
    store, found = HashStore(), {}

    runners = [Runner(load(fresh), silent, Team(store, rank, 2)) for rank in range(2)]
    assert all(runner.model for runner in runners)  # diffusers can't load two at once

    def member(rank):
        found[rank] = runners[rank].run(("edit",))

    threads = [threading.Thread(target=member, args=(n,), daemon=True) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert all(result.error is None for rank in (0, 1) for result in found[rank])
    assert_as_alone(fresh, alone)


@pytest.mark.slow
def test_what_is_held_does_not_grow_with_the_clip_and_is_planned(tmp_path, tiny_model, monkeypatch):
    held, bounds = [], set()
    monkeypatch.setattr(runner_module, "Reads", lambda: held.append(Reads()) or held[-1])
    for frames in (12, 24):
        folder = tmp_path / str(frames)
        folder.mkdir()
        clip(folder / "clip.mp4", frames)
        manifest = write_manifest(folder, tiny_model, clips=CLIP, **JOB)
        assert all(r.error is None for r in run(manifest, STAGES[:4]))
        batch = load(manifest)
        known = Known(ModelShape.of(Inputs.of(batch).model), Measured(), "float32")
        sizes = JobSizes.of(known, batch.jobs[0], ClipSize(frames, *SIZE))
        assert 0.75 * sizes.held_beside < held[-1].largest <= sizes.held_beside
        bounds.add(sizes.held_beside)
    assert len(bounds) == 1


def test_as_many_go_side_by_side_as_are_asked_for_and_processes_leave():
    class Fake:
        def __init__(self, clip, edit):
            self.clip, self.name = clip, f"{clip}/{edit}"

    jobs = [Fake("a", n) for n in range(10)] + [Fake("b", n) for n in range(3)]
    sizes = {
        (together, processes): [
            len(group) for group in groups(jobs, lambda job: job.clip, together, processes)
        ]
        for together, processes in itertools.product((1, 4, 16), (1, 2, 8))
    }
    assert sizes[1, 1] == [1] * 13
    assert sizes[4, 1] == [4, 4, 2, 3]
    assert sizes[16, 1] == [10, 3]
    assert sizes[16, 2] == [5, 5, 2, 1]
    assert sizes[16, 8] == [2] * 5 + [1] * 3

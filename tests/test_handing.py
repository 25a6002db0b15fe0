"""What invert hands to match is, bit for bit, what match computes by itself."""

import json
from itertools import product

import pytest
import torch
from jobs import clip, command, folder_of, quick_first, run_one, same, write_manifest

from tokenflow_batch.manifest import load
from tokenflow_batch.row_counts import row_counts
from tokenflow_batch.stages import invert
from tokenflow_batch.store import ArrayStore
from tokenflow_batch.tokenflow.ddim import invert_fixed_point
from tokenflow_batch.tokenflow.passes import SourcePass

FRAMES = 11
KINDS = {
    "as usual": {},
    "chunks shorter than segments": {"chunk_frames": 2, "segment_length": 5},
    "one chunk, several batches": {"chunk_frames": 64},
    "the floor of rounding, where an earlier iterate is the best": {"inversion_iterations": 12},
    "two shots": {"cuts": [5], "inversion_iterations": 3},
    "features in 8 bits": {"conv_features": "store8", "inversion_iterations": 2},
    "no features": {"technique": "sdedit"},
}
QUICK = [("as usual", True), ("chunks shorter than segments", False), ("two shots", True)]


def stored(manifest):
    """The arrays of match, and what its units say of themselves."""
    folder = folder_of(manifest, "match")
    store = ArrayStore.open(folder)
    arrays = [
        store.read(name, (step,))
        for name, spec in sorted(store.specs.items())
        for step in range(spec.lead[0])
    ]
    return arrays, folder.totals()


def planned_rows(manifest):
    answer = command("plan", manifest, "--json")
    assert answer.exit_code == 0, answer.output
    return json.loads(answer.stdout)["total"]["match"]["rows"]


@pytest.mark.parametrize(
    ("kind", "swings"),
    quick_first([*product(KINDS, (False, True))], QUICK, "{}, retried: {}".format),
)
def test_handed_or_computed_the_bits_are_the_same(tmp_path, tiny_model, monkeypatch, kind, swings):
    settings = {"cuts": "none", **KINDS[kind]}
    monkeypatch.setattr("tokenflow_batch.tokenflow.ddim.TOLERANCE", 3e-3 if swings else 1e9)
    clip(tmp_path / "clip.mp4", FRAMES)
    manifest = write_manifest(tmp_path, tiny_model, **settings)
    run_one(manifest, ("encode",))
    least = planned_rows(manifest)
    run_one(manifest, ("invert",))
    arrays, totals = stored(manifest)
    chunks = -(-FRAMES // settings.get("chunk_frames", 4))
    assert totals["handed"] == 3 * chunks
    assert totals["rows"] == least < 3 * FRAMES
    retried = folder_of(manifest, "invert").totals()["retried_rows"]
    assert (retried > 0) == swings
    assert planned_rows(manifest) == 0
    before = sorted((folder_of(manifest, "match").folder / "commits").iterdir())
    run_one(manifest, ("match",))
    after = sorted((folder_of(manifest, "match").folder / "commits").iterdir())
    assert {p.name for p in after} - {p.name for p in before} == {"complete.json"}

    run_one(manifest, ("match",), force=["match"])
    again, totals = stored(manifest)
    assert "handed" not in totals
    assert totals["rows"] == least + 3 * FRAMES
    assert same(arrays, again)


def test_without_a_last_evaluation_there_is_nothing_to_hand_over(tmp_path, tiny_model):
    """Plain inversion never evaluates where it ends."""
    clip(tmp_path / "clip.mp4", FRAMES)
    manifest = write_manifest(tmp_path, tiny_model, inversion_iterations=0)
    planned = planned_rows(manifest)
    run_one(manifest, ("encode", "invert"))
    assert not folder_of(manifest, "match").folder.exists()
    run_one(manifest, ("match",))
    assert stored(manifest)[1]["rows"] == planned >= 3 * FRAMES


def test_what_was_lost_of_it_is_computed_and_planned(tmp_path, tiny_model):
    clip(tmp_path / "clip.mp4", FRAMES)
    manifest = write_manifest(tmp_path, tiny_model, cuts="none")
    run_one(manifest, ("encode", "invert"))
    arrays, totals = stored(manifest)
    folder = folder_of(manifest, "match")
    for chunk in range(3):
        folder.forget(f"match-00001-{chunk:05d}")
    alone = row_counts(load(manifest).jobs[0].settings, FRAMES, handed=False)["match"]
    assert planned_rows(manifest) == round(alone / 3)
    run_one(manifest, ("match",))
    again, both = stored(manifest)
    assert both["rows"] - totals["rows"] == FRAMES
    assert same(arrays, again)


def test_an_interrupted_inversion_hands_over_what_it_had(tmp_path, tiny_model, monkeypatch):
    clip(tmp_path / "clip.mp4", FRAMES)
    whole, part = (tmp_path / name for name in ("whole", "part"))
    for folder in (whole, part):
        folder.mkdir()
        (folder / "clip.mp4").write_bytes((tmp_path / "clip.mp4").read_bytes())
    one, other = (write_manifest(f, tiny_model, cuts="none") for f in (whole, part))
    run_one(one, ("encode", "invert", "match"))

    unit, done = invert._Inversion.unit, []

    def stop_after_four(self, i, chunk):
        if len(done) == 4:
            raise KeyboardInterrupt
        unit(self, i, chunk)
        done.append((i, chunk.index))

    monkeypatch.setattr(invert._Inversion, "unit", stop_after_four)
    with pytest.raises(KeyboardInterrupt):
        run_one(other, ("encode", "invert"))
    monkeypatch.undo()
    assert folder_of(other, "match").totals()["handed"] == 3
    run_one(other, ("encode", "invert", "match"))
    assert folder_of(other, "match").totals()["handed"] == 8  # the one that waited is not
    assert same(stored(one)[0], stored(other)[0])


def test_each_frame_s_best_evaluation_is_told():
    """One frame converges, the other runs away: its first iterate stays the best."""
    slope = torch.tensor([0.1, -3.0]).view(2, 1, 1, 1)
    evaluated, kept = [], {}

    def noise(x, _t):
        evaluated.append(x)
        return slope * x + 1

    def better(rows_F):
        kept.update({n: len(evaluated) - 1 for n in rows_F.nonzero().flatten().tolist()})

    x = torch.ones(2, 1, 2, 2)
    start = torch.ones_like(x)
    found = invert_fixed_point(
        noise, x, 10, 0.9, 0.5, extra=2, warm_noise_FChw=start, better=better
    )
    assert kept == {0: 2, 1: 0}
    for n, call in kept.items():
        assert torch.equal(found.x[n], evaluated[call][n])


def test_two_passes_are_merged_row_by_row():
    old, new = SourcePass(), SourcePass()
    for value, seen in enumerate((old, new)):
        seen.self_attention(_Site(), None, torch.full((3, 2, 4), float(value)), lambda: None)
        seen.conv_features(torch.full((3, 4, 1, 1), float(value)))
    both = old.merged(new, torch.tensor([True, False, True]))
    assert both.tokens[0][:, 0, 0].tolist() == both.conv[:, 0, 0, 0].tolist() == [1, 0, 1]
    assert old.merged(new, torch.ones(3, dtype=torch.bool)) is new


class _Site:
    index = 0

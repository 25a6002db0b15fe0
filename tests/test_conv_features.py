"""`conv_features`, stored in 16 or 8 bits or computed again: what each gives and costs."""

import shutil

import numpy as np
import pytest
import torch
from jobs import EDIT, clip, command, edited_latents, folder_of, run, silent, write_manifest
from test_damage import flip
from test_forecast import planned
from test_resume import Died, dying

from tokenflow_batch.errors import ModelError
from tokenflow_batch.manifest import load
from tokenflow_batch.runner import Runner
from tokenflow_batch.stage_names import STAGES
from tokenflow_batch.stages.matching import stored_features
from tokenflow_batch.store import ArrayStore

KINDS = ("store", "store8", "recompute")
FRAMES = 7
# Four segments in three overlapping windows with anchors, two chunks. Queries and keys are injected
# in one step of two, so keyframes' features come from their joint pass, and from one of their own.
SETTINGS = {
    "steps": 2,
    "f_t": 1.0,
    "attn_t": 0.5,
    "segment_length": 2,
    "window_segments": 2,
    "window_overlap": 1,
    "anchors": 2,
}


def manifest_of(folder, model, *kinds, name="manifest.yaml", **settings):
    edits = [{**EDIT, "name": kind, "conv_features": kind} for kind in kinds]
    clips = [{"video": "clip.mp4", "edits": edits}]
    return write_manifest(folder, model, clips=clips, name=name, **{**SETTINGS, **settings})


@pytest.fixture(scope="module")
def matched(tmp_path_factory, tiny_model):
    """A clip with edits of all kinds, of which none has begun."""
    folder = tmp_path_factory.mktemp("kinds") / "matched"
    folder.mkdir()
    clip(folder / "clip.mp4", FRAMES)
    manifest = manifest_of(folder, tiny_model, *KINDS)
    plan = planned(manifest)
    assert [result.error for result in run(manifest, STAGES[:3])] == [None] * 3
    return manifest, plan


def copied(manifest, to):
    shutil.copytree(manifest.parent, to)
    return to / manifest.name


@pytest.fixture(scope="module")
def done(matched, tmp_path_factory):
    """The same, edited."""
    manifest = copied(matched[0], tmp_path_factory.mktemp("done") / "job")
    assert [result.error for result in run(manifest, STAGES[:4])] == [None] * 3
    return manifest, {kind: edited_latents(manifest, i) for i, kind in enumerate(KINDS)}


def run_kind(manifest, kind, **options):
    (result,) = Runner(load(manifest).only([f"clip/{kind}"]), silent).run(STAGES[:4], **options)
    return result


# -- what comes out --------------------------------------------------------------------------


def test_all_kinds_give_the_same_edit_as_nearly_as_they_say(done):
    _, latents = done
    plain = latents["store"]
    for kind, most in (("store8", 1e-2), ("recompute", 1e-3)):
        gap = np.abs(latents[kind] - plain)
        assert 0 < gap.max() < most * plain.std()


def test_one_match_serves_them_all_and_eight_bits_are_those_of_the_sixteen(done):
    manifest, _ = done
    assert len({folder_of(manifest, "match", job).key for job in range(3)}) == 1
    store = ArrayStore.open(folder_of(manifest, "match"))
    for step in range(2):
        half = store.read("conv", (step,)).astype(np.float64)
        steps, scale = (store.read(n, (step,)) for n in ("conv8", "conv8_scale"))
        assert np.abs(half).max() > 0.1
        bound = scale[..., None, None].astype(np.float64) / 2 + np.abs(half) * 2**-11 + 1e-7
        assert (np.abs(steps * scale[..., None, None].astype(np.float64) - half) <= bound).all()


@pytest.mark.parametrize("kind", ["store8", "recompute"])
def test_an_edit_that_dies_after_every_few_commits_ends_with_the_same_bits(
    matched, done, tmp_path, monkeypatch, kind
):
    manifest, died = copied(matched[0], tmp_path / "job"), 0
    while True:
        with monkeypatch.context() as patch:
            dying(patch, 5, after=died % 2 == 0)
            try:
                result = run_kind(manifest, kind)
                break
            except Died:
                died += 1
    assert result.error is None
    assert died >= 2
    assert np.array_equal(edited_latents(manifest, KINDS.index(kind)), done[1][kind])


def test_without_the_other_edits_it_is_the_same_edit(matched, done, tmp_path, tiny_model):
    manifest = copied(matched[0], tmp_path / "job")
    alone = manifest_of(manifest.parent, tiny_model, "recompute")
    run_kind(alone, "recompute")
    assert np.array_equal(edited_latents(alone), done[1]["recompute"])
    names = sorted(ArrayStore.open(folder_of(alone, "match")).specs)
    assert [n for n in names if not n.startswith("index")] == []


@pytest.mark.parametrize("array", ["conv8", "conv8_scale"])
def test_damage_is_found_and_mended(done, tmp_path, caplog, array):
    manifest, latents = done
    copy = copied(manifest, tmp_path / "job")
    folder = folder_of(copy, "match")
    files = (folder.folder / "data.zarr" / array / "c" / "1" / "0").rglob("*")
    flip(next(path for path in files if path.is_file()))
    result = run_kind(copy, "store8", force=["edit"])
    assert result.error is None
    assert f"match {folder.key}: unit match-00001-00000 is damaged" in caplog.text
    assert array in caplog.text
    assert np.array_equal(edited_latents(copy, 1), latents["store8"])


def test_features_that_the_format_does_not_hold_stop_the_job():
    x = torch.ones(2, 3, 4, 4)
    x[1, 2, 3, 3] = 1e5
    steps = stored_features("conv8", x, "step 3")
    assert sorted(steps) == ["conv8", "conv8_scale"]
    with pytest.raises(ModelError, match=r"step 3: convolution features in 16 bits.*not finite"):
        stored_features("conv", x, "step 3")
    x[0, 0, 0, 0] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        stored_features("conv8", x, "step 3")


# -- what it costs ---------------------------------------------------------------------------


def test_rows_are_those_of_the_run_partial_ones_too(matched, done):
    _, plan = matched
    manifest, _ = done
    for job, kind in enumerate(KINDS):
        totals = folder_of(manifest, "edit", job).totals()
        cost = plan["jobs"][job]["stages"]["edit"]
        assert cost["rows"] == totals["rows"]
        assert cost["partial_rows"] == totals.get("partial_rows", 0)
        assert (cost["partial_rows"] > 0) == (kind == "recompute")
    store, store8, again = (plan["jobs"][j]["stages"]["edit"] for j in range(3))
    assert store["rows"] == again["rows"]
    assert store["flops"] == store8["flops"] < again["flops"]


def test_bytes_are_those_of_the_run(matched, tmp_path, tiny_model):
    manifest = copied(matched[0], tmp_path / "job")
    plans, real = {}, {}
    for kind in KINDS:
        site = {"conv_site": "up_blocks.3.resnets.1"}  # much of it
        own = manifest_of(manifest.parent, tiny_model, kind, name=f"{kind}.yaml", **site)
        plans[kind] = planned(own)["total"]["match"]["bytes"]
        run(own, STAGES[:3])
        files = folder_of(own, "match").folder.rglob("*")
        # But for what tells of the arrays' layout: a few kB, whatever the clip's length.
        kept = [p for p in files if p.is_file() and p.name not in ("zarr.json", "layout.json")]
        real[kind] = sum(p.stat().st_size for p in kept)
    for kind in ("store", "store8"):
        more = plans[kind] - plans["recompute"]
        assert more == pytest.approx(real[kind] - real["recompute"], rel=0.05)
    assert real["store8"] - real["recompute"] < 0.6 * (real["store"] - real["recompute"])


def test_where_the_disk_cannot_hold_it_the_plan_names_what_fits(
    matched, tmp_path, tiny_model, monkeypatch
):
    folder = copied(matched[0], tmp_path / "job").parent
    needed = {}
    for kind in KINDS:
        own = manifest_of(folder, tiny_model, kind, name=f"{kind}.yaml")
        disk = planned(own, "-o", tmp_path / "new")["disk"]
        needed[kind] = disk["bytes"] + disk["scratch_bytes"]
    assert needed["store"] > needed["store8"] > needed["recompute"]
    plain = folder / "store.yaml"
    for free, named in ((needed["store8"], "store8"), (needed["recompute"], "recompute")):
        monkeypatch.setattr("tokenflow_batch.forecast.free_bytes", lambda _path, n=free: n)
        answer = command("plan", plain, "-o", tmp_path / "new")
        assert answer.exit_code == 7
        assert f"set `conv_features: {named}` under `defaults`, which fits" in answer.output
        assert "of the UNet (+ " in answer.output
    monkeypatch.setattr("tokenflow_batch.forecast.free_bytes", lambda _path: 1000)
    answer = command("plan", plain, "-o", tmp_path / "new")
    assert "which fits" not in answer.output

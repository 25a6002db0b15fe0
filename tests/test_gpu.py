"""What only a GPU can show; skipped without one. TEST_DEVICE=cuda sends the other tests there, too.

K keyframes, H heads, L tokens, D channels per head.
"""

import json

import numpy as np
import pytest
import torch
from jobs import EDIT, clip, edited_latents, folder_of, outcome, run, run_one, same, write_manifest

from tokenflow_batch.config import Runtime
from tokenflow_batch.errors import OutOfMemoryError
from tokenflow_batch.models import resolve
from tokenflow_batch.store import ArrayStore
from tokenflow_batch.tokenflow.attention import attend, choose_attention
from tokenflow_batch.tokenflow.correspondence import faiss_available, triton_works

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
JOB = {"chunk_frames": 3, "steps": 4, "window_segments": 2, "window_overlap": 1, "anchors": 2}


def normal(seed, *shape):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda")


def usable(backend, dtype):
    try:
        return choose_attention(backend, "cuda", dtype) == backend
    except ValueError:
        return False


@pytest.mark.parametrize("backend", ["xformers", "sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 40, 64, 80, 160])
@pytest.mark.parametrize("most", [1, 40])
def test_attention_of_every_backend_is_what_the_formula_says(backend, dtype, width, most):
    if not usable(backend, dtype):
        pytest.skip(f"{backend} has no kernel for {dtype} here")
    q_KLHD, k_KLHD, v_KLHD = (normal(seed, 2, 300, 3, width).to(dtype) for seed in range(3))
    # As the UNet leaves heads, which no backend should have to copy.
    q, k, v = (x.transpose(1, 2) for x in (q_KLHD, k_KLHD, v_KLHD))
    scale = width**-0.5
    counts = normal(3, 300).abs().mul(most).clamp(1, most).ceil()
    scores = q.double() @ k.double().transpose(-1, -2) * scale + counts.double().log()
    exact = torch.softmax(scores, dim=-1) @ v.double()
    given = None if most == 1 else counts.to(dtype)
    off = (attend(q, k, v, scale, backend, given).double() - exact).abs()
    bound = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    assert off.max() < bound


def test_half_precision_and_what_is_fastest_are_the_defaults():
    found = resolve(Runtime(threads=1)).numerics()
    assert found["dtype"] == "float16"
    assert torch.cuda.get_device_name() in found["device"]
    assert found["correspondence"] == ("triton" if triton_works("cuda") else "faiss")
    assert found["attention"] == "sdpa"
    assert found["memory_format"] == "channels first"


@pytest.fixture(scope="module")
def reference(tmp_path_factory, tiny_model):
    """A clip edited as it comes: its manifest."""
    folder = tmp_path_factory.mktemp("reference")
    clip(folder / "clip.mp4", 9)
    manifest = write_manifest(folder, tiny_model, runtime={"device": "auto"}, **JOB)
    run_one(manifest)
    return manifest


def again(reference, folder, model, *, runtime=None, **changes):
    (folder / "clip.mp4").symlink_to(reference.parent / "clip.mp4")
    runtime = {"device": "auto", **(runtime or {})}
    manifest = write_manifest(folder, model, runtime=runtime, **{**JOB, **changes})
    run_one(manifest)
    return manifest


def fields(manifest):
    """All correspondences, by name."""
    store = ArrayStore.open(folder_of(manifest, "match"))
    steps = JOB["steps"]
    return {
        (name, step): store.read(name, (step,))
        for name in store.specs
        if np.issubdtype(store.specs[name].dtype, np.unsignedinteger)
        for step in range(steps)
    }


def test_the_same_run_gives_the_same_bits(reference, tmp_path, tiny_model):
    assert same(outcome(again(reference, tmp_path, tiny_model)), outcome(reference))


@pytest.mark.parametrize("backend", ["torch", "faiss"])
def test_every_search_finds_the_same_correspondences(reference, tmp_path, tiny_model, backend):
    if backend == "faiss" and not faiss_available("cuda"):
        pytest.skip("FAISS has no support for GPUs here")
    other = again(reference, tmp_path, tiny_model, runtime={"correspondence": backend})
    found, wanted = fields(other), fields(reference)
    assert found.keys() == wanted.keys()
    assert wanted
    differ = [float((found[name] != wanted[name]).mean()) for name in wanted]
    assert max(differ) < 1e-3  # ties within float32's rounding


def test_half_precision_edits_like_single(reference, tmp_path, tiny_model):
    single = again(reference, tmp_path, tiny_model, runtime={"dtype": "fp32"})
    exact, half = (edited_latents(m).astype(np.float64) for m in (single, reference))
    assert np.abs(half - exact).mean() < 0.02 * exact.std()


def test_the_peak_of_memory_does_not_grow_with_the_clip(tmp_path, tiny_model):
    peaks = {}
    for frames in (9, 45):
        folder = tmp_path / str(frames)
        folder.mkdir()
        clip(folder / "clip.mp4", frames)
        manifest = write_manifest(folder, tiny_model, runtime={"device": "auto"}, **JOB)
        run_one(manifest)
        for stage in ("encode", "invert", "match", "edit", "render"):
            mark = folder_of(manifest, stage).folder / "commits" / "complete.json"
            memory = json.loads(mark.read_text())["facts"]["memory"]
            assert memory["device"] == "cuda"
            peaks.setdefault(stage, []).append(memory["peak"])
    # Torch reserves whole blocks of 2 MB.
    assert all(long <= short + (2 << 20) for short, long in peaks.values()), peaks


def test_too_little_memory_is_one_job_s_failure(tmp_path, tiny_model):
    clip(tmp_path / "clip.mp4", 4)
    clip(tmp_path / "large.mp4", 4, size=(1024, 1024))
    clips = [{"video": f"{name}.mp4", "edits": [EDIT]} for name in ("large", "clip")]
    manifest = write_manifest(tmp_path, tiny_model, clips=clips, runtime={"device": "auto"})
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    (tmp_path / "first").mkdir()
    clip(tmp_path / "first" / "clip.mp4", 4)
    run_one(write_manifest(tmp_path / "first", tiny_model, runtime={"device": "auto"}))
    enough = torch.cuda.max_memory_reserved() + (16 << 20)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, enough / total))
    try:
        large, small = run(manifest)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert isinstance(large.error, OutOfMemoryError)
    assert small.error is None

"""Finding and loading models: folders, single files, the hub's cache; and what is refused."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from ldm_layout import save_single_file
from safetensors.torch import load_file, save_file
from tiny_model import (
    CHANNELS,
    FACTOR,
    PROMPT_TOKENS,
    WIDTH,
    copied,
    edit_json,
    tiny_pipeline,
)

from tokenflow_batch.config import Runtime
from tokenflow_batch.errors import ModelError
from tokenflow_batch.files import DigestMemory
from tokenflow_batch.model_files import COMPONENTS, locate
from tokenflow_batch.models import load, resolve


def loaded(model, compute, base_config=None):
    return load(locate(str(model), base_config, download=False), compute)


@torch.no_grad()
def noise(model):
    """What the UNet makes of a fixed latent and prompt."""
    x = torch.randn(2, CHANNELS, 8, 16, generator=torch.Generator().manual_seed(0))
    text = model.embed("a red ball").expand(2, -1, -1)
    x = x.to(model.compute.dtype)
    return model.unet(x, 321, encoder_hidden_states=text, return_dict=False)[0].float()


def frames(count=3):
    return np.random.default_rng(0).integers(0, 256, (count, 32, 64, 3), dtype=np.uint8)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "auto"])
def test_a_folder_loads_in_every_precision(tiny_model, dtype, compute):
    model = loaded(tiny_model, resolve(Runtime(device="cpu", dtype=dtype, threads=1)))
    expected = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(dtype, torch.float32)
    assert model.unet.dtype == expected
    assert not model.unet.training
    assert not any(p.requires_grad for p in model.unet.parameters())
    assert (model.latent_channels, model.vae_factor, model.multiple) == (CHANNELS, FACTOR, 32)
    latents = model.encode(frames())
    assert (latents.shape, latents.dtype) == ((3, CHANNELS, 8, 16), torch.float32)
    assert model.decode(latents).shape == (3, 32, 64, 3)
    assert model.embed("a red ball").shape == (PROMPT_TOKENS, WIDTH)
    exact = loaded(tiny_model, compute)
    error = {"fp16": 5e-3, "bf16": 5e-2}.get(dtype, 0)
    gap = (noise(model) - noise(exact)).abs().mean() / noise(exact).std()
    assert gap <= error
    assert (latents - exact.encode(frames())).abs().mean() <= error * latents.std()


def test_latents_are_the_posterior_s_mean_times_the_scaling_factor(tiny_model, compute):
    vae = tiny_pipeline().vae
    pixels = torch.from_numpy(frames()).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        mean = vae.encode(pixels).latent_dist.mean
    assert vae.config.scaling_factor == 4.0
    got = loaded(tiny_model, compute).encode(frames())
    torch.testing.assert_close(got, mean * 4, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_scheduler_s_own_timesteps_and_prediction_are_taken(
    tiny_model, tmp_path, compute, kind
):
    folder = copied(tiny_model, tmp_path / "m")
    edit_json(folder / "scheduler" / "scheduler_config.json", prediction_type=kind)
    model = loaded(folder, compute)
    assert model.prediction_type == kind
    schedule = model.schedule(4)
    assert schedule.timesteps == (751, 501, 251, 1)
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas = np.cumprod(1 - betas)
    assert schedule.alphas == pytest.approx([alphas[t] for t in (751, 501, 251, 1)], rel=1e-4)
    assert schedule.final_alpha == pytest.approx(alphas[0], rel=1e-4)
    assert len(model.schedule(999)) == 999
    for steps in (1000, 1001):  # with its offset of 1 the model has no 1000th
        with pytest.raises(ModelError, match=f"{steps} steps are too many"):
            model.schedule(steps)


def test_a_schedule_that_ends_in_pure_noise_is_refused(tiny_model, tmp_path, compute):
    folder = copied(tiny_model, tmp_path / "m")
    edit_json(
        folder / "scheduler" / "scheduler_config.json",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
    with pytest.raises(ModelError, match="zero terminal signal"):
        loaded(folder, compute).schedule(4)


def test_a_prompt_that_would_be_cut_is_refused(tiny_model, compute):
    model = loaded(tiny_model, compute)
    fits = "ball " * (PROMPT_TOKENS - 2)
    assert model.embed(fits).shape == (PROMPT_TOKENS, WIDTH)
    with pytest.raises(ModelError, match=f"prompt of {PROMPT_TOKENS + 1} tokens.* takes 13"):
        model.embed(fits + "ball")
    assert not torch.equal(model.embed(""), model.embed("ball"))


def test_a_single_file_of_the_original_layout_is_the_same_model(tiny_model, tmp_path, compute):
    path = save_single_file(tiny_pipeline(), tmp_path / "model.safetensors")
    single = loaded(path, compute, str(tiny_model))
    folder = loaded(tiny_model, compute)
    assert torch.equal(noise(single), noise(folder))
    assert torch.equal(single.encode(frames()), folder.encode(frames()))
    assert torch.equal(single.embed("a ball"), folder.embed("a ball"))
    assert single.prediction_type == folder.prediction_type
    latents = folder.encode(frames())
    assert np.array_equal(single.decode(latents), folder.decode(latents))


def test_a_single_file_needs_a_base_config(tmp_path):
    (tmp_path / "m.safetensors").touch()
    with pytest.raises(ModelError, match="holds weights alone") as caught:
        locate(str(tmp_path / "m.safetensors"))
    assert "base_config" in str(caught.value)


def test_weights_in_shards_and_of_the_fp16_variant_are_found(tiny_model, tmp_path, compute):
    expected = noise(loaded(tiny_model, compute))
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path / "shards", max_shard_size="300KB")
    assert len(list((tmp_path / "shards" / "unet").glob("*-of-*.safetensors"))) > 1
    assert torch.equal(noise(loaded(tmp_path / "shards", compute)), expected)
    pipeline.to(dtype=torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    model = loaded(tmp_path / "half", compute)
    assert model.unet.dtype == torch.float32
    assert 0 < (noise(model) - expected).abs().max() < 0.05


# -- what is refused -------------------------------------------------------------------------


def without(component):
    return lambda folder: shutil.rmtree(folder / component)


def pickled(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()


def garbage(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"no tensors" * 99)


def truncated(folder):
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def another_kind(folder):
    edit_json(folder / "model_index.json", _class_name="StableDiffusionXLPipeline")


BROKEN = {
    **{f"no {name}": (without(name), f"no {name}") for name in COMPONENTS},
    "no index": (lambda f: (f / "model_index.json").unlink(), "no model_index"),
    "pickled": (pickled, "no complete set of safetensors"),
    "another kind": (another_kind, "StableDiffusionXLPipeline, not Stable Diffusion"),
    "garbage": (garbage, "can't be loaded"),
    "truncated": (truncated, "can't be loaded"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_that_is_no_such_model_is_refused(tiny_model, tmp_path, compute, name):
    spoil, reason = BROKEN[name]
    folder = copied(tiny_model, tmp_path / "m")
    spoil(folder)
    with pytest.raises(ModelError, match=reason) as caught:
        loaded(folder, compute)
    assert caught.value.exit_code == 3
    assert str(folder) in caught.value.message


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"in_channels": 2 * CHANNELS + 1}, "inpainting or depth"),
        (
            {
                "block_out_channels": (16, 16),
                "down_block_types": ("DownBlock2D",) * 2,
                "up_block_types": ("UpBlock2D",) * 2,
                "mid_block_type": None,
            },
            "no self-attention",
        ),
    ],
)
def test_a_unet_of_another_kind_is_refused(tmp_path, compute, changes, reason):
    tiny_pipeline(**changes).save_pretrained(tmp_path / "m")
    with pytest.raises(ModelError, match=reason):
        loaded(tmp_path / "m", compute)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("model.ckpt", "only .safetensors files"),
        ("model.bin", "only .safetensors files"),
        ("missing.safetensors", "no such folder or file"),
        ("missing", "no such folder or file"),
        ("./a/b", "no such folder or file"),
        ("/no/where", "no such folder or file"),
        ("a/b/c", "no such folder or file"),
        ("owner/missing.ckpt", "no such folder or file"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path, monkeypatch, model, reason):
    monkeypatch.chdir(tmp_path)
    for name in ("model.ckpt", "model.bin"):
        torch.save({"x": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(ModelError, match=reason):
        locate(model, download=False)


@pytest.mark.parametrize(
    ("runtime", "reason"),
    [
        ({"device": "cuda:99"}, "runtime: "),
        ({"device": "cpu", "attention": "xformers"}, "no attention kernel"),
        ({"device": "cpu", "correspondence": "triton"}, "kernel doesn't work on cpu"),
    ],
)
def test_a_runtime_that_is_not_there_is_refused(runtime, reason):
    with pytest.raises(ModelError, match=reason):
        resolve(Runtime(**runtime))


def test_channels_last_is_the_default_and_can_be_turned_off(tiny_model, compute):
    plain = resolve(Runtime(device="cpu", dtype="fp32", threads=1, channels_last=False))
    weights = [loaded(tiny_model, c).unet.conv_in.weight for c in (compute, plain)]
    layouts = [w.is_contiguous(memory_format=torch.channels_last) for w in weights]
    assert layouts == [True, False]
    assert torch.equal(*weights)
    assert "memory_format" not in compute.numerics()
    assert plain.numerics() == {**compute.numerics(), "memory_format": "channels first"}


def test_to_compile_needs_a_compiler_and_is_told_in_the_record(compute, monkeypatch):
    wanted = Runtime(device="cpu", dtype="fp32", threads=1, compile=True)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    compiled = resolve(wanted)
    assert set(compiled.numerics()) - set(compute.numerics()) == {"compile"}
    monkeypatch.setattr("shutil.which", lambda name: None)  # noqa: ARG005
    with pytest.raises(ModelError, match=r"torch\.compile has no compiler for cpu"):
        resolve(wanted)


# -- identity --------------------------------------------------------------------------------


def fingerprints(model, tmp_path, base_config=None):
    memory = DigestMemory(tmp_path / "digests.json")
    files = locate(str(model), base_config, download=False)
    return [files.fingerprint(memory, c) for c in COMPONENTS]


def test_a_model_is_its_content_wherever_it_lies(tiny_model, tmp_path):
    before = fingerprints(tiny_model, tmp_path)
    copy = copied(tiny_model, tmp_path / "copy")
    assert fingerprints(copy, tmp_path) == before
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_in.bias"][0] += 1e-3
    save_file(tensors, file)
    edit_json(copy / "scheduler" / "scheduler_config.json", steps_offset=0)
    after = fingerprints(copy, tmp_path)
    same = [name for name, a, b in zip(COMPONENTS, before, after, strict=True) if a == b]
    assert same == ["vae", "text_encoder", "tokenizer"]


def test_a_single_file_s_name_is_no_part_of_its_identity(tiny_model, tmp_path):
    first = tmp_path / "first.safetensors"
    first.write_bytes(b"weights")
    second = tmp_path / "second.safetensors"
    shutil.copy(first, second)
    base = str(tiny_model)
    assert fingerprints(first, tmp_path, base) == fingerprints(second, tmp_path, base)


# -- the hub's cache -------------------------------------------------------------------------

OFFLINE = """
import json, sys
from tokenflow_batch.errors import ModelError
from tokenflow_batch.model_files import locate
for name in sys.argv[1:]:
    try:
        print(json.dumps(str(locate(name).path)))
    except ModelError as error:
        print(json.dumps(error.message))
"""


def test_a_hub_id_is_found_in_the_local_cache_without_a_network(tiny_model, tmp_path):
    for repo in ("owner/tiny-v1.5_x", "owner/configs"):
        folder = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
        snapshot = copied(tiny_model, folder / "snapshots" / ("a" * 40))
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("a" * 40)
        if repo == "owner/configs":
            for weights in snapshot.rglob("*.safetensors"):
                weights.unlink()
    answer = subprocess.run(
        [sys.executable, "-c", OFFLINE, "owner/tiny-v1.5_x", "owner/configs", "owner/none"],
        env={"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    found, bare, none = map(json.loads, answer.stdout.splitlines())
    assert found.endswith("models--owner--tiny-v1.5_x/snapshots/" + "a" * 40)
    assert "no complete set of safetensors weights" in bare
    assert "can't be had from the hub" in none


def test_a_decoder_that_overflows_is_no_black_picture(tiny_model, compute):
    model = loaded(tiny_model, compute)
    model._vae.decoder.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(ModelError, match=r"^frames 3 to 4: .*not finite"):
        model.decode(torch.zeros(2, *model.frame_shape((64, 32))), "frames 3 to 4")
    model._vae.encoder.conv_out.bias.data.fill_(float("inf"))
    with pytest.raises(ModelError, match=r"^encoding: .*not finite"):
        model.encode(np.zeros((1, 32, 64, 3), np.uint8))

"""The demo model's training recipe: every stage runs, and a killed run ends at the same bits."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny_model import tiny_pipeline

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from demo_training.data import LatentCache
from demo_training.export import average_pipelines

SCRIPT = Path(__file__).parents[1] / "scripts" / "train_demo_model.py"
UNET = ("unet", "--steps", "6", "--batch", "2", "--save-every", "2")


def command(work, *arguments):
    return [sys.executable, str(SCRIPT), *arguments, "--work", str(work)]


def train(work, *arguments):
    done = subprocess.run(command(work, *arguments), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A work folder up to the latents."""
    work = tmp_path_factory.mktemp("training")
    train(work, "tokenizer")
    told = train(work, "vae", "--steps", "3", "--batch", "2")
    assert "linear codec" in told
    train(work, "latents", "--count", "12")
    return work


def weights(work):
    content = torch.load(work / "pipeline.ckpt", weights_only=True)
    assert content["step"] == 6
    return [*content["parameters"], *content["average"]]


@pytest.mark.slow
def test_a_killed_training_ends_at_the_same_bits(prepared):
    checkpoint, log = prepared / "pipeline.ckpt", prepared / "pipeline.jsonl"
    train(prepared, *UNET)
    whole, lines = weights(prepared), log.read_text()
    checkpoint.unlink()

    process = subprocess.Popen(
        command(prepared, *UNET), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while not checkpoint.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert torch.load(checkpoint, weights_only=True)["step"] < 6
    train(prepared, *UNET)
    assert all(torch.equal(a, b) for a, b in zip(weights(prepared), whole, strict=True))
    assert [without_time(x) for x in log.read_text().splitlines()] == [
        without_time(x) for x in lines.splitlines()
    ]

    pipeline = StableDiffusionPipeline.from_pretrained(
        prepared / "pipeline", variant="fp16", safety_checker=None, dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a red ball on grass", num_inference_steps=2, height=64, width=64).images[0]
    assert image.size == (64, 64)
    other = train(
        prepared,
        "unet",
        "--steps",
        "2",
        "--init",
        str(prepared / "pipeline"),
        "--batch",
        "2",
        "--out",
        "finer",
    )
    assert "step=2" in other


@pytest.mark.slow
def test_a_checkpoint_of_other_options_is_refused(prepared, tmp_path):
    train(prepared, "unet", "--steps", "2", "--batch", "2", "--out", "refused")
    again = command(prepared, "unet", "--steps", "3", "--batch", "2", "--out", "refused")
    done = subprocess.run(again, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode != 0
    assert "use the same options" in done.stderr


@pytest.mark.parametrize(("pairs", "two"), [(0.0, {False}), (0.5, {False, True}), (1.0, {True})])
def test_the_share_of_pairs_is_the_caches_and_kept_with_it(tmp_path, pairs, two):
    LatentCache(tmp_path, seed=0, count=12, size=64, pairs=pairs).finish()
    found = LatentCache.open(tmp_path)
    assert {found.scene(i).second is not None for i in range(found.count)} == two


@pytest.mark.parametrize("factors", [(1.0, 0.5), (1.0, 0.5, -0.25)])
def test_the_average_of_pipelines_has_the_same_share_of_each(tmp_path, factors):
    weights, folders = [], [tmp_path / str(factor) for factor in factors]
    for folder, factor in zip(folders, factors, strict=True):
        pipeline = tiny_pipeline().to(torch.float16)
        for parameter in [*pipeline.unet.parameters(), *pipeline.text_encoder.parameters()]:
            parameter.data.mul_(factor)
        pipeline.save_pretrained(folder, variant="fp16", safe_serialization=True)
        weights.append((pipeline.unet.state_dict(), pipeline.text_encoder.state_dict()))
    average_pipelines(folders, tmp_path / "mean")
    mean = StableDiffusionPipeline.from_pretrained(
        tmp_path / "mean", variant="fp16", safety_checker=None, dtype=torch.float16
    )
    for number, found in enumerate((mean.unet, mean.text_encoder)):
        for key, value in found.named_parameters():
            wanted = torch.stack([x[number][key].double() for x in weights]).mean(dim=0)
            torch.testing.assert_close(value, wanted.half(), atol=0, rtol=2**-10)


def without_time(line):
    return {k: v for k, v in json.loads(line).items() if k != "seconds"}

"""The whole method against the published code's recordings, and against a plain reference."""

import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from jobs import quick_first
from reference_tokenflow import Reference
from safetensors.torch import save_file
from tiny_model import CHANNELS, SCHEDULER, WIDTH, tiny_unet

from tokenflow_batch.tokenflow.attention import tokenflow_hooks
from tokenflow_batch.tokenflow.correspondence import match_frames, side_by_side
from tokenflow_batch.tokenflow.ddim import Schedule
from tokenflow_batch.tokenflow.denoise import Denoiser, EditSettings, Prompts, predict_window
from tokenflow_batch.tokenflow.keyframes import draw_keyframes, segments, true_neighbours
from tokenflow_batch.tokenflow.modes import MODES, Guidance, Injection
from tokenflow_batch.tokenflow.passes import SourcePass
from tokenflow_batch.tokenflow.samplers import Ddim, State
from tokenflow_batch.tokenflow.windows import WindowMoment

ROOT = Path(__file__).parents[1]
FOLDER = Path(os.environ.get("TOKENFLOW_GOLDEN", ROOT.parent / "shared" / "golden"))
RECORDINGS = sorted(FOLDER.glob("*.safetensors"))


def golden():
    spec = importlib.util.spec_from_file_location("golden", ROOT / "benchmarks" / "golden.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["golden"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not RECORDINGS, reason="no recordings: set TOKENFLOW_GOLDEN to their folder")
@pytest.mark.parametrize("path", RECORDINGS, ids=lambda p: p.stem)
def test_official_mode_reproduces_the_published_code(path):
    found = golden().compare(path, None)
    inversion = found["source_latents"]
    assert inversion["mean_abs"] <= 1e-4 * inversion["ref_std"]
    assert len(found["steps"]) == len(golden().Vectors.load(path).tensors["timesteps"])
    for step in found["steps"]:
        assert step["mean_abs"] <= 1e-4 * step["ref_std"]
        assert step["share_over_5e-3"] <= 1e-3


def test_a_file_that_holds_no_vectors_is_named_and_the_others_are_run(
    tmp_path, monkeypatch, capsys
):
    broken, other = tmp_path / "broken.safetensors", tmp_path / "other.safetensors"
    broken.write_bytes(b"vectors")
    save_file({"x0": torch.zeros(1)}, other)
    files = map(str, (broken, other, tmp_path / "none.safetensors"))
    monkeypatch.setattr(sys, "argv", ["golden.py", *files])
    with pytest.raises(SystemExit) as end:
        golden().main()
    assert end.value.code == 1
    said = capsys.readouterr().err.splitlines()
    assert all(n in line for n, line in zip(("broken", "other", "none"), said, strict=True))
    assert "it lacks x_T" in said[1]


def test_what_is_dumped_never_takes_the_place_of_a_vector_file(tmp_path, monkeypatch, capsys):
    own, other = tmp_path / "a.safetensors", tmp_path / "other" / "a.safetensors"
    other.parent.mkdir()
    for path in (own, other):
        path.write_bytes(b"vectors")
    for files, said in (([own], "would overwrite"), ([own, other], "two files are named")):
        folder = tmp_path if len(files) == 1 else tmp_path / "dump"
        monkeypatch.setattr(sys, "argv", ["golden.py", *map(str, files), "--dump", str(folder)])
        with pytest.raises(SystemExit):
            golden().main()
        assert said in capsys.readouterr().err
    assert own.read_bytes() == other.read_bytes() == b"vectors"


class Inputs:
    """A window's inputs from memory; source features as the match stage makes them."""

    def __init__(self, x, source, seen, keyframes, length, *, again):
        self.x, self.x_source, self.seen, self.again = x, source, seen, again
        self.keyframes, self.length = keyframes, length

    def latents(self, frames):
        return self.x[list(frames)]

    def source(self, frames):
        return self.x_source[list(frames)]

    def conv(self, frames):
        assert not self.again
        return self.seen.conv[list(frames)]

    def correspondences(self, frames):
        near = [true_neighbours(f, self.keyframes, self.length) for f in frames]
        picked, every = list(frames), self.seen.tokens
        fields = []
        for tokens in every:
            joined = side_by_side([t for t in every if t.shape[1] == tokens.shape[1]])
            fields.append(match_frames(joined[picked], joined[self.keyframes], near, "torch"))
        return fields


def ours(unet, kind, schedule, settings, case):
    x, source, embeds, keyframes = case
    denoiser, state, after = Denoiser(unet, kind), State(x), []
    with tokenflow_hooks(unet, "eager") as hooks:
        for step, (t, alpha) in enumerate(zip(schedule.timesteps, schedule.alphas, strict=True)):
            with hooks.during(SourcePass()) as seen:
                denoiser.noise(source[step], t, alpha, embeds[0])
            given = (state.x, source[step], seen, keyframes[step], settings.batch)
            inputs = Inputs(*given, again=settings.recompute_conv)
            noise = predict_window(
                denoiser,
                hooks,
                inputs,
                Prompts(*embeds),
                settings,
                step=step,
                t=t,
                alpha=alpha,
                window=WindowMoment.whole(
                    len(x), settings.batch, settings.mode.neighbours, keyframes[step]
                ),
            )
            state = Ddim().step(schedule, step, 0, state, noise)
            after.append(state.x)
    return torch.stack(after)


# (mode, frames, B, latent size, attn_t, f_t, prediction type); None, None is SDEdit
CASES = {
    "published": ("official", 8, 4, (8, 8), 0.5, 0.75, "epsilon"),
    "published, wide, v": ("official", 6, 3, (8, 16), 0.5, 0.75, "v_prediction"),
    "published, sdedit": ("official", 6, 2, (8, 8), None, None, "epsilon"),
    "published, odd sizes": ("official", 4, 4, (7, 10), 1.0, 0.5, "epsilon"),
    "published, thresholds 0": ("official", 4, 2, (8, 8), 0.0, 0.0, "epsilon"),
    "published, thresholds 1": ("official", 4, 2, (8, 8), 1.0, 1.0, "epsilon"),
    "default, tail": ("default", 7, 3, (8, 8), 0.5, 0.75, "epsilon"),
    "default, wide, v, thresholds 1": ("default", 5, 4, (8, 16), 1.0, 1.0, "v_prediction"),
    "default, sdedit": ("default", 7, 2, (8, 8), None, None, "epsilon"),
    "default, one segment": ("default", 3, 8, (10, 7), 0.25, 0.0, "epsilon"),
    "published, guidance on the way": ("official", 6, 3, (8, 8), 0.5, 0.75, "epsilon"),
    "default, guidance on the way": ("default", 7, 3, (8, 8), 0.5, 0.75, "epsilon"),
    "default, sdedit, guidance at the end": ("default", 5, 2, (8, 8), None, None, "epsilon"),
    "default, tail, features again": ("default", 7, 3, (8, 8), 0.25, 0.75, "epsilon"),
    "default, wide, v, features again": ("default", 5, 2, (8, 16), 0.0, 1.0, "v_prediction"),
}

QUICK = [
    "published",
    "published, odd sizes",
    "default, tail",
    "default, wide, v, thresholds 1",
    "default, sdedit",
    "default, guidance on the way",
    "default, wide, v, features again",
]

GUIDED = {
    "published, guidance on the way": (1, 3),
    "default, guidance on the way": (1, 3),
    "default, sdedit, guidance at the end": (2, 4),
}
"""First step with guidance, and one past the last; otherwise all have it."""


@pytest.mark.parametrize("name", quick_first(CASES, QUICK))
def test_an_edit_is_what_a_plain_reference_makes_of_it(name):
    mode, frames, length, size, attn_t, f_t, kind = CASES[name]
    steps, guided = 4, GUIDED.get(name, (0, 4))
    unet = tiny_unet(seed=len(name)).double()  # see the reference
    scheduler = DDIMScheduler(**SCHEDULER)
    scheduler.set_timesteps(steps)
    times = [int(t) for t in scheduler.timesteps]
    alphas = [float(scheduler.alphas_cumprod[t]) for t in times]
    schedule = Schedule(tuple(times), tuple(alphas), float(scheduler.final_alpha_cumprod))
    torch.manual_seed(0)
    x = torch.randn(frames, CHANNELS, *size)
    source = torch.randn(steps, frames, CHANNELS, *size)
    embeds = torch.randn(3, 7, WIDTH)
    keyframes = [draw_keyframes(5, step, segments(frames, length)) for step in range(steps)]
    injection = Injection() if attn_t is None else Injection.pnp(steps, attn_t, f_t)
    again = "features again" in name
    settings = EditSettings(
        Guidance(3.0, *guided), injection, steps, length, size, MODES[mode], recompute_conv=again
    )
    got = ours(unet, kind, schedule, settings, (x, source, embeds, keyframes))
    copied = (injection.qk_steps, injection.conv_steps)
    official, steps_guided = mode == "official", range(*guided)
    reference = Reference(unet, kind, length, 3.0, *copied, official, steps_guided)
    wanted = reference.edit(times, alphas, schedule.final_alpha, x, source, list(embeds), keyframes)
    assert wanted.shape == (steps, frames, CHANNELS, *size)
    for mine, theirs in zip(got, wanted, strict=True):
        gap = (mine - theirs).abs()
        assert gap.mean() <= 1e-4 * theirs.std()
        assert (gap > 5e-3).float().mean() <= 1e-3
    assert (wanted[-1] - wanted[0]).abs().mean() > 0.01
    # An edit that skips the injection, or makes another, is another edit.
    other = Injection.pnp(steps, 0.75, 0.25) if injection != Injection(3, 1) else Injection()
    changed = replace(settings, injection=other)
    apart = ours(unet, kind, schedule, changed, (x, source, embeds, keyframes))
    assert (apart[-1] - wanted[-1]).abs().mean() > 5e-4 * wanted[-1].std()

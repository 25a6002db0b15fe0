"""Guidance where the prompts differ: what is measured of a place, and what becomes of it."""

import numpy as np
import pytest
import torch
from tiny_model import CHANNELS, WIDTH, tiny_unet
from torch.nn import functional
from unet_probe import Recorder, attention_in_float64, evaluate, normal

from tokenflow_batch.config import Settings
from tokenflow_batch.demo.scenes import Clip, recoloured
from tokenflow_batch.model_files import locate
from tokenflow_batch.models import load
from tokenflow_batch.plan import guidance_of
from tokenflow_batch.tokenflow import focus as focus_module
from tokenflow_batch.tokenflow.attention import tokenflow_hooks
from tokenflow_batch.tokenflow.compiled import compile_parts
from tokenflow_batch.tokenflow.denoise import Denoiser, EditSettings, Prompts, predict_window
from tokenflow_batch.tokenflow.focus import CHANGED, UNCHANGED, Focus, guided, returned
from tokenflow_batch.tokenflow.modes import DEFAULT, Guidance, Injection
from tokenflow_batch.tokenflow.windows import WindowMoment
from tokenflow_batch.unet_flops import focus_sites

HW, N = (8, 6), 3
SITES = [
    f"up_blocks.{i}.attentions.{j}.transformer_blocks.0.attn2" for i in (2, 3) for j in (0, 1, 2)
]


NOT_HERE, HERE = 0.9, 1.0


@pytest.fixture(autouse=True)
def _sharp(monkeypatch):
    """A random model hardly tells places apart: bounds between which it does."""
    monkeypatch.setattr(focus_module, "NOT_HERE", NOT_HERE)
    monkeypatch.setattr(focus_module, "HERE", HERE)


def watched(unet, source, rows=2 * N, seed=0):
    focus = Focus(unet, source, N, HW)
    with focus.watching(), torch.no_grad():
        noise = evaluate(unet, normal(seed, rows, CHANNELS, *HW), normal(99, rows, 5, WIDTH))
    return focus, noise


def test_the_finest_two_blocks_on_the_way_up_are_asked(unet):
    names = [n for n, _ in unet.named_modules() if n.endswith(".attn2")]
    assert focus_sites(names) == SITES
    assert focus_sites(["up_blocks.3.a.attn2", "mid_block.a.attn2"]) == ["up_blocks.3.a.attn2"]


def test_a_place_s_weight_is_how_far_the_prompts_lie_apart_there(unet):
    """Against the formula, in float64 from the target rows' own inputs."""
    source = normal(7, 5, WIDTH)
    with Recorder(unet, *SITES) as seen:
        focus, _ = watched(unet, source)
    logs = []
    for name in SITES:
        attn = unet.get_submodule(name)
        grid = (8, 6) if "up_blocks.3" in name else (4, 3)
        maps = []
        for n in range(N):
            tokens = seen.inputs[name][N + n].double().numpy()
            text = source.double().numpy()
            told = seen.outputs[name][N + n].double().numpy()
            far = np.linalg.norm(told - attention_in_float64(attn, tokens, text, text), axis=1)
            maps.append(torch.from_numpy(far / far.mean()).view(1, 1, *grid))
        fine = functional.interpolate(torch.cat(maps), HW, mode="bilinear", align_corners=False)
        logs.append(fine.log())
    change = torch.stack(logs).mean(0).exp()
    for _ in range(2):
        change = functional.avg_pool2d(functional.pad(change, (1, 1, 1, 1), "replicate"), 3, 1)
    change = change / change.amax(dim=(2, 3), keepdim=True)
    here = ((change - NOT_HERE) / (HERE - NOT_HERE)).clamp(0, 1)
    beyond = functional.pad(here, (1, 1, 1, 1))
    around = beyond.unfold(2, 3, 1).unfold(3, 3, 1)
    expected = around.amax(dim=(4, 5))  # widened by a pixel: the most of each 3 × 3
    torch.testing.assert_close(focus.weight().double(), expected, atol=2e-4, rtol=0)
    assert focus.weight().shape == (N, 1, *HW)
    assert focus.weight().amax(dim=(1, 2, 3)).tolist() == [1.0] * N
    assert 0.02 < here.mean() < 0.8


def test_watching_changes_nothing_in_the_unet(unet):
    x, text = normal(0, 2 * N, CHANNELS, *HW), normal(99, 2 * N, 5, WIDTH)
    _, noise = watched(unet, normal(7, 5, WIDTH))
    assert torch.equal(noise, evaluate(unet, x, text))
    assert not any(m._forward_hooks for m in unet.modules())


def test_a_frame_s_weight_is_its_own(unet):
    """Another frame beside it, and the weight stays: what else is in a batch doesn't matter."""
    source = normal(7, 5, WIDTH)
    first, _ = watched(unet, source)
    other = Focus(unet, source, N, HW)
    x, text = normal(0, 2 * N, CHANNELS, *HW), normal(99, 2 * N, 5, WIDTH)
    x[-1] = normal(5, CHANNELS, *HW)
    with other.watching():
        evaluate(unet, x, text)
    torch.testing.assert_close(other.weight()[:-1], first.weight()[:-1], atol=1e-5, rtol=0)
    assert not torch.allclose(other.weight()[-1], first.weight()[-1], atol=1e-2)


def test_the_source_s_branch_is_watched_alike(unet):
    """It comes first: with the branches exchanged, both see the same rows."""
    other = normal(7, 5, WIDTH)
    theirs, _ = watched(unet, other)
    ours = Focus(unet, other, N, HW, of_source=True)
    x, text = normal(0, 2 * N, CHANNELS, *HW), normal(99, 2 * N, 5, WIDTH)
    with ours.watching(), torch.no_grad():
        evaluate(unet, x.roll(N, 0), text.roll(N, 0))
    torch.testing.assert_close(ours.weight(), theirs.weight(), atol=1e-4, rtol=0)


def test_without_a_pass_there_is_no_weight(unet):
    with pytest.raises(RuntimeError, match="watched"):
        Focus(unet, normal(7, 5, WIDTH), N, HW).weight()


class Held:
    """A window's inputs out of memory."""

    def __init__(self, frames):
        self.x = normal(3, frames, CHANNELS, *HW)

    def latents(self, frames):
        return self.x[list(frames)]

    source = latents

    def correspondences(self, frames):
        return [torch.arange(n).repeat(len(frames), 2, 1) for n in self.tokens]


def predicted(unet, guidance, step=5, frames=4):
    prompts = Prompts(*(normal(n, 5, WIDTH) for n in (7, 8, 9)))
    denoiser, inputs = Denoiser(unet, "epsilon"), Held(frames)
    settings = EditSettings(guidance, Injection(), 10, 2, HW, DEFAULT)
    window = WindowMoment.whole(frames, 2, DEFAULT.neighbours, [0, 3])
    with tokenflow_hooks(unet) as hooks:
        inputs.tokens = [site.tokens(HW) for site in hooks.sites]
        at = {"step": step, "t": 421, "alpha": 0.5, "window": window}
        noise = predict_window(denoiser, hooks, inputs, prompts, settings, **at)
    return noise, denoiser


def everywhere_as_far(monkeypatch, share):
    monkeypatch.setattr(Focus, "weight", lambda self: torch.full((self.frames, 1, *HW), share))


def test_where_the_prompts_differ_everywhere_it_is_as_if_nothing_were_focused(unet, monkeypatch):
    """But for a g that is as much farther from 1 as `stronger` says."""
    plain, _ = predicted(unet, Guidance(6.625))
    everywhere_as_far(monkeypatch, 1.0)
    for own in (5, 6):
        found, _ = predicted(unet, Guidance(6.0, focus=5, own=own))
        torch.testing.assert_close(found, plain, atol=1e-4, rtol=1e-4)


def test_guidance_goes_farther_from_the_step_on_where_it_acts_in_some_places_only():
    guidance = Guidance(6.0, focus=5, stronger=1.5)
    assert [guidance.scale_at(step) for step in (0, 4, 5, 9)] == [6.0, 6.0, 8.5, 8.5]
    assert not Guidance(1.0, focus=5).on(7)


def test_where_they_differ_nowhere_guidance_has_no_scale(unet, monkeypatch):
    everywhere_as_far(monkeypatch, 0.0)
    strong, weak = (predicted(unet, Guidance(scale, focus=5, own=5))[0] for scale in (6.0, 2.0))
    torch.testing.assert_close(strong, weak, atol=1e-4, rtol=1e-4)


def test_a_place_gets_its_share_of_guidance():
    negative, target = normal(1, N, 4, *HW), normal(2, N, 4, *HW)
    where = torch.rand(N, 1, *HW, generator=torch.Generator().manual_seed(3))
    for share in (0.0, 0.25, 1.0):
        found = guided(negative, target, 6.0, torch.full_like(where, share))
        expected = guided(negative, target, 1 + 5 * share)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    whole, none = guided(negative, target, 6.0), guided(negative, target, 1.0)
    expected = none + where * (whole - none)
    torch.testing.assert_close(guided(negative, target, 6.0, where), expected, atol=1e-5, rtol=1e-5)


def apart(by):
    """Edit and source of one frame, and the edit's noise, their predictions `by` apart."""
    alpha, x, source, theirs = 0.9, *(normal(n, 1, 4, *HW).double() for n in (1, 2, 3))
    goal = (source - (1 - alpha) ** 0.5 * theirs) / alpha**0.5 + by
    noise = (x - alpha**0.5 * goal) / (1 - alpha) ** 0.5
    return noise, theirs, x, source, alpha


def clean(x, noise, alpha):
    return (x - (1 - alpha) ** 0.5 * noise) / alpha**0.5


@pytest.mark.parametrize(
    ("by", "share"),
    [
        (UNCHANGED / 2, 1.0),
        (UNCHANGED, 1.0),
        ((UNCHANGED + CHANGED) / 2, 0.5),
        (CHANGED, 0.0),
        (3.0, 0.0),
    ],
)
def test_what_is_left_as_it_was_goes_back_to_the_source(by, share):
    """Its predicted clean latents are the source's then, and all the less the more has changed."""
    noise, theirs, x, source, alpha = apart(by)
    agree = torch.zeros(1, 1, *HW, dtype=torch.float64)
    found = clean(x, returned(noise, theirs, x, source, alpha, agree), alpha)
    expected = clean(source, theirs, alpha) + (1 - share) * by
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


def test_only_where_the_prompts_agree():
    noise, theirs, x, source, alpha = apart(0.1)
    where = torch.rand(1, 1, *HW, generator=torch.Generator().manual_seed(3)).double()
    found = clean(x, returned(noise, theirs, x, source, alpha, where), alpha)
    expected = clean(source, theirs, alpha) + 0.1 * where
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


def test_a_changed_place_stays_beside_one_that_goes_back():
    noise, theirs, x, source, alpha = apart(0.0)
    noise[..., :4] += 5.0
    agree = torch.zeros(1, 1, *HW, dtype=torch.float64)
    found = returned(noise, theirs, x, source, alpha, agree)
    assert torch.equal(found[..., :3], noise[..., :3])


def test_a_window_goes_back_with_its_own_attention(unet, monkeypatch):
    """Nothing is edited yet and the prompts agree: what is found is the source's own noise."""
    everywhere_as_far(monkeypatch, 0.0)
    held, text = Held(4), normal(7, 5, WIDTH).unsqueeze(0)
    source = Denoiser(unet, "epsilon").noise(held.x, 421, 0.5, text)
    found, _ = predicted(unet, Guidance(6.0, focus=5, own=5))
    torch.testing.assert_close(found, source, atol=1e-4, rtol=1e-4)
    for other in (Guidance(6.0, focus=5, own=5, back=False), Guidance(6.0, focus=5)):
        assert not torch.allclose(predicted(unet, other)[0], source, atol=1e-2)


def test_nothing_goes_back_where_the_source_s_own_object_is(unet, monkeypatch):
    """The edited one may be drawn beside it, so that the edit asks for nothing there."""
    monkeypatch.setattr(
        Focus, "weight", lambda self: torch.full((self.frames, 1, *HW), float(self.of_source))
    )
    found, _ = predicted(unet, Guidance(6.0, focus=5, own=5))
    stays, _ = predicted(unet, Guidance(6.0, focus=5, own=5, back=False))
    assert torch.equal(found, stays)
    monkeypatch.setattr(Focus, "weight", lambda self: torch.zeros(self.frames, 1, *HW))
    assert not torch.allclose(predicted(unet, Guidance(6.0, focus=5, own=5))[0], stays, atol=1e-2)


def test_before_its_step_no_bit_is_another(unet):
    with_focus, counted = predicted(unet, Guidance(6.0, focus=6))
    everywhere, plain = predicted(unet, Guidance(6.0))
    assert torch.equal(with_focus, everywhere)
    assert counted.flops == plain.flops


def test_what_is_looked_at_besides_and_the_source_s_rows_are_counted(unet):
    """2 keyframes are looked at; where frames keep their own attention all have a third branch."""
    _, everywhere = predicted(unet, Guidance(6.0))
    _, focused = predicted(unet, Guidance(6.0, focus=5))
    _, keeps = predicted(unet, Guidance(6.0, focus=5, own=5))
    _, detailed = predicted(unet, Guidance(6.0, focus=5, own=5, detail=5))
    assert focused.rows == everywhere.rows == 2 * (4 + 2)
    assert keeps.rows == detailed.rows == 3 * (4 + 2)
    assert 1 < focused.flops / everywhere.flops < 1.1
    assert 1.5 < keeps.flops / focused.flops < 1.8
    assert 1.02 < detailed.flops / keeps.flops < 1.3


def test_compiled_parts_are_watched_too():
    """Compiled code would ignore the hooks."""
    unet = tiny_unet()
    eager, _ = predicted(unet, Guidance(6.0, focus=5, own=5))
    compile_parts(unet, backend="eager")
    compiled, _ = predicted(unet, Guidance(6.0, focus=5, own=5))
    torch.testing.assert_close(compiled, eager, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("change", [{"color": "blue"}, {"ground": "snow"}])
def test_the_demo_model_is_guided_where_the_edit_is(monkeypatch, compute, change):
    """The object where that changes its colour, the ground where that changes."""
    monkeypatch.undo()  # the bounds as they are
    scene = Clip.random(2, 2)
    assert (scene.scene.color, scene.scene.ground) != ("blue", "snow")
    model, wanted = load(locate("demo"), compute), recoloured(scene, **change)
    clean = model.encode(np.stack([scene.frame(i) for i in range(2)]))
    schedule = model.schedule(25)
    alpha = schedule.alphas[18]
    noisy = alpha**0.5 * clean + (1 - alpha) ** 0.5 * normal(1, *clean.shape)
    hw = (clean.shape[2], clean.shape[3])
    focus = Focus(model.unet, model.embed(scene.caption), 2, hw)
    text = model.embed(wanted.caption).unsqueeze(0)
    with focus.watching():
        Denoiser(model.unet, "epsilon").noise(noisy, schedule.timesteps[18], alpha, text)
    masks = torch.stack([torch.from_numpy(scene.mask(i).astype("float32")) for i in range(2)])
    object_N1hw = functional.adaptive_avg_pool2d(masks.unsqueeze(1), hw)
    asked = object_N1hw if "color" in change else 1 - object_N1hw
    near = functional.max_pool2d(asked, 3, stride=1, padding=1)  # guidance reaches a pixel beyond
    assert focus.weight()[asked > 0.9].mean() > 0.8
    assert (near < 0.1).sum() > 10
    assert focus.weight()[near < 0.1].mean() < 0.2


SETTINGS = Settings(source_prompt="a wolf", prompt="a fox", steps=10)


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({}, 5),
        ({"guidance_focus": 0.2}, 2),
        ({"guidance_focus": 1.0}, None),
        ({"guidance_focus": 0.0, "guidance_interval": (0.3, 1.0)}, 3),
        ({"guidance_scale": 1.0}, None),
        ({"mode": "official"}, None),
        ({"source_prompt": ""}, None),
        ({"prompt": "a wolf"}, None),
    ],
)
def test_from_when_on_guidance_is_focused(changes, first):
    guidance = guidance_of(SETTINGS.model_copy(update=changes))
    steps = [step for step in range(10) if guidance.focused(step)]
    assert steps == ([] if first is None else list(range(first, 10)))
    assert [step for step in range(10) if guidance.keeps(step)] == [s for s in steps if s >= 8]
    alone = {step: guidance.own_branches(step) for step in range(10)}
    assert alone == {s: 0 if s not in steps or s < 8 else {8: 1, 9: 3}[s] for s in range(10)}

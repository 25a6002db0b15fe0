"""What each kind of pass does in a real UNet."""

import numpy as np
import pytest
import torch
from tiny_model import CHANNELS, WIDTH
from unet_probe import CONV, Recorder, attention_in_float64, evaluate, normal

from tokenflow_batch.tokenflow import passes, propagation
from tokenflow_batch.tokenflow.attention import (
    attend,
    choose_attention,
    merge_heads,
    split_heads,
    tokenflow_hooks,
)
from tokenflow_batch.tokenflow.correspondence import match_frames
from tokenflow_batch.tokenflow.denoise import Denoiser
from tokenflow_batch.tokenflow.injection import (
    Site,
    attention_sites,
)
from tokenflow_batch.tokenflow.keyframes import Neighbours, true_neighbours
from tokenflow_batch.tokenflow.motion import agreed_motion, between_tokens
from tokenflow_batch.tokenflow.passes import (
    FeaturePass,
    KeyframePass,
    SourcePass,
    inject_conv,
)
from tokenflow_batch.tokenflow.propagation import PropagationPass, propagate

K = 3


def keyframe_pass(**changes):
    settings = {
        "branches": 3,
        "inject_qk": False,
        "inject_conv": False,
        "stored_conv_KChw": None,
        "attention": "eager",
        **changes,
    }
    settings.setdefault("keep_tokens", settings["branches"] == 3)
    return KeyframePass(**settings)


def propagation_pass(joint, neighbours, **changes):
    settings = {
        "branches": joint.branches,
        "inject_conv": joint.inject_conv,
        "stored_conv_NChw": None,
        "stored_index": None,
        "matching": "torch",
        **changes,
    }
    return PropagationPass(joint, neighbours, **settings)


# -- the keyframe pass -----------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("inject_qk", [False, True])
@pytest.mark.parametrize("branches", [2, 3])
def test_keyframes_attend_to_all_keyframes_and_the_source_to_itself(
    unet, branches, inject_qk, attention
):
    if inject_qk and branches == 2:
        with pytest.raises(ValueError, match="needs the source branch"):
            keyframe_pass(branches=2, inject_qk=True)
        return
    joint = keyframe_pass(branches=branches, inject_qk=inject_qk, attention=attention)
    names = [s.name for s in attention_sites(unet)]
    with (
        tokenflow_hooks(unet, attention) as hooks,
        hooks.during(joint),
        Recorder(unet, *names) as seen,
    ):
        evaluate(unet, normal(0, branches * K, CHANNELS, 8, 4))
    for site in hooks.sites:
        attn = unet.get_submodule(site.name)
        tokens = seen.inputs[site.name].double().numpy().reshape(branches, K, -1, attn.query_dim)
        got = joint.outputs[site.index].double().numpy()
        qk = tokens[0] if inject_qk and site.inject_qk else None
        for r in range(branches):
            own = tokens[r] if qk is None else qk
            everything = own.reshape(-1, attn.query_dim), tokens[r].reshape(-1, attn.query_dim)
            for k in range(K):
                alone = branches == 3 and r == 0
                keys, values = (own[k], tokens[r, k]) if alone else everything
                expected = attention_in_float64(attn, own[k], keys, values)
                np.testing.assert_allclose(got[r, k], expected, atol=2e-5, rtol=1e-4)
        assert torch.equal(
            seen.outputs[site.name].unflatten(0, (branches, K)), joint.outputs[site.index]
        )
        if branches == 3:
            assert torch.equal(joint.tokens[site.index], seen.inputs[site.name][:K])


def test_the_source_branch_of_the_keyframe_pass_is_the_plain_unet(unet):
    x = normal(0, 3 * K, CHANNELS, 8, 16)
    text = normal(1, 3 * K, 5, WIDTH)
    with (
        tokenflow_hooks(unet) as hooks,
        hooks.during(keyframe_pass(inject_conv=True, attention="sdpa")),
    ):
        joint = evaluate(unet, x, text)
    plain = evaluate(unet, x, text)
    torch.testing.assert_close(joint[:K], plain[:K], atol=1e-5, rtol=1e-4)
    assert (joint[K:] - plain[K:]).abs().max() > 1e-2


def test_one_keyframe_alone_is_the_plain_unet(unet):
    x = normal(0, 2, CHANNELS, 8, 8)
    with tokenflow_hooks(unet) as hooks, hooks.during(keyframe_pass(branches=2, attention="sdpa")):
        joint = evaluate(unet, x)
    torch.testing.assert_close(joint, evaluate(unet, x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("tokens", "keys"), [(5, 5), (1, 7), (64, 192)])
def test_sdpa_is_eager_attention_up_to_rounding(tokens, keys):
    q, k, v = normal(0, 2, 4, tokens, 8), normal(1, 2, 4, keys, 8), normal(2, 2, 4, keys, 8)
    eager, sdpa = (attend(q * 3, k, v, 0.35, backend) for backend in ("eager", "sdpa"))
    torch.testing.assert_close(eager, sdpa, atol=1e-5, rtol=1e-5)


def test_keyframes_in_one_sequence_share_keys_and_values_without_a_copy(unet, monkeypatch):
    joint, memory = keyframe_pass(branches=2, attention="sdpa", keep_tokens=False), []

    def seen(q, k, v, scale, backend):
        memory.append(
            [x.untyped_storage().nbytes() // (x.element_size() * x.numel()) for x in (k, v)]
        )
        return attend(q, k, v, scale, backend)

    monkeypatch.setattr(passes, "attend", seen)
    with tokenflow_hooks(unet, "sdpa") as hooks, hooks.during(joint):
        evaluate(unet, normal(0, 2 * K, CHANNELS, 8, 8))
    # Both branches' projections are one tensor, of which each branch's sequence is a view.
    assert memory == [[2, 2]] * (2 * len(hooks.sites))


def test_heads_are_split_as_diffusers_does_and_put_together_again(unet):
    x = normal(0, 2, 7, 16)
    attn = unet.get_submodule(attention_sites(unet)[0].name)
    theirs = attn.head_to_batch_dim(x).unflatten(0, (2, attn.heads))
    assert torch.equal(split_heads(x, attn.heads), theirs)
    assert torch.equal(merge_heads(split_heads(x, attn.heads)), x)


def test_which_attention_is_taken_where():
    assert choose_attention("auto", "cpu") == "sdpa"
    assert choose_attention("sdpa", "cuda") == "sdpa"
    with pytest.raises(ValueError, match="no attention kernel for cpu in float16 here"):
        choose_attention("xformers", "cpu")


# -- injection -------------------------------------------------------------------------------


@pytest.mark.parametrize("branches", [2, 3])
@pytest.mark.parametrize("stored", [False, True])
def test_injected_convolution_features_are_the_source_s(branches, stored):
    features = normal(0, branches * K, 4, 2, 3)
    source = normal(1, K, 4, 2, 3).half() if stored else None
    parts = inject_conv(features, branches, source).chunk(branches)
    expected = features[:K] if source is None else source.float()
    assert torch.equal(parts[-1], expected)
    assert torch.equal(parts[-2], expected)
    assert branches == 2 or torch.equal(parts[0], features[:K])


@pytest.mark.parametrize("on", [False, True])
def test_what_follows_the_convolution_in_the_unet_sees_the_source_s_features(unet, on):
    x = normal(0, 3 * K, CHANNELS, 8, 16)
    joint = keyframe_pass(inject_conv=on)
    with (
        tokenflow_hooks(unet) as hooks,
        hooks.during(joint),
        Recorder(unet, CONV) as keyframes,
    ):
        evaluate(unet, x)
        source, negative, target = keyframes.outputs[CONV].chunk(3)
    assert torch.equal(negative, source) == torch.equal(target, source) == on
    near = [true_neighbours(f, [0, 1, 2], 1) for f in range(K)]
    spread = propagation_pass(joint, near)
    with tokenflow_hooks(unet) as hooks, hooks.during(spread), Recorder(unet, CONV) as others:
        evaluate(unet, x)
        source, negative, target = others.outputs[CONV].chunk(3)
    assert torch.equal(negative, source) == torch.equal(target, source) == on


def test_a_pass_for_features_ends_with_them_and_leaves_the_unet_as_it_was(unet):
    x, text, calls = normal(0, K, CHANNELS, 8, 16), normal(1, 5, WIDTH), []
    denoiser, last = (
        Denoiser(unet, "epsilon"),
        unet.conv_out.register_forward_hook(lambda *_: calls.append(1)),
    )
    with tokenflow_hooks(unet) as hooks:
        with hooks.during(SourcePass()) as whole:
            before = denoiser.noise(x, 421, 0.5, text)
        with hooks.during(FeaturePass()) as seen:
            denoiser.until_enough(x, 421, text, hooks.conv_site)
        assert torch.equal(seen.conv, whole.conv)
        assert (denoiser.rows, denoiser.partial_rows, len(calls)) == (K, K, 1)
        with hooks.during(SourcePass()):
            assert torch.equal(denoiser.noise(x, 421, 0.5, text), before)
    last.remove()


# -- propagation -----------------------------------------------------------------------------


def test_propagation_gathers_each_token_from_its_keyframe():
    out = normal(0, 2, K, 6, 5)
    index = torch.randint(0, 6, (4, 6), generator=torch.Generator().manual_seed(1))
    keyframe = [2, 0, 0, 1]
    got = propagate(out, index, keyframe)
    assert got.shape == (2, 4, 6, 5)
    for r in range(2):
        for n in range(4):
            for p in range(6):
                assert torch.equal(got[r, n, p], out[r, keyframe[n], index[n, p]])


@pytest.mark.parametrize(("branches", "stored"), [(2, True), (3, True), (3, False)])
def test_an_ordinary_frame_s_attention_is_the_blend_of_its_keyframes_tokens(unet, branches, stored):
    frames, drawn = normal(0, 5, CHANNELS, 8, 8), [1, 3, 4]
    batch = frames.repeat(branches, 1, 1, 1)
    near = [true_neighbours(f, drawn, 2) for f in range(5)]
    joint = keyframe_pass()
    names = [s.name for s in attention_sites(unet)]
    with tokenflow_hooks(unet) as hooks:
        with hooks.during(SourcePass()) as seen:
            evaluate(unet, frames)
        given = [match_frames(t, t[drawn], near, "torch") for t in seen.tokens]
        with hooks.during(joint):
            evaluate(unet, frames[drawn].repeat(3, 1, 1, 1))
        spread = propagation_pass(
            joint, near, branches=branches, stored_index=given if stored else None
        )
        with hooks.during(spread), Recorder(unet, *names) as got:
            evaluate(unet, batch)
    for site in hooks.sites:
        out = got.outputs[site.name].unflatten(0, (branches, 5))
        index = given[site.index]
        if not stored:
            source = got.inputs[site.name][:5]
            index = match_frames(source, joint.tokens[site.index], near, "torch")
        for r in range(branches):
            edited = joint.outputs[site.index][r + 3 - branches]
            for n, (a, b) in enumerate(index):
                w = near[n].weight
                expected = w * edited[near[n].first][a] + (1 - w) * edited[near[n].second][b]
                torch.testing.assert_close(out[r, n], expected, atol=1e-6, rtol=1e-5)


def test_a_keyframe_comes_out_of_the_propagation_pass_as_out_of_the_keyframe_pass(unet):
    x, drawn = normal(0, 3, CHANNELS, 8, 16), [2, 5, 9]
    text = normal(1, 2, 5, WIDTH).repeat_interleave(3, dim=0)
    near = [true_neighbours(f, drawn, 4) for f in drawn]
    joint = keyframe_pass(branches=2)
    with tokenflow_hooks(unet) as hooks:
        with hooks.during(joint):
            edited = evaluate(unet, x.repeat(2, 1, 1, 1), text)
        index = [torch.arange(s.tokens((8, 16))).expand(3, 2, -1) for s in hooks.sites]
        with hooks.during(propagation_pass(joint, near, stored_index=index)):
            again = evaluate(unet, x.repeat(2, 1, 1, 1), text)
    assert torch.equal(again, edited)


def test_the_neighbour_s_weight_decides_between_the_two_keyframes():
    joint = keyframe_pass(branches=2)
    joint.outputs[0] = torch.stack([torch.zeros(4, 3), torch.ones(4, 3)]).expand(2, 2, 4, 3)
    near = [Neighbours(0, 1, w) for w in (1.0, 0.75, 0.5, 0.0)]
    index = [torch.zeros(4, 2, 4, dtype=torch.int64)]
    spread = propagation_pass(joint, near, stored_index=index)
    out = spread.self_attention(Site(0, "", 0, False), None, torch.zeros(8, 4, 3), lambda: None)
    assert out.unflatten(0, (2, 4))[:, :, 0, 0].tolist() == [[0.0, 0.25, 0.5, 1.0]] * 2


def restored(near, sides, table, candidates, weight):
    """The blend of two sides, each token as far from the mean token as those in it are."""
    blend, mean, distance = 0, 0, 0
    for s, (k, share) in enumerate(((near.first, near.weight), (near.second, 1 - near.weight))):
        apart = (table[k] - table[k].mean(dim=0)).norm(dim=1)
        blend = blend + share * sides[s]
        mean = mean + share * table[k].mean(dim=0)
        distance = distance + share * (weight[s] * apart[candidates[s]]).sum(dim=1)
    times = (distance / (blend - mean).norm(dim=1)).clamp(1, 1.5)
    return mean + times.unsqueeze(1) * (blend - mean)


def test_tokens_come_from_where_the_agreed_motion_leads_found_once_for_all_sites(monkeypatch):
    fine, coarse, frames = (4, 6), (2, 3), 3
    grids = [coarse, fine, fine]
    joint = keyframe_pass(branches=2)
    joint.outputs = {n: normal(n, 2, K, h * w, 5) for n, (h, w) in enumerate(grids)}
    near = [Neighbours(0, 1, 0.25), Neighbours(1, 2, 1.0), Neighbours(2, 2, 1.0, itself=True)]
    draw = torch.Generator().manual_seed(2)
    index = {
        g: torch.randint(0, g[0] * g[1], (frames, 2, g[0] * g[1]), generator=draw) for g in grids
    }
    for grid in index:
        index[grid][2] = torch.arange(grid[0] * grid[1])
    seen = []
    monkeypatch.setattr(
        propagation, "agreed_motion", lambda *a: seen.append(agreed_motion(*a)) or seen[-1]
    )
    spread = propagation_pass(joint, near, stored_index=[index[g] for g in grids], grids=grids)
    for n, grid in enumerate(grids):
        tokens = grid[0] * grid[1]
        given = torch.zeros(2 * frames, tokens, 5)
        got = spread.self_attention(Site(n, "", 0, False), None, given, lambda: None)
        candidates, weight = between_tokens(seen[0 if grid == coarse else 1])
        for r, f in ((0, 0), (1, 1), (1, 2)):
            table = joint.outputs[n][r].double()
            sides = [
                (weight[f, s, :, :, None] * table[k][candidates[f, s]]).sum(dim=1)
                for s, k in enumerate((near[f].first, near[f].second))
            ]
            expected = restored(near[f], sides, table, candidates[f], weight[f].double())
            found = got.unflatten(0, (2, frames))[r, f]
            torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)
        itself = got.unflatten(0, (2, frames))[:, 2]
        torch.testing.assert_close(itself, joint.outputs[n][:, 2], atol=1e-6, rtol=0)
    assert len(seen) == 2  # the coarser grid's, and from it the finer's
    assert torch.equal(seen[1], agreed_motion(index[fine], fine, seen[0]))


def focused_passes(unet, focus_K1hw):
    """A keyframe pass and a propagation pass where prompts differ as `focus_K1hw` says."""
    frames, drawn, hw = normal(0, 5, CHANNELS, 8, 8), [1, 3, 4], (8, 8)
    near = [true_neighbours(f, drawn, 2) for f in range(5)]
    joint, names = keyframe_pass(), [s.name for s in attention_sites(unet)]
    edited = normal(5, 5, CHANNELS, 8, 8)
    text = normal(1, 3, 5, WIDTH)
    with tokenflow_hooks(unet) as hooks:
        with hooks.during(SourcePass()) as seen:
            evaluate(unet, frames, text[:1].expand(5, -1, -1))
        index = [match_frames(t, t[drawn], near, "torch") for t in seen.tokens]
        with hooks.during(joint):
            rows = torch.cat([frames[drawn], edited[drawn], edited[drawn]])
            evaluate(unet, rows, text.repeat_interleave(3, dim=0))
        grids = [site.grid(hw) for site in hooks.sites]
        kept = {"focus_K1hw": focus_K1hw, "keep": focus_K1hw is not None}
        spread = propagation_pass(joint, near, stored_index=index, grids=grids, **kept)
        with hooks.during(spread), Recorder(unet, *names) as got:
            rows = torch.cat([frames, edited, edited])
            noise = evaluate(unet, rows, text.repeat_interleave(5, dim=0))
    return joint, spread, got, noise, hooks.sites


def test_where_the_prompts_agree_frames_keep_their_own_attention(unet):
    """Source rows are the plain UNet's; the others add to them what the edit did to keyframes."""
    focus = torch.rand(K, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    joint, spread, got, noise, sites = focused_passes(unet, focus)
    plain = evaluate(
        unet, normal(0, 5, CHANNELS, 8, 8), normal(1, 3, 5, WIDTH)[:1].expand(5, -1, -1)
    )
    torch.testing.assert_close(noise[:5], plain, atol=1e-5, rtol=1e-4)
    for site in sites:
        attn = unet.get_submodule(site.name)
        tokens = got.inputs[site.name].double().numpy()
        out = got.outputs[site.name].double().unflatten(0, (3, 5))
        moved = spread.blended(site, joint.outputs[site.index], got.inputs[site.name]).double()
        grid = site.grid((8, 8))
        pooled = torch.nn.functional.adaptive_avg_pool2d(focus, grid).flatten(2).transpose(1, 2)
        shares = torch.tensor([[n.weight, 1 - n.weight] for n in spread.neighbours])
        places, counts = spread.weighted(site.index, shares)
        where = (pooled.flatten()[places] * counts).sum(dim=-1, keepdim=True).double()
        for n in range(5):
            own = torch.from_numpy(attention_in_float64(attn, tokens[n], tokens[n], tokens[n]))
            torch.testing.assert_close(out[0, n], own, atol=2e-5, rtol=1e-4)
            for r in (1, 2):
                expected = moved[r, n] + (1 - where[n]) * (own - moved[0, n])
                torch.testing.assert_close(out[r, n], expected, atol=2e-5, rtol=1e-4)
        if grid == (8, 8):
            finest = where.unflatten(1, grid)[..., 0].unsqueeze(1).float()
    torch.testing.assert_close(spread.focus(), finest, atol=1e-5, rtol=0)


def test_where_the_prompts_differ_everywhere_tokens_are_the_keyframes_alone(unet):
    _, _, _, focused, _ = focused_passes(unet, torch.ones(K, 1, 8, 8))
    _, _, _, plain, _ = focused_passes(unet, None)
    torch.testing.assert_close(focused[5:], plain[5:], atol=1e-5, rtol=1e-4)


def test_a_keyframe_keeps_what_the_joint_pass_gave_it_wherever_the_prompts_agree(unet):
    """On a keyframe the source's own attention is the keyframe pass's: nothing is added."""
    _, _, _, focused, _ = focused_passes(unet, torch.zeros(K, 1, 8, 8))
    _, _, _, plain, _ = focused_passes(unet, None)
    keyframes = [5 + 1, 5 + 3, 5 + 4]
    torch.testing.assert_close(focused[keyframes], plain[keyframes], atol=1e-4, rtol=1e-3)
    assert not torch.allclose(focused[5], plain[5], atol=1e-2)


def test_nothing_is_kept_without_the_source_branch_or_the_focus():
    near, focus = [Neighbours(0, 1, 0.5)], torch.ones(K, 1, 8, 8)
    for branches, given in ((2, focus), (3, None)):
        with pytest.raises(ValueError, match="needs the focus and the source branch"):
            propagation_pass(keyframe_pass(branches=branches), near, focus_K1hw=given, keep=True)

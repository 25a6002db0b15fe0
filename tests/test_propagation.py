"""What the propagation pass makes of the keyframes' tokens."""

import pytest
import torch
from made_passes import K, keyframe_pass, propagation_pass
from tiny_model import CHANNELS, WIDTH
from unet_probe import Recorder, attention_in_float64, evaluate, normal

from tokenflow_batch.tokenflow import propagation
from tokenflow_batch.tokenflow.attention import tokenflow_hooks
from tokenflow_batch.tokenflow.correspondence import match_frames
from tokenflow_batch.tokenflow.injection import Site, attention_sites
from tokenflow_batch.tokenflow.keyframes import Neighbours, true_neighbours
from tokenflow_batch.tokenflow.motion import agreed_motion, between_tokens
from tokenflow_batch.tokenflow.passes import SourcePass
from tokenflow_batch.tokenflow.propagation import propagate


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


def focused_passes(unet, focus_K1hw, own=0):
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
        kept = {"focus_K1hw": focus_K1hw, "own": own}
        spread = propagation_pass(joint, near, stored_index=index, grids=grids, **kept)
        with hooks.during(spread), Recorder(unet, *names) as got:
            rows = torch.cat([frames, edited, edited])
            noise = evaluate(unet, rows, text.repeat_interleave(5, dim=0))
    return joint, spread, got, noise, hooks.sites


@pytest.mark.parametrize("own", [1, 3])
def test_where_the_prompts_agree_frames_keep_their_own_attention(unet, own):
    """Source rows are the plain UNet's; the others add to them what the edit did to keyframes.

    With all branches', they are then led a quarter of the way to it where the prompts differ.
    """
    focus = torch.rand(K, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    joint, spread, got, noise, sites = focused_passes(unet, focus, own)
    assert spread.kept == 5 * own
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
        alone = [torch.from_numpy(attention_in_float64(attn, t, t, t)) for t in tokens]
        for n in range(5):
            torch.testing.assert_close(out[0, n], alone[n], atol=2e-5, rtol=1e-4)
            for r in (1, 2):
                expected = moved[r, n] + (1 - where[n]) * (alone[n] - moved[0, n])
                if own == 3:
                    expected = expected.lerp(alone[5 * r + n], 0.25 * where[n])
                torch.testing.assert_close(out[r, n], expected, atol=2e-5, rtol=1e-4)
        if grid == (8, 8):
            finest = where.unflatten(1, grid)[..., 0].unsqueeze(1).float()
    torch.testing.assert_close(spread.focus(), finest, atol=1e-5, rtol=0)


def test_where_the_prompts_differ_everywhere_tokens_are_the_keyframes_alone(unet):
    _, _, _, focused, _ = focused_passes(unet, torch.ones(K, 1, 8, 8), 1)
    _, _, _, plain, _ = focused_passes(unet, None)
    torch.testing.assert_close(focused[5:], plain[5:], atol=1e-5, rtol=1e-4)


def test_a_keyframe_keeps_what_the_joint_pass_gave_it_wherever_the_prompts_agree(unet):
    """On a keyframe the source's own attention is the keyframe pass's: nothing is added."""
    _, _, _, focused, _ = focused_passes(unet, torch.zeros(K, 1, 8, 8), 1)
    _, _, _, plain, _ = focused_passes(unet, None)
    keyframes = [5 + 1, 5 + 3, 5 + 4]
    torch.testing.assert_close(focused[keyframes], plain[keyframes], atol=1e-4, rtol=1e-3)
    assert not torch.allclose(focused[5], plain[5], atol=1e-2)


def test_nothing_is_kept_without_the_source_branch_or_the_focus():
    near, focus = [Neighbours(0, 1, 0.5)], torch.ones(K, 1, 8, 8)
    for branches, given in ((2, focus), (3, None)):
        with pytest.raises(ValueError, match="needs the focus and the source branch"):
            propagation_pass(keyframe_pass(branches=branches), near, focus_K1hw=given, own=1)
    with pytest.raises(ValueError, match="all 3 branches, not 2"):
        propagation_pass(keyframe_pass(), near, focus_K1hw=focus, own=2)

"""What each kind of pass does in a real UNet."""

import numpy as np
import pytest
import torch
from made_passes import K, keyframe_pass, propagation_pass
from tiny_model import CHANNELS, WIDTH
from unet_probe import CONV, Recorder, attention_in_float64, evaluate, normal

from tokenflow_batch.tokenflow import passes
from tokenflow_batch.tokenflow.attention import (
    attend,
    choose_attention,
    merge_heads,
    split_heads,
    tokenflow_hooks,
)
from tokenflow_batch.tokenflow.denoise import Denoiser
from tokenflow_batch.tokenflow.injection import attention_sites
from tokenflow_batch.tokenflow.keyframes import true_neighbours
from tokenflow_batch.tokenflow.passes import FeaturePass, SourcePass, inject_conv

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

    def seen(q, k, v, *how):
        memory.append(
            [x.untyped_storage().nbytes() // (x.element_size() * x.numel()) for x in (k, v)]
        )
        return attend(q, k, v, *how)

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

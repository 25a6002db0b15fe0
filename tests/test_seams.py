"""The two seams in the UNet: installed, seen through, and gone without a trace."""

import pytest
import torch
from tiny_model import CHANNELS, tiny_unet
from unet_probe import CONV, Recorder, evaluate, normal

from tokenflow_batch.tokenflow.attention import (
    tokenflow_hooks,
)
from tokenflow_batch.tokenflow.injection import (
    CONV_SITE,
    QK_PREFIXES,
    Site,
    attention_sites,
    conv_shape,
)
from tokenflow_batch.tokenflow.passes import (
    SourcePass,
)


def hooks_on(unet):
    return {n: len(m._forward_hooks) for n, m in unet.named_modules() if m._forward_hooks}


@pytest.mark.parametrize("fails", [False, True])
def test_the_unet_is_what_it_was_when_the_hooks_are_gone(unet, fails):
    x = normal(0, 2, CHANNELS, 8, 16)
    before, processors = evaluate(unet, x), unet.attn_processors
    state = {name: value.clone() for name, value in unet.state_dict().items()}
    try:
        with tokenflow_hooks(unet, "sdpa") as hooks:
            assert hooks_on(unet) == {CONV: 1}
            with hooks.during(SourcePass()):
                evaluate(unet, x)
                if fails:
                    evaluate(unet, normal(0, 2, CHANNELS + 1, 8, 16))
    except RuntimeError:
        assert fails
    assert hooks.active is None
    assert hooks_on(unet) == {}
    after = unet.attn_processors
    assert after.keys() == processors.keys()
    assert all(after[name] is processors[name] for name in after)
    assert all(torch.equal(value, state[name]) for name, value in unet.state_dict().items())
    assert torch.equal(evaluate(unet, x), before)


def test_hooks_without_a_pass_and_the_source_pass_change_no_bit(unet):
    x = normal(0, 2, CHANNELS, 8, 16)
    before = evaluate(unet, x)
    with tokenflow_hooks(unet, "sdpa") as hooks:
        assert torch.equal(evaluate(unet, x), before)
        with hooks.during(SourcePass()) as seen:
            assert torch.equal(evaluate(unet, x), before)
        assert torch.equal(evaluate(unet, x), before)
    assert len(seen.tokens) == len(hooks.sites)


def test_one_pass_at_a_time(unet):
    with tokenflow_hooks(unet) as hooks, hooks.during(SourcePass()):
        with pytest.raises(RuntimeError, match="another pass is active"):
            hooks.during(SourcePass()).__enter__()
        assert hooks.active is not None


def test_a_unet_without_self_attention_is_refused():
    plain = tiny_unet(
        block_out_channels=(16, 16),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        mid_block_type=None,
    )
    with pytest.raises(ValueError, match="no self-attention"), tokenflow_hooks(plain):
        pass


def test_a_unet_without_the_pnp_convolution_is_refused():
    small = tiny_unet(
        block_out_channels=(16,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    )
    with pytest.raises(ValueError, match="PnP needs the SD"):
        conv_shape(small, (8, 8))
    with pytest.raises(ValueError, match="PnP needs the SD"), tokenflow_hooks(small):
        pass


# -- sites -----------------------------------------------------------------------------------


@pytest.mark.parametrize("latent_hw", [(8, 8), (8, 16), (32, 8), (9, 13), (1, 1), (5, 24)])
def test_sites_and_conv_features_have_the_shape_that_the_unet_gives_them(unet, latent_hw):
    with tokenflow_hooks(unet) as hooks, hooks.during(SourcePass()) as seen:
        evaluate(unet, normal(0, 2, CHANNELS, *latent_hw))
    assert [t.shape[1] for t in seen.tokens] == [s.tokens(latent_hw) for s in hooks.sites]
    assert tuple(seen.conv.shape) == (2, *conv_shape(unet, latent_hw))


def test_sites_are_all_self_attentions_and_pnp_s_among_them(unet):
    sites = attention_sites(unet)
    assert len(sites) == 3 * 2 + 1 + 3 * 3
    assert [s.index for s in sites] == list(range(16))
    injected = [s.name for s in sites if s.inject_qk]
    assert injected == [f"{p}.transformer_blocks.0.attn1" for p in QK_PREFIXES]
    assert all(unet.get_submodule(s.name).to_q is not None for s in sites)
    assert [s.level for s in sites] == [0, 0, 1, 1, 2, 2, *[2] * 3, *[1] * 3, *[0] * 3, 3]
    assert Site(0, "", 1, False).tokens((5, 3)) == 3 * 2


@pytest.mark.parametrize("site", ["up_blocks.0.resnets.2", CONV_SITE, "up_blocks.3.resnets.0"])
def test_the_source_pass_keeps_what_goes_into_the_attentions_and_out_of_the_convolution(unet, site):
    conv = f"{site}.conv2"
    sites = attention_sites(unet)
    x = normal(0, 2, CHANNELS, 8, 8)
    with Recorder(unet, conv, *(s.name for s in sites)) as plain:
        evaluate(unet, x)
    with tokenflow_hooks(unet, conv_site=site) as hooks, hooks.during(SourcePass()) as seen:
        evaluate(unet, x)
    assert torch.equal(seen.conv, plain.outputs[conv])
    assert tuple(seen.conv.shape) == (2, *conv_shape(unet, (8, 8), site))
    for s in sites:
        assert torch.equal(seen.tokens[s.index], plain.inputs[s.name])

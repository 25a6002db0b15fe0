"""The UNet's parts through torch.compile, with the method's seams on it."""

import re

import pytest
import torch
from tiny_model import CHANNELS, tiny_unet
from unet_probe import evaluate, normal

from tokenflow_batch.tokenflow import compiled
from tokenflow_batch.tokenflow.attention import tokenflow_hooks
from tokenflow_batch.tokenflow.compiled import compilable, compile_parts, uncompiled
from tokenflow_batch.tokenflow.injection import CONV_SITE
from tokenflow_batch.tokenflow.passes import KeyframePass, SourcePass

SMALL = {
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
"""Two levels: compiling takes its time."""


def joint():
    return KeyframePass(
        branches=2,
        inject_qk=False,
        inject_conv=True,
        stored_conv_KChw=normal(3, 1, 16, 8, 8),
        attention="sdpa",
    )


def passes(unet, x):
    """What two passes at the seams make of it, and one without."""
    with tokenflow_hooks(unet) as hooks:
        with hooks.during(SourcePass()) as source:
            evaluate(unet, x)
        with hooks.during(joint()):
            edited = evaluate(unet, x)
    return evaluate(unet, x), edited, source.conv, *source.tokens


def test_no_part_has_a_seam_within_and_the_pnp_site_is_one(unet):
    parts = compilable(unet)
    assert CONV_SITE in parts
    assert len(parts) > 50
    assert not [n for n, p in parts.items() for m, _ in p.named_modules() if m.endswith("attn1")]


def test_compiled_parts_are_put_back_after_the_seams_were_on(unet):
    block = unet.get_submodule(CONV_SITE)
    block._compiled_call_impl = block._call_impl  # as if compiled
    try:
        with uncompiled(block):
            assert block._compiled_call_impl is None
        with tokenflow_hooks(unet):
            assert block._compiled_call_impl is None
        assert block._compiled_call_impl is not None
    finally:
        block._compiled_call_impl = None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
@pytest.mark.parametrize(
    ("backend", "only"), [("eager", ""), ("inductor", r"up_blocks\.1\.(resnets|attentions\.1)")]
)
def test_a_compiled_unet_does_what_it_did_with_and_without_seams(backend, only, monkeypatch):
    torch._dynamo.reset()
    unet, x = tiny_unet(**SMALL), normal(0, 2, CHANNELS, 8, 8)
    before = passes(unet, x)
    parts = {n: p for n, p in compilable(unet).items() if re.match(only, n)}
    monkeypatch.setattr(compiled, "compilable", lambda _: parts)
    compile_parts(unet, backend)
    after, again = passes(unet, x), passes(unet, x)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0  # parts alike share a graph
    for one, other, repeated in zip(before, after, again, strict=True):
        assert torch.equal(other, repeated)
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
        assert backend != "eager" or torch.equal(one, other)

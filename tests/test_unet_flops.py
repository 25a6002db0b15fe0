"""FLOPs of a row, counted from the configuration, against torch's counter on the UNet itself."""

import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from tiny_model import tiny_unet

from tokenflow_batch.config import Settings
from tokenflow_batch.model_files import DEMO
from tokenflow_batch.plan import UNetCall
from tokenflow_batch.row_counts import edit_flops
from tokenflow_batch.unet_flops import UNetFlops

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from rows import MetaUNet, planned

TEXT = 7
SITES = ["up_blocks.0.resnets.2", "up_blocks.1.resnets.1", "up_blocks.3.resnets.0"]


def unet_of(name):
    if name == "demo":
        return UNet2DConditionModel.from_pretrained(DEMO / "unet", variant="fp16")
    if name == "tiny":
        return tiny_unet()
    # Stable Diffusion 2's: linear projections, heads of one width; and one with more layers.
    sizes = {"cross_attention_dim": 48, "norm_num_groups": 16, "sample_size": 16}
    extra = {"layers_per_block": 1, "transformer_layers_per_block": (1, 2, 1, 3)}
    changes = {"sd2": {"use_linear_projection": True, "attention_head_dim": (1, 2, 4, 4)}}
    with torch.device("meta"):
        return UNet2DConditionModel(
            block_out_channels=(32, 64, 128, 128), **sizes, **changes.get(name, extra)
        )


SLOW = [pytest.param(name, SITES, marks=pytest.mark.slow) for name in ("demo", "sd2", "deep")]


@pytest.mark.parametrize(("name", "sites"), [("tiny", SITES[1:2]), *SLOW])
def test_it_is_what_torch_counts(name, sites):
    unet, hw = unet_of(name), (24, 8)
    meta = MetaUNet(unet, (unet.config.in_channels, *hw), (TEXT, unet.config.cross_attention_dim))
    flops = UNetFlops.of(unet.config, TEXT)
    assert flops.row(hw) == meta.flops(UNetCall("plain", 1))
    for site in sites:
        if name == "deep" and site.endswith("2"):
            continue  # one residual block less
        assert flops.row(hw, site) == meta.flops(UNetCall("partial", 1), site)
        assert 0.2 < flops.row(hw, site) / flops.row(hw) < 0.95


def test_a_site_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"no up_blocks.7"):
        UNetFlops.of(tiny_unet().config, TEXT).row((8, 8), "up_blocks.7.resnets.0")


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mode": "official", "segment_length": 3},
        {"mode": "official", "window_segments": 4, "segment_length": 3},
        {"technique": "sdedit", "guidance_interval": (0.4, 0.8)},
        {"source_prompt": "a", "prompt": "b", "guidance_focus": 0.25},
        {"source_prompt": "a", "prompt": "b", "conv_features": "recompute", "f_t": 1.0},
        {"conv_features": "recompute", "conv_site": "up_blocks.2.resnets.1"},
        {
            "conv_features": "recompute",
            "attn_t": 0.25,
            "segment_length": 3,
            "window_segments": 3,
            "window_overlap": 1,
            "anchors": 3,
        },
    ],
)
def test_an_edit_s_flops_are_those_of_its_calls(settings):
    unet, hw, frames = tiny_unet(), (8, 16), 17
    s = Settings(**{"steps": 4, "inversion_steps": 4, "segment_length": 4, **settings})
    meta = MetaUNet(unet, (3, *hw), (TEXT, unet.config.cross_attention_dim))
    flops = UNetFlops.of(unet.config, TEXT)
    assert edit_flops(s, frames, (), flops, hw) == planned(s, frames, meta)["edit"]["flops"]

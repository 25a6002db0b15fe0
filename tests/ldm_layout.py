"""The single-file layout of the original Stable Diffusion 1.x, out of a diffusers pipeline.

Written from the layout's own names (CompVis `ldm`), the other way round than diffusers reads it.
"""

from safetensors.torch import save_file

UNET = [
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("conv_in", "input_blocks.0.0"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
    ("mid_block.attentions.0", "middle_block.1"),
    ("mid_block.resnets.0", "middle_block.0"),
    ("mid_block.resnets.1", "middle_block.2"),
]
for i in range(4):
    UNET += [
        (f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{3 * i + 3}.0.op"),
        (f"up_blocks.{i}.upsamplers.0", f"output_blocks.{3 * i + 2}.{2 if i else 1}"),
    ]
    for j in range(3):
        UNET += [
            (f"down_blocks.{i}.resnets.{j}", f"input_blocks.{3 * i + j + 1}.0"),
            (f"down_blocks.{i}.attentions.{j}", f"input_blocks.{3 * i + j + 1}.1"),
            (f"up_blocks.{i}.resnets.{j}", f"output_blocks.{3 * i + j}.0"),
            (f"up_blocks.{i}.attentions.{j}", f"output_blocks.{3 * i + j}.1"),
        ]
RESNET = [
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("time_emb_proj", "emb_layers.1"),
    ("conv_shortcut", "skip_connection"),
]
VAE = [("conv_norm_out", "norm_out"), ("conv_shortcut", "nin_shortcut")]


def unet_name(name):
    for ours, theirs in UNET:
        if name.startswith(ours + "."):
            rest = name.removeprefix(ours)
            if ".resnets." in name:
                for part, other in RESNET:
                    rest = rest.replace(f".{part}.", f".{other}.")
            return theirs + rest
    raise ValueError(name)


def vae_name(name, levels):
    for ours, theirs in VAE:
        name = name.replace(ours, theirs)
    for i in range(levels):
        back = levels - 1 - i
        name = name.replace(f"down_blocks.{i}.resnets.", f"down.{i}.block.")
        name = name.replace(f"down_blocks.{i}.downsamplers.0.", f"down.{i}.downsample.")
        name = name.replace(f"up_blocks.{i}.resnets.", f"up.{back}.block.")
        name = name.replace(f"up_blocks.{i}.upsamplers.0.", f"up.{back}.upsample.")
    for i in range(2):
        name = name.replace(f"mid_block.resnets.{i}.", f"mid.block_{i + 1}.")
    return name


def save_single_file(pipeline, path):
    """Write the whole model into one file, as checkpoints of the original code are shared."""
    levels = len(pipeline.vae.config.block_out_channels)
    tensors = {}
    for name, value in pipeline.unet.state_dict().items():
        tensors["model.diffusion_model." + unet_name(name)] = value.contiguous()
    for name, value in pipeline.vae.state_dict().items():
        tensors["first_stage_model." + vae_name(name, levels)] = value.contiguous()
    for name, value in pipeline.text_encoder.state_dict().items():
        full = "text_model." + name.removeprefix("text_model.")
        tensors["cond_stage_model.transformer." + full] = value.contiguous()
    save_file(tensors, path)
    return path

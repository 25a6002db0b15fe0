"""torch.compile for the parts of a UNet that the method does not enter.

Passes change with every call and live in Python; a compiler that looked into them would compile
anew at every one. So what is compiled are the blocks around them: residual blocks, resampling,
cross-attention and feed-forward layers, each by itself and in place.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

_PARTS = re.compile(r"(^|\.)(resnets\.\d+|downsamplers\.\d+|upsamplers\.\d+|attn2|ff)$")


def compilable(unet: nn.Module) -> dict[str, nn.Module]:
    """The parts, by module path, in module order."""
    return {name: m for name, m in unet.named_modules() if _PARTS.search(name)}


def compile_parts(unet: nn.Module, backend: str = "inductor") -> None:
    """Have the parts compiled by a backend of torch when first called, once for every shape.

    A graph for any shape would be made after the first one seen, and then bits would depend on
    what came first. More graphs than torch allows for would silently run uncompiled: it is told
    not to.
    """
    torch._dynamo.config.recompile_limit = 10_000
    torch._dynamo.config.accumulated_recompile_limit = 100_000
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for part in compilable(unet).values():
        part.compile(backend=backend, dynamic=False)


@contextmanager
def uncompiled(part: nn.Module) -> Iterator[None]:
    """Call `part` as it was written within the block: compiled code ignores hooks set later."""
    compiled = part._compiled_call_impl
    part._compiled_call_impl = None
    try:
        yield
    finally:
        part._compiled_call_impl = compiled

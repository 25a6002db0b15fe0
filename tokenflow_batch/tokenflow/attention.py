"""The two seams through which the method enters a diffusers UNet.

An attention processor on every `attn1` (its input *is* the token φ, its output is what propagation
replaces) and a forward hook on one convolution. Both only ask the active *pass* what to do. Passes
live in `passes`; without one the UNet computes exactly what it did before.

Shape suffixes: N batch rows, L tokens, M keys, H heads, D channels per head, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from tokenflow_batch.clock import measured
from tokenflow_batch.tokenflow.compiled import uncompiled
from tokenflow_batch.tokenflow.injection import CONV_SITE, Site, attention_sites, conv_module
from tokenflow_batch.tokenflow.long_attention import attend_long, fits

P = TypeVar("P", bound="Pass")
AttentionBackend = Literal["sdpa", "xformers", "eager"]


def choose_attention(
    wanted: str, device_type: str, dtype: torch.dtype = torch.float16
) -> AttentionBackend:
    """Resolve `auto`: torch's SDPA.

    On an H100 its kernel (cuDNN's) takes 54 % of the time of xformers' for the joint attention of
    keyframes (benchmarks/gpu.py, docs/architecture.md); other GPUs were not measured.

    Args:
        wanted: `auto` or a backend's name.
        device_type: where attention is to be computed.
        dtype: in what.

    Raises:
        ValueError: `xformers` was asked for where it has no kernel.
    """
    if wanted == "auto":
        return "sdpa"
    if wanted == "xformers" and not (device_type == "cuda" and _xformers_works(dtype)):
        kind = f"{device_type} in {dtype}".replace("torch.", "")
        raise ValueError(f"xformers has no attention kernel for {kind} here")
    return cast(AttentionBackend, wanted)


@cache
def _xformers_works(dtype: torch.dtype) -> bool:
    """Whether xformers is there and has a kernel for this GPU: tried, not guessed."""
    try:
        from xformers.ops import memory_efficient_attention

        tiny = torch.zeros(1, 8, 1, 8, dtype=dtype, device="cuda")
        memory_efficient_attention(tiny, tiny, tiny)
    except Exception:  # a wheel for another torch fails in many ways
        return False
    return True


@measured("attention")
def attend(
    q_NHLD: Tensor,
    k_NHMD: Tensor,
    v_NHMD: Tensor,
    scale: float,
    backend: AttentionBackend,
    counts_M: Tensor | None = None,
) -> Tensor:
    """Softmax attention, (N, H, L, D).

    `sdpa` and `xformers` never hold the L × M matrix, and take heads as `split_heads` leaves them,
    without a copy; for long sequences on a CPU `sdpa` is `attend_long`. `eager` does hold it: it is
    the published code's arithmetic, whose rounding decides near-ties between tokens, for comparison
    with its vectors.

    Args:
        q_NHLD: queries.
        k_NHMD: keys.
        v_NHMD: values.
        scale: of the scores.
        backend: see above.
        counts_M: how often each key is there, as it were; once, if not given.
    """
    if backend == "eager":
        scores = q_NHLD @ k_NHMD.transpose(-1, -2) * scale
        if counts_M is not None:
            scores = scores + counts_M.log()
        return torch.softmax(scores, dim=-1) @ v_NHMD
    if backend == "sdpa" and fits(q_NHLD, k_NHMD, v_NHMD):
        return attend_long(q_NHLD, k_NHMD, v_NHMD, scale, counts_M)
    if counts_M is None:
        return _kernel(q_NHLD, k_NHMD, v_NHMD, scale, backend)
    if q_NHLD.is_cuda:
        wide = with_bias(q_NHLD, k_NHMD, v_NHMD, counts_M.float().log() / scale)
        return _kernel(*wide, scale, backend)[..., :-_EXTRA]
    mask = counts_M.log().expand(1, 1, q_NHLD.shape[2], -1)
    return functional.scaled_dot_product_attention(
        q_NHLD, k_NHMD, v_NHMD, attn_mask=mask, scale=scale
    )


def _kernel(
    q_NHLD: Tensor, k_NHMD: Tensor, v_NHMD: Tensor, scale: float, backend: AttentionBackend
) -> Tensor:
    if backend == "xformers":
        from xformers.ops import memory_efficient_attention

        rows = [x.transpose(1, 2).contiguous() for x in (q_NHLD, k_NHMD, v_NHMD)]
        return cast(Tensor, memory_efficient_attention(*rows, scale=scale)).transpose(1, 2)
    return functional.scaled_dot_product_attention(q_NHLD, k_NHMD, v_NHMD, scale=scale)


_EXTRA = 8
"""Channels more where keys have a bias: GPUs' kernels want multiples of so many."""


def with_bias(
    q_NHLD: Tensor, k_NHMD: Tensor, v_NHMD: Tensor, bias_M: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values whose plain attention has `bias_M` added to every score.

    A mask would do the same, and rule out the fastest kernels of a GPU. So a channel more: 1 in
    every query, the bias in the keys.

    Args:
        q_NHLD: queries.
        k_NHMD: keys.
        v_NHMD: values, which get zeros, as kernels want them as wide.
        bias_M: before the scores are scaled.
    """
    q_NHLD, k_NHMD, v_NHMD = (functional.pad(x, (0, _EXTRA)) for x in (q_NHLD, k_NHMD, v_NHMD))
    q_NHLD[..., -1] = 1
    k_NHMD[..., -1] = bias_M.to(k_NHMD)
    return q_NHLD, k_NHMD, v_NHMD


def split_heads(x_NLC: Tensor, heads: int) -> Tensor:
    """(N, L, H·D) → (N, H, L, D)."""
    return x_NLC.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x_NHLD: Tensor) -> Tensor:
    """(N, H, L, D) → (N, L, H·D)."""
    return x_NHLD.transpose(1, 2).flatten(-2)


def attend_alone(attn: Any, tokens_NLC: Tensor, backend: AttentionBackend) -> Tensor:
    """Self-attention of every frame for itself, after `to_out`, (N, L, C).

    Args:
        attn: the diffusers `Attention` module, for its projections.
        tokens_NLC: its input φ.
        backend: of the attention.
    """
    q, k, v = (
        split_heads(project(tokens_NLC), attn.heads)
        for project in (attn.to_q, attn.to_k, attn.to_v)
    )
    joined_NLC = merge_heads(attend(q, k, v, attn.scale, backend))
    out_NLC: Tensor = attn.to_out[1](attn.to_out[0](joined_NLC))
    return out_NLC


class Pass(Protocol):
    """What one forward pass of the UNet does at the seams."""

    def self_attention(
        self, site: Site, attn: Any, tokens_NLC: Tensor, plain: Callable[[], Tensor]
    ) -> Tensor:
        """The output of `attn1` at `site` (after `to_out`), (N, L, C).

        Args:
            site: which self-attention.
            attn: the diffusers `Attention` module, for its projections.
            tokens_NLC: its input φ.
            plain: computes what the unmodified module would.
        """

    def conv_features(self, features_NChw: Tensor) -> Tensor:
        """What the convolution at the PnP site shall return instead of its output."""


class Hooks:
    """The explicit state between the method and the UNet: which pass is on, if any."""

    def __init__(
        self, sites: tuple[Site, ...], attention: AttentionBackend, conv_site: str
    ) -> None:
        self.sites = sites
        self.attention = attention
        self.conv_site = conv_site
        self._active: Pass | None = None

    @property
    def active(self) -> Pass | None:
        """The pass that the next UNet evaluation performs."""
        return self._active

    @contextmanager
    def during(self, new: P) -> Iterator[P]:
        """Make `new` the active pass within the block."""
        if self._active is not None:
            raise RuntimeError("another pass is active")
        self._active = new
        try:
            yield new
        finally:
            self._active = None


class _Processor:
    """The processor at one site: asks the active pass, else does what was there before."""

    def __init__(self, site: Site, hooks: Hooks, original: Callable[..., Tensor]) -> None:
        self.site, self.hooks, self.original = site, hooks, original

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        def plain() -> Tensor:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, temb)

        active = self.hooks.active
        if active is None:
            return plain()
        return active.self_attention(self.site, attn, hidden_states, plain)


@contextmanager
def tokenflow_hooks(
    unet: nn.Module, attention: AttentionBackend = "sdpa", conv_site: str = CONV_SITE
) -> Iterator[Hooks]:
    """Install the seams on `unet`; on leaving it is bit for bit what it was.

    Args:
        unet: of the SD 1.x / 2.x layout.
        attention: backend of the passes' own attention.
        conv_site: residual block whose convolution features PnP injects.

    Raises:
        ValueError: the UNet has no self-attention sites or no PnP convolution.
    """
    hooks = Hooks(attention_sites(unet), attention, conv_site)
    modules = [unet.get_submodule(site.name) for site in hooks.sites]
    originals: list[Any] = [m.processor for m in modules]
    conv = conv_module(unet, conv_site)

    def on_conv(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:  # noqa: ARG001
        return None if hooks.active is None else hooks.active.conv_features(output)

    with uncompiled(unet.get_submodule(conv_site)):
        handle = conv.register_forward_hook(on_conv)
        try:
            for site, module, original in zip(hooks.sites, modules, originals, strict=True):
                module.processor = _Processor(site, hooks, original)  # type: ignore[assignment]
            yield hooks
        finally:
            handle.remove()
            for module, original in zip(modules, originals, strict=True):
                module.processor = original

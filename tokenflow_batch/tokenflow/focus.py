"""Where an edit's prompt asks for something else than the source's: there guidance goes on.

Where both prompts say the same, guidance late in sampling sharpens what is not to change, a little
differently in every frame. What a place is told is the output of its cross-attention. So that is
computed a second time, from the source's prompt and for the target's own queries, and how far the
two lie apart says how much the edit is about this place. Where they agree, for the source's own
queries as well, and the edit has changed nothing that one would notice, the last steps lead back to
the source (docs/architecture.md).

Shape suffixes: N frames in a batch, L tokens, C channels, T prompt tokens, E embedding width,
h w latent size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tokenflow_batch.tokenflow.compiled import uncompiled
from tokenflow_batch.tokenflow.injection import attention_sites
from tokenflow_batch.unet_flops import focus_sites

NOT_HERE, HERE = 0.4, 0.5
"""Relative to the frame's largest difference: up to where there is no guidance, and from where
there is all of it. (DiffEdit, Couairon et al., ICLR 2023, cuts its differences at the half.)"""

_SMOOTHED = 2
"""How often the differences are averaged over 3 × 3 latent pixels."""

_BORDER = 1
"""Latent pixels by which the places that count are widened: an object's outline lies within one."""

UNCHANGED, CHANGED = 0.2, 1.4
"""Between the predicted clean latents of edit and source, root mean square over channels; latents
are scaled to a deviation of about 1. Up to where a place counts as left as it is, and from where as
edited, wherever the prompts differ: an object can be drawn beside its place. Far apart, as places
that now count and now don't would flicker."""

_LEAST = 1e-6
"""Of a frame's mean difference; keeps the logarithm finite."""


class Focus:
    """Watches one branch of a pass: the target's, what its frames would be told by the source's
    prompt; or the source's, by the target's.

    Args:
        unet: of the SD 1.x / 2.x layout.
        other_TE: text embedding of the prompt that the branch is not told.
        frames: N.
        latent_hw: (h, w) of the latents.
        of_source: watch the pass's first N rows, its source branch, instead of its last, its
            target branch.
    """

    def __init__(
        self,
        unet: nn.Module,
        other_TE: Tensor,
        frames: int,
        latent_hw: tuple[int, int],
        *,
        of_source: bool = False,
    ) -> None:
        parameter = next(unet.parameters())
        self.frames, self.of_source, self._latent_hw = frames, of_source, latent_hw
        self._other_TE = other_TE.to(parameter.device, parameter.dtype)
        grids = {
            f"{site.name.removesuffix('attn1')}attn2": site.grid(latent_hw)
            for site in attention_sites(unet)
        }
        self._grids = {unet.get_submodule(name): grids[name] for name in focus_sites(grids)}
        self._logs: list[Tensor] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While the UNet is evaluated within the block, which computes what it always does."""
        with ExitStack() as stack:
            for module, grid in self._grids.items():
                stack.enter_context(uncompiled(module))
                see = partial(self._see, grid)
                handle = module.register_forward_hook(see, with_kwargs=True)
                stack.callback(handle.remove)
            yield

    def _see(
        self,
        grid: tuple[int, int],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        told_NLC: Tensor,
    ) -> None:
        rows = slice(self.frames) if self.of_source else slice(-self.frames, None)
        tokens_NLC = (args[0] if args else kwargs["hidden_states"])[rows]
        text_NTE = self._other_TE.expand(self.frames, -1, -1)
        # Past the hooks, this one among them.
        other_NLC = module.forward(tokens_NLC, encoder_hidden_states=text_NTE)
        change_NLC = told_NLC[rows].float() - other_NLC.float()
        change_NL = torch.linalg.vector_norm(change_NLC, dim=-1)
        change_NL = change_NL / change_NL.mean(dim=1, keepdim=True).clamp(min=1e-12)
        fine_N1hw = functional.interpolate(
            change_NL.unflatten(1, grid).unsqueeze(1),
            size=self._latent_hw,
            mode="bilinear",
            align_corners=False,
        )
        # A geometric mean over the sites: a place counts if all of them say so.
        self._logs.append(fine_N1hw.clamp(min=_LEAST).log())

    def weight(self) -> Tensor:
        """How much guidance each place gets, 0 to 1, (N, 1, h, w) float32: what was seen.

        Raises:
            RuntimeError: no pass has been watched.
        """
        if not self._logs:
            raise RuntimeError("no pass has been watched")
        change_N1hw = torch.stack(self._logs).mean(dim=0).exp()
        for _ in range(_SMOOTHED):
            change_N1hw = _averaged(change_N1hw)
        largest_N111 = change_N1hw.amax(dim=(2, 3), keepdim=True)
        here_N1hw = ((change_N1hw / largest_N111 - NOT_HERE) / (HERE - NOT_HERE)).clamp(0, 1)
        return functional.max_pool2d(here_N1hw, 2 * _BORDER + 1, stride=1, padding=_BORDER)


def _averaged(x_N1hw: Tensor) -> Tensor:
    """Over 3 × 3."""
    around = functional.pad(x_N1hw, (1, 1, 1, 1), mode="replicate")
    return functional.avg_pool2d(around, 3, stride=1)


def guided(negative: Tensor, target: Tensor, scale: float, where: Tensor | None = None) -> Tensor:
    """Classifier-free guidance, ε_neg + g · (ε_target − ε_neg), (N, C, h, w).

    Args:
        negative: noise from the negative prompt, (N, C, h, w).
        target: from the edit's.
        scale: g.
        where: how much of it a place gets, 0 to 1, (N, 1, h, w); at 0, g is 1. None is all of it
            everywhere.
    """
    if where is None:
        return negative + scale * (target - negative)
    return negative + (1 + (scale - 1) * where.to(target)) * (target - negative)


def returned(
    noise: Tensor, source_noise: Tensor, x: Tensor, source: Tensor, alpha: float, where: Tensor
) -> Tensor:
    """Noise that leads back to the source wherever the edit has left that as it is.

    ε* = ε_source + (x − x_source) / √(1 − ᾱ) makes the clean latents predicted from x those that
    are predicted for the source. It replaces ε as far as the prompts agree and the two predictions
    lie close together: what is left of their difference is another one in every frame. (DiffEdit,
    Couairon et al., ICLR 2023, returns to the source outside of its mask, whatever is there.)

    Args:
        noise: ε of the edit, (N, C, h, w) float32.
        source_noise: ε_source, of the source alone, (N, C, h, w).
        x: edited latents, (N, C, h, w).
        source: the source's at the same timestep, (N, C, h, w).
        alpha: ᾱ there.
        where: how far the prompts differ, 0 to 1, (N, 1, h, w).
    """
    x, source = x.to(noise), source.to(noise)
    back = source_noise + (x - source) / (1 - alpha) ** 0.5
    apart_N1hw = (noise - back).square().mean(dim=1, keepdim=True) * ((1 - alpha) / alpha)
    apart_N1hw = _averaged(apart_N1hw).sqrt()
    alike_N1hw = ((CHANGED - apart_N1hw) / (CHANGED - UNCHANGED)).clamp(0, 1)
    return noise + (1 - where.to(noise)) * alike_N1hw * (back - noise)

"""What a pass through the UNet takes in floating-point operations, without counting as it runs.

A row with plain self-attention follows from the configuration (`unet_flops`); the passes differ
from it in `attn1` alone. It is what torch counts inside the UNet: copies and blends are not in it.

Symbols: L tokens of a site, C its channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from tokenflow_batch.tokenflow.focus import Focus
from tokenflow_batch.tokenflow.injection import attention_sites
from tokenflow_batch.tokenflow.passes import KeyframePass
from tokenflow_batch.tokenflow.propagation import PropagationPass
from tokenflow_batch.unet_flops import UNetFlops


class Weights:
    """Weighs passes of one UNet on latents of one size.

    Args:
        unet: of the SD 1.x / 2.x layout.
        latent_hw: (h, w) of the latents.
        text_tokens: length of the text embeddings.
    """

    def __init__(self, unet: nn.Module, latent_hw: tuple[int, int], text_tokens: int) -> None:
        of = UNetFlops.of(cast(Mapping[str, Any], unet.config), text_tokens)
        self._of, self._latent_hw, self._row = of, latent_hw, of.row(latent_hw)
        self._attn1 = self._scores = 0
        for site in attention_sites(unet):
            tokens = site.tokens(latent_hw)
            width = int(unet.get_submodule(site.name).to_q.out_features)  # type: ignore[arg-type,union-attr]
            scores = 4 * tokens * tokens * width  # queries by keys, weights by values
            self._scores += scores
            self._attn1 += scores + 4 * 2 * tokens * width * width

    def until(self, site: str) -> int:
        """FLOPs of a row that leaves the UNet after the second convolution of `site`."""
        return self._of.row(self._latent_hw, site)

    def of(self, rows: int, active: KeyframePass | PropagationPass | None = None) -> int:
        """FLOPs of so many rows.

        Args:
            rows: of the batch.
            active: the pass that changes self-attention, if any does.
        """
        if isinstance(active, KeyframePass):
            pairs = active.frame_pairs(rows // active.branches)
            return rows * self._row + (pairs - rows) * self._scores + self._looking(active.focus)
        if isinstance(active, PropagationPass):
            replaced = rows - active.kept
            whole = rows * self._row + self._looking(active.source_focus)
            return whole - replaced * self._attn1 + active.searches * self._scores // 2
        return rows * self._row

    def _looking(self, focus: Focus | None) -> int:
        return focus.frames * self._of.focus(self._latent_hw) if focus else 0

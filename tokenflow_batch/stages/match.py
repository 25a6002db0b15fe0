"""match: inverted latents → correspondences, and convolution features for Plug-and-Play."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from tokenflow_batch.ahead import ahead
from tokenflow_batch.ledger import StageFolder
from tokenflow_batch.stages.base import Stage, StageContext
from tokenflow_batch.stages.clip import InvertedLatents, read_clip
from tokenflow_batch.stages.matching import Matching
from tokenflow_batch.store import unit_name
from tokenflow_batch.tokenflow.attention import Hooks, tokenflow_hooks
from tokenflow_batch.tokenflow.ddim import Schedule
from tokenflow_batch.tokenflow.denoise import Denoiser
from tokenflow_batch.tokenflow.modes import MODES
from tokenflow_batch.tokenflow.passes import SourcePass
from tokenflow_batch.tokenflow.windows import batches


class Match(Stage):
    """Units: (sampling step, chunk). In official mode, which finds correspondences on the way,
    there are none.

    `invert` evaluates the model at the same latents, and commits what it can of these units while
    it is at it (`handing`). What is missing is computed here, from the stored latents: the same
    batches, so the same bits.
    """

    name = "match"

    def run(self, context: StageContext, folder: StageFolder) -> None:
        """See `Stage.run`."""
        s = context.settings
        if not MODES[s.mode].stored_source:
            return
        clip, model = read_clip(context), context.model()
        matching, sampling = Matching.of(context, clip, model), model.schedule(s.steps)
        inverted = InvertedLatents(
            context.folder("invert"), sampling, model.schedule(s.inversion_steps)
        )
        store = context.store(folder, matching.specs)
        units = {
            unit_name("match", (step, chunk.index)): (step, chunk)
            for step in range(s.steps)
            for chunk in clip.chunks
        }
        missing = [chunk for unit, (_, chunk) in units.items() if not folder.committed(unit)]
        denoiser = Denoiser(model.unet, model.prediction_type)
        with (
            tokenflow_hooks(model.unet, context.compute.attention, s.conv_site) as hooks,
            context.progress("match", sum(map(len, missing))) as advance,
        ):
            embed = model.embed(s.source_prompt).unsqueeze(0)
            look = _Looking(inverted, sampling, denoiser, hooks, embed)
            for step, chunk in context.sharing.share(folder, units):
                rows, flops, began = denoiser.rows, denoiser.flops, time.perf_counter()
                unit = matching.unit(step, chunk)
                if unit.outside:
                    for _, seen in look.at(step, [unit.outside]):
                        unit.outside_seen(seen)
                for batch, seen in look.at(step, batches(chunk.frames, s.unet_batch)):
                    unit.add(batch, seen)
                facts = {
                    "rows": denoiser.rows - rows,
                    "flops": denoiser.flops - flops,
                    "seconds": time.perf_counter() - began,
                }
                store.write((step, chunk.index), unit.values, facts)
                advance(len(chunk))


@dataclass(frozen=True)
class _Looking:
    """Source passes over stored latents."""

    source: InvertedLatents
    sampling: Schedule
    denoiser: Denoiser
    hooks: Hooks
    embed: Tensor

    def at(
        self, step: int, parts: Sequence[Sequence[int]]
    ) -> Iterator[tuple[Sequence[int], SourcePass]]:
        """Batches of frames, and what the model sees in each."""
        t, alpha = self.sampling.timesteps[step], self.sampling.alphas[step]
        for batch, x in ahead(((b, self.source.read(step, b)) for b in parts), 1):
            with self.hooks.during(SourcePass()) as seen:
                self.denoiser.noise(x, t, alpha, self.embed)
            yield batch, seen

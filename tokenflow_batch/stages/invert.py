"""invert: clean latents → inverted latents at every sampling timestep, step by step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenflow_batch.ahead import ahead
from tokenflow_batch.arrays import invert_arrays
from tokenflow_batch.errors import ModelError
from tokenflow_batch.ledger import StageFolder
from tokenflow_batch.models import Model, require_finite
from tokenflow_batch.stages.base import Stage, StageContext
from tokenflow_batch.stages.clip import CleanLatents, Clip, read_clip
from tokenflow_batch.stages.handing import Handing, Watch
from tokenflow_batch.stages.matching import Matching, Unit
from tokenflow_batch.store import ArrayStore, unit_name
from tokenflow_batch.tokenflow.attention import tokenflow_hooks
from tokenflow_batch.tokenflow.ddim import (
    LOOKED_BACK,
    TOLERANCE,
    Inverted,
    Schedule,
    converged,
    foreseen_noise,
    invert_fixed_point,
    invert_plain,
    retry,
)
from tokenflow_batch.tokenflow.denoise import Denoiser
from tokenflow_batch.tokenflow.modes import inversion_evaluations
from tokenflow_batch.tokenflow.windows import Chunk, batches


class Invert(Stage):
    """Units: (inversion step, chunk), ascending noise. Steps that no sampling step needs are
    dropped once the next one is there. `match` gets its units on the way where it can."""

    name = "invert"

    def run(self, context: StageContext, folder: StageFolder) -> None:
        """See `Stage.run`."""
        s, clip, model = context.settings, read_clip(context), context.model()
        schedule, sampling = model.schedule(s.inversion_steps), model.schedule(s.steps)
        kept = _kept(model, schedule, sampling)
        clean = CleanLatents(context.folder("encode"))
        size = (len(schedule), clip.frames, clip.chunk_frames)
        specs = invert_arrays(*size, clean.frame_shape, context.float_dtype)
        store = context.store(folder, specs)
        denoiser = Denoiser(model.unet, model.prediction_type)
        embed = model.embed(s.source_prompt)
        work = _Inversion(context, store, clean, denoiser, schedule, embed)
        sharing = context.sharing
        needed = sharing.agree(
            folder, "needed", lambda: [_plan(folder, chunk, kept) for chunk in clip.chunks]
        )
        units = {
            unit_name("invert", (i, chunk.index)): (i, chunk)
            for i in range(len(schedule))
            for chunk, steps in zip(clip.chunks, needed, strict=True)
            if steps[i]
        }
        with (
            context.progress("invert", sum(len(c) for _, c in units.values())) as advance,
            sharing.busy(folder),  # until what is handed over is committed
            work.handing(folder, clip, sampling),
        ):
            step = 0
            for i, chunk in sharing.claimed(folder, units):
                if i > max(step, 1) and not kept[i - 2]:  # whoever drops or has dropped it
                    folder.release(unit_name("invert", (i - 2, c.index)) for c in clip.chunks)
                step = i
                before = unit_name("invert", (i - 1, chunk.index))
                if i > 0:
                    sharing.wait_for(folder, [before])  # another process may be at it
                work.unit(i, chunk)
                if i > 0 and not kept[i - 1]:
                    folder.drop(before)
                advance(len(chunk))
        sharing.all_there(folder, units)


def _possible(model: Model, steps: int) -> str:
    wanted = set(model.schedule(steps).timesteps)
    fitting = (n for n in range(steps, 1000) if wanted <= set(model.timesteps(n)))
    return ", ".join(map(str, fitting))


def _kept(model: Model, schedule: Schedule, sampling: Schedule) -> list[bool]:
    """Which inversion steps, in ascending noise, are sampling timesteps."""
    wanted = set(sampling.timesteps)
    if not wanted <= set(schedule.timesteps):
        raise ModelError(
            f"{len(schedule)} inversion steps don't pass through the {len(sampling)} sampling "
            "timesteps",
            hint="a number of inversion steps works if the timesteps of `steps` are among its own: "
            f"for this model {_possible(model, len(sampling))}",
        )
    kept = [t in wanted for t in reversed(schedule.timesteps)]
    kept[-1] = True  # the noisiest latent, which the published code starts from
    return kept


def _plan(folder: StageFolder, chunk: Chunk, kept: Sequence[bool]) -> list[bool]:
    """What is still to compute: kept steps that are not there, and what leads to them."""
    needed = [False] * len(kept)
    following = False
    for i in reversed(range(len(kept))):
        unit = unit_name("invert", (i, chunk.index))
        there = folder.available(unit)
        if not kept[i] and not following:
            folder.drop(unit)  # a killed process may not have come to it, or not to the end
        needed[i] = following = not there and (kept[i] or following)
        if following and folder.committed(unit):
            folder.forget(unit)  # dropped, and needed once more
    return needed


class _Inversion:
    """One clip's inversion, a unit at a time."""

    def __init__(
        self,
        context: StageContext,
        store: ArrayStore,
        clean: CleanLatents,
        denoiser: Denoiser,
        schedule: Schedule,
        source_embed: Tensor,
    ) -> None:
        self.settings, self.store, self.clean = context.settings, store, clean
        self.warn = context.warn
        self.denoiser, self.embed = denoiser, source_embed.unsqueeze(0)
        self.timesteps = schedule.timesteps[::-1]
        self.alphas = schedule.alphas[::-1]
        self.final_alpha = schedule.final_alpha
        self.retried_rows = self.retried_flops = 0
        self.context, self.schedule = context, schedule
        self.handed: Handing | None = None

    @contextmanager
    def handing(self, folder: StageFolder, clip: Clip, sampling: Schedule) -> Iterator[None]:
        """While this lasts `match` gets what it can of the evaluations, if it is open for that."""
        context = self.context
        target = context.handed
        if target is None:
            yield
            return
        s, model = self.settings, context.model()
        matching = Matching.of(context, clip, model)
        with tokenflow_hooks(model.unet, context.compute.attention, s.conv_site) as hooks:
            self.handed = Handing(
                context,
                folder,
                target,
                matching,
                self._latents,
                (sampling, self.schedule),
                self.denoiser,
                self.embed,
                hooks,
            )
            try:
                yield
                self.handed.finish()
                target.settle()
            finally:
                target.abandon()

    def unit(self, i: int, chunk: Chunk) -> None:
        """Compute and commit inversion step `i` of `chunk`."""
        rows, flops = self.denoiser.rows, self.denoiser.flops
        retried, retried_flops = self.retried_rows, self.retried_flops
        began = time.perf_counter()
        matched = self.handed.begin(i, chunk) if self.handed else None
        parts = batches(chunk.frames, self.settings.unet_batch)
        reads = ahead(((b, self._read(i, b)) for b in parts), 1)
        done = [self._batch(i, b, read, matched) for b, read in reads]
        require_finite(torch.cat([d.x for d in done]), f"inversion step {i}, {chunk.frames}")
        values = {
            "latents": torch.cat([d.x for d in done]).cpu().numpy(),
            "residual": torch.cat([d.residual for d in done]).cpu().numpy().astype(np.float32),
        }
        self._warn(i, chunk, values["residual"])
        retried = self.retried_rows - retried
        facts = {
            "rows": self.denoiser.rows - rows - retried,  # as planned
            "flops": self.denoiser.flops - flops - (self.retried_flops - retried_flops),
            "retried_rows": retried,
            "seconds": time.perf_counter() - began,
        }
        if self.settings.inversion_iterations > 0:
            facts["residual_sum"] = float(values["residual"].sum())
            facts["residual_largest"] = float(values["residual"].max())
            facts["residual_worst_frame"] = chunk.start + int(values["residual"].argmax())
            facts["unconverged"] = int((values["residual"] > TOLERANCE).sum())
        self.store.write((i, chunk.index), values, facts)
        if self.handed:
            self.handed.add(i, chunk, matched)

    def _read(self, i: int, frames: Sequence[int]) -> list[Tensor]:
        """Latents before step `i`, the latest first: as many as have a use."""
        count = 1 if self.settings.inversion_iterations == 0 else LOOKED_BACK
        return [self._latents(j, frames) for j in range(i - 1, max(i - 1 - count, -2), -1)]

    def _batch(
        self,
        i: int,
        frames: Sequence[int],
        latents: Sequence[Tensor],
        matched: Unit | None,
    ) -> Inverted:
        alphas = [self._alpha(i - 1 - n) for n in range(len(latents))]
        t, alpha_t, x, alpha = self.timesteps[i], self.alphas[i], latents[0], alphas[0]

        def noise(x_NChw: Tensor, at: int) -> Tensor:
            raw = self.settings.mode == "official"
            return self.denoiser.noise(x_NChw, at, alpha_t, self.embed, raw=raw)

        if self.settings.inversion_iterations == 0:
            return invert_plain(noise, x, t, alpha, alpha_t)
        watch = Watch(self.handed.hooks, noise) if self.handed and matched else None
        found = invert_fixed_point(
            watch.noise if watch else noise,
            x,
            t,
            alpha,
            alpha_t,
            extra=inversion_evaluations(i, self.settings.inversion_iterations) - 1,
            warm_noise_FChw=foreseen_noise(latents, alphas),  # state that needs no storing
            better=watch.better if watch else None,
        )
        rows, flops = self.denoiser.rows, self.denoiser.flops
        again = (~converged(found)).nonzero().flatten().tolist()
        for n in again:
            # One frame at a time: its bits must not depend on which others had trouble.
            part = Inverted(found.x[n : n + 1], found.residual[n : n + 1])
            one = retry(noise, x[n : n + 1], part, t, alpha, alpha_t)
            found.x[n], found.residual[n] = one.x[0], one.residual[0]
        if watch and matched and self.handed:
            # What was seen of retried frames is of other latents, and in other batches.
            seen = self.handed.look(matched.step, found.x) if again else watch.seen
            assert seen is not None  # noqa: S101 - extra ≥ 1
            matched.add(frames, seen)
        self.retried_rows += self.denoiser.rows - rows
        self.retried_flops += self.denoiser.flops - flops
        return found

    def _warn(self, i: int, chunk: Chunk, residual_F: NDArray[np.float32]) -> None:
        """Name the frames that even the retry did not bring to a solution."""
        bad = np.flatnonzero(residual_F > TOLERANCE)
        if len(bad):
            worst = chunk.start + int(residual_F.argmax())
            self.warn(
                f"inversion step {i} (timestep {self.timesteps[i]}): {len(bad)} frames did not "
                f"converge after a retry, the worst is frame {worst} (residual "
                f"{residual_F.max():.2g}); the best iterate is kept. More inversion_iterations or "
                "steps help"
            )

    def _alpha(self, i: int) -> float:
        return self.final_alpha if i < 0 else self.alphas[i]

    def _latents(self, i: int, frames: Sequence[int]) -> Tensor:
        """Latents after inversion step `i`; the clean ones before the first."""
        if i < 0:
            x = self.clean.read(frames)
        else:
            x = torch.from_numpy(self.store.read("latents", (i,), frames)).float()
        return x.to(self.denoiser.device)

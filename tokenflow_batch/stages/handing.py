"""What `invert` sees of the source, handed to `match`, which then needs no passes of its own.

Fixed-point inversion ends at a latent where it has evaluated the model. `match` would evaluate it
there again, in the same batches, for the tokens and the convolution features: the same bits. So its
unit is put together from what goes by, all but the keyframes in neighbouring chunks. Those are
looked at once their chunks are inverted as well. What a killed process has not come to, `match`
computes itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from torch import Tensor

from tokenflow_batch.ledger import StageFolder
from tokenflow_batch.stages.base import StageContext
from tokenflow_batch.stages.matching import Matching, Unit
from tokenflow_batch.store import unit_name
from tokenflow_batch.tokenflow.attention import Hooks
from tokenflow_batch.tokenflow.ddim import NoiseFn, Schedule
from tokenflow_batch.tokenflow.denoise import Denoiser
from tokenflow_batch.tokenflow.passes import SourcePass
from tokenflow_batch.tokenflow.windows import Chunk


class Watch:
    """Evaluations of one batch; of each frame it keeps what the best one has seen.

    Attributes:
        seen: None before the first.
    """

    def __init__(self, hooks: Hooks, noise: NoiseFn) -> None:
        self.seen: SourcePass | None = None
        self._hooks, self._noise = hooks, noise
        self._latest = SourcePass()

    def noise(self, x_FChw: Tensor, t: int) -> Tensor:
        """Evaluate, and look."""
        with self._hooks.during(SourcePass()) as self._latest:
            return self._noise(x_FChw, t)

    def better(self, rows_F: Tensor) -> None:
        """For these frames the latest evaluation is the best so far."""
        seen, latest = self.seen, self._latest
        self.seen = latest if seen is None else seen.merged(latest, rows_F)


class Handing:
    """Commits units of `match` on the way of `invert`.

    Args:
        context: of the job.
        inverted: `invert`'s folder.
        target: `match`'s, open and locked.
        matching: what its units have in common.
        latents: (inversion step, frames) → what is stored.
        schedules: of sampling and of inversion.
        denoiser, embed: the model and the source prompt.
        hooks: on the model.
    """

    def __init__(
        self,
        context: StageContext,
        inverted: StageFolder,
        target: StageFolder,
        matching: Matching,
        latents: Callable[[int, Sequence[int]], Tensor],
        schedules: tuple[Schedule, Schedule],
        denoiser: Denoiser,
        embed: Tensor,
        hooks: Hooks,
    ) -> None:
        sampling, inversion = schedules
        at = {t: step for step, t in enumerate(sampling.timesteps)}
        self._steps = [at.get(t) for t in reversed(inversion.timesteps)]
        self._sampling, self._matching, self._latents = sampling, matching, latents
        self._sharing, self._inverted, self._target = context.sharing, inverted, target
        self._store = context.store(target, matching.specs)
        self._denoiser, self._embed, self.hooks = denoiser, embed, hooks
        self._waiting: list[tuple[int, Unit]] = []

    def begin(self, i: int, chunk: Chunk) -> Unit | None:
        """The unit of `match` that inversion step `i` of a chunk gives, if it is missing."""
        step = self._steps[i]
        if step is None or self._target.committed(unit_name("match", (step, chunk.index))):
            return None
        return self._matching.unit(step, chunk)

    def add(self, i: int, chunk: Chunk, unit: Unit | None) -> None:
        """Take a unit that has seen all of its chunk; completes those that this makes possible."""
        if unit is not None:
            self._waiting.append((i, unit))
        self._finish((i, chunk.index))

    def finish(self) -> None:
        """Complete all that is waiting.

        Raises:
            JobOver: the stage has failed elsewhere.
        """
        self._finish(None)

    def _finish(self, reached: tuple[int, int] | None) -> None:
        """Complete units that need no chunk after the one reached, which all processes go by."""
        waiting, self._waiting = self._waiting, []
        for i, unit in waiting:
            chunks = {frame // self._matching.clip.chunk_frames for frame in unit.outside}
            if reached is not None and (i, max(chunks, default=0)) > reached:
                self._waiting.append((i, unit))
            else:
                self._complete(i, unit, sorted(chunks))

    def _complete(self, i: int, unit: Unit, chunks: Sequence[int]) -> None:
        """Look at keyframes in other chunks, and commit."""
        rows, flops, began = self._denoiser.rows, self._denoiser.flops, time.perf_counter()
        if chunks:
            self._sharing.wait_for(self._inverted, [unit_name("invert", (i, c)) for c in chunks])
            unit.outside_seen(self.look(unit.step, self._latents(i, unit.outside)))
        facts = {
            "rows": self._denoiser.rows - rows,
            "flops": self._denoiser.flops - flops,
            "seconds": time.perf_counter() - began,
            "handed": 1,  # so these seconds are not all that it took
        }
        self._store.write((unit.step, unit.chunk.index), unit.values, facts, timed=False)

    def look(self, step: int, x_NChw: Tensor) -> SourcePass:
        """A pass of its own over stored latents."""
        t, alpha = self._sampling.timesteps[step], self._sampling.alphas[step]
        with self.hooks.during(SourcePass()) as seen:
            self._denoiser.noise(x_NChw, t, alpha, self._embed)
        return seen

"""Deterministic samplers: what one step makes of the latents, a noise prediction and a history.

A sampler's history is part of the stored state between steps, so that a killed run goes on with
the same bits. DDIM has none. Shapes as in `ddim`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tokenflow_batch.tokenflow.ddim import Schedule, move


@dataclass(frozen=True)
class State:
    """Latents (F, C, h, w) before a step, and `Sampler.history` tensors of the same shape."""

    x: Tensor
    history: tuple[Tensor, ...] = ()


class Sampler(Protocol):
    """One deterministic sampling step."""

    @property
    def history(self) -> int:
        """How many tensors the state carries beside the latents, from the second step on."""

    def step(self, schedule: Schedule, step: int, first: int, state: State, noise: Tensor) -> State:
        """Go from `schedule.timesteps[step]` to the next; `first` is the step sampling began at."""


@dataclass(frozen=True)
class Ddim:
    """Song et al. 2021, eq. 12 with η = 0."""

    history: int = 0

    def step(self, schedule: Schedule, step: int, first: int, state: State, noise: Tensor) -> State:  # noqa: ARG002
        """One DDIM step."""
        return State(move(state.x, noise, schedule.alphas[step], schedule.alpha_after(step)))


@dataclass(frozen=True)
class DpmSolverPlusPlus:
    """DPM-Solver++(2M), midpoint form, first order at both ends (Lu et al. 2022, algorithm 2).

    The history is the previous step's clean-latent prediction.
    """

    history: int = 1

    def step(self, schedule: Schedule, step: int, first: int, state: State, noise: Tensor) -> State:
        """One multistep step; the first and the last are first order."""
        alpha, to = schedule.alphas[step], schedule.alpha_after(step)
        clean = (state.x - (1 - alpha) ** 0.5 * noise) / alpha**0.5
        slope = clean
        if first < step < len(schedule) - 1:
            lam, lam_to = _half_log_snr(alpha), _half_log_snr(to)
            ratio = (lam - _half_log_snr(schedule.alphas[step - 1])) / (lam_to - lam)
            slope = clean + (clean - state.history[0]) / (2 * ratio)
        sigma, sigma_to = (1 - alpha) ** 0.5, (1 - to) ** 0.5
        shrink = sigma_to / sigma  # exp(−h) α'/α, so that α'(1 − e^−h) = α' − shrink·α
        x = shrink * state.x + (to**0.5 - shrink * alpha**0.5) * slope
        return State(x, (clean,))


def _half_log_snr(alpha: float) -> float:
    return 0.5 * math.log(alpha / (1 - alpha)) if alpha < 1 else math.inf


SAMPLERS: dict[str, Sampler] = {"ddim": Ddim(), "dpmsolver++": DpmSolverPlusPlus()}

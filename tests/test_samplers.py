"""Samplers, against diffusers and a paper's algorithm in float64."""

import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from schedules import close, double, normal, schedule_of
from tiny_model import SCHEDULER

from tokenflow_batch.tokenflow.ddim import Schedule, move, noise_from_prediction
from tokenflow_batch.tokenflow.samplers import SAMPLERS, State


def changing_noise(x, step):
    return torch.tanh(x) + 0.1 * normal(step, x.shape)


@pytest.mark.parametrize("steps", [1, 7, 50])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_ddim_is_diffusers_ddim_over_a_whole_trajectory(steps, kind):
    scheduler, schedule = schedule_of(steps, kind)
    ours = theirs = normal(0)
    for step, t in enumerate(scheduler.timesteps):
        predicted = changing_noise(theirs, step)
        noise = noise_from_prediction(predicted, ours, schedule.alphas[step], kind)
        state = SAMPLERS["ddim"].step(schedule, step, 0, State(ours), noise)
        assert state.history == ()
        ours, theirs = state.x, scheduler.step(predicted, t, theirs).prev_sample
        # diffusers computes in float32 throughout; its own rounding grows as ᾱ nears zero.
        close(ours, double(theirs), rtol=1e-4)


def diffusers_dpm(schedule, kind):
    scheduler = DPMSolverMultistepScheduler(
        **{k: v for k, v in SCHEDULER.items() if k not in ("clip_sample", "set_alpha_to_one")},
        solver_order=2,
        algorithm_type="dpmsolver++",
        solver_type="midpoint",
        lower_order_final=True,
        final_sigmas_type="sigma_min",
        prediction_type=kind,
    )
    scheduler.set_timesteps(timesteps=list(schedule.timesteps))
    return scheduler


# diffusers hands a tensor to numpy in the way of numpy 1.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("steps", [2, 3, 10, 14])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_dpmsolver_is_diffusers_dpmsolver_over_a_whole_trajectory(steps, kind):
    _, schedule = schedule_of(steps)
    scheduler = diffusers_dpm(schedule, kind)
    state, theirs = State(normal(0)), normal(0)
    ddim = normal(0)
    for step, t in enumerate(schedule.timesteps):
        alpha = schedule.alphas[step]
        predicted = changing_noise(theirs, step)
        noise = noise_from_prediction(predicted, state.x, alpha, kind)
        state = SAMPLERS["dpmsolver++"].step(schedule, step, 0, state, noise)
        theirs = scheduler.step(predicted, t, theirs).prev_sample
        close(state.x, double(theirs), rtol=3e-4)
        first_order = noise_from_prediction(changing_noise(ddim, step), ddim, alpha, kind)
        ddim = move(ddim, first_order, alpha, schedule.alpha_after(step))
    if steps > 2:  # the second order matters
        assert (state.x - ddim).abs().max() > 0.01


@pytest.mark.parametrize(("steps", "first"), [(25, 0), (25, 3), (5, 4)])
def test_dpmsolver_is_the_paper_s_algorithm_in_float64(steps, first):
    # Lu et al. 2022, DPM-Solver++, algorithm 2 with r = h_{i−1}/h_i; first order at both ends.
    _, schedule = schedule_of(steps)
    alphas = [*schedule.alphas, schedule.final_alpha]
    signal = [math.sqrt(a) for a in alphas]
    spread = [math.sqrt(1 - a) for a in alphas]
    lam = [math.log(a / s) for a, s in zip(signal, spread, strict=True)]
    state, x, previous = State(normal(0)), double(normal(0)), None
    for i in range(first, steps):
        noise = changing_noise(state.x, i)
        clean = (x - spread[i] * double(noise)) / signal[i]
        h = lam[i + 1] - lam[i]
        direction = clean
        if i not in (first, steps - 1):
            r = (lam[i] - lam[i - 1]) / h
            direction = (1 + 1 / (2 * r)) * clean - 1 / (2 * r) * previous
        x = spread[i + 1] / spread[i] * x - signal[i + 1] * math.expm1(-h) * direction
        previous = clean
        state = SAMPLERS["dpmsolver++"].step(schedule, i, first, state, noise)
        close(state.x, x, rtol=2e-4)
        close(state.history[0], clean, rtol=2e-4)


def test_dpmsolver_ends_on_the_clean_latent_where_the_schedule_ends_without_noise():
    _, schedule = schedule_of(4)
    clean_end = Schedule(schedule.timesteps, schedule.alphas, 1.0)
    x, noise, alpha = normal(0), normal(1), schedule.alphas[-1]
    state = SAMPLERS["dpmsolver++"].step(clean_end, 3, 0, State(x, (normal(2),)), noise)
    expected = (double(x) - math.sqrt(1 - alpha) * double(noise)) / math.sqrt(alpha)
    close(state.x, expected)


def test_a_sampler_says_how_much_history_it_needs():
    _, schedule = schedule_of(4)
    for sampler in SAMPLERS.values():
        state = sampler.step(schedule, 0, 0, State(normal(0)), normal(1))
        assert len(state.history) == sampler.history
        assert all(h.shape == state.x.shape for h in state.history)

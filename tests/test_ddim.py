"""Noise schedule and fixed-point inversion, against formulas written independently."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from schedules import close, double, normal, schedule_of

from tokenflow_batch.tokenflow.ddim import (
    CARRIED_OVER,
    LOOKED_BACK,
    TOLERANCE,
    Inverted,
    converged,
    foreseen_noise,
    implied_noise,
    invert_fixed_point,
    invert_plain,
    longer_step,
    move,
    noise_from_prediction,
    residual,
    retry,
)
from tokenflow_batch.tokenflow.modes import inversion_evaluations
from tokenflow_batch.tokenflow.samplers import SAMPLERS, State

LEVELS = [(0.999, 0.97), (0.97, 0.3), (0.3, 0.0047), (0.0047, 0.3), (0.3, 0.999)]


@pytest.mark.parametrize(("alpha", "to"), LEVELS)
def test_a_move_keeps_clean_part_and_noise_and_changes_their_shares(alpha, to):
    clean, noise = double(normal(0)), double(normal(1))
    x = torch.from_numpy(math.sqrt(alpha) * clean + math.sqrt(1 - alpha) * noise).float()
    expected = math.sqrt(to) * clean + math.sqrt(1 - to) * noise
    close(move(x, normal(1), alpha, to), expected, rtol=1e-4 if alpha < 0.01 else 2e-5)


@pytest.mark.parametrize(("alpha", "to"), LEVELS)
def test_implied_noise_is_the_noise_that_was_moved_along(alpha, to):
    x, noise = normal(0), normal(1)
    close(implied_noise(x, move(x, noise, alpha, to), alpha, to), double(noise), rtol=1e-3)


@pytest.mark.parametrize("alpha", [0.999, 0.4, 0.0047])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_every_prediction_type_gives_the_noise_that_is_in_the_latent(alpha, kind):
    clean, noise = double(normal(0)), double(normal(1))
    signal, spread = math.sqrt(alpha), math.sqrt(1 - alpha)
    x = signal * clean + spread * noise
    # Salimans & Ho 2022: v = α ε − σ x₀.
    predicted = {"epsilon": noise, "v_prediction": signal * noise - spread * clean, "sample": clean}
    args = (torch.from_numpy(predicted[kind]).float(), torch.from_numpy(x).float(), alpha, kind)
    close(noise_from_prediction(*args), noise, rtol=1e-4)


def test_what_cannot_be_turned_into_noise_is_refused():
    with pytest.raises(ValueError, match="unknown prediction type 'flow'"):
        noise_from_prediction(normal(0), normal(1), 0.5, "flow")
    with pytest.raises(ValueError, match="zero terminal signal"):
        noise_from_prediction(normal(0), normal(1), 0.0, "epsilon")


def test_where_a_step_arrives():
    _, schedule = schedule_of(5)
    assert schedule.timesteps == (801, 601, 401, 201, 1)
    assert len(schedule) == 5
    after = [schedule.alpha_after(i) for i in range(5)]
    assert after == [*schedule.alphas[1:], schedule.final_alpha]
    assert list(schedule.alphas) == sorted(schedule.alphas)


def test_residual_is_the_root_mean_square_of_each_frame():
    a, b = normal(0), normal(1)
    expected = [np.sqrt(np.mean((double(a[f]) - double(b[f])) ** 2)) for f in range(2)]
    assert residual(a, b).tolist() == pytest.approx(expected, rel=1e-5)


def up_the_schedule(schedule):
    """(timestep, ᾱ before, ᾱ after), from clean to noisy."""
    before = [schedule.final_alpha, *reversed(schedule.alphas)]
    return list(zip(reversed(schedule.timesteps), before, before[1:], strict=False))


def sampled(schedule, x, noise_fn):
    for step, (t, alpha) in enumerate(zip(schedule.timesteps, schedule.alphas, strict=True)):
        state = SAMPLERS["ddim"].step(schedule, step, 0, State(x), noise_fn(x, t, alpha))
        x = state.x
    return x


@pytest.mark.parametrize("steps", [4, 25])
def test_sampling_undoes_plain_inversion_where_the_noise_does_not_change(steps):
    _, schedule = schedule_of(steps)
    x0, constant = normal(0), normal(1)
    x, rows = x0, 0
    for t, alpha, alpha_t in up_the_schedule(schedule):

        def noise(x_FChw, at, t=t):
            nonlocal rows
            rows += len(x_FChw)
            assert at == t
            return constant

        found = invert_plain(noise, x, t, alpha, alpha_t)
        assert found.residual.isnan().all()
        assert found.residual.shape == (2,)
        x = found.x
    assert rows == steps * len(x0)
    close(sampled(schedule, x, lambda *_: constant), double(x0), rtol=2e-3)


def smooth_noise(x, alpha):
    """A stand-in for a denoiser: its noise changes with the latent, as a contraction."""
    return 0.3 * torch.tanh(x) + alpha * 0.5


def test_sampling_undoes_fixed_point_inversion_of_a_denoiser_that_depends_on_the_latent():
    _, schedule = schedule_of(10)
    level = dict(zip(schedule.timesteps, schedule.alphas, strict=True))
    x0 = normal(0)
    gaps = {}
    for extra in (0, 1, 3, 12):
        x, latents, alphas = x0, [], []
        for t, alpha, alpha_t in up_the_schedule(schedule):
            noise = lambda y, at: smooth_noise(y, level[at])  # noqa: E731
            if extra == 0:
                x = invert_plain(noise, x, t, alpha, alpha_t).x
                continue
            latents, alphas = [x, *latents][:LOOKED_BACK], [alpha, *alphas][:LOOKED_BACK]
            warm = foreseen_noise(latents, alphas)
            x = invert_fixed_point(noise, x, t, alpha, alpha_t, extra=extra, warm_noise_FChw=warm).x
        back = sampled(schedule, x, lambda y, _, alpha: smooth_noise(y, alpha))
        gaps[extra] = float((back - x0).square().mean().sqrt())
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[3]
    assert gaps[12] < 1e-4


def went_along(noises, alphas):
    """Latents, the latest first, of steps that went along these noises, the first one's first."""
    latents = [normal(0)]
    for noise, alpha, alpha_to in zip(noises, alphas, alphas[1:], strict=False):
        latents.insert(0, move(latents[0], noise, alpha, alpha_to))
    return latents, alphas[::-1]


ALPHAS = [0.98, 0.9, 0.75, 0.5]


def test_noise_is_foreseen_as_it_has_changed_or_as_it_was_each_frame_for_itself():
    first, change = normal(1), 0.1 * normal(2)
    steady = [first, first + change, first + 2 * change]
    to_and_fro = [first, first + change, first]
    mixed = [torch.stack((a[0], b[1])) for a, b in zip(steady, to_and_fro, strict=True)]
    found = foreseen_noise(*went_along(mixed, ALPHAS))
    close(found[0], double(first + 3 * change)[0], rtol=1e-4)
    close(found[1], double(first)[1], rtol=1e-4)


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_after_few_steps_noise_is_foreseen_as_it_was(steps):
    noises = [normal(n) for n in range(1, 4)]
    found = foreseen_noise(*went_along(noises[:steps], ALPHAS[: steps + 1]))
    if steps == 0:
        assert found is None
    else:
        close(found, double(noises[steps - 1]), rtol=1e-4)


def test_a_step_that_went_nowhere_tells_no_noise():
    # Stable Diffusion's schedule: its cleanest timestep has the clean latent's own ᾱ.
    noises, alphas = [normal(n) for n in range(1, 4)], [ALPHAS[0], *ALPHAS]
    assert foreseen_noise(*went_along(noises[:1], alphas[:2])) is None
    found = foreseen_noise(*went_along(noises, alphas[:4]))
    close(found, double(noises[2]), rtol=1e-4)


def test_the_second_inversion_step_alone_evaluates_once_more():
    assert [inversion_evaluations(i, 2) for i in range(4)] == [3, 4, 3, 3]
    assert [inversion_evaluations(i, 0) for i in range(4)] == [1, 1, 1, 1]


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("extra", [1, 2, 5])
def test_fixed_point_iteration_makes_one_evaluation_and_the_extra_ones(extra, warm):
    seen = []

    def noise(x_FChw, at):
        assert at == 321
        seen.append(x_FChw.clone())
        return 0.4 * x_FChw + 1

    x, alpha, alpha_t = normal(0), 0.8, 0.6
    warm_noise = normal(1) if warm else None
    found = invert_fixed_point(
        noise, x, 321, alpha, alpha_t, extra=extra, warm_noise_FChw=warm_noise
    )
    assert len(seen) == 1 + extra
    first = seen[0] if warm else seen[1]
    along = normal(1) if warm else 0.4 * x + 1
    torch.testing.assert_close(first, move(x, along, alpha, alpha_t))
    # Latent, noise and features belong together: the result is where an evaluation was made.
    assert any(torch.equal(found.x[0], y[0]) for y in seen)


def test_fixed_point_iteration_converges_to_the_known_solution_of_a_contraction():
    # x' = a x + b ε(x') with ε(y) = c y + d has the solution (a x + b d) / (1 − b c).
    alpha, alpha_t, c, d = 0.8, 0.6, 0.4, 1.0
    a = math.sqrt(alpha_t / alpha)
    b = math.sqrt(1 - alpha_t) - a * math.sqrt(1 - alpha)
    assert abs(b * c) < 0.2
    x = normal(0)
    solution = (a * double(x) + b * d) / (1 - b * c)
    errors, residuals = [], []
    for extra in (1, 2, 3, 4, 12):
        found = invert_fixed_point(lambda y, _: c * y + d, x, 1, alpha, alpha_t, extra=extra)
        errors.append(np.abs(double(found.x) - solution).max())
        residuals.append(float(found.residual.max()))
        expected = residual(found.x, move(x, c * found.x + d, alpha, alpha_t))
        torch.testing.assert_close(found.residual, expected)
    assert all(after < 0.2 * before for before, after in pairwise(errors[:4]))
    assert residuals[:4] == sorted(residuals[:4], reverse=True)
    assert errors[-1] < 1e-6


@given(alpha=st.floats(0.01, 0.999), ratio=st.floats(0.01, 0.999), share=st.floats(0, 1))
def test_a_longer_first_step_comes_nearer_whatever_a_denoiser_takes_for_noise(alpha, ratio, share):
    # ε(y) = share · y / √(1 − ᾱ_t): from what is none of the noise to all of it.
    alpha_t, x = alpha * ratio, normal(0)
    a = math.sqrt(ratio)
    sigma, sigma_t = math.sqrt(1 - alpha), math.sqrt(1 - alpha_t)
    slope = share * (1 - a * sigma / sigma_t)
    step = longer_step(alpha, alpha_t)
    assert 1 <= step < 2
    factor = 1 - step * (1 - slope)
    assert abs(factor) < 1
    found = []

    def noise(y, _):
        found.append(double(y))
        return share / sigma_t * y

    invert_fixed_point(noise, x, 1, alpha, alpha_t, extra=2, warm_noise_FChw=x)
    solution = a * double(x) / (1 - slope)
    gaps = [np.abs(y - solution).max() for y in found]
    for (before, after), nearer in zip(pairwise(gaps), (abs(factor), slope), strict=True):
        wanted = pytest.approx(nearer * before, rel=1e-3, abs=1e-4 * np.abs(solution).max())
        assert after == wanted


def test_at_the_share_that_is_carried_over_one_longer_step_arrives():
    alpha, alpha_t, x = 0.998, 0.96, normal(0)
    found = invert_fixed_point(
        lambda y, _: CARRIED_OVER / math.sqrt(1 - alpha_t) * y,
        x,
        1,
        alpha,
        alpha_t,
        extra=1,
        warm_noise_FChw=normal(1),
    )
    assert found.residual.max() < 1e-6


def test_where_iterating_makes_it_worse_each_frame_keeps_its_best():
    # Frame 0 contracts, frame 1 diverges: the first keeps its last iterate, the second its first.
    gain = torch.tensor([0.1, -4.0]).view(2, 1, 1, 1)
    alpha, alpha_t, x, warm = 0.9, 0.3, normal(0), 0.1 * normal(1)
    iterates = []

    def noise(y, _):
        iterates.append(y)
        return gain * y

    found = invert_fixed_point(noise, x, 1, alpha, alpha_t, extra=4, warm_noise_FChw=warm)
    gaps = torch.stack([residual(move(x, gain * y, alpha, alpha_t), y) for y in iterates])
    assert gaps[:, 0].argmin() == 4
    assert gaps[:, 1].argmin() == 0
    assert torch.equal(found.x[0], iterates[4][0])
    assert torch.equal(found.x[1], iterates[0][1])
    torch.testing.assert_close(found.residual, gaps.min(dim=0).values)


@pytest.mark.parametrize("slope", [-1.4, -2.5])
def test_a_retry_solves_what_plain_iteration_makes_worse(slope):
    alpha, alpha_t, x = 0.9, 0.3, normal(0)
    scale = math.sqrt(alpha_t / alpha)
    b = math.sqrt(1 - alpha_t) - scale * math.sqrt(1 - alpha)
    gain = slope / b  # of ε, so that the iteration's slope is the given one

    def noise(y, _):
        return gain * y

    found = invert_fixed_point(noise, x, 1, alpha, alpha_t, extra=5, warm_noise_FChw=0 * x)
    assert not converged(found).any()
    again = retry(noise, x, found, 1, alpha, alpha_t, evaluations=12)
    solution = scale * x / (1 - slope)
    assert residual(again.x, solution).max() < 0.05 * residual(found.x, solution).min()
    assert (again.residual < found.residual).all()
    torch.testing.assert_close(
        again.residual, residual(again.x, move(x, noise(again.x, 1), alpha, alpha_t))
    )


def test_a_retry_starts_anew_where_there_is_no_number_and_keeps_the_rest():
    alpha, alpha_t, x = 0.9, 0.3, normal(0)
    spoilt = x.clone()
    spoilt[0] = math.nan
    found = Inverted(spoilt, torch.tensor([math.nan, 0.0]))
    assert converged(found).tolist() == [False, True]
    again = retry(lambda y, _: 0.1 * y, x, found, 1, alpha, alpha_t)
    assert again.residual[0] < TOLERANCE
    assert torch.equal(again.x[1], x[1])


def test_fixed_point_inversion_without_an_iteration_is_refused():
    with pytest.raises(ValueError, match="extra ≥ 1"):
        invert_fixed_point(lambda y, _: y, normal(0), 1, 0.9, 0.8, extra=0)

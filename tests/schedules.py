"""Latents, a noise schedule by diffusers, and what is equal up to rounding."""

import numpy as np
import torch
from diffusers import DDIMScheduler
from tiny_model import SCHEDULER

from tokenflow_batch.tokenflow.ddim import Schedule

SHAPE = (2, 3, 4, 6)


def normal(seed, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def double(x):
    return x.double().numpy()


def close(got, expected, rtol=2e-5):
    """Equal up to float32 rounding on the scale of the whole array."""
    np.testing.assert_allclose(double(got), expected, rtol=rtol, atol=rtol * np.abs(expected).max())


def schedule_of(steps, prediction_type="epsilon"):
    scheduler = DDIMScheduler(**SCHEDULER, prediction_type=prediction_type)
    scheduler.set_timesteps(steps)
    times = [int(t) for t in scheduler.timesteps]
    alphas = [float(scheduler.alphas_cumprod[t]) for t in times]
    return scheduler, Schedule(tuple(times), tuple(alphas), float(scheduler.final_alpha_cumprod))

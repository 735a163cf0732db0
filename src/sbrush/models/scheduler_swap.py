"""Which of diffusers' schedulers give a student's image too, when they are put in place of its own.

A student has one scheduler that is right. Others may be equal to it in one step, or draw something else without an
error: they scale the noise differently, start at another timestep, or take more than one step for one.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler
from torch import Tensor

SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "LCMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)
TOLERANCE = 1e-3  # in a latent, whose standard deviation is about 1: less than 1/255 of an image


def same_image(own: DDIMScheduler) -> dict[str, bool]:
    """For each of SCHEDULERS, made of the configuration of a student's scheduler: whether it draws the same image.

    Found by taking the one step with each, of a network that answers to its input and to the timestep.
    """
    z = torch.linspace(-2, 2, 64).view(1, 1, 8, 8)
    right = _draw(DDIMScheduler, own, z)
    found = {}
    # Ancestral schedulers draw noise, and multiply it by zero; some convert tensors in a way that numpy 2 deprecates.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for name in SCHEDULERS:
            try:
                drawn = _draw(getattr(diffusers, name), own, z)
            except (ValueError, NotImplementedError):  # it has no such prediction, or cannot take one step
                found[name] = False
                continue
            found[name] = bool((drawn - right).abs().max() <= TOLERANCE)
    return found


def _draw(kind: Any, own: DDIMScheduler, z: Tensor) -> Tensor:
    """x0 of the noise z as a pipeline draws it in one step."""
    known = inspect.signature(kind).parameters
    scheduler = kind.from_config({key: value for key, value in own.config.items() if key in known})
    scheduler.set_timesteps(1)
    x = z * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t)
        output = torch.sin(seen + float(t))  # of which no two timesteps, nor two scales of noise, are alike
        x = scheduler.step(output, t, x).prev_sample
    return x

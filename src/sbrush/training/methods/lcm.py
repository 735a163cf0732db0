"""Latent consistency distillation (arXiv 2310.04378): a student whose guess is the same all along a teacher's path.

From x_t, one DDIM step of the guided teacher leads to x_s, s being the next lower timestep of a grid. The student is

    f(x, t, w) = c_skip(t) x + c_out(t) x0(x, t, w)        with f(x, 0, w) = x

and is held, at (x_t, t), to what its own average says at (x_s, s). So step by step the end of the path reaches its
start, and a student that starts from noise draws what the path leads to. More steps noise that and guess again.

The average is the network that targets come from (the paper's theta^-, decay .95) and what is exported.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from sbrush import core
from sbrush.console import SbrushError
from sbrush.core import NoiseSchedule, Prediction
from sbrush.models.ladder import Sampling
from sbrush.models.model import Model
from sbrush.training.methods.regression import MicroBatch, Outcome, Regression
from sbrush.training.recipes import Recipe

SIGMA_DATA = 0.5
TIMESTEP_SCALING = 10.0  # diffusers' LCMScheduler has both


def boundary_scalings(t: Tensor) -> tuple[Tensor, Tensor]:
    """c_skip and c_out of timesteps t [B], each float32 [B, 1, 1, 1]: 1 and 0 at t = 0, almost 0 and 1 from 19 on.

    c_skip = .25 / ((10 t)^2 + .25),    c_out = 10 t / sqrt((10 t)^2 + .25)
    """
    scaled = (TIMESTEP_SCALING * t.double()).view(-1, 1, 1, 1)
    squares = scaled.pow(2) + SIGMA_DATA**2
    return (SIGMA_DATA**2 / squares).float(), (scaled / squares.sqrt()).float()


def consistency(x_t: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """f = c_skip(t) x_t + c_out(t) x0, given a network's x0 at (x_t, t). Float32 [B, C, H, W]."""
    skip, out = boundary_scalings(t)
    return skip * x_t.float() + out * x0.float()


def grid_of(timesteps: int, steps: int) -> Tensor:
    """The grid's timesteps, int64 [steps], ascending: those that LCMScheduler(original_inference_steps=steps) has."""
    return torch.arange(1, steps + 1) * (timesteps // steps) - 1


def previous(t: Tensor, timesteps: int, steps: int) -> Tensor:
    """Where a step from grid timesteps t [B] leads: max(t - k, 0), k being the grid's distance."""
    return (t - timesteps // steps).clamp(min=0)


def ddim_step(
    output: Tensor, x_t: Tensor, t: Tensor, s: Tensor, schedule: NoiseSchedule, prediction: Prediction
) -> Tensor:
    """x_s = alpha_s x0 + sigma_s eps of a network's output at (x_t, t): along its probability-flow ODE. Float32."""
    x0 = core.to_x0(output, x_t, t, schedule, prediction)
    return core.add_noise(x0, core.to_epsilon(output, x_t, t, schedule, prediction), s, schedule)


def pseudo_huber(found: Tensor, target: Tensor, c: float) -> Tensor:
    """mean (sqrt(d^2 + c^2) - c) of the differences d; with c = 0 the mean of d^2."""
    difference = found.float() - target.float()
    return difference.pow(2).mean() if c == 0 else ((difference.pow(2) + c * c).sqrt() - c).mean()


class LCM(Regression):
    """A latent consistency model: a full student takes w as input; a LoRA is held to the mean over w."""

    unused: ClassVar[tuple[str, ...]] = (*Regression.unused, "halve_from", "guide_share", "snr_weight")

    def __init__(self, teacher: Model, recipe: Recipe, **options: Any) -> None:
        super().__init__(teacher, recipe, **options)
        self._grid = grid_of(len(self.schedule), recipe.grid_steps).to(self.accelerator.device)

    @classmethod
    def sampling(cls, recipe: Recipe) -> Sampling:
        """Fresh noise between steps, on timesteps of the grid."""
        return Sampling(
            recipe.student_steps, grid=recipe.grid_steps, guidance=None if recipe.student_rank else recipe.guidance
        )

    @classmethod
    def check(cls, recipe: Recipe, teacher: Model) -> None:
        """SbrushError if the student's steps or guidance scale are not among those that it learns."""
        if recipe.student_steps > recipe.grid_steps:
            raise SbrushError(
                f"a student of {recipe.student_steps} steps on a grid of {recipe.grid_steps} timesteps",
                f"take at most {recipe.grid_steps} steps, or --set grid_steps={recipe.student_steps}",
                code=2,
            )
        super().check(recipe, teacher)

    @classmethod
    def forwards(cls, recipe: Recipe) -> float:
        """The student's 3, or as a LoRA 2; the guided teacher's 2; the target's 1."""
        return (2 if recipe.student_rank else 3) + 2 + 1

    def compare(self, step: int, batch: MicroBatch) -> Outcome:
        """The pseudo-Huber distance of f(x_t, t, w) from the average's f(x_s, s, w)."""
        recipe, timesteps = self.recipe, len(self.schedule)
        t = self._grid[batch.draw.timesteps(0, recipe.grid_steps - 1)]
        s = previous(t, timesteps, recipe.grid_steps)
        x_t = self.noisy(batch, t)
        x_s = ddim_step(self.teacher_output(x_t, t, batch), x_t, t, s, self.schedule, self.prediction)
        with self.ema.inside():  # over before the student's own forward, whose backward needs its weights as they are
            target = consistency(x_s, self.to_x0(self.student_output(x_s, s, batch, grad=False), x_s, s), s)
        found = consistency(x_t, self.to_x0(self.student_output(x_t, t, batch), x_t, t), t)
        return Outcome(pseudo_huber(found, target, recipe.huber_c), found, target)

"""What a student is held to while it learns something new: what it drew before, or its teacher's guess.

Prompts whose images stay:

    loss = 1/2 mean (f_theta(z, y) - f_before(z, y))^2        over noise z and other prompts y: core.pair_loss

DreamBooth's prior preservation, for a student of one step: what a noise is to become is known, so that a plain squared
error blurs nothing. It costs no teacher, and leaves the whole batch of the score difference to the new subject.

And the steps of a student of several, see Anchor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from sbrush import core
from sbrush.core import Conditioning, Denoiser
from sbrush.models.load import digest
from sbrush.models.model import Model
from sbrush.models.unet import attend_explicitly
from sbrush.noise import StepNoise
from sbrush.prompts import Prompts, ShuffledPrompts
from sbrush.training.networks import frozen
from sbrush.training.recipes import Recipe


@dataclass(frozen=True)
class Held:
    """`student`: as it was before; `prompts`: those of which it is to draw the same."""

    student: Model
    prompts: Prompts

    @property
    def about(self) -> dict[str, Any]:
        """What a run's config.json says of it."""
        return {"student_sha256": digest(self.student), "prompts_sha256": self.prompts.sha256}


class Holding:
    """Holds `recipe.hold` samples of a step, which follow those of its batch, to what the student drew before."""

    def __init__(self, held: Held, teacher: Model, recipe: Recipe, accelerator: Accelerator, seed: int) -> None:
        attend_explicitly(frozen(held.student.unet, accelerator))
        self._before, self._teacher, self._recipe, self._accelerator = held.student, teacher, recipe, accelerator
        self._prompts, self._seed = ShuffledPrompts(held.prompts, seed), seed
        # Asked for once: each time they are moved to the device anew, which waits for them.
        self._own_schedule, self._schedule = held.student.schedule, teacher.schedule

    def loss(self, student: Denoiser, step: int, rung: int, indices: range) -> Tensor:
        """core.pair_loss at a rung of the student's ladder, for the share of the samples that goes with `indices`."""
        recipe, before = self._recipe, self._before
        chosen = _share(indices, recipe)
        texts = [self._prompts[(step - 1) * recipe.hold + i] for i in chosen]
        draw = StepNoise(self._seed, step, [recipe.batch + i for i in chosen], self._accelerator.device)
        cond, rungs = self._teacher.encode(texts), before.rungs()[: rung + 1]
        with torch.no_grad(), self._accelerator.autocast():
            z, fresh = draw.normal(before.latent_shape), [draw.normal(before.latent_shape) for _ in rungs[1:]]
            x = core.student_input(self._denoise, z, fresh, rungs, cond, self._own_schedule, before.prediction)
            t = self._own_schedule.start(len(x), rungs[-1])
            target = self._x0(self._denoise(x, t, cond), x, t)
        return core.pair_loss(self._x0(student(x, t, cond), x, t), target)

    def _x0(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The image that a student's UNet's output at (x, t) stands for."""
        prediction, reparameterised = self._teacher.prediction, self._recipe.reparameterised
        return core.student_x0(output.float(), x, t, self._schedule, prediction, reparameterised=reparameterised)

    def _denoise(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return self._before.predict(self._before.unet, x_t, t, conditioning)


class Anchor:
    """What the steps of a few-step student are held to, which starts as `student`, by core.pair_loss.

    The first step to what `student` drew, others to the teacher's guess of x0 from the same x_t: at their noise that is
    all but an image of the data. Steered by control images, the first is to draw something else, and is not held.
    """

    def __init__(self, student: Model, teacher: Model, accelerator: Accelerator) -> None:
        self._before = None if teacher.controls else student
        self._schedule, self._prediction, self._accelerator = teacher.schedule, teacher.prediction, accelerator
        if self._before:
            attend_explicitly(frozen(self._before.unet, accelerator))

    def holds(self, rung: int) -> bool:
        """Whether a step of the ladder is held, the first being 0."""
        return rung > 0 or self._before is not None

    @torch.no_grad()
    def target(
        self, rung: int, x_t: Tensor, t: Tensor, conditioning: Conditioning, guess: Callable[[], Tensor]
    ) -> Tensor:
        """The x0 that a step is held to, [B, C, H, W]. `guess`: the teacher's noise prediction at (x_t, t)."""
        if rung > 0 or self._before is None:
            return core.to_x0(guess(), x_t, t, self._schedule, "epsilon")
        with self._accelerator.autocast():
            output = self._before.predict(self._before.unet, x_t, t, conditioning)
        return core.student_x0(output.float(), x_t, t, self._schedule, self._prediction)


def _share(indices: range, recipe: Recipe) -> Sequence[int]:
    """Of a step's held samples those that a micro-batch of `indices` has."""
    return range(indices.start * recipe.hold // recipe.batch, indices.stop * recipe.hold // recipe.batch)

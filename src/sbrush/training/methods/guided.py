"""Guided Distillation (arXiv 2210.03142): first the teacher's guidance into one forward, then its steps by half.

1. The student takes w as input and learns, at every t, the guided teacher x^w = (1 + w) x(y) - w x(null).
2. Halvings: a frozen copy of the student, which takes 2 N steps of DDIM, teaches it to take N. Two steps of the copy,
   from t over t' to t'', lead to z''; one step of the student leads there too if its guess of the clean image is

       x = (z'' - (sigma'' / sigma_t) z_t) / (alpha'' - (sigma'' / sigma_t) alpha_t)

   Then the student, its average taken for it, is the next halving's copy, with half as many steps.

t = CLEAN stands for the end of the last step: alpha = 1, sigma = 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from sbrush.console import SbrushError, count
from sbrush.core import NoiseSchedule
from sbrush.models.ladder import Sampling
from sbrush.models.model import Model
from sbrush.models.schedule import one_step_scheduler, timesteps_of
from sbrush.models.unet import attend_explicitly
from sbrush.prompts import ShuffledPrompts
from sbrush.storage.checkpoint import Checkpoint
from sbrush.training.methods.lcm import ddim_step
from sbrush.training.methods.regression import MicroBatch, Outcome, Regression
from sbrush.training.networks import misfit
from sbrush.training.recipes import Recipe

CLEAN = -1  # the last entry of with_clean's schedule


def with_clean(schedule: NoiseSchedule) -> NoiseSchedule:
    """A schedule with one more entry at its end, CLEAN, where an image has no noise."""
    one, zero = schedule.alpha.new_ones(1), schedule.alpha.new_zeros(1)
    return NoiseSchedule(torch.cat([schedule.alpha, one]), torch.cat([schedule.sigma, zero]))


def halving_target(z_t: Tensor, z_end: Tensor, t: Tensor, end: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The clean image from which one DDIM step leads from z_t at t to z_end at `end`, a lower timestep or CLEAN.

    Float32 [B, C, H, W]; see the formula above. `schedule`: with_clean's.
    """
    (alpha, sigma), (alpha_end, sigma_end) = schedule.at(t), schedule.at(end)
    ratio = sigma_end / sigma
    return (z_end.float() - ratio * z_t.float()) / (alpha_end - ratio * alpha)


def snr_weight(t: Tensor, schedule: NoiseSchedule, kind: Literal["truncated", "plus-one"]) -> Tensor:
    """What the squared error in x0 is weighted by: max(snr, 1), or snr + 1, the squared error in v. [B, 1, 1, 1]."""
    alpha, sigma = schedule.at(t)
    snr = (alpha / sigma).pow(2)
    return snr.clamp(min=1) if kind == "truncated" else snr + 1


def weighted_loss(x0: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """mean weight (x0 - target)^2."""
    return (weight * (x0.float() - target.float()).pow(2)).mean()


@dataclasses.dataclass(frozen=True)
class Stage:
    """Training steps `first` .. `last`, counted from 1. `steps`: of the student after it; None: it learns guidance."""

    first: int
    last: int
    steps: int | None


def stages_of(recipe: Recipe) -> list[Stage]:
    """The stages of a run. ValueError if the student's steps are not reached by halving, or a stage has no step."""
    halvings = (recipe.halve_from // recipe.student_steps).bit_length() - 1
    if halvings < 0 or recipe.student_steps << halvings != recipe.halve_from:
        raise ValueError(f"halving {recipe.halve_from} steps again and again does not give {recipe.student_steps}")
    learned = round(recipe.guide_share * recipe.steps) if halvings else recipe.steps
    ends = [learned + round((recipe.steps - learned) * i / halvings) for i in range(1, halvings + 1)]
    stages = [Stage(1, learned, None)]
    for halving, end in enumerate(ends, 1):
        stages.append(Stage(stages[-1].last + 1, end, recipe.halve_from >> halving))
    if any(stage.last < stage.first for stage in stages):
        raise ValueError(f"{recipe.steps} training steps are too few for guidance and {halvings} halvings")
    return stages


class Guided(Regression):
    """Guided Distillation; `halved` is the frozen copy that teaches the present halving."""

    unused: ClassVar[tuple[str, ...]] = (*Regression.unused, "grid_steps", "huber_c")
    metrics: ClassVar[tuple[str, ...]] = (
        *Regression.metrics,
        "taught_steps",  # the student's in this stage; 0 while it learns guidance
    )
    extendable = False

    def __init__(self, teacher: Model, recipe: Recipe, **options: Any) -> None:
        super().__init__(teacher, recipe, **options)
        self.stages = stages_of(recipe)
        self.halved: UNet2DConditionModel | None = None
        self._clean = with_clean(self.schedule)

    @classmethod
    def sampling(cls, recipe: Recipe) -> Sampling:
        """DDIM: the noise that the student predicts is kept between its steps."""
        return Sampling(recipe.student_steps, fresh=False, guidance=recipe.guidance)

    @classmethod
    def check(cls, recipe: Recipe, teacher: Model) -> None:
        """SbrushError if the recipe's stages do not lead to its student, or not with this teacher's schedule."""
        if recipe.student_rank:
            raise SbrushError(
                "Guided Distillation trains a full student: a LoRA takes no guidance scale as input",
                "leave out --student-lora, or take --recipe lcm",
                code=2,
            )
        try:
            stages_of(recipe)
        except ValueError as problem:
            raise SbrushError(
                f"recipe {recipe.name}: {problem}",
                "--set halve_from=N with N = --student-steps times a power of two; more --steps for more halvings",
                code=2,
            ) from None
        if recipe.student_steps == 1 and teacher.scheduler.alphas_cumprod[-1] == 0:
            raise SbrushError(
                "the teacher's schedule ends in pure noise, from which one step cannot be taught by halving",
                "--student-steps 2, or another method",
                code=2,
            )
        timesteps = len(teacher.scheduler.alphas_cumprod)
        if 2 * recipe.halve_from > timesteps:
            raise SbrushError(
                f"{count(recipe.halve_from, 'step')} on a schedule of {timesteps} timesteps", "lower halve_from", code=2
            )
        super().check(recipe, teacher)

    @classmethod
    def forwards(cls, recipe: Recipe) -> float:
        """The student's 3; the guided teacher's 2, or the two steps of the present halving's."""
        return 5

    @classmethod
    def kept(cls, student: int) -> dict[str, int]:
        """The present halving's teacher."""
        return {"teacher of the present halving": student}

    def stage(self, step: int) -> Stage:
        """The stage that a training step is in."""
        return next(stage for stage in self.stages if step <= stage.last)

    def learning_rate(self, step: int) -> float:
        """The student's: each stage has the recipe's rise and fall."""
        stage = self.stage(step)
        whole = dataclasses.replace(self.recipe, steps=stage.last - stage.first + 1)
        return whole.student_lr_at(step - stage.first + 1)

    def average_step(self, step: int) -> int:
        """The average starts afresh in each stage."""
        return step - self.stage(step).first + 1

    def step(self, step: int, prompts: ShuffledPrompts) -> dict[str, Tensor]:
        """One update of the student; the first of a halving makes the student its own teacher."""
        stage = self.stage(step)
        if stage.steps and step == stage.first:
            self._start_halving()
        steps = torch.tensor(float(stage.steps or 0), device=self.accelerator.device)
        return super().step(step, prompts) | {"taught_steps": steps}

    def compare(self, step: int, batch: MicroBatch) -> Outcome:
        """The weighted squared error in x0 to the guided teacher, or to two steps of the present halving's teacher."""
        recipe, steps = self.recipe, self.stage(step).steps
        if steps is None:
            t = batch.draw.timesteps(0, len(self.schedule) - 1)
            x_t = self.noisy(batch, t)
            target = self.to_x0(self.teacher_output(x_t, t, batch), x_t, t)
        else:
            grid = trailing(self.teacher.scheduler, 2 * steps).to(self.accelerator.device)
            place = 2 * batch.draw.timesteps(0, steps - 1)
            t, middle, end = (grid[place + i] for i in range(3))
            x_t = self.noisy(batch, t)
            z = x_t
            for start, stop in ((t, middle), (middle, end)):
                output = self.output_of(self._halved(), z, start, batch.guided)
                z = ddim_step(output, z, start, stop, self._clean, self.prediction)
            target = halving_target(x_t, z, t, end, self._clean)
        x0 = self.to_x0(self.student_output(x_t, t, batch), x_t, t)
        weight = snr_weight(t, self.schedule, recipe.snr_weight)
        return Outcome(weighted_loss(x0, target, weight), x0, target)

    def summary(self, entry: Mapping[str, float | None]) -> str:
        """A log entry in a few words, for the progress line."""
        steps = int(entry["taught_steps"] or 0)
        return super().summary(entry) + (f", towards {count(steps, 'step')}" if steps else ", learning guidance")

    @torch.no_grad()
    def _start_halving(self) -> None:
        """The student becomes its average, a copy of it the teacher of this halving, and Adam forgets."""
        for name, tensor in self.ema.tensors.items():
            self.trained[name].copy_(tensor)
        self._teach(self.trained)
        self.student_optimizer.state.clear()

    def _halved(self) -> UNet2DConditionModel:
        if self.halved is None:
            raise RuntimeError("a halving has begun without its teacher")
        return self.halved

    def _teach(self, weights: Mapping[str, Tensor]) -> None:
        """Makes the halving's teacher, in the number format of the run's own teacher."""
        if self.halved is None:
            # Not by deepcopy: accelerate has given the student a forward that is bound to the student.
            made = UNet2DConditionModel.from_config(self.student.config)
            made = nn.Module.to(made, self.accelerator.device, self.teacher.unet.dtype)
            self.halved = made.to(memory_format=self.memory_format).requires_grad_(False).eval()
            attend_explicitly(self.halved)
        self.halved.load_state_dict(weights)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Everything that training changes, the present halving's teacher among it."""
        return super().state() | ({"halved": self.halved.state_dict()} if self.halved else {})

    def load(self, saved: Checkpoint) -> None:
        """Restores what `state` gave. SbrushError if it does not belong to this run's networks."""
        super().load(saved)
        if self.stage(saved.step).steps is None:
            return
        weights = saved.part("halved")
        shapes = {name: p.shape for name, p in self.trained.items()}
        if {name: p.shape for name, p in weights.items()} != shapes or not all(
            p.isfinite().all() for p in weights.values()
        ):
            raise misfit(saved.step)
        self._teach(weights)


def trailing(teacher: DDIMScheduler, steps: int) -> Tensor:
    """Where `steps` DDIM steps start, descending from T, and CLEAN where the last one ends: int64 [steps + 1]."""
    return torch.cat([timesteps_of(one_step_scheduler(teacher), steps), torch.tensor([CLEAN])])

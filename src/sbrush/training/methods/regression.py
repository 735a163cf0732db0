"""What lcm.py and guided.py share: a student learns, from noisy clean images, a target for each guidance weight w.

Its UNet takes w as one more input (diffusers' time_cond_proj_dim), so that one student draws at every guidance scale
1 + w that it has learned, in one forward a step. A student that is a LoRA takes none.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sbrush import core
from sbrush.console import SbrushError
from sbrush.core import Conditioning
from sbrush.models.model import Model, guidance_embedding
from sbrush.models.unet import (
    GUIDANCE_WIDTH,
    add_lora,
    attend_explicitly,
    set_role,
    with_guidance_input,
)
from sbrush.noise import StepNoise
from sbrush.prompts import ShuffledPrompts
from sbrush.training.accounting import Held, conditioning_shapes, kernels
from sbrush.training.alignment import Alignment
from sbrush.training.images import TrainingImages
from sbrush.training.methods.method import Machine, Method, Rehearsal, progress_line, split_batch
from sbrush.training.networks import Networks
from sbrush.training.recipes import Recipe
from sbrush.training.request import ExecutionOptions
from sbrush.training.text_cache import TextCache


@dataclass(frozen=True)
class MicroBatch:
    """Clean images and what goes with them."""

    draw: StepNoise
    x0: Tensor  # [b, C, H, W] float32
    w: Tensor  # [b]
    cond: Conditioning  # for the teacher
    guided: Conditioning  # for the student: with w embedded


class Outcome(NamedTuple):
    """What the student made of a micro-batch."""

    loss: Tensor
    x0: Tensor  # the student's guess at the clean latents [b, C, H, W]
    target: Tensor  # what it is held to


class Regression(Networks, Method):
    """A student, its frozen teacher, and the clean images; a subclass says what the student is held to."""

    from_images = True
    unused: ClassVar[tuple[str, ...]] = (
        "gap", "guide_lora", "lora_lr", "lora_rank", "lora_alpha", "lora_targets", "lora_updates", "shared_forward",
        "lora_weight", "null_chance", "t_init", "t_low", "t_high", "reparameterised", "lora_lr_end", "guidance_to",
        "guidance_high", "lora_lead", "tell_rung", "anchor_weight", "anchor_end", "first_share", "pairs",
        "pair_steps", "pair_guidance", "pair_share", "pair_weight", "hold", "hold_weight", "clip_weight", "clip_tau",
    )  # fmt: skip
    metrics: ClassVar[tuple[str, ...]] = (
        "student_loss",
        "x0_mean",  # of the student's latents
        "x0_std",
        "student_grad",  # norm before clipping
        "skipped",  # 1 if the loss or a gradient was not finite
    )
    views: ClassVar[dict[str, str]] = {"student x0": "x0", "target x0": "target_x0"}

    def __init__(
        self,
        teacher: Model,
        recipe: Recipe,
        *,
        seed: int,
        accelerator: Accelerator,
        images: TrainingImages,
        init: Model | None = None,
        execution: ExecutionOptions | None = None,
        text_cache: TextCache | None = None,
        **_: None,
    ) -> None:
        """`images`: filled already. `text_cache`: filled here."""
        execution = execution or ExecutionOptions()
        self._micro_batches = split_batch(recipe, execution, accelerator.process_index, accelerator.num_processes)
        super().__init__(teacher, recipe, seed=seed, accelerator=accelerator, init=init, execution=execution)
        self.images, self.text_cache = images, text_cache
        self._null = teacher.null()
        if text_cache:
            text_cache.fill(accelerator)
            for _, encoder in teacher.text_parts:
                encoder.cpu()
        self.schedule, self.prediction = teacher.schedule, teacher.prediction

    @abstractmethod
    def compare(self, step: int, batch: MicroBatch) -> Outcome:
        """The student's loss on a micro-batch, with its gradient."""

    def new_student(self, unet: UNet2DConditionModel) -> UNet2DConditionModel:
        """The same with an input for w, which has no effect before it is trained."""
        return with_guidance_input(unet)

    def learning_rate(self, step: int) -> float:
        """The student's in a step, counted from 1."""
        return self.recipe.student_lr_at(step)

    def average_step(self, step: int) -> int:
        """Steps that the average has followed the student, of which its ramp depends."""
        return step

    def step(self, step: int, prompts: ShuffledPrompts) -> dict[str, Tensor]:
        """One update of the student; `step` counts from 1, `prompts` has a prompt for each of the images."""
        self.student_optimizer.param_groups[0]["lr"] = self.learning_rate(step)
        outcomes = []
        for indices in self._micro_batches:
            last = indices is self._micro_batches[-1]
            # Gradients of all micro-batches but the last are added up here before processes exchange them.
            with nullcontext() if last else self.accelerator.no_sync(self._student):
                outcome = self.compare(step, self._micro_batch(step, indices, prompts))
                set_role(self.student, "student")
                self.accelerator.backward(outcome.loss / len(self._micro_batches))
            outcomes.append(Outcome(*(value.detach() for value in outcome)))
        norm = self.apply(self.student_optimizer, self.trained)
        self.ema.update(self.average_step(step))
        x0, target = (torch.cat([getattr(one, name) for one in outcomes]) for name in ("x0", "target"))
        return {
            "student_loss": torch.stack([one.loss for one in outcomes]).mean(), "x0_mean": x0.mean(),
            "x0_std": x0.std(), "student_grad": norm.detach(), "skipped": (~norm.isfinite()).float(),
            "x0": x0, "target_x0": target,
        }  # fmt: skip

    def _micro_batch(self, step: int, indices: range, prompts: ShuffledPrompts) -> MicroBatch:
        draw = StepNoise(self.seed, step, indices, self.accelerator.device)
        numbers = [(step - 1) * self.recipe.batch + i for i in indices]
        rows = [prompts.place(number) for number in numbers]
        if self.text_cache:
            cond = self.text_cache.conditioning([self.images.places[row] for row in rows])
        else:
            cond = self.teacher.encode([prompts[number] for number in numbers])
        w = draw.uniforms(self.recipe.w_min, self.recipe.w_max)
        guided = cond if self.recipe.student_rank else cond | {"guidance": guidance_embedding(w, GUIDANCE_WIDTH)}
        return MicroBatch(draw, self.images.latents(rows, self.accelerator.device), w, cond, guided)

    def noisy(self, batch: MicroBatch, t: Tensor) -> Tensor:
        """x_t of clean latents, with fresh noise."""
        return core.add_noise(batch.x0, batch.draw.normal(self.teacher.latent_shape), t, self.schedule)

    def student_output(self, x_t: Tensor, t: Tensor, batch: MicroBatch, *, grad: bool = True) -> Tensor:
        """The student's UNet's output; without `grad` of its bare network, whatever its weights are now."""
        set_role(self.student, "student")
        x = x_t.contiguous(memory_format=self.memory_format)
        if grad:
            return self.teacher.predict(self._student, x, t, batch.guided).float()
        return self.output_of(self.student, x, t, batch.guided)

    @torch.no_grad()
    def output_of(self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """A network's output without gradient, float32."""
        x = x_t.contiguous(memory_format=self.memory_format)
        with self.accelerator.autocast():
            return self.teacher.predict(network, x, t, conditioning).float()

    def teacher_output(self, x_t: Tensor, t: Tensor, batch: MicroBatch) -> Tensor:
        """The teacher's guided output, (1 + w) u(y) - w u(null): the guided teacher's, be it an epsilon or a v."""
        set_role(self.teacher.unet, "teacher")
        both = core.with_null(batch.cond, self._null)
        twice, t_twice = torch.cat([x_t, x_t]), torch.cat([t, t])
        output, null = self.output_of(self.teacher.unet, twice, t_twice, both).chunk(2)
        return core.guide(output, null, 1 + batch.w.view(-1, 1, 1, 1))

    def to_x0(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """See core.to_x0."""
        return core.to_x0(output, x_t, t, self.schedule, self.prediction)

    def summary(self, entry: Mapping[str, float | None]) -> str:
        """A log entry in a few words, for the progress line."""
        return progress_line(entry, loss="student_loss")

    @classmethod
    def check(cls, recipe: Recipe, teacher: Model) -> None:
        """SbrushError if the student is to draw at a guidance scale, or in steps, that it does not learn."""
        low, high = 1 + recipe.w_min, 1 + recipe.w_max
        if not recipe.student_rank and not low <= recipe.guidance <= high:
            raise SbrushError(
                f"the student is to draw at guidance {recipe.guidance:g}, and learns {low:g} to {high:g}",
                f"--guidance {low:g} to {high:g}, or change w_min and w_max: w is the scale less one",
                code=2,
            )
        cls.sampling(recipe).scheduler(teacher.scheduler)  # or SbrushError

    @classmethod
    @abstractmethod
    def forwards(cls, recipe: Recipe) -> float:
        """What an update costs for each image, in UNet forwards; a backward counts as two, through a LoRA as one."""

    @classmethod
    def rehearse(
        cls, recipe: Recipe, teacher: Model, execution: ExecutionOptions, machine: Machine, alignment: Alignment | None
    ) -> Rehearsal:
        """One micro-batch played through on shapes: the teacher's guided forward, then the student's, and back."""
        share = max(1, recipe.batch // machine.world // execution.micro_batches)
        wide = {} if recipe.student_rank else {"time_cond_proj_dim": GUIDANCE_WIDTH}
        base, student = (UNet2DConditionModel.from_config(teacher.unet.config, **more) for more in ({}, wide))
        trained = list(student.parameters())
        if rank := recipe.student_rank:
            trained = list(
                add_lora(student, "student", rank=rank, alpha=1, targets=cls.targets(recipe), seed=0).values()
            )
        dtype = torch.bfloat16 if machine.bf16 else torch.float32
        for unet in (base, student):
            attend_explicitly(nn.Module.to(unet, dtype), machine.device)
            if execution.checkpointing:
                unet.enable_gradient_checkpointing()
                unet.train()

        def forward(unet: nn.Module, batch: int) -> Tensor:
            conditioning = conditioning_shapes(teacher, batch)
            if wide and unet is student:
                conditioning["guidance"] = torch.zeros(batch, GUIDANCE_WIDTH)
            x, t = torch.zeros(batch, *teacher.latent_shape, dtype=dtype), torch.zeros(batch, dtype=torch.int64)
            return teacher.predict(unet, x, t, {name: value.to(dtype) for name, value in conditioning.items()}).float()

        counter, held = FlopCounterMode(display=False), Held([base, student])
        with counter, torch.no_grad():
            forward(base, 1)
        with held, kernels(autocast=machine.bf16 and machine.device.startswith("cuda")):
            with torch.no_grad():
                forward(base, 2 * share)
            forward(student, share).sum().backward()
        size = sum(p.numel() for p in trained)
        again = 1 if execution.checkpointing else 0
        kept = cls.kept(size)
        return Rehearsal(
            size, {}, held.most, counter.get_total_flops(), cls.forwards(recipe) + again,
            frozen={name: (2 if machine.bf16 else 4) * parameters for name, parameters in kept.items()},
            kept=sum(kept.values()) * (2 if machine.bf16 else 4),
        )  # fmt: skip

    @classmethod
    def kept(cls, student: int) -> dict[str, int]:
        """Further frozen networks that are on the device and in checkpoints: their parameters, given the student's."""
        return {}

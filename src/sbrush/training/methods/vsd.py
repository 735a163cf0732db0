"""Variational Score Distillation, SwiftBrush's method: core.py's formulas put together on the networks of networks.py.

What a step of it costs is rehearsal.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sbrush import core
from sbrush.console import SbrushError
from sbrush.core import Conditioning
from sbrush.models.model import Model
from sbrush.models.unet import Role, add_lora, set_role
from sbrush.noise import StepNoise
from sbrush.prompts import ShuffledPrompts
from sbrush.training.alignment import Alignment
from sbrush.training.methods.holding import Anchor, Held, Holding
from sbrush.training.methods.method import Machine, Method, Rehearsal, progress_line, split_batch
from sbrush.training.methods.rehearsal import rehearse
from sbrush.training.methods.steering import ControlImages, prepare_controls
from sbrush.training.methods.teachers import Teachers
from sbrush.training.networks import Networks, average_gradients
from sbrush.training.recipes import Recipe
from sbrush.training.request import ExecutionOptions
from sbrush.training.text_cache import TextCache


@dataclass
class Images:
    """The student's images of a micro-batch, and what it drew them from."""

    step: int
    indices: range  # the samples' places in the global batch
    draw: StepNoise
    texts: list[str]
    cond: Conditioning
    rung: int  # of the student's ladder, from 0
    x: Tensor  # [b, C, H, W] float32, what the student saw there: at its first rung pure noise
    t: Tensor  # [b] int64, the rung's timestep
    x0: Tensor  # [b, C, H, W] float32, with the student's gradient until that has been taken


@dataclass
class Scores:
    """What both teachers say of those images, made noisy. Without gradient, but for lora_loss."""

    noise: Tensor  # [b, C, H, W] float32, as are all but t
    x_t: Tensor
    t: Tensor  # [b] int64
    scale: float | Tensor  # the guidance scale
    eps_teacher: Tensor
    eps_lora: Tensor
    lora_loss: Tensor | None  # if the LoRA teacher's score was a forward to be trained through


class VSD(Networks, Method):
    """A student and its two teachers, see teachers.py."""

    steerable: ClassVar[bool] = True
    asked: ClassVar[type[Teachers]] = Teachers  # for the scores; a benchmark asks otherwise
    unused: ClassVar[tuple[str, ...]] = (
        "w_min", "w_max", "images", "image_steps", "image_guidance", "grid_steps", "huber_c", "halve_from",
        "guide_share", "snr_weight",
    )  # fmt: skip
    metrics: ClassVar[tuple[str, ...]] = (
        "gap",  # mean |g|
        "student_loss",
        "lora_loss",
        "pair_loss",
        "anchor_loss",
        "hold_loss",  # pair_loss of the prompts whose images are to stay, if there are any
        "clip_cosine",  # of the student's images and their prompts, while the clamped CLIP loss is on
        "x0_mean",  # of the student's latents
        "x0_std",
        "student_grad",  # norms before clipping
        "lora_grad",
        "skipped",  # 1 if the loss or a gradient was not finite
        "score_gap_ratio",  # mean |eps_phi - eps_psi| / mean |eps_phi - eps|
        "lora_divergence",  # mean |eps_psi - eps| / mean |eps_phi - eps|
    )
    views: ClassVar[dict[str, str]] = {"student x0": "x0", "teacher x0": "teacher_x0", "LoRA x0": "lora_x0"}

    def __init__(
        self,
        teacher: Model,
        recipe: Recipe,
        *,
        seed: int,
        accelerator: Accelerator,
        init: Model | None = None,
        execution: ExecutionOptions | None = None,
        alignment: Alignment | None = None,
        text_cache: TextCache | None = None,
    ) -> None:
        """`alignment`: for the clamped CLIP loss, if the recipe has it. `text_cache`: filled here."""
        if recipe.clip_weight and not alignment:
            raise ValueError("the clamped CLIP loss needs a CLIP model")
        execution = execution or ExecutionOptions()
        self._control_images = None
        if teacher.controls:
            if init is None:
                raise ValueError("ControlNets in the loop need a student to start from")
            teacher = prepare_controls(teacher, accelerator)
        self._micro_batches = split_batch(recipe, execution, accelerator.process_index, accelerator.num_processes)
        self._pair_every = recipe.batch // recipe.pairs if recipe.pairs else recipe.batch
        super().__init__(teacher, recipe, seed=seed, accelerator=accelerator, init=init, execution=execution)
        if init and teacher.controls:
            self._control_images = ControlImages(init, teacher, accelerator)
        self._anchor = Anchor(init, teacher, accelerator) if init and recipe.anchor_weight else None
        self._holding: Holding | None = None
        self.lora, self.lora_optimizer = self.helpers["lora"]
        self.alignment, self.text_cache = alignment, text_cache
        self.teachers = self.asked(
            teacher, self._base, recipe, accelerator, rung_tokens=self._rung_tokens, memory_format=self.memory_format
        )
        if text_cache:
            text_cache.fill(accelerator)
            for _, encoder in teacher.text_parts:
                encoder.cpu()
        self.schedule, self.prediction = teacher.schedule, teacher.prediction
        self._rungs = teacher.as_student(self.scheduler, {"steps": recipe.student_steps}).rungs()

    def hold(self, held: Held) -> None:
        """From now on the recipe's `hold` samples of a step are held to what a student drew of them before."""
        self._holding = Holding(held, self.teacher, self.recipe, self.accelerator, self.seed)

    def add_helpers(self) -> dict[str, tuple[dict[str, nn.Parameter], float]]:
        """The LoRA teacher: an adapter on the teacher's own frozen UNet."""
        recipe = self.recipe
        lora = add_lora(
            self.teacher.unet, "lora_teacher", rank=recipe.lora_rank, alpha=recipe.lora_alpha,
            targets=recipe.lora_targets, seed=self.seed,
        )  # fmt: skip
        self._rung_tokens = None
        if recipe.tell_rung and recipe.student_steps > 1:
            # Without it, one score stands for what the student draws at all its rungs: that the whole is right then
            # leaves each rung free to lack what another has too much of (tests/test_few_steps.py, on Gaussians).
            width = self.teacher.unet.config.cross_attention_dim
            self._rung_tokens = nn.Parameter(torch.zeros(recipe.student_steps, width, device=self.accelerator.device))
            lora["rung_tokens"] = self._rung_tokens
        return {"lora": (lora, recipe.lora_lr)}

    def summary(self, entry: Mapping[str, float | None]) -> str:
        """A log entry in a few words, for the progress line."""
        return progress_line(entry, gap="gap", LoRA_loss="lora_loss")

    @classmethod
    def check(cls, recipe: Recipe, teacher: Model) -> None:
        """SbrushError if the recipe's timesteps, steps or weights do not go with the teacher's schedule."""
        T = len(teacher.schedule) - 1
        if recipe.t_init is not None and recipe.t_init > T:
            raise SbrushError(
                f"t_init {recipe.t_init} is beyond the teacher's last timestep, {T}", f"take 1 to {T}", code=2
            )
        if recipe.t_high > T:
            raise SbrushError(f"t_high {recipe.t_high} is beyond the teacher's last timestep, {T}", "lower it", code=2)
        cls.sampling(recipe).scheduler(teacher.scheduler, recipe.t_init)  # or SbrushError
        if recipe.lora_weight != "alpha" and teacher.scheduler.alphas_cumprod[-1] == 0:
            raise SbrushError(
                f"the teacher's schedule ends in pure noise, where lora_weight {recipe.lora_weight} has no value",
                "--set lora_weight=alpha",
                code=2,
            )

    @classmethod
    def rehearse(
        cls, recipe: Recipe, teacher: Model, execution: ExecutionOptions, machine: Machine, alignment: Alignment | None
    ) -> Rehearsal:
        """What a step costs: see rehearsal.py."""
        return rehearse(recipe, teacher, execution, machine, alignment)

    def step(self, step: int, prompts: ShuffledPrompts) -> dict[str, Tensor]:
        """One update of the student, then the LoRA teacher's; `step` counts from 1. Metrics stay on the device.

        The returned dictionary also holds x0 [B, C, H, W] and the two teachers' guesses of it, for the sample grid.
        """
        recipe, schedule = self.recipe, self.schedule
        self.student_optimizer.param_groups[0]["lr"] = recipe.student_lr_at(step)
        self.lora_optimizer.param_groups[0]["lr"] = recipe.lora_lr_at(step)
        parts, measured = list[tuple[Images, Scores]](), list[dict[str, Tensor]]()
        for indices in self._micro_batches:
            with self._gradients_wait(last=indices is self._micro_batches[-1]):
                images = self._draw_images(step, indices, prompts)
                scores = self._ask_teachers(images)
                loss, metrics = self._student_loss(images, scores)
                if loss.requires_grad:
                    self._backward(loss, "student")
                images.x0 = images.x0.detach()
                if scores.lora_loss is not None:
                    self._backward(scores.lora_loss, "lora_teacher")
            parts.append((images, scores))
            measured.append(metrics)
        student_grad = torch.zeros((), device=schedule.alpha.device)
        if self._learns(step, parts[-1][0].rung):
            student_grad = self.apply(self.student_optimizer, self.trained)
        self.ema.update(step)
        lora_loss, lora_grad = self._teach_lora(parts)

        x0 = torch.cat([images.x0 for images, _ in parts])
        noise, x_t, t, eps_teacher, eps_lora = (
            torch.cat([getattr(scores, name) for _, scores in parts])
            for name in ("noise", "x_t", "t", "eps_teacher", "eps_lora")
        )
        error = (eps_teacher - noise).abs().mean()
        skipped = ~(student_grad.isfinite() & lora_grad.isfinite())
        result = {name: torch.stack([one[name] for one in measured]).mean() for name in measured[0]}
        result |= {
            "lora_loss": lora_loss, "x0_mean": x0.mean(), "x0_std": x0.std(), "student_grad": student_grad,
            "lora_grad": lora_grad, "skipped": skipped.float(),
            "score_gap_ratio": (eps_teacher - eps_lora).abs().mean() / error,
            "lora_divergence": (eps_lora - noise).abs().mean() / error, "x0": x0,
            "teacher_x0": core.to_x0(eps_teacher, x_t, t, schedule, "epsilon"),
            "lora_x0": core.to_x0(eps_lora, x_t, t, schedule, "epsilon"),
        }  # fmt: skip
        return {name: value.detach() for name, value in result.items()}

    def _draw_images(self, step: int, indices: range, prompts: ShuffledPrompts) -> Images:
        """What the student makes of its prompts and noise, at the step's rung."""
        recipe = self.recipe
        draw = StepNoise(self.seed, step, indices, self.accelerator.device)
        numbers = [(step - 1) * recipe.batch + i for i in indices]
        texts = [prompts[number] for number in numbers]
        if self.text_cache:
            cond = self.text_cache.conditioning([prompts.place(number) for number in numbers])
        else:
            cond = self.teacher.encode(texts)
        if self._control_images:
            cond = cond | {"control": self._control_images.draw(cond, draw)}
        z = draw.normal(self.teacher.latent_shape)
        set_role(self.student, "student")
        rung = self._choose_rung(draw)
        x, t = self._go_down(z, rung, draw, cond)
        with torch.set_grad_enabled(self._learns(step, rung)):
            output = self._as_student(x, t, cond)
        x0 = core.student_x0(
            output.float(), x, t, self.schedule, self.prediction, reparameterised=recipe.reparameterised
        )
        return Images(step, indices, draw, texts, cond, rung, x, t, x0)

    def _ask_teachers(self, images: Images) -> Scores:
        """Both teachers' noise predictions on the images, at noise and timesteps of their own."""
        recipe, schedule, draw, cond, rung = self.recipe, self.schedule, images.draw, images.cond, images.rung
        t = draw.timesteps(recipe.t_low, recipe.t_high)
        noise = draw.normal(self.teacher.latent_shape)
        x_t = core.add_noise(images.x0.detach(), noise, t, schedule)
        scale = self._guidance(draw)
        eps_teacher = self.teachers.score(x_t, t, cond, scale)
        lora_loss = None
        if recipe.gap == "sds":
            eps_lora = noise
        elif recipe.shared_forward:
            eps_lora = self.teachers.lora_epsilon(x_t, t, cond, rung)
            lora_loss = core.lora_loss(eps_lora, noise, t, schedule, weight=recipe.lora_weight)
            eps_lora = eps_lora.detach()
        else:
            eps_lora = self.teachers.lora_score(x_t, t, cond, rung, scale if recipe.guide_lora else 1.0)
        return Scores(noise, x_t, t, scale, eps_teacher, eps_lora, lora_loss)

    def _student_loss(self, images: Images, scores: Scores) -> tuple[Tensor, dict[str, Tensor]]:
        """The paper's loss and what the recipe adds to it; and what is logged of each."""
        recipe, step, x0 = self.recipe, images.step, images.x0
        if recipe.gap == "dmd":
            gap = core.dmd_gap(scores.eps_teacher, scores.eps_lora, scores.noise)
        else:
            gap = core.vsd_gap(scores.eps_teacher, scores.eps_lora, scores.t, self.schedule)
        none = torch.zeros((), device=x0.device)
        loss = core.vsd_loss(x0, gap) if step > recipe.lora_lead else none
        metrics = {"gap": gap.abs().mean(), "pair_loss": none, "anchor_loss": none}
        paired = slice(-images.indices.start % self._pair_every, None, self._pair_every)
        if recipe.pairs and len(z := images.x[paired]) and step <= recipe.pair_share * recipe.steps:
            cond = {name: value[paired] for name, value in images.cond.items()}
            metrics["pair_loss"] = core.pair_loss(x0[paired], self.teachers.images(z, cond))
            loss = loss + recipe.pair_weight * len(z) / len(x0) * metrics["pair_loss"]
        if self._anchor and self._anchor.holds(images.rung):
            x, t, cond = images.x, images.t, images.cond
            guess = partial(self.teachers.score, x, t, cond, scores.scale)
            metrics["anchor_loss"] = core.pair_loss(x0, self._anchor.target(images.rung, x, t, cond, guess))
            loss = loss + recipe.anchor_weight_at(step, images.rung) * metrics["anchor_loss"]
        if self.alignment and (weight := recipe.clip_weight_at(step)):
            with self.accelerator.autocast():
                cosine = self.alignment.cosines(x0, images.texts)
            metrics["clip_cosine"] = cosine.mean()
            loss = loss + weight * core.clamped_clip_loss(cosine, recipe.clip_tau)
        if self._holding and step > recipe.lora_lead:
            set_role(self.student, "student")
            metrics["hold_loss"] = self._holding.loss(self._as_student, step, images.rung, images.indices)
            loss = loss + recipe.hold_weight * metrics["hold_loss"]
        metrics["student_loss"] = loss
        return loss, {name: value.detach() for name, value in metrics.items()}

    def _teach_lora(self, parts: Sequence[tuple[Images, Scores]]) -> tuple[Tensor, Tensor]:
        """The LoRA teacher's updates on the images: its last loss, and its gradient's norm before clipping."""
        recipe = self.recipe
        losses = [scores.lora_loss for _, scores in parts if scores.lora_loss is not None]
        norm = torch.zeros((), device=self.schedule.alpha.device)
        for update in range(recipe.lora_updates if recipe.gap != "sds" else 0):
            if update > 0 or not recipe.shared_forward:
                losses = []
                for images, _ in parts:
                    with self._gradients_wait(last=images is parts[-1][0]):
                        losses.append(self._lora_loss(images))
                        self._backward(losses[-1], "lora_teacher")
            self._average_rung_tokens()
            norm = self.apply(self.lora_optimizer, self.lora)
        return torch.stack(losses).mean() if losses else torch.zeros_like(norm), norm

    def _learns(self, step: int, rung: int) -> bool:
        """Whether the student learns in a step: while the LoRA teacher leads, from the anchor alone."""
        return step > self.recipe.lora_lead or (self._anchor is not None and self._anchor.holds(rung))

    def _choose_rung(self, draw: StepNoise) -> int:
        """The student's step that is trained, counted from 0."""
        count, share = len(self._rungs), self.recipe.first_share
        if count == 1:
            return 0
        if share is None:
            return draw.index(count)
        return 0 if draw.chance(share) else 1 + draw.index(count - 1)

    def _guidance(self, draw: StepNoise) -> float | Tensor:
        """The guidance scale of a step."""
        low, high = self.recipe.guidance, self.recipe.guidance_to
        return low if high is None else draw.uniform(low, high)

    def _average_rung_tokens(self) -> None:
        """Makes their gradient that of all processes: they are no part of the module that accelerate has wrapped."""
        if self._rung_tokens is not None and self.accelerator.num_processes > 1 and not self.recipe.student_rank:
            average_gradients([self._rung_tokens], self.accelerator)

    @torch.no_grad()
    def _go_down(self, z: Tensor, rung: int, draw: StepNoise, cond: Conditioning) -> tuple[Tensor, Tensor]:
        """What the student sees at a rung of its ladder, and the rung's timestep for each sample."""
        rungs = self._rungs[: rung + 1]
        fresh = [draw.normal(self.teacher.latent_shape) for _ in rungs[1:]]
        z = core.student_input(self._as_student, z, fresh, rungs, cond, self.schedule, self.prediction)
        return z, self.schedule.start(len(z), rungs[-1])

    def _as_student(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        laid_out = x_t.contiguous(memory_format=self.memory_format)
        return self.teacher.predict(self._student, laid_out, t, conditioning)

    def _lora_loss(self, images: Images) -> Tensor:
        """The LoRA teacher's loss on the same images, with fresh noise."""
        t = images.draw.timesteps(0, len(self.schedule) - 1)
        noise = images.draw.normal(self.teacher.latent_shape)
        cond = images.cond
        if images.draw.chance(self.recipe.null_chance):
            cond = {name: value.expand_as(cond[name]) for name, value in self.teachers.null_of(cond).items()}
        x_t = core.add_noise(images.x0, noise, t, self.schedule)
        eps = self.teachers.lora_epsilon(x_t, t, cond, images.rung)
        return core.lora_loss(eps, noise, t, self.schedule, weight=self.recipe.lora_weight)

    @contextmanager
    def _gradients_wait(self, *, last: bool) -> Iterator[None]:
        """But for the last part of a batch, gradients are added up here before processes exchange them."""
        with ExitStack() as stack:
            if not last:
                for network in {self._student, self._base}:
                    stack.enter_context(self.accelerator.no_sync(network))
            yield

    def _backward(self, loss: Tensor, role: Role) -> None:
        set_role(self.student if role == "student" else self.teacher.unet, role)
        self.accelerator.backward(loss / len(self._micro_batches))

"""The networks that are trained, and one training step of theirs: core.py's formulas put together.

The loop around it is distill.py.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from sbrush import checkpoint, core, optimizer, sharding
from sbrush.alignment import Alignment
from sbrush.console import SbrushError
from sbrush.core import Words
from sbrush.ema import EMA
from sbrush.models.checks import read_network
from sbrush.models.model import Model
from sbrush.models.schedule import one_step_scheduler
from sbrush.models.unet import Role, add_lora, answer_as, attend_explicitly, merge_lora
from sbrush.noise import StepNoise
from sbrush.prompts import ShuffledPrompts
from sbrush.recipes import Recipe
from sbrush.sample import ddim
from sbrush.text_cache import TextCache


@dataclass(frozen=True)
class Fit:
    """How a run is made to fit its machine; but for rounding nothing of this changes the student."""

    micro_batches: int = 1  # that a process's share of a batch is split into: less memory, more time
    checkpointing: bool = False  # of gradients: activations are computed again in the backward
    ema_on_cpu: bool = False
    shard: bool = False  # a full student's weights and all that belongs to them are shared out among processes
    compile: str | None = None  # the networks' forwards and backwards, by this backend of torch.compile


@dataclass
class Part:
    """A part of a step's batch, from the prompts to both teachers' opinions of the student's pictures."""

    draw: StepNoise
    cond: Words
    x0: Tensor  # [b, C, H, W] float32, detached, as are all but lora_loss
    x_t: Tensor
    t: Tensor  # [b] int64
    eps_teacher: Tensor
    eps_lora: Tensor
    metrics: dict[str, Tensor]
    lora_loss: Tensor | None  # if the LoRA teacher's score was a forward to be trained through


class Distiller:
    """A student and its two teachers, and one training step of theirs.

    The teacher and the LoRA teacher are one frozen UNet: with its adapter off and on. The student is a full copy, or,
    with `recipe.student_rank`, a second adapter on the same frozen weights.
    """

    memory_format = torch.channels_last  # in which convolutions are fastest

    def __init__(
        self,
        teacher: Model,
        recipe: Recipe,
        *,
        seed: int,
        accelerator: Accelerator,
        init: Model | None = None,
        fit: Fit | None = None,
        alignment: Alignment | None = None,
        text_cache: TextCache | None = None,
    ) -> None:
        """`alignment`: for the clamped CLIP loss, if the recipe has it. `text_cache`: filled here."""
        if recipe.clip_weight and not alignment:
            raise ValueError("the clamped CLIP loss needs a CLIP model")
        self.alignment, self.text_cache = alignment, text_cache
        self.teacher, self.recipe, self.seed, self.accelerator = teacher, recipe, seed, accelerator
        self.fit = fit or Fit()
        self._parts = self._share(accelerator.process_index, accelerator.num_processes)
        base = teacher.unet
        for network in teacher.networks:
            network.to(accelerator.device)
        if recipe.student_rank:
            self.student = base
        else:
            layout = torch.contiguous_format if self.fit.shard else self.memory_format  # torch shards no other
            student = copy.deepcopy((init or teacher).unet).to(accelerator.device, memory_format=layout)
            self.student = student.float().requires_grad_(True).train()
            if self.fit.shard:
                sharding.shard(self.student, accelerator)
        if accelerator.mixed_precision == "bf16":
            # On the CPU memory is no worry, and text embeddings may as well keep their digits.
            for network in teacher.networks if accelerator.device.type == "cuda" else (base,):
                nn.Module.to(network, torch.bfloat16)  # diffusers' own `to` warns, of nothing that concerns this
        base.to(memory_format=self.memory_format)
        rank, alpha, targets = recipe.lora_rank, recipe.lora_alpha, recipe.lora_targets
        self.lora = add_lora(base, "lora_teacher", rank=rank, alpha=alpha, targets=targets, seed=seed)
        self.trained = dict(self.student.named_parameters())
        if rank := recipe.student_rank:
            self.trained = add_lora(base, "student", rank=rank, alpha=2 * rank, targets="all", seed=seed + 1)
        for unet in (base, self.student):
            attend_explicitly(unet)
            if self.fit.checkpointing:
                unet.enable_gradient_checkpointing()
                unet.train()  # without which diffusers leaves checkpointing out; these networks have no dropout
        where = torch.device("cpu") if self.fit.ema_on_cpu else None
        self.ema = EMA(self.trained, recipe.ema, device=where)
        self.student_optimizer = optimizer.make_adam(
            self.trained.values(), kind=recipe.optimizer, lr=recipe.student_lr, beta2=recipe.beta2
        )
        self.lora_optimizer = optimizer.make_adam(
            self.lora.values(), kind=recipe.optimizer, lr=recipe.lora_lr, beta2=recipe.beta2
        )
        # accelerate wraps both networks (autocast; DDP when there are several processes), each under its own name:
        # the plain modules stay reachable as self.student and self.teacher.unet. Two LoRAs in one DDP module would
        # each wait for the other's gradients, so then their gradients are averaged in `_apply`. A student that is
        # shared out averages its own.
        if recipe.student_rank:
            self._student = self._lora_teacher = accelerator.prepare_model(
                base, device_placement=False, evaluation_mode=True
            )
        else:
            self._lora_teacher = accelerator.prepare_model(base)
            self._student = accelerator.prepare_model(
                self.student, device_placement=not self.fit.shard, evaluation_mode=self.fit.shard
            )
        if self.fit.compile:
            # Each role is a graph of its own, and so is each mode: torch tells them apart by the LoRAs' switches.
            for unet in {base, self.student}:
                unet.compile(backend=self.fit.compile, dynamic=False)
        self._null = teacher.null()
        if text_cache:
            text_cache.fill(accelerator)
            for _, encoder in teacher.text_parts:
                encoder.cpu()
        self.schedule, self.prediction = teacher.schedule, teacher.prediction

    def step(self, step: int, prompts: ShuffledPrompts) -> dict[str, Tensor]:
        """One update of the student, then the LoRA teacher's; `step` counts from 1. Metrics stay on the device.

        The returned dictionary also holds x0 [B, C, H, W] and the two teachers' guesses of it, for the contact sheet.
        """
        recipe, schedule = self.recipe, self.schedule
        self.student_optimizer.param_groups[0]["lr"] = recipe.student_lr_at(step)
        self.lora_optimizer.param_groups[0]["lr"] = recipe.lora_lr_at(step)
        parts = []
        for indices in self._parts:
            with self._gradients_wait(last=indices is self._parts[-1]):
                part = self._compare(step, indices, prompts)
                if part.lora_loss is not None:
                    self._backward(part.lora_loss, "lora_teacher")
            parts.append(part)
        student_grad = self._apply(self.student_optimizer, self.trained)
        self.ema.update(step)

        lora_losses = [part.lora_loss for part in parts if part.lora_loss is not None]
        lora_grad = torch.zeros((), device=schedule.alpha.device)
        for update in range(recipe.lora_updates if recipe.gap != "sds" else 0):
            if update > 0 or not recipe.shared_forward:
                lora_losses = []
                for part in parts:
                    with self._gradients_wait(last=part is parts[-1]):
                        lora_losses.append(self._lora_loss(part))
                        self._backward(lora_losses[-1], "lora_teacher")
            lora_grad = self._apply(self.lora_optimizer, self.lora)

        whole = {
            name: torch.cat([getattr(part, name) for part in parts])
            for name in ("x0", "x_t", "t", "eps_teacher", "eps_lora")
        }
        skipped = ~(student_grad.isfinite() & lora_grad.isfinite())
        metrics = {name: torch.stack([part.metrics[name] for part in parts]).mean() for name in parts[0].metrics}
        metrics |= {
            "lora_loss": torch.stack(lora_losses).mean() if lora_losses else torch.zeros_like(lora_grad),
            "x0_mean": whole["x0"].mean(), "x0_std": whole["x0"].std(), "student_grad": student_grad,
            "lora_grad": lora_grad, "skipped": skipped.float(),
        }  # fmt: skip
        guesses = {
            name: core.to_x0(whole[eps], whole["x_t"], whole["t"], schedule, "epsilon")
            for name, eps in (("teacher_x0", "eps_teacher"), ("lora_x0", "eps_lora"))
        }
        return {name: value.detach() for name, value in (metrics | {"x0": whole["x0"]} | guesses).items()}

    def _compare(self, step: int, indices: range, prompts: ShuffledPrompts) -> Part:
        """The student's pictures and what both teachers make of them; the student's gradients are added up."""
        recipe, schedule = self.recipe, self.schedule
        draw = StepNoise(self.seed, step, indices, self.accelerator.device)
        numbers = [(step - 1) * recipe.batch + i for i in indices]
        texts = [prompts[number] for number in numbers]
        if self.text_cache:
            cond = self.text_cache.words([prompts.place(number) for number in numbers])
        else:
            cond = self.teacher.encode(texts)
        z = draw.normal(self.teacher.latent_shape)
        t_init = schedule.start(len(z), recipe.t_init)

        answer_as(self.student, "student")
        output = self.teacher.predict(self._student, self._laid_out(z), t_init, cond)
        x0 = core.student_x0(
            output.float(), z, t_init, schedule, self.prediction, reparameterised=recipe.reparameterised
        )
        t = draw.timesteps(recipe.t_low, recipe.t_high)
        noise = draw.normal(self.teacher.latent_shape)
        x_t = core.add_noise(x0.detach(), noise, t, schedule)
        scale: float | Tensor = recipe.guidance
        if recipe.guidance_to is not None:
            scale = draw.uniform(recipe.guidance, recipe.guidance_to)
        if recipe.guidance_high is not None:
            scale = torch.where(t <= recipe.guidance_high, scale, 1.0).view(-1, 1, 1, 1)
        eps_teacher = self._score("teacher", x_t, t, cond, scale)
        lora_loss = None
        if recipe.gap == "sds":
            eps_lora = noise
        elif recipe.shared_forward:
            eps_lora = self._lora_epsilon(x_t, t, cond)
            lora_loss = core.lora_loss(eps_lora, noise, t, schedule, weight=recipe.lora_weight)
            eps_lora = eps_lora.detach()
        else:
            eps_lora = self._score("lora_teacher", x_t, t, cond, scale if recipe.guide_lora else 1.0)
        if recipe.gap == "dmd":
            gap = core.dmd_gap(eps_teacher, eps_lora, noise)
        else:
            gap = core.vsd_gap(eps_teacher, eps_lora, t, schedule)
        student_loss = core.vsd_loss(x0, gap)
        pair_loss = torch.zeros((), device=x0.device)
        paired = [place for place, index in enumerate(indices) if recipe.pairs and index % self._pair_every == 0]
        if paired and step <= recipe.pair_share * recipe.steps:
            words = {name: value[paired] for name, value in cond.items()}
            pair_loss = core.pair_loss(x0[paired], self._teacher_pictures(z[paired], words))
            student_loss = student_loss + recipe.pair_weight * len(paired) / len(z) * pair_loss
        extra = {}
        if self.alignment and (weight := recipe.clip_weight_at(step)):
            with self.accelerator.autocast():
                cosine = self.alignment.cosines(x0, texts)
            student_loss = student_loss + weight * core.clamped_clip_loss(cosine, recipe.clip_tau)
            extra["clip_cosine"] = cosine.detach().mean()
        self._backward(student_loss, "student")
        error, lora_error = ((eps - noise).abs().mean() for eps in (eps_teacher, eps_lora))
        metrics = {
            "gap": gap.abs().mean(), "student_loss": student_loss.detach(), "pair_loss": pair_loss.detach(),
            "gap_share": (eps_teacher - eps_lora).abs().mean() / error, "lora_error": lora_error / error,
        }  # fmt: skip
        return Part(draw, cond, x0.detach(), x_t, t, eps_teacher, eps_lora, metrics | extra, lora_loss)

    def _lora_loss(self, part: Part) -> Tensor:
        """The LoRA teacher's loss on the same pictures, with fresh noise."""
        t = part.draw.timesteps(0, len(self.schedule) - 1)
        noise = part.draw.normal(self.teacher.latent_shape)
        words = part.cond
        if part.draw.chance(self.recipe.null_chance):
            words = {name: value.expand_as(words[name]) for name, value in self._null.items()}
        eps = self._lora_epsilon(core.add_noise(part.x0, noise, t, self.schedule), t, words)
        return core.lora_loss(eps, noise, t, self.schedule, weight=self.recipe.lora_weight)

    def _lora_epsilon(self, x_t: Tensor, t: Tensor, words: Words) -> Tensor:
        """The LoRA teacher's noise prediction, through which it can be trained."""
        answer_as(self.teacher.unet, "lora_teacher")
        output = self.teacher.predict(self._lora_teacher, self._laid_out(x_t), t, words)
        return core.to_epsilon(output, x_t, t, self.schedule, self.prediction)

    @torch.no_grad()
    def _score(self, role: Role, x_t: Tensor, t: Tensor, cond: Words, scale: float | Tensor) -> Tensor:
        """The noise prediction of the teacher or of the LoRA teacher, guided."""
        answer_as(self.teacher.unet, role)
        with self.accelerator.autocast():
            return self._guided(x_t, t, cond, scale)

    def _guided(self, x_t: Tensor, t: Tensor, cond: Words, scale: float | Tensor) -> Tensor:
        return core.guided_epsilon(self._denoise, x_t, t, cond, self._null, scale, self.schedule, self.prediction)

    @torch.no_grad()
    def _teacher_pictures(self, z: Tensor, cond: Words) -> Tensor:
        """The teacher's own pictures of this noise, in the recipe's few steps."""
        steps, scale = self.recipe.pair_steps, self.recipe.pair_guidance
        answer_as(self.teacher.unet, "teacher")
        with self.accelerator.autocast():
            return ddim(self._denoise, self.teacher.scheduler, z, cond, self._null, steps=steps, guidance=scale)

    def _denoise(self, x_t: Tensor, t: Tensor, words: Words) -> Tensor:
        return self.teacher.predict(self.teacher.unet, self._laid_out(x_t), t, words)

    def _laid_out(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=self.memory_format)

    def _share(self, process: int, world: int) -> list[range]:
        """The parts of every batch that are this process's: sample indices of the global batch."""
        batch, parts = self.recipe.batch, self.fit.micro_batches
        for whole, what in ((batch, "a batch"), (self.recipe.pairs, "pairs")):
            if whole % world:
                raise SbrushError(
                    f"{what} of {whole} cannot be shared by {world} processes", f"choose a multiple of {world}", code=2
                )
        local = batch // world
        if local % parts:
            raise SbrushError(
                f"{local} samples a process cannot be split into {parts} micro-batches",
                f"choose --micro-batches that divides {local}",
                code=2,
            )
        self._pair_every = batch // self.recipe.pairs if self.recipe.pairs else batch
        size, first = local // parts, process * local
        return [range(first + i * size, first + (i + 1) * size) for i in range(parts)]

    @contextmanager
    def _gradients_wait(self, *, last: bool) -> Iterator[None]:
        """But for the last part of a batch, gradients are added up here before processes exchange them."""
        with ExitStack() as stack:
            if not last:
                for network in {self._student, self._lora_teacher}:
                    stack.enter_context(self.accelerator.no_sync(network))
            yield

    def _backward(self, loss: Tensor, role: Role) -> None:
        answer_as(self.student if role == "student" else self.teacher.unet, role)
        self.accelerator.backward(loss / len(self._parts))

    def _apply(self, adam: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> Tensor:
        """One step; the gradient's norm before clipping, see optimizer.clip_and_step.

        The gradients are already those of all processes, so that all decide alike.
        """
        if self.recipe.student_rank and self.accelerator.num_processes > 1:
            average_gradients(parameters.values(), self.accelerator)
        return optimizer.clip_and_step(adam, self.recipe.clip)

    @contextmanager
    def average(self) -> Iterator[Model]:
        """The student that would be exported now, the average, as a model; for as long as the context lasts."""
        answer_as(self.student, "student")
        cut = one_step_scheduler(self.teacher.scheduler, self.recipe.t_init)
        about = {"reparameterised": self.recipe.reparameterised}
        # A sheet's batches are of other sizes than a step's, and not worth graphs of their own.
        with self.ema.inside(), self.accelerator.autocast(), torch.compiler.set_stance("force_eager"):
            yield replace(self.teacher, unet=self.student, about=about, scheduler=cut)

    def exported(self) -> UNet2DConditionModel:
        """The average as a plain UNet in float32, to be called within `average`; a LoRA is merged into its teacher."""
        if self.fit.shard:
            with torch.device("meta"):
                plain = UNet2DConditionModel.from_config(self.student.config)
            weights = {name: sharding.whole(p.detach()).cpu() for name, p in self.trained.items()}
            plain.load_state_dict(weights, assign=True)
            return plain
        if not self.recipe.student_rank:
            return self.student
        folder = self.teacher.folders["unet"] / "unet"  # the weights as they were before any was made bfloat16
        plain = read_network(UNet2DConditionModel, folder, torch_dtype=torch.float32)
        return merge_lora(self.student, "student", plain.to(self.student.device))

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Everything that training changes, for a checkpoint; if the student is shared out, asked on all processes."""
        parts = {
            "student": dict(self.trained),
            "ema": self.ema.tensors,
            "lora": dict(self.lora),
            "student_optimizer": optimizer.state_of(self.student_optimizer),
            "lora_optimizer": optimizer.state_of(self.lora_optimizer),
        }
        if not self.fit.shard:
            return parts
        # Put together one by one, and kept by the process that writes them.
        found: dict[str, dict[str, Tensor]] = {part: {} for part in parts}
        for part, tensors in parts.items():
            for name, tensor in tensors.items():
                together = sharding.whole(tensor.detach())
                if self.accelerator.is_main_process:
                    found[part][name] = together.cpu()
        return found

    @torch.no_grad()
    def load(self, saved: checkpoint.Checkpoint) -> None:
        """Puts back what `state` gave. SbrushError if that is not what this run's networks are made of."""
        own = {"student": self.trained, "ema": self.ema.tensors, "lora": self.lora}
        for part, tensors in own.items():
            theirs = saved.part(part)
            if {k: v.shape for k, v in tensors.items()} != {k: v.shape for k, v in theirs.items()}:
                raise _misfit(saved.step)
            if not all(v.isfinite().all() for v in theirs.values()):
                raise _misfit(saved.step)
            for name, tensor in tensors.items():
                sharding.put(tensor, theirs[name])
        try:
            optimizer.restore(self.student_optimizer, saved.part("student_optimizer"))
            optimizer.restore(self.lora_optimizer, saved.part("lora_optimizer"))
        except (ValueError, IndexError, KeyError, RuntimeError) as problem:
            raise _misfit(saved.step) from problem


def average_gradients(parameters: Iterable[nn.Parameter], accelerator: Accelerator) -> None:
    """Each gradient becomes the mean of all processes', in one exchange."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    mean = accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "mean")
    for gradient, own in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(own.view_as(gradient))


def _misfit(step: int) -> SbrushError:
    return SbrushError(
        f"the checkpoint after step {step} is no state of this run's networks",
        "it was changed by something else; start anew in another --out",
    )

"""The networks that are trained: made out of a teacher, saved and restored, averaged, exported.

What a training step does with them is a method's matter: methods/.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import SchedulerMixin, UNet2DConditionModel
from torch import Tensor, nn

from sbrush.console import SbrushError
from sbrush.models.checks import read_network
from sbrush.models.ladder import Sampling
from sbrush.models.model import Model
from sbrush.models.unet import (
    STUDENT_TARGETS,
    add_lora,
    attend_explicitly,
    compile_transformers,
    merge_lora,
    set_role,
)
from sbrush.storage import checkpoint
from sbrush.training import optimizer, sharding
from sbrush.training.ema import EMA
from sbrush.training.recipes import Recipe
from sbrush.training.request import ExecutionOptions


class Networks:
    """A student, the frozen teacher beside it, and all that training keeps of them: what every method starts from.

    The student is a full copy of the teacher's UNet, or, with `recipe.student_rank`, a LoRA on the same frozen weights.
    A method that trains more overrides `add_helpers`.
    """

    def __init__(
        self,
        teacher: Model,
        recipe: Recipe,
        *,
        seed: int,
        accelerator: Accelerator,
        init: Model | None,
        execution: ExecutionOptions,
    ) -> None:
        self.teacher, self.recipe, self.accelerator, self.execution = teacher, recipe, accelerator, execution
        self.seed, self.memory_format = seed, self.layout(accelerator.device.type)
        base = teacher.unet
        for network in teacher.networks:
            network.to(accelerator.device)
        self.student = base if recipe.student_rank else self._copy((init or teacher).unet)
        if accelerator.mixed_precision == "bf16":
            # On the CPU memory is no worry, and text embeddings may as well keep their digits.
            for network in teacher.networks if accelerator.device.type == "cuda" else (base,):
                nn.Module.to(network, torch.bfloat16)  # diffusers' own `to` warns, of nothing that concerns this
        base.to(memory_format=self.memory_format)
        helpers = self.add_helpers()
        self.trained = dict(self.student.named_parameters())
        if rank := recipe.student_rank:
            targets = self.targets(recipe)
            self.trained = add_lora(base, "student", rank=rank, alpha=2 * rank, targets=targets, seed=seed + 1)
        for unet in (base, self.student):
            attend_explicitly(unet)
            if execution.checkpointing:
                unet.enable_gradient_checkpointing()
                unet.train()  # without which diffusers leaves checkpointing out; these networks have no dropout
        where = torch.device("cpu") if execution.ema_on_cpu else None
        self.ema = EMA(self.trained, recipe.ema, device=where)
        self.student_optimizer = self._adam(self.trained, recipe.student_lr)
        self.helpers = {name: (trained, self._adam(trained, lr)) for name, (trained, lr) in helpers.items()}
        self._wrap()

    @staticmethod
    def layout(device: str) -> torch.memory_format:
        """The layout in which a UNet is fastest on a kind of device ("cpu", "cuda"), as measured (docs/results.md)."""
        return torch.channels_last if device == "cpu" else torch.contiguous_format

    @classmethod
    def targets(cls, recipe: Recipe) -> str:
        """The layers that a student has which is a LoRA, see add_lora."""
        return STUDENT_TARGETS

    @classmethod
    def sampling(cls, recipe: Recipe) -> Sampling:
        """The student's steps, with fresh noise between them."""
        return Sampling(recipe.student_steps)

    @property
    def scheduler(self) -> SchedulerMixin:
        """The scheduler that the student is exported with."""
        return self.sampling(self.recipe).scheduler(self.teacher.scheduler, self.recipe.t_init)

    def new_student(self, unet: UNet2DConditionModel) -> UNet2DConditionModel:
        """A full student's UNet, made of the teacher's or of that of the student to start from."""
        return copy.deepcopy(unet)

    def add_helpers(self) -> dict[str, tuple[dict[str, nn.Parameter], float]]:
        """Adds adapters to the teacher's UNet that are trained beside the student: name -> (parameters, LR)."""
        return {}

    def _copy(self, unet: UNet2DConditionModel) -> UNet2DConditionModel:
        """A student that is a full copy, its weights float32."""
        # torch shards no other than the plain layout, and the 8-bit Adam falls back to it.
        plain = self.execution.shard or self.recipe.optimizer == "adam8bit"
        layout = torch.contiguous_format if plain else self.memory_format
        student = self.new_student(unet).to(self.accelerator.device, memory_format=layout)
        student = student.float().requires_grad_(True).train()
        if self.execution.shard:
            sharding.shard(student, self.accelerator)
        return student

    def _adam(self, parameters: Mapping[str, nn.Parameter], lr: float) -> torch.optim.Optimizer:
        recipe = self.recipe
        return optimizer.make_adam(parameters.values(), kind=recipe.optimizer, lr=lr, beta2=recipe.beta2)

    def _wrap(self) -> None:
        """Has accelerate wrap what is trained (autocast; DDP when there are several processes).

        The plain modules stay reachable as `student` and `teacher.unet`; what answers in training is `_student` and
        `_base`. Two LoRAs in one DDP module would each wait for the other's gradients, so then their gradients are
        averaged in `apply`. A sharded student averages its own.
        """
        base, accelerator, shard = self.teacher.unet, self.accelerator, self.execution.shard
        if self.recipe.student_rank:
            self._student = self._base = accelerator.prepare_model(base, device_placement=False, evaluation_mode=True)
        else:
            self._base = accelerator.prepare_model(base, evaluation_mode=not self.helpers)
            self._student = accelerator.prepare_model(self.student, device_placement=not shard, evaluation_mode=shard)
        if self.execution.compile:
            for unet in {base, self.student}:
                compile_transformers(unet, self.execution.compile)

    def apply(self, adam: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> Tensor:
        """One step; the gradient's norm before clipping, see optimizer.clip_and_step.

        The gradients are already those of all processes, so that all decide alike.
        """
        if self.recipe.student_rank and self.accelerator.num_processes > 1:
            average_gradients(parameters.values(), self.accelerator)
        return optimizer.clip_and_step(adam, self.recipe.clip)

    @contextmanager
    def average(self) -> Iterator[Model]:
        """The student as it would be exported now (the average), as a model, for as long as the context lasts."""
        set_role(self.student, "student")
        about = {"reparameterised": self.recipe.reparameterised} | self.sampling(self.recipe).about
        student = self.teacher.as_student(self.scheduler, about)
        # A sample grid's batches are of other sizes than a step's, and not worth graphs of their own.
        with self.ema.inside(), self.accelerator.autocast(), torch.compiler.set_stance("force_eager"):
            yield replace(student, unet=self.student)

    def exported(self) -> UNet2DConditionModel:
        """The average as a plain UNet in float32; call it within `average`. A LoRA is merged into its teacher."""
        if self.execution.shard:
            with torch.device("meta"):
                plain = UNet2DConditionModel.from_config(self.student.config)
            weights = {name: sharding.gather(p.detach()).cpu() for name, p in self.trained.items()}
            plain.load_state_dict(weights, assign=True)
            return plain
        if not self.recipe.student_rank:
            return self.student
        folder = self.teacher.folders["unet"] / "unet"  # the weights as they were before any was made bfloat16
        plain = read_network(UNet2DConditionModel, folder, torch_dtype=torch.float32)
        return merge_lora(self.student, "student", plain.to(self.student.device))

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Everything that training changes, for a checkpoint; called on all processes if the student is sharded."""
        parts = {"student": dict(self.trained), "ema": self.ema.tensors}
        parts |= {name: dict(trained) for name, (trained, _) in self.helpers.items()}
        parts["student_optimizer"] = optimizer.state_of(self.student_optimizer)
        parts |= {f"{name}_optimizer": optimizer.state_of(adam) for name, (_, adam) in self.helpers.items()}
        if not self.execution.shard:
            return parts
        # Gathered one by one, and kept by the process that writes them.
        found: dict[str, dict[str, Tensor]] = {part: {} for part in parts}
        for part, tensors in parts.items():
            for name, tensor in tensors.items():
                together = sharding.gather(tensor.detach())
                if self.accelerator.is_main_process:
                    found[part][name] = together.cpu()
        return found

    @torch.no_grad()
    def load(self, saved: checkpoint.Checkpoint) -> None:
        """Restores what `state` gave. SbrushError if it does not belong to this run's networks."""
        own = {"student": self.trained, "ema": self.ema.tensors}
        own |= {name: trained for name, (trained, _) in self.helpers.items()}
        for part, tensors in own.items():
            theirs = saved.part(part)
            if {k: v.shape for k, v in tensors.items()} != {k: v.shape for k, v in theirs.items()}:
                raise misfit(saved.step)
            if not all(v.isfinite().all() for v in theirs.values()):
                raise misfit(saved.step)
            for name, tensor in tensors.items():
                sharding.put(tensor, theirs[name])
        try:
            optimizer.restore(self.student_optimizer, saved.part("student_optimizer"))
            for name, (_, adam) in self.helpers.items():
                optimizer.restore(adam, saved.part(f"{name}_optimizer"))
        except (ValueError, IndexError, KeyError, RuntimeError) as problem:
            raise misfit(saved.step) from problem


def average_gradients(parameters: Iterable[nn.Parameter], accelerator: Accelerator) -> None:
    """Each gradient becomes the mean of all processes', in one exchange."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    mean = accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "mean")
    for gradient, own in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(own.view_as(gradient))


def misfit(step: int) -> SbrushError:
    """A checkpoint that does not belong to a run's networks."""
    return SbrushError(
        f"the checkpoint after step {step} does not belong to this run's networks",
        "something else changed it; start a new run in another --out",
    )


def frozen(network: Any, accelerator: Accelerator) -> Any:
    """A network on the process's device, in bfloat16 where that computes."""
    if accelerator.mixed_precision == "bf16":
        nn.Module.to(network, torch.bfloat16)  # diffusers' own `to` warns, of nothing that concerns this
    return network.to(accelerator.device).requires_grad_(False).eval()

"""The networks that are trained: made out of a teacher, saved and put back, averaged, exported.

What a training step does with them is distiller.py.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from sbrush.console import SbrushError
from sbrush.models.checks import read_network
from sbrush.models.model import Model
from sbrush.models.schedule import one_step_scheduler
from sbrush.models.unet import add_lora, attend_explicitly, merge_lora, set_role
from sbrush.storage import checkpoint
from sbrush.training import optimizer, sharding
from sbrush.training.ema import EMA
from sbrush.training.recipes import Recipe


@dataclass(frozen=True)
class ExecutionOptions:
    """How a run is made to fit its machine; but for rounding nothing of this changes the student."""

    micro_batches: int = 1  # that a process's share of a batch is split into: less memory, more time
    checkpointing: bool = False  # of gradients: activations are computed again in the backward
    ema_on_cpu: bool = False
    shard: bool = False  # a full student's weights and all that belongs to them are shared out among processes
    compile: str | None = None  # the networks' forwards and backwards, by this backend of torch.compile


class Networks:
    """A student and its two teachers, with all that training keeps of them.

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
        init: Model | None,
        execution: ExecutionOptions,
    ) -> None:
        self.teacher, self.recipe, self.accelerator, self.execution = teacher, recipe, accelerator, execution
        base = teacher.unet
        for network in teacher.networks:
            network.to(accelerator.device)
        if recipe.student_rank:
            self.student = base
        else:
            # torch shards no other than the plain layout, and the 8-bit Adam falls back to it.
            plain = self.execution.shard or recipe.optimizer == "adam8bit"
            layout = torch.contiguous_format if plain else self.memory_format
            student = copy.deepcopy((init or teacher).unet).to(accelerator.device, memory_format=layout)
            self.student = student.float().requires_grad_(True).train()
            if self.execution.shard:
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
            if self.execution.checkpointing:
                unet.enable_gradient_checkpointing()
                unet.train()  # without which diffusers leaves checkpointing out; these networks have no dropout
        where = torch.device("cpu") if self.execution.ema_on_cpu else None
        self.ema = EMA(self.trained, recipe.ema, device=where)
        self.student_optimizer = optimizer.make_adam(
            self.trained.values(), kind=recipe.optimizer, lr=recipe.student_lr, beta2=recipe.beta2
        )
        self.lora_optimizer = optimizer.make_adam(
            self.lora.values(), kind=recipe.optimizer, lr=recipe.lora_lr, beta2=recipe.beta2
        )
        # accelerate wraps both networks (autocast; DDP when there are several processes), each under its own name:
        # the plain modules stay reachable as self.student and self.teacher.unet. Two LoRAs in one DDP module would
        # each wait for the other's gradients, so then their gradients are averaged in `apply`. A student that is
        # shared out averages its own.
        if recipe.student_rank:
            self._student = self._lora_teacher = accelerator.prepare_model(
                base, device_placement=False, evaluation_mode=True
            )
        else:
            self._lora_teacher = accelerator.prepare_model(base)
            self._student = accelerator.prepare_model(
                self.student, device_placement=not self.execution.shard, evaluation_mode=self.execution.shard
            )
        if self.execution.compile:
            # Each role is a graph of its own, and so is each mode: torch tells them apart by the LoRAs' switches.
            for unet in {base, self.student}:
                unet.compile(backend=self.execution.compile, dynamic=False)

    def apply(self, adam: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> Tensor:
        """One step; the gradient's norm before clipping, see optimizer.clip_and_step.

        The gradients are already those of all processes, so that all decide alike.
        """
        if self.recipe.student_rank and self.accelerator.num_processes > 1:
            average_gradients(parameters.values(), self.accelerator)
        return optimizer.clip_and_step(adam, self.recipe.clip)

    @contextmanager
    def average(self) -> Iterator[Model]:
        """The student that would be exported now, the average, as a model; for as long as the context lasts."""
        set_role(self.student, "student")
        cut = one_step_scheduler(self.teacher.scheduler, self.recipe.t_init)
        about = {"reparameterised": self.recipe.reparameterised}
        # A sample grid's batches are of other sizes than a step's, and not worth graphs of their own.
        with self.ema.inside(), self.accelerator.autocast(), torch.compiler.set_stance("force_eager"):
            yield replace(self.teacher, unet=self.student, about=about, scheduler=cut)

    def exported(self) -> UNet2DConditionModel:
        """The average as a plain UNet in float32, to be called within `average`; a LoRA is merged into its teacher."""
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
        """Everything that training changes, for a checkpoint; if the student is shared out, asked on all processes."""
        parts = {
            "student": dict(self.trained),
            "ema": self.ema.tensors,
            "lora": dict(self.lora),
            "student_optimizer": optimizer.state_of(self.student_optimizer),
            "lora_optimizer": optimizer.state_of(self.lora_optimizer),
        }
        if not self.execution.shard:
            return parts
        # Put together one by one, and kept by the process that writes them.
        found: dict[str, dict[str, Tensor]] = {part: {} for part in parts}
        for part, tensors in parts.items():
            for name, tensor in tensors.items():
                together = sharding.gather(tensor.detach())
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

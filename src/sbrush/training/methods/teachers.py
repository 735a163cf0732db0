"""VSD's two teachers, which are one frozen UNet: the teacher with its LoRA switched off, the LoRA teacher with it on.

Both are asked for the noise in a student's noisy images; their difference is what the student learns from.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sbrush import core
from sbrush.core import Conditioning
from sbrush.models.model import Model
from sbrush.models.unet import Role, set_role
from sbrush.sampling.generation import ddim
from sbrush.training.recipes import Recipe


class Teachers:
    """`network`: the UNet of `model` as accelerate has wrapped it, through which the LoRA is trained.

    `rung_tokens`: [steps, D], what the LoRA teacher is told of the step of the student's ladder, if anything.
    `memory_format`: of what the UNet is given.
    """

    def __init__(
        self,
        model: Model,
        network: nn.Module,
        recipe: Recipe,
        accelerator: Accelerator,
        *,
        rung_tokens: nn.Parameter | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self.model, self._network, self._recipe, self._accelerator = model, network, recipe, accelerator
        self._rung_tokens, self._memory_format = rung_tokens, memory_format
        # Asked for once: each time it is moved to the device anew, which waits for it.
        self.schedule, self.prediction = model.schedule, model.prediction
        self._null = model.null()

    @torch.no_grad()
    def score(self, x_t: Tensor, t: Tensor, cond: Conditioning, scale: float | Tensor) -> Tensor:
        """The teacher's noise prediction, guided from no prompt's towards the prompts'. Float32 [b, C, H, W]."""
        return self._score("teacher", x_t, t, (cond, self.null_of(cond)), scale)

    @torch.no_grad()
    def lora_score(self, x_t: Tensor, t: Tensor, cond: Conditioning, rung: int, scale: float | Tensor) -> Tensor:
        """The LoRA teacher's, for images of a step of the student's ladder. Float32 [b, C, H, W]."""
        told = (self._told(cond, rung), self._told(self.null_of(cond), rung))
        return self._score("lora_teacher", x_t, t, told, scale)

    def lora_epsilon(self, x_t: Tensor, t: Tensor, cond: Conditioning, rung: int) -> Tensor:
        """The LoRA teacher's noise prediction without guidance, through which it can be trained."""
        set_role(self.model.unet, "lora_teacher")
        output = self.model.predict(self._network, self._laid_out(x_t), t, self._told(cond, rung))
        return core.to_epsilon(output, x_t, t, self.schedule, self.prediction)

    @torch.no_grad()
    def images(self, z: Tensor, cond: Conditioning) -> Tensor:
        """The teacher's own images of this noise, in the recipe's few steps. Latents [b, C, H, W]."""
        steps, scale = self._recipe.pair_steps, self._recipe.pair_guidance
        set_role(self.model.unet, "teacher")
        with self._accelerator.autocast():
            null = self.null_of(cond)
            return ddim(self.denoise, self.model.scheduler, z, cond, null, steps=steps, guidance=scale)

    def null_of(self, cond: Conditioning) -> Conditioning:
        """What a UNet is told without a prompt: the control images stay, as in diffusers' pipelines."""
        return self._null | {name: cond[name] for name in ("control",) if name in cond}

    def guided(self, x_t: Tensor, t: Tensor, cond: Conditioning, null: Conditioning, scale: float | Tensor) -> Tensor:
        """The guided noise prediction of whoever answers, [b, C, H, W]."""
        return core.guided_epsilon(self.denoise, x_t, t, cond, null, scale, self.schedule, self.prediction)

    def denoise(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The UNet's own output, of whoever answers, [b, C, H, W]."""
        return self.model.predict(self.model.unet, self._laid_out(x_t), t, cond)

    def _score(
        self, role: Role, x_t: Tensor, t: Tensor, prompts: tuple[Conditioning, Conditioning], scale: float | Tensor
    ) -> Tensor:
        set_role(self.model.unet, role)
        cond, null = prompts
        high = self._recipe.guidance_high
        if high is not None and (isinstance(scale, Tensor) or scale != 1):
            scale = torch.where(t <= high, scale, 1.0).view(-1, 1, 1, 1)
        with self._accelerator.autocast():
            return self.guided(x_t, t, cond, null, scale)

    def _told(self, cond: Conditioning, rung: int) -> Conditioning:
        """A conditioning for the LoRA teacher: its first token, alike in all prompts, tells the rung if it is to."""
        if self._rung_tokens is None:
            return cond
        first, rest = cond["tokens"].split((1, cond["tokens"].shape[1] - 1), dim=1)
        told = (first + self._rung_tokens[rung]).to(first.dtype)
        return {**cond, "tokens": torch.cat([told, rest], dim=1)}

    def _laid_out(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=self._memory_format)

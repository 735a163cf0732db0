"""SwiftBrush (arXiv 2312.05239): one-step text-to-image distillation by variational score distillation.

This module is the paper. It imports only torch; every function is pure and takes its noise and timesteps as arguments.

    code            symbol           shape            meaning
    x0              x_0              [B, C, H, W]     a clean latent; the student's picture
    noise           eps, z           [B, C, H, W]     standard normal
    t               t                [B] int64        timestep, 0 .. T
    x_t             x_t              [B, C, H, W]     alpha_t x0 + sigma_t noise
    alpha, sigma    alpha_t sigma_t  [B, 1, 1, 1]     sqrt(abar_t) and sqrt(1 - abar_t), from the teacher's schedule
    eps_teacher     eps_phi          [B, C, H, W]     the frozen teacher's noise prediction, guided
    eps_lora        eps_psi          [B, C, H, W]     the LoRA teacher's noise prediction
    scale           s                number           guidance scale
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NoiseSchedule:
    """alpha_t and sigma_t for t = 0 .. T, each float32 [T + 1]."""

    alpha: Tensor
    sigma: Tensor

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Tensor) -> NoiseSchedule:
        """From abar_t, [T + 1], in the teacher's scheduler."""
        abar = alphas_cumprod.double()
        return cls(abar.sqrt().float(), (1 - abar).sqrt().float())

    def __len__(self) -> int:
        return len(self.alpha)

    def to(self, device: torch.device | str) -> NoiseSchedule:
        """The same schedule on another device."""
        return NoiseSchedule(self.alpha.to(device), self.sigma.to(device))

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t, each [B, 1, 1, 1]."""
        return self.alpha[t].view(-1, 1, 1, 1), self.sigma[t].view(-1, 1, 1, 1)

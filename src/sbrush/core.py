"""SwiftBrush (arXiv 2312.05239): one-step text-to-image distillation by Variational Score Distillation.

This module is the paper. It imports only torch; its functions are pure: noise and timesteps come in as arguments.

    code          symbol            shape           meaning
    x0            x_0               [B, C, H, W]    a clean latent; the student's image
    z             z ~ N(0, I)       [B, C, H, W]    what the student starts from
    noise         eps ~ N(0, I)     [B, C, H, W]    what a clean latent is mixed with
    t             t, t', T          [B] int64       timestep in 0 .. T; T = len(schedule) - 1 is pure noise, nearly
    x_t           x_t               [B, C, H, W]    alpha_t x0 + sigma_t noise
    alpha, sigma  alpha_t, sigma_t  [B, 1, 1, 1]    sqrt(abar_t), sqrt(1 - abar_t): read from the teacher's scheduler
    output        -                 [B, C, H, W]    what a UNet returns: an epsilon or a v, see Prediction
    eps_teacher   eps_phi           [B, C, H, W]    noise prediction of the frozen teacher
    eps_lora      eps_psi           [B, C, H, W]    noise prediction of the LoRA teacher, which follows the student
    scale         s                 number          guidance scale
    gap           g                 [B, C, H, W]    weighted score difference: the direction that x0 must leave

One update of the student theta, then one of the LoRA teacher psi:

    x0 = student_x0(output of theta at (z, T, y), z, T)                     f_theta(z, y)
    gap = vsd_gap(guided eps_phi, guided eps_psi at x_t = add_noise(x0))    no gradient through the teachers
    theta follows vsd_loss(x0, gap)                                         and pair_loss, clamped_clip_loss, if asked
    psi follows lora_loss(eps_psi at x_t' = add_noise(x0.detach()), noise, t')

A student of several steps has a list of timesteps, its ladder; the first of these rungs is its start. A training step
takes one rung: student_input goes down to it without gradient. Its result then replaces z in the equations above, and
the rung replaces T.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["epsilon", "v_prediction"]
"""What a UNet's output means: the noise eps, or v = alpha_t eps - sigma_t x0 (named as in diffusers' schedulers)."""

LoraWeight = Literal["alpha", "v", "min-snr"]
"""What the LoRA teacher's squared error in epsilon is weighted by, see lora_loss."""

Conditioning = dict[str, Tensor]
"""What a UNet is given of the prompts: tensors by name, batch first; "tokens" [B, L, D] are the prompt embeddings."""

Denoiser = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""(x_t [B, C, H, W], t [B], conditioning) -> output [B, C, H, W]."""


@dataclass(frozen=True)
class NoiseSchedule:
    """alpha_t and sigma_t for t = 0 .. T, each float32 [T + 1]."""

    alpha: Tensor
    sigma: Tensor

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Tensor) -> NoiseSchedule:
        """From abar_t [T + 1], as diffusers' schedulers hold it."""
        abar = alphas_cumprod.double()
        return cls(abar.sqrt().float(), (1 - abar).sqrt().float())

    def __len__(self) -> int:
        return len(self.alpha)

    def to(self, device: torch.device | str) -> NoiseSchedule:
        """The same schedule on another device."""
        return NoiseSchedule(self.alpha.to(device), self.sigma.to(device))

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t, each float32 [B, 1, 1, 1]."""
        return self.alpha[t].view(-1, 1, 1, 1), self.sigma[t].view(-1, 1, 1, 1)

    def start(self, batch: int, t_init: int | None = None) -> Tensor:
        """The student's timestep, T or the earlier `t_init`, for each of `batch` samples: int64 [B]."""
        return torch.full((batch,), len(self) - 1 if t_init is None else t_init, device=self.alpha.device)


def add_noise(x0: Tensor, noise: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """x_t = alpha_t x0 + sigma_t eps (the forward process, SwiftBrush eq. 1). Float32 [B, C, H, W]."""
    alpha, sigma = schedule.at(t)
    return alpha * x0.float() + sigma * noise.float()


def to_epsilon(output: Tensor, x_t: Tensor, t: Tensor, schedule: NoiseSchedule, prediction: Prediction) -> Tensor:
    """A UNet's output as a noise prediction: itself, or eps = alpha_t v + sigma_t x_t. Float32 [B, C, H, W]."""
    if prediction == "epsilon":
        return output.float()
    alpha, sigma = schedule.at(t)
    return alpha * output.float() + sigma * x_t.float()


def to_x0(output: Tensor, x_t: Tensor, t: Tensor, schedule: NoiseSchedule, prediction: Prediction) -> Tensor:
    """A UNet's output as a clean latent: x0 = (x_t - sigma_t eps) / alpha_t, or x0 = alpha_t x_t - sigma_t v.

    Float32 [B, C, H, W] whatever the output's dtype: at T, 1 / alpha_T = 14.6 magnifies rounding by as much.
    """
    alpha, sigma = schedule.at(t)
    if prediction == "epsilon":
        return (x_t.float() - sigma * output.float()) / alpha
    return alpha * x_t.float() - sigma * output.float()


def student_x0(
    output: Tensor,
    z: Tensor,
    t: Tensor,
    schedule: NoiseSchedule,
    prediction: Prediction,
    *,
    reparameterised: bool = True,
) -> Tensor:
    """The student's map from noise to image, given its UNet's output at (z, T, y) (SwiftBrush eq. 8).

        f_theta(z, y) = (z - sigma_T eps_theta(z, T, y)) / alpha_T

    so that a student that starts as a copy of the teacher starts as the teacher's own one-step guess. An earlier `t`
    than T (SiD's t_init, arXiv 2404.04057) takes pure noise for x_t: that guess then depends more on z. Without
    `reparameterised` (the paper's ablation) the UNet's output is the image itself. Float32 [B, C, H, W].
    """
    return to_x0(output, z, t, schedule, prediction) if reparameterised else output.float()


def student_input(
    denoise: Denoiser,
    z: Tensor,
    fresh: Sequence[Tensor] | None,
    rungs: Sequence[int],
    cond: Conditioning,
    schedule: NoiseSchedule,
    prediction: Prediction,
    known: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """What a student of several steps sees at the last of `rungs`: backward simulation (DMD2, arXiv 2405.14867).

    At rungs[0] that is z. From each rung to the next:

        x0 = f_theta(x, y) at t,    x = alpha_t' x0 + sigma_t' eps at the next t'

    `fresh`: eps of each step down, [B, C, H, W], one fewer than `rungs`; None keeps the noise that the student itself
    predicts, which is DDIM. `known` puts in each x0 what is known of the image, such as what lies outside a mask. One
    rung returns z. Float32 [B, C, H, W]; training calls it without gradient.
    """
    x = z
    for step, (t, following) in enumerate(pairwise(rungs)):
        here, there = (torch.full((len(x),), rung, device=x.device) for rung in (t, following))
        output = denoise(x, here, cond)
        x0 = to_x0(output, x, here, schedule, prediction)
        noise = to_epsilon(output, x, here, schedule, prediction) if fresh is None else fresh[step]
        x = add_noise(known(x0) if known else x0, noise, there, schedule)
    return x


def guide(eps_cond: Tensor, eps_null: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance: eps_null + s (eps_cond - eps_null); s = 1 is no guidance."""
    return eps_null + scale * (eps_cond - eps_null)


def with_null(cond: Conditioning, null: Conditioning) -> Conditioning:
    """The prompts' conditioning followed by that of the empty prompt, as often; `null` may be a batch of one."""
    return {name: torch.cat([value, null[name].expand_as(value)]) for name, value in cond.items()}


def guided_epsilon(
    denoise: Denoiser,
    x_t: Tensor,
    t: Tensor,
    cond: Conditioning,
    null: Conditioning,
    scale: float | Tensor,
    schedule: NoiseSchedule,
    prediction: Prediction,
) -> Tensor:
    """eps^cfg(x_t, t, y) with both halves in one batched call of `denoise`; without guidance (s = 1) only one half.

    `cond`, `null`: of the prompts and of no prompt, see with_null. `scale`: one number, or one for each sample,
    [B, 1, 1, 1]. Float32 [B, C, H, W].
    """
    if not isinstance(scale, Tensor) and scale == 1:
        return to_epsilon(denoise(x_t, t, cond), x_t, t, schedule, prediction)
    twice, t_twice = torch.cat([x_t, x_t]), torch.cat([t, t])
    output = denoise(twice, t_twice, with_null(cond, null))
    eps_cond, eps_null = to_epsilon(output, twice, t_twice, schedule, prediction).chunk(2)
    return guide(eps_cond, eps_null, scale)


def vsd_gap(eps_teacher: Tensor, eps_lora: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """g = w(t) (eps_phi - eps_psi) with w(t) = sigma_t^2 (SwiftBrush eq. 6). Float32 [B, C, H, W].

    Zero where the LoRA teacher, and so the student's own distribution, agrees with the teacher.
    With eps_lora the added noise itself this is Score Distillation Sampling, the paper's ablation.
    """
    _, sigma = schedule.at(t)
    return sigma.pow(2) * (eps_teacher.float() - eps_lora.float())


def dmd_gap(eps_teacher: Tensor, eps_lora: Tensor, noise: Tensor) -> Tensor:
    """g = (eps_phi - eps_psi) / mean|eps_phi - eps|, the mean taken per sample (DMD, arXiv 2311.18828, as in its code).

    DMD writes it with x0 predictions, where sigma_t / alpha_t is in numerator and denominator and cancels. Float32
    [B, C, H, W].
    """
    scale = (eps_teacher.float() - noise.float()).abs().mean(dim=(1, 2, 3), keepdim=True)
    return (eps_teacher.float() - eps_lora.float()) / scale.clamp(min=1e-6)


def vsd_loss(x0: Tensor, gap: Tensor) -> Tensor:
    """The student's loss: 1/2 mean (x0 - stopgrad(x0 - g))^2, whose gradient by x0 is g / numel (SwiftBrush eq. 6).

    Its value, mean(g^2) / 2, measures how far the scores are apart, not convergence.
    """
    target = (x0.float() - gap).detach()
    return 0.5 * (x0.float() - target).pow(2).mean()


def pair_loss(x0: Tensor, teacher_x0: Tensor) -> Tensor:
    """1/2 mean (x0 - x0')^2, x0' being the teacher's own many-step image of the noise that x0 comes from.

    DMD's regression loss (arXiv 2311.18828, eq. 9), in latents and without LPIPS: it ties which noise becomes which
    image, so that no mode is lost, while the score difference makes the images sharp.

    Also the anchor of a few-step student: at low noise x0' is the teacher's guess of x0 from the same x_t, its
    posterior mean, which is then all but an image of the data.
    """
    return 0.5 * (x0.float() - teacher_x0.detach().float()).pow(2).mean()


def clamped_clip_loss(cosine: Tensor, tau: float) -> Tensor:
    """mean max(0, tau - cos(image, prompt)), the cosines [B] by a CLIP model (SwiftBrush v2, arXiv 2408.14176).

    Images that match their prompt well enough get no gradient: without the clamp the loss makes FID worse.
    """
    return (tau - cosine.float()).clamp(min=0).mean()


def lora_loss(
    eps_lora: Tensor, noise: Tensor, t: Tensor, schedule: NoiseSchedule, *, weight: LoraWeight = "alpha"
) -> Tensor:
    """The LoRA teacher's loss: a weighted mean of (eps_psi - eps)^2 (SwiftBrush eq. 7).

    `weight` "alpha" is the official one, alpha_t'^2. "v" is 1 / alpha_t'^2, which makes it the plain squared error in
    v: at high noise, where layout and background are decided, the other two all but vanish. "min-snr" is
    min(snr_t', 5) / (snr_t' + 1) of the squared error in v (arXiv 2303.09556).
    """
    alpha, sigma = schedule.at(t)
    error = (eps_lora.float() - noise.float()).pow(2)
    if weight == "alpha":
        return (alpha.pow(2) * error).mean()
    if weight == "v":
        return (error / alpha.pow(2)).mean()
    snr = (alpha / sigma).pow(2)
    # The squared error in v is the one in eps over alpha_t^2, and (snr_t + 1) alpha_t^2 = snr_t.
    return (snr.clamp(max=5) / snr * error).mean()

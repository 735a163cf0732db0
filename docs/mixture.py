"""SwiftBrush in two dimensions: python docs/mixture.py draws docs/mixture.png, in about half a minute on one core.

The target is eight petals, a mixture of Gaussians whose noised scores are known exactly: a perfect teacher. A small
network learns to map noise to petals in one step, once by VSD, once by SDS. Everything but the pictures is sbrush.core.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

from sbrush.core import NoiseSchedule, add_noise, lora_loss, student_x0, vsd_gap, vsd_loss

SCHEDULE = NoiseSchedule.from_alphas_cumprod((1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0))
ANGLES = torch.arange(8) * torch.pi / 4
TURN = torch.stack([ANGLES.cos(), -ANGLES.sin(), ANGLES.sin(), ANGLES.cos()], dim=1).view(8, 2, 2)  # one petal's axes
CENTRES = 1.5 * TURN[:, :, 0]
VARIANCE = torch.tensor([0.3, 0.1]) ** 2  # along a petal and across


def teacher(x_t, t):
    """eps_phi = -sigma_t grad log p_t, exactly: p_t is the mixture with every petal shrunk and blurred."""
    alpha, sigma = (a.view(-1, 1, 1) for a in SCHEDULE.at(t))
    away = torch.einsum("kij,bki->bkj", TURN, x_t.view(-1, 1, 2) - alpha * CENTRES)  # in each petal's own axes
    pull = away / (alpha**2 * VARIANCE + sigma**2)
    nearness = (-(away * pull).sum(dim=2) / 2).softmax(dim=1)
    return (sigma[:, 0] * torch.einsum("bk,kij,bkj->bi", nearness, TURN, pull))[:, :, None, None]


def mlp(inputs):
    return nn.Sequential(
        nn.Linear(inputs, 128),
        nn.SiLU(),
        nn.Linear(128, 128),
        nn.SiLU(),
        nn.Linear(128, 128),
        nn.SiLU(),
        nn.Linear(128, 2),
    )


def distil(vsd, steps=STEPS, batch=256):
    torch.manual_seed(0)
    student, correction = mlp(2), mlp(5)
    nn.init.zeros_(correction[-1].weight)  # as LoRA: the LoRA teacher starts as the teacher

    def lora_teacher(x_t, t):
        alpha, sigma = SCHEDULE.at(t)
        inputs = torch.cat([x_t, alpha, sigma, (sigma / alpha).log()], dim=1).flatten(1)
        return teacher(x_t, t) + correction(inputs)[:, :, None, None]

    def picture(z):
        return student_x0(student(z.flatten(1))[:, :, None, None], z, SCHEDULE.last(len(z)), SCHEDULE, "v_prediction")

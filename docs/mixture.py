"""SwiftBrush in two dimensions: `python docs/mixture.py` draws docs/mixture.png, in about half a minute on one core.

The target is six petals, a mixture of Gaussians whose noised scores are known exactly: a perfect teacher. A one-step
student learns to draw them, once by VSD and once by SDS. Everything but target, networks and picture is sbrush.core.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

from sbrush.core import NoiseSchedule, add_noise, lora_loss, student_x0, vsd_gap, vsd_loss

SCHEDULE = NoiseSchedule.from_alphas_cumprod((1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0))
ANGLE = torch.arange(6) * torch.pi / 3
AXES = torch.stack([ANGLE.cos(), -ANGLE.sin(), ANGLE.sin(), ANGLE.cos()], dim=1).view(6, 2, 2)  # columns: along, across
CENTRE = 8 * AXES[:, :, 0]
SPREAD = torch.tensor([2.0, 0.8])  # of a petal: along, across


def teacher(x_t, t):
    """eps_phi = -sigma_t grad log p_t, exactly: p_t is the mixture with every petal shrunk and blurred."""
    alpha, sigma = (a.view(-1, 1, 1) for a in SCHEDULE.at(t))
    away = torch.einsum("kij,bki->bkj", AXES, x_t.view(-1, 1, 2) - alpha * CENTRE)  # from each petal, in its own axes
    pull = away / (alpha**2 * SPREAD**2 + sigma**2)
    share = (-0.5 * (away * pull).sum(dim=2)).softmax(dim=1)  # the chance that x_t came from each petal
    return torch.einsum("bi,bk,kij,bkj->bi", sigma[:, 0], share, AXES, pull)[:, :, None, None]


class Network(nn.Module):
    """The teacher plus a learned correction that starts at zero: the student and the LoRA teacher are one each."""

    def __init__(self, width=128):
        super().__init__()
        hidden = [layer for _ in range(2) for layer in (nn.Linear(width, width), nn.SiLU())]
        self.correction = nn.Sequential(nn.Linear(5, width), nn.SiLU(), *hidden, nn.Linear(width, 2))
        nn.init.zeros_(self.correction[-1].weight)
        nn.init.zeros_(self.correction[-1].bias)

    def forward(self, x_t, t):
        alpha, sigma = SCHEDULE.at(t)
        scaled = 3 * x_t / (32 * alpha**2 + sigma**2).sqrt()
        inputs = torch.cat([scaled, alpha, sigma, (sigma / alpha).log()], dim=1).flatten(1)
        return teacher(x_t, t) + alpha * self.correction(inputs)[:, :, None, None]


def descent(network, lr, steps):
    """A function that takes one Adam step down a loss, at a learning rate that fades over `steps`."""
    adam = torch.optim.Adam(network.parameters(), lr=lr, betas=(0.9, 0.99))
    fade = torch.optim.lr_scheduler.LinearLR(adam, 1, 0.02, steps)

    def step(loss):
        adam.zero_grad()
        loss.backward()
        adam.step()
        fade.step()

    return step


def distil(method, steps=1500, batch=512):
    """Trains a student by "VSD" or "SDS"; returns the function that draws its x0 [count, 2, 1, 1]."""
    torch.manual_seed(0)
    student, lora_teacher = Network(), Network()
    student_step, lora_step = descent(student, 2e-3, steps), descent(lora_teacher, 4e-3, 2 * steps)

    def draw(count):
        z, t = torch.randn(count, 2, 1, 1), SCHEDULE.start(count)
        return student_x0(student(z, t), z, t, SCHEDULE, "epsilon")

    for _ in range(steps):
        x0, noise, t = draw(batch), torch.randn(batch, 2, 1, 1), torch.randint(20, 981, (batch,))
        x_t = add_noise(x0.detach(), noise, t, SCHEDULE)
        with torch.no_grad():
            eps_lora = lora_teacher(x_t, t) if method == "VSD" else noise
            gap = vsd_gap(teacher(x_t, t), eps_lora, t, SCHEDULE)
        student_step(vsd_loss(x0, gap))
        for _ in range(2 if method == "VSD" else 0):  # the LoRA teacher keeps up with the student
            noise, t = torch.randn(batch, 2, 1, 1), torch.randint(0, 1000, (batch,))
            x_t = add_noise(draw(batch).detach(), noise, t, SCHEDULE)
            lora_step(lora_loss(lora_teacher(x_t, t), noise, t, SCHEDULE))
    return torch.no_grad()(draw)


def draw_target(count):
    petal = torch.randint(0, 6, (count,))
    return CENTRE[petal] + torch.einsum("bij,bj->bi", AXES[petal], SPREAD * torch.randn(count, 2))


if __name__ == "__main__":
    torch.set_num_threads(1)
    students = {method: distil(method)(3000).flatten(1) for method in ("VSD", "SDS")}
    torch.manual_seed(0)
    target = draw_target(3000)
    figure, panels = plt.subplots(1, 3, figsize=(9, 3.2), sharex=True, sharey=True, layout="constrained")
    titles = ["target", "one step, trained by VSD", "one step, trained by SDS"]
    colours = ["#3b3f46", "#2a6f97", "#c8553d"]
    for panel, title, colour, points in zip(panels, titles, colours, [target, *students.values()], strict=True):
        panel.scatter(*target.T, s=3, color="#dcdfe3", linewidths=0)
        panel.scatter(*points.T, s=3, color=colour, alpha=0.6, linewidths=0)
        panel.set(xlim=(-14.5, 14.5), ylim=(-14.5, 14.5), aspect="equal")
        panel.set_title(title, fontsize=10, color=colour)
        panel.axis("off")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=150, bbox_inches="tight", pad_inches=0.1)

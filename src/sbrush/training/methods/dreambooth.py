"""DreamBooth (arXiv 2208.12242): a LoRA of the teacher learns a subject from its photos, and keeps the rest.

    loss = E |u(x_t, t, y) - target|^2        over photos of "a sks dog" and prior images of other prompts, as many

u being the network's own prediction, epsilon or v, and the prior images its student's: what it draws of the other
prompts is to stay what it was. The LoRA is then like any other, and the teacher with it a teacher of the subject.

The error is not weighted: a weight like min-SNR is next to nothing at T, where a one-step student works.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from sbrush import core
from sbrush.console import SbrushError
from sbrush.core import NoiseSchedule, Prediction
from sbrush.models.model import Model
from sbrush.training.methods.regression import MicroBatch, Outcome, Regression
from sbrush.training.recipes import Recipe


def diffusion_loss(
    output: Tensor, x0: Tensor, noise: Tensor, t: Tensor, schedule: NoiseSchedule, prediction: Prediction
) -> Tensor:
    """The mean squared error of a network's output at (alpha_t x0 + sigma_t noise, t): all [B, C, H, W], t [B]."""
    if prediction == "epsilon":
        return (output.float() - noise).pow(2).mean()
    alpha, sigma = schedule.at(t)
    return (output.float() - (alpha * noise - sigma * x0)).pow(2).mean()


class DreamBooth(Regression):
    """A LoRA on the teacher's own weights, by the ordinary diffusion loss on TrainingImages of photos and prior."""

    unused: ClassVar[tuple[str, ...]] = (
        *(name for name in Regression.unused if name != "lora_targets"), "w_min", "w_max", "image_steps",
        "image_guidance", "grid_steps", "huber_c", "halve_from", "guide_share", "snr_weight",
    )  # fmt: skip
    views: ClassVar[dict[str, str]] = {"teacher x0": "x0", "image x0": "target_x0"}

    @classmethod
    def targets(cls, recipe: Recipe) -> str:
        """The recipe's: all layers of the blocks, or those of cross-attention."""
        return recipe.lora_targets

    @classmethod
    def check(cls, recipe: Recipe, teacher: Model) -> None:
        """SbrushError if it is not to train a LoRA."""
        if not recipe.student_rank:
            raise SbrushError("method dreambooth trains a LoRA", "sbrush personalize sets its rank", code=2)
        super().check(recipe, teacher)

    @classmethod
    def forwards(cls, recipe: Recipe) -> float:
        """A forward, and a backward through a LoRA, which counts as one."""
        return 2

    def compare(self, step: int, batch: MicroBatch) -> Outcome:
        """The squared error of what the network predicts of noisy images, at all timesteps alike."""
        t = batch.draw.timesteps(0, len(self.schedule) - 1)
        noise = batch.draw.normal(self.teacher.latent_shape)
        x_t = core.add_noise(batch.x0, noise, t, self.schedule)
        output = self.student_output(x_t, t, batch)
        loss = diffusion_loss(output, batch.x0, noise, t, self.schedule, self.prediction)
        return Outcome(loss, self.to_x0(output, x_t, t), batch.x0)

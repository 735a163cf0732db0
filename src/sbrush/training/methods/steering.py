"""ControlNets in the loop: control images for a training that has no images.

A student that draws well is prepared for a ControlNet of its teacher. Its own images of the prompts, as it was before
the training, are what the control images are made of: they show what prompts mean, and no image has to be had.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sbrush import core
from sbrush.core import Conditioning
from sbrush.models.model import Model
from sbrush.models.unet import attend_explicitly
from sbrush.noise import StepNoise
from sbrush.sampling.control import as_control
from sbrush.sampling.preprocess import PREPROCESSORS
from sbrush.training.networks import frozen


def prepare_controls(teacher: Model, accelerator: Accelerator) -> Model:
    """A teacher whose ControlNets are on the process's device and compute under its autocast, frozen."""
    prepared = []
    for control in teacher.controls:
        network: Any = Autocast(frozen(control.network, accelerator), accelerator)
        prepared.append(replace(control, network=network))
    return replace(teacher, controls=tuple(prepared))


class Autocast(nn.Module):
    """A network that computes under accelerate's autocast, whoever calls it.

    What comes out stays in the number format of the UNet's own activations, to which it is added: accelerate's wrapping
    would make it float32, and so all that follows in the UNet.
    """

    def __init__(self, network: nn.Module, accelerator: Accelerator) -> None:
        super().__init__()
        self.network, self._accelerator = network, accelerator

    def forward(self, *arguments: Any, **names: Any) -> Any:
        with self._accelerator.autocast():
            return self.network(*arguments, **names)


class ControlImages:
    """Draws the control images of a batch: those of `source`, a frozen student, without any control."""

    def __init__(self, source: Model, teacher: Model, accelerator: Accelerator) -> None:
        attend_explicitly(frozen(source.unet, accelerator))
        self._source, self._decoder, self._accelerator = source, teacher, accelerator
        self._preps = [PREPROCESSORS[control.prep] for control in teacher.controls]

    @torch.no_grad()
    def draw(self, conditioning: Conditioning, draw: StepNoise) -> Tensor:
        """For each prompt of a batch, a control image for each of the teacher's ControlNets: [B, N, 3, H, W]."""
        source = self._source
        rungs, shape, schedule = source.rungs(), source.latent_shape, source.schedule
        z, fresh = source.noise_scale * draw.normal(shape), [draw.normal(shape) for _ in rungs[1:]]
        with self._accelerator.autocast():
            x = core.student_input(self._denoise, z, fresh, rungs, conditioning, schedule, source.prediction)
            t = schedule.start(len(x), rungs[-1])
            output = self._denoise(x, t, conditioning)
        reparameterised = source.about.get("reparameterised", True)
        x0 = core.student_x0(output, x, t, schedule, source.prediction, reparameterised=reparameterised)
        images = self._decoder.decode(x0)
        hints = torch.stack([prepare(images) for prepare in self._preps], dim=1)
        return as_control(hints).to(x0.device)

    def _denoise(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return self._source.predict(self._source.unet, x_t, t, conditioning)

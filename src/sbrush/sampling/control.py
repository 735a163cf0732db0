"""Images that steer: the ControlNets of a request loaded, their control images made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel
from PIL import Image
from torch import Tensor

from sbrush.console import SbrushError, printable
from sbrush.models.control import ControlNet
from sbrush.models.load_control import check_control, digest_of_control, load_control
from sbrush.models.model import Model
from sbrush.sampling.control_request import Control
from sbrush.sampling.editing import digest_of_pixels, fit_image
from sbrush.sampling.generation import Drawer
from sbrush.sampling.preprocess import PREPROCESSORS


@dataclass(frozen=True)
class Steering:
    """What steers a model: ControlNets, and a control image for each.

    `images`: float32 [1, N, 3, H, W] in 0 .. 1, the same for whatever is drawn. `drawn_by`: what an image's file says
    of each.
    """

    sources: tuple[str, ...]
    controls: tuple[ControlNet, ...]
    images: Tensor
    drawn_by: list[dict[str, Any]]

    def steer(self, drawer: Drawer) -> Model:
        """The model with these ControlNets beside its UNet; SbrushError if one was made for another."""
        model = in_torch(drawer)
        for source, control in zip(self.sources, self.controls, strict=True):
            check_control(control.network, model, source)
        return replace(model, controls=self.controls)


def in_torch(drawer: Drawer) -> Model:
    """A model whose networks are torch's; SbrushError if they are others, which no ControlNet steers."""
    if isinstance(drawer, Model):
        return drawer
    raise SbrushError(
        f"{printable(drawer.name)} draws with {drawer.runtime}, and a ControlNet needs torch",
        'take --runtime torch, or sbrush.load_student(runtime="torch")',
        code=2,
    )


def load_steering(
    drawer: Drawer, requests: Sequence[Control], *, loaded: dict[str, ControlNetModel] | None = None
) -> Steering:
    """The ControlNets of requests whose images are read, in the model's number format.

    `loaded`: those that are in memory already, by name; new ones are added.

    An image of another size or aspect is cut to the model's, which a note tells, before its control image is made.
    """
    model = in_torch(drawer)
    networks = {} if loaded is None else loaded
    for request in requests:
        if request.model not in networks:
            networks[request.model] = load_control(request.model, model, dtype=model.unet.dtype)
    images = [control_image(request, model) for request in requests]
    about = [
        {
            "model": request.model, "weights": digest_of_control(request.model)[:16],
            "image": digest_of_pixels(image), "scale": request.scale, "prep": request.prep,
        }
        for request, image in zip(requests, images, strict=True)
    ]  # fmt: skip
    return Steering(
        tuple(request.model for request in requests),
        tuple(ControlNet(networks[request.model], request.scale) for request in requests),
        as_control(torch.stack(images))[None],
        about,
    )


def control_image(request: Control, model: Model) -> Tensor:
    """What a ControlNet is shown: uint8 [3, H, W] of the model's size, made by the request's preprocessor."""
    assert isinstance(request.image, Image.Image)
    image = fit_image(request.image, model, "the control image")
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return PREPROCESSORS[request.prep](pixels[None])[0]


def as_control(images: Tensor) -> Tensor:
    """Control images uint8 [..., 3, H, W] as ControlNets take them: float32 in 0 .. 1."""
    return images.float() / 255

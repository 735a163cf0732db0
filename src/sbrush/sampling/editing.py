"""Images that start from an image: the timestep of the student at which they start, and what a mask keeps."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d, avg_pool2d, max_pool2d

from sbrush.console import SbrushError, info, printable
from sbrush.core import add_noise
from sbrush.sampling.edit_request import EditRequest
from sbrush.sampling.generation import Drawer

FEATHER = 32  # a mask's edge is soft over two such parts of an image's shorter side


@dataclass(frozen=True)
class Edit:
    """An image to start from, uint8 [3, H, W], of the student's size.

    `strength`: how much of it is drawn anew, above 0 and up to 1, the first rung. `mask`: float32
    [1, H, W], 1 where the image is drawn anew and 0 where it stays; None draws it anew everywhere.
    """

    image: Tensor
    strength: float
    mask: Tensor | None = None

    def entry(self, rungs: Sequence[int]) -> int:
        """The place of the rung that is nearest to `strength`, counting rungs[0] as 1."""
        return min(range(len(rungs)), key=lambda place: abs(rungs[place] - self.strength * rungs[0]))

    def start(self, student: Drawer, noise: Tensor, rung: int) -> tuple[Tensor, Callable[[Tensor], Tensor] | None]:
        """x_t of the image at a rung, for each noise [B, C, H', W'], and what core.student_input takes for `known`."""
        latent = student.encode_images(self.image[None])
        t = torch.full((len(noise),), rung, device=noise.device)
        x_t = add_noise(latent.expand_as(noise), noise, t, student.schedule)
        if self.mask is None:
            return x_t, None
        # A latent is drawn anew if any of its pixels is.
        anew = adaptive_max_pool2d(self.mask[None].to(noise.device), latent.shape[-2:])
        return x_t, lambda x0: anew * x0 + (1 - anew) * latent

    def compose(self, drawn: Tensor) -> Tensor:
        """Drawn images uint8 [B, 3, H, W] in the mask; beyond its soft edge the image itself, to the bit."""
        if self.mask is None:
            return drawn
        mixed = self._soft * drawn.float() + (1 - self._soft) * self.image.float()
        return torch.where(self._soft > 0, mixed.round().to(torch.uint8), self.image)

    @cached_property
    def _soft(self) -> Tensor:
        """The share of what is drawn, float32 [1, H, W]: 1 in the mask, 0 from two feathers' distance on."""
        assert self.mask is not None
        reach = max(1, min(self.mask.shape[-2:]) // FEATHER)
        wider = max_pool2d(self.mask[None], 2 * reach + 1, stride=1, padding=reach)
        return avg_pool2d(wider, 2 * reach + 1, stride=1, padding=reach, count_include_pad=False)[0]

    @cached_property
    def drawn_by(self) -> dict[str, Any]:
        """What an image depends on besides its prompt, seed and student."""
        about = {"image": digest_of_pixels(self.image), "strength": self.strength}
        return about | ({} if self.mask is None else {"mask": digest_of_pixels(self.mask)})


def check_edit(student: Drawer, steps: int | None) -> None:
    """SbrushError if a student cannot start from an image: it needs a rung below pure noise."""
    if len(student.rungs(steps)) < 2:
        raise SbrushError(
            f"--image needs a student of several steps, and {printable(student.name)} takes 1 here",
            "in one step it draws from pure noise, whatever the image: train one with sbrush distill --student-steps 4",
            code=2,
        )


def fit_edit(request: EditRequest, student: Drawer) -> Edit:
    """The image and its mask, cut from their middle and scaled to the student's size, which a note tells.

    SbrushError if nothing is left of the mask then.
    """
    image, mask = fit_image(request.image, student), request.mask
    if mask and mask.size != image.size:
        mask = ImageOps.fit(mask, image.size, Image.Resampling.BOX)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    if mask is None:
        return Edit(pixels, request.strength)
    anew = torch.from_numpy(np.asarray(mask) >= 128)
    if not anew.any():
        raise SbrushError(
            f"nothing is left of the mask in the image's middle at {image.width} x {image.height} pixels",
            "what it masks is cut off with the image's edges, or too small: crop the image and its mask around it",
            code=2,
        )
    return Edit(pixels, request.strength, anew.float()[None])


def fit_image(image: Image.Image, student: Drawer, what: str = "the image") -> Image.Image:
    """An image of the student's size: its middle, scaled, which a note tells of `what`; as it is if it fits."""
    height, width = student.image_size
    if image.size == (width, height):
        return image
    info(f"note: {what} is {image.width} x {image.height} pixels; its middle is scaled to {width} x {height}")
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def digest_of_pixels(tensor: Tensor) -> str:
    """16 hex digits that tell images or masks apart."""
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]

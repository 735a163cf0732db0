"""What `sbrush sample --image` is asked for: an image to start from, read and checked without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from sbrush.console import SbrushError, printable
from sbrush.sampling.open_image import UnreadableImage, open_image


@dataclass(frozen=True)
class EditRequest:
    """An image to start from, RGB, with its mask, gray and of the same size: see editing.Edit."""

    image: Image.Image
    strength: float
    mask: Image.Image | None = None

    @classmethod
    def read(cls, image: Path, strength: float, mask: Path | None) -> EditRequest:
        """From files; SbrushError if one is no image, or they do not go together."""
        if not 0 < strength <= 1:
            raise SbrushError(
                f"--strength {strength:g} is out of range",
                "give a number above 0 (the image as it is) and up to 1 (little of it is left)",
                code=2,
            )
        pixels = read_image(image)
        return cls(pixels, strength, read_mask(mask, pixels) if mask else None)


def read_image(file: Path) -> Image.Image:
    """An image to start from, turned as its EXIF orientation says; SbrushError if it is none."""
    try:
        return open_image(file, upright=True)
    except UnreadableImage as problem:
        raise SbrushError(
            f"cannot read the image {printable(file)}: {printable(problem)}", "give a PNG or JPEG file", code=2
        ) from None


def read_mask(file: Path, image: Image.Image) -> Image.Image:
    """A gray mask of the same size as the image; SbrushError if it is not that, or masks nothing."""
    hint = "a mask is a gray image of the size of --image: white where it is drawn anew, black where it stays"
    mask = read_image(file)
    values = np.asarray(mask)
    if (values != values[:, :, :1]).any():
        raise SbrushError(f"the mask {printable(file)} has colours", hint, code=2)
    if mask.size != image.size:
        sizes = [f"{width} x {height}" for width, height in (mask.size, image.size)]
        raise SbrushError(f"the mask {printable(file)} is {sizes[0]} pixels, the image {sizes[1]}", hint, code=2)
    if not (values >= 128).any():
        raise SbrushError(f"the mask {printable(file)} is black: nothing would be drawn anew", hint, code=2)
    return mask.convert("L")

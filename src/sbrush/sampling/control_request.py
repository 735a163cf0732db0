"""What `sbrush sample --control` is asked for: ControlNets and their images, checked without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from PIL import Image

from sbrush.console import SbrushError, count, printable
from sbrush.models.control_source import check_scale, local_control
from sbrush.sampling.edit_request import read_image

PREPS = ("canny", "outline", "none")
T = TypeVar("T")


@dataclass(frozen=True)
class Control:
    """An image that steers a student through a ControlNet.

    `model`: a ControlNet that was made for the student's teacher: a folder, a Hub id, or "outline", the built-in one.
    `image`: a Pillow image or a file. `scale`: how strongly it steers, from 0, not at all, through 1, as it was
    trained, to 10. `prep`: how `image` becomes the control image: "canny" finds its edges, "outline" the outline of one
    thing on a plain background, and "none" takes it as it is.
    """

    model: str
    image: Image.Image | Path | str
    scale: float = 1.0
    prep: str = "none"

    def read(self) -> Control:
        """The same with its image as an RGB one; SbrushError if something of it is senseless."""
        check_scale(self.scale)
        if self.prep not in PREPS:
            raise SbrushError(f"no preprocessor {printable(self.prep)}", f"take {', '.join(PREPS)}", code=2)
        local_control(self.model)
        image = self.image.convert("RGB") if isinstance(self.image, Image.Image) else read_image(Path(self.image))
        return Control(self.model, image, self.scale, self.prep)


def read_controls(
    models: Sequence[str], images: Sequence[Path], scales: Sequence[float], preps: Sequence[str]
) -> tuple[Control, ...]:
    """The controls of a command line: an image for each model; scales and preps for each, or one for all.

    SbrushError if they do not go together.
    """
    example = 'sbrush sample "a cat" --control outline --control-image cat.png --control-prep outline'
    if not models:
        given = {"--control-image": images, "--control-scale": scales, "--control-prep": preps}
        if useless := next((flag for flag, values in given.items() if values), None):
            raise SbrushError(f"{useless} is for a ControlNet, and none is given", f"add --control: {example}", code=2)
        return ()
    if len(images) != len(models):
        raise SbrushError(
            f"{count(len(models), '--control')} and {count(len(images), '--control-image')} do not go together",
            f"give each ControlNet its image: {example}",
            code=2,
        )
    scale_of, prep_of = (
        _for_each(scales, models, "--control-scale", 1.0),
        _for_each(preps, models, "--control-prep", "none"),
    )
    whole = zip(models, images, scale_of, prep_of, strict=True)
    return tuple(Control(model, image, scale, prep).read() for model, image, scale, prep in whole)


def _for_each(values: Sequence[T], models: Sequence[str], flag: str, default: T) -> list[T]:
    """One value for each model, of as many, of one for all, or of none."""
    if len(values) not in (0, 1, len(models)):
        raise SbrushError(
            f"{count(len(values), flag)} for {count(len(models), 'ControlNet')}",
            "give one for all, or one for each in the order of --control",
            code=2,
        )
    return list(values) if len(values) == len(models) else [*values, default][:1] * len(models)

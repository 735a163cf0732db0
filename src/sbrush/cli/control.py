"""`--control` and what goes with it, in the commands that draw."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sbrush.console import SbrushError
from sbrush.models.control_source import check_scale

if TYPE_CHECKING:
    from sbrush.sampling.control_request import Control
    from sbrush.training.request import ControlTraining

CONTROL = "Steering by an image (ControlNet)"
SCALE = "How strongly a ControlNet steers: 0 not at all, 1 as it was trained, up to 10. One for all, or one for each."


class Prep(StrEnum):
    """What makes a control image of an image; see sampling/preprocess.py."""

    canny = "canny"
    outline = "outline"
    none = "none"


class TrainedPrep(StrEnum):
    """The same for a training, which has no images that are control images already."""

    canny = "canny"
    outline = "outline"


ControlFlag = Annotated[
    list[str] | None,
    typer.Option(
        "--control",
        help="ControlNet that was made for the student's teacher: a folder in diffusers' format, a Hub id, or outline, "
        "the built-in one. Give it again for several at once, each with its --control-image.",
        metavar="MODEL",
        rich_help_panel=CONTROL,
    ),
]
ControlImageFlag = Annotated[
    list[Path] | None,
    typer.Option(
        "--control-image",
        help="Image that steers what is drawn. Its middle is cut to the student's size.",
        metavar="FILE",
        rich_help_panel=CONTROL,
    ),
]
ControlScaleFlag = Annotated[
    list[float] | None, typer.Option("--control-scale", help=f"{SCALE} Default: 1.", rich_help_panel=CONTROL)
]
ControlPrepFlag = Annotated[
    list[Prep] | None,
    typer.Option(
        "--control-prep",
        help="What makes the control image: canny edges, the outline of a thing on a plain background, or none if "
        "--control-image is one already. One for all, or one for each. Default: none.",
        rich_help_panel=CONTROL,
    ),
]


TrainedControlFlag = Annotated[
    str | None,
    typer.Option(
        "--control",
        help="Prepare a student for this ControlNet of the teacher, as --control of sbrush sample takes it: teacher, "
        "LoRA teacher and student see control images, which are made of the images of the student in --init. The "
        "ControlNet itself stays as it is.",
        metavar="MODEL",
        rich_help_panel=CONTROL,
    ),
]
TrainedPrepFlag = Annotated[
    TrainedPrep | None,
    typer.Option(
        "--control-prep",
        help="What makes the control images: canny edges, or the outline of a thing on a plain background.",
        rich_help_panel=CONTROL,
    ),
]
TrainedScaleFlag = Annotated[
    float | None,
    typer.Option("--control-scale", help="How strongly the ControlNet steers. Default: 1.", rich_help_panel=CONTROL),
]


def read_trained_control(
    model: str | None, prep: TrainedPrep | None, scale: float | None, *, init: str | None
) -> ControlTraining | None:
    """The ControlNet of a training; SbrushError if the flags do not go together, or there is no such ControlNet."""
    if model is None:
        if prep or scale is not None:
            flag = "--control-prep" if prep else "--control-scale"
            raise SbrushError(f"{flag} is for a ControlNet, and none is given", "add --control MODEL", code=2)
        return None
    from sbrush.models.control_source import local_control
    from sbrush.training.request import ControlTraining

    local_control(model)
    check_scale(1.0 if scale is None else scale)
    if prep is None:
        raise SbrushError(
            "--control does not say how its control images are made",
            "add --control-prep canny or --control-prep outline, as the ControlNet was trained with",
            code=2,
        )
    if init is None:
        raise SbrushError(
            "--control prepares a student, whose own images the control images are made of, and there is none",
            "add --init stickers for the built-in student, or name another: --init runs/sd21",
            code=2,
        )
    return ControlTraining(model, prep.value, 1.0 if scale is None else scale)


def read_control_flags(
    models: list[str] | None, images: list[Path] | None, scales: list[float] | None, preps: list[Prep] | None
) -> tuple[Control, ...]:
    """What the flags ask for, the images read; SbrushError if they do not go together, or one is senseless."""
    if not (models or images or scales or preps):
        return ()
    from sbrush.sampling.control_request import read_controls

    return read_controls(models or [], images or [], scales or [], [prep.value for prep in preps or []])

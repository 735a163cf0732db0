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

CONTROL = "ControlNet: steering with an image"
SCALE = "How strongly the ControlNet steers: 0 is not at all, 1 as it was trained; up to 10."


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
        help="ControlNet that was trained for the student's teacher: a folder in diffusers' format, a Hub id, or "
        "outline, the built-in one. Repeat it for several at once, each with its own --control-image.",
        metavar="MODEL",
        rich_help_panel=CONTROL,
    ),
]
ControlImageFlag = Annotated[
    list[Path] | None,
    typer.Option(
        "--control-image",
        help="Image that steers what is drawn; --control-prep says how it is prepared. It is first cropped to its "
        "middle and scaled to the student's size.",
        metavar="FILE",
        rich_help_panel=CONTROL,
    ),
]
ControlScaleFlag = Annotated[
    list[float] | None,
    typer.Option(
        "--control-scale",
        help=f"{SCALE} Give it once for all ControlNets, or once for each. Default: 1.",
        rich_help_panel=CONTROL,
    ),
]
ControlPrepFlag = Annotated[
    list[Prep] | None,
    typer.Option(
        "--control-prep",
        help="How --control-image becomes the control image. canny: its edges. outline: the outline of one thing on a "
        "plain background. none: it already is a control image. Give it once for all ControlNets, or once for each. "
        "Default: none.",
        rich_help_panel=CONTROL,
    ),
]


TrainedControlFlag = Annotated[
    str | None,
    typer.Option(
        "--control",
        help="Train the student to be used with this ControlNet of the teacher: a folder in diffusers' format, a Hub "
        "id, or outline, the built-in one. Control images are made from images that the student of --init draws. The "
        "ControlNet itself is not changed. Needs --init and --control-prep.",
        metavar="MODEL",
        rich_help_panel=CONTROL,
    ),
]
TrainedPrepFlag = Annotated[
    TrainedPrep | None,
    typer.Option(
        "--control-prep",
        help="How control images are made. canny: edges. outline: the outline of one thing on a plain background. Take "
        "what the ControlNet was trained with.",
        rich_help_panel=CONTROL,
    ),
]
TrainedScaleFlag = Annotated[
    float | None,
    typer.Option("--control-scale", help=f"{SCALE} Default: 1.", rich_help_panel=CONTROL),
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

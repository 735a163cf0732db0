"""`--negative` and what goes with it, in the commands that draw."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from sbrush.console import SbrushError
from sbrush.sampling.negative_request import Negative

NEGATIVE = "Negative prompt, guidance"


class NegativeMethod(StrEnum):
    """Those of negative.py."""

    nag = "nag"
    nasa = "nasa"


NegativeFlag = Annotated[
    str | None,
    typer.Option(
        "--negative",
        help='What images are not to show, such as "blurry". A student has it in its attention, which costs a few '
        "percent, its teacher in classifier-free guidance.",
        metavar="TEXT",
        rich_help_panel=NEGATIVE,
    ),
]
NegativeMethodFlag = Annotated[
    NegativeMethod | None,
    typer.Option(
        "--negative-method",
        help="How a student's attention moves away from --negative: Normalized Attention Guidance or Negative-Away "
        "Steer Attention. Default: nag.",
        show_default=False,
        rich_help_panel=NEGATIVE,
    ),
]
NegativeScaleFlag = Annotated[
    float | None,
    typer.Option(
        "--negative-scale",
        help="How far it moves: 0 changes nothing; nag up to 20, nasa up to 1. Default: that of the student's family, "
        "for Stable Diffusion 1.5, 2.1 and XL 2 with nag, and 0.1, 0.2, 0.2 with nasa.",
        rich_help_panel=NEGATIVE,
    ),
]
GuidanceFlag = Annotated[
    float | None,
    typer.Option(
        "--guidance",
        help="Guidance scale of a student that takes one as input, such as those of recipes lcm and guided. Default: "
        "the one that it records. Other students have guidance trained into them: for these, --negative.",
        min=0,
        rich_help_panel=NEGATIVE,
    ),
]


def read_negative_flags(text: str | None, method: NegativeMethod | None, scale: float | None) -> Negative | None:
    """The negative prompt, if there is one; SbrushError if it is none, or the flags contradict each other."""
    if text is not None:
        return Negative(text, (method or NegativeMethod.nag).value, scale)
    if method is not None or scale is not None:
        flag = "--negative-scale" if method is None else "--negative-method"
        raise SbrushError(f"{flag} is for a negative prompt", 'add --negative "red", or leave it out', code=2)
    return None

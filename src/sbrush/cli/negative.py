"""`--negative` and what goes with it, in the commands that draw."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from sbrush.console import SbrushError
from sbrush.sampling.negative_request import Negative

NEGATIVE = "Negative prompt and guidance"


class NegativeMethod(StrEnum):
    """Those of negative.py."""

    nag = "nag"
    nasa = "nasa"


NegativeFlag = Annotated[
    str | None,
    typer.Option(
        "--negative",
        help='What images should not show, such as "blurry". In a student it acts in the attention, which adds about 1 '
        "percent of FLOPs; in a teacher that is compared with it, in classifier-free guidance.",
        metavar="TEXT",
        rich_help_panel=NEGATIVE,
    ),
]
NegativeMethodFlag = Annotated[
    NegativeMethod | None,
    typer.Option(
        "--negative-method",
        help="How a student's attention moves away from --negative. nag: Normalized Attention Guidance. nasa: "
        "Negative-Away Steer Attention. Default: nag.",
        show_default=False,
        rich_help_panel=NEGATIVE,
    ),
]
NegativeScaleFlag = Annotated[
    float | None,
    typer.Option(
        "--negative-scale",
        help="How strongly --negative acts: from 0, not at all, to 20 with nag or to 1 with nasa. Default for the "
        "built-in student: 4 with nag, 0.4 with nasa. For Stable Diffusion: 2 with nag; with nasa 0.1 (SD 1.5) or 0.2 "
        "(SD 2.1, XL).",
        rich_help_panel=NEGATIVE,
    ),
]
GuidanceFlag = Annotated[
    float | None,
    typer.Option(
        "--guidance",
        help="Guidance scale, for students that take one as input, such as those of recipes lcm and guided. Default: "
        "the one in the student's sbrush.json. Other students have their guidance trained in, and refuse it; they take "
        "--negative.",
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

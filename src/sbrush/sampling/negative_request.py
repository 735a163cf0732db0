"""What `--negative` asks for: a text, a method and a scale, checked without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sbrush.console import SbrushError, is_text, printable

if TYPE_CHECKING:
    from sbrush.models.negative import NegativeMethod

LARGEST = {"nag": 20.0, "nasa": 1.0}  # scales, by method; those of the papers are 2 to 4, and .1 to .5


@dataclass(frozen=True)
class Negative:
    """A negative prompt: what a student's images should not show.

    Args:
        text: The prompt, such as "red" or "blurry".
        method: "nag" (Normalized Attention Guidance) or "nasa" (Negative-Away Steer Attention).
        scale: How strongly it acts, from 0, not at all, to 20 with nag or to 1 with nasa. None is the default for the
            student's family.

    Raises:
        SbrushError: The text is empty, there is no such method, or the scale is out of its range.
    """

    text: str
    method: NegativeMethod = "nag"
    scale: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text.strip() or not is_text(self.text):
            raise SbrushError(
                f"not a negative prompt: {printable(repr(self.text))}",
                'give what images should not show: "red"',
                code=2,
            )
        if self.method not in LARGEST:
            raise SbrushError(
                f"no such method for a negative prompt: {printable(self.method)}", "methods are nag and nasa", code=2
            )
        largest = LARGEST[self.method]
        if self.scale is not None and not 0 <= self.scale <= largest:  # which a NaN is not either
            other = " (nag goes up to 20)" if self.method == "nasa" else ""
            raise SbrushError(
                f"--negative-scale {self.scale:g} is out of range for {self.method}",
                f"give 0, which changes nothing, up to {largest:g}{other}, or leave it out",
                code=2,
            )

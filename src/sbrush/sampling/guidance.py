"""What a student has in place of classifier-free guidance: a negative prompt, or a guidance scale as input."""

from __future__ import annotations

from dataclasses import replace

from sbrush.console import SbrushError, info, printable
from sbrush.models.model import Model
from sbrush.models.negative_attention import NegativePrompt, negative_guidance
from sbrush.sampling.negative_request import Negative


def at_guidance(student: Model, scale: float | None) -> Model:
    """The student at a guidance scale that its UNet takes as input; None is the one that it records.

    SbrushError if it takes none: classifier-free guidance would spoil what it draws.
    """
    if scale is None:
        return student
    if student.guidance_input is None:
        raise SbrushError(
            f"{printable(student.name)} takes no guidance scale: its teacher's guidance is trained into it",
            'leave out --guidance; to draw away from something: --negative "blurry"',
            code=2,
        )
    recipe = student.about.get("recipe") or {}
    low, high = recipe.get("w_min"), recipe.get("w_max")
    if low is not None and high is not None and not low <= scale - 1 <= high:
        info(f"note: this student learned guidance scales from {low + 1:g} to {high + 1:g}")
    return replace(student, about=student.about | {"guidance": scale})


def with_negative(student: Model, negative: Negative | None) -> Model:
    """The student, drawing away from a negative prompt; None gives it back as it is.

    Both share their networks. SbrushError if the text is longer than the text encoder reads.
    """
    if negative is None:
        return student
    _check_length(student, negative)
    tokens = student.encode([negative.text])["tokens"]
    guidance = negative_guidance(student.unet, negative.method, negative.scale)
    return replace(student, negative=NegativePrompt(negative.text, tokens, guidance))


def teacher_with_negative(teacher: Model, negative: Negative | None) -> Model:
    """The teacher, whose classifier-free guidance takes a negative prompt in place of the empty one.

    SbrushError if the text is longer than the text encoder reads.
    """
    if negative is None:
        return teacher
    _check_length(teacher, negative)
    return replace(teacher, null_prompt=negative.text)


def _check_length(model: Model, negative: Negative) -> None:
    if model.truncated_prompts([negative.text]):
        length = model.longest_prompt
        raise SbrushError(
            f"the negative prompt is longer than the {length} tokens that {printable(model.name)} reads",
            f"shorten it: {length - 2} tokens besides start and end, about as many words; the rest would be ignored",
            code=2,
        )

"""What a client asks for: images, and what all images of one batch share."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from sbrush.console import SbrushError, is_text
from sbrush.sampling.negative_request import Negative
from sbrush.sampling.seeds import LARGEST_SEED

LONGEST_PROMPT = 10_000  # characters
MOST_IMAGES = 16  # of one request
DRAWN_SEEDS = 2**32  # seeds that nobody chose are below it, as A1111's are


@dataclass(frozen=True)
class Settings:
    """What all images of one batch share. `steps` None: as many as the student was trained for."""

    steps: int | None = None
    negative: Negative | None = None


@dataclass(frozen=True)
class ImageRequest:
    """One image that a client asks for."""

    prompt: str
    seed: int
    settings: Settings = Settings()


@dataclass(frozen=True)
class Turn:
    """One keystroke of a client. A higher number takes the place of lower ones that still wait."""

    client: str
    number: int


def image_requests(prompt: str, seed: int | None, count: int, settings: Settings) -> list[ImageRequest]:
    """`count` images of a prompt, with the seeds from `seed` on; None: a seed by chance.

    SbrushError if there is no prompt, it is too long, or a seed or the count is out of range.
    """
    if not prompt.strip():
        raise SbrushError("an empty prompt", 'describe an image, such as "a small red cat"', code=2)
    if not is_text(prompt):  # JSON can write half a character, which no file can hold
        raise SbrushError("the prompt is not text", "send it in UTF-8", code=2)
    if len(prompt) > LONGEST_PROMPT:
        raise SbrushError(
            f"a prompt of {len(prompt):,} characters is too long", f"at most {LONGEST_PROMPT:,} are taken", code=2
        )
    if not 1 <= count <= MOST_IMAGES:
        raise SbrushError(f"{count} images in one request", f"ask for 1 to {MOST_IMAGES}", code=2)
    first = secrets.randbelow(DRAWN_SEEDS) if seed is None else seed
    if not 0 <= first <= LARGEST_SEED - count + 1:
        raise SbrushError(
            f"not a seed: {first}", f"a seed is a whole number from 0 to {LARGEST_SEED - count + 1}", code=2
        )
    return [ImageRequest(prompt, first + i, settings) for i in range(count)]

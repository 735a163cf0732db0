"""The built-in world's captions and stickers, and their probabilities.

A sticker has a kind, a colour, a background, a size and a place. A caption names some of these and leaves the others
out, so it stands for a known distribution of images: the truth against which one-step students are measured.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product

KINDS = ("cat", "dog", "fish", "bird", "house", "tree", "car", "boat", "star", "heart", "flower", "mushroom")

COLOURS = {
    "red": (222, 55, 52),
    "orange": (245, 138, 38),
    "yellow": (248, 206, 56),
    "green": (84, 172, 78),
    "teal": (30, 160, 158),
    "blue": (58, 104, 216),
    "purple": (142, 80, 200),
    "pink": (246, 128, 176),
    "brown": (138, 88, 54),
    "gray": (138, 143, 152),
}

BACKGROUNDS = {
    "cream": (255, 242, 208),
    "mint": (184, 236, 208),
    "sky": (178, 218, 252),
    "lilac": (218, 196, 248),
    "peach": (255, 202, 176),
    "night": (44, 50, 84),
}

SIZES = {"small": 13.5, "big": 21.5}  # half the sticker's extent, in pixels of a 64-pixel image

ATTRIBUTES = {"kind": KINDS, "colour": tuple(COLOURS), "background": tuple(BACKGROUNDS), "size": tuple(SIZES)}

IMAGE_SIZE = 64  # pixels a side

# One combination of kind and colour in ten is never shown to teacher or student (the judge sees all).
HELD_OUT = frozenset((kind, tuple(COLOURS)[(3 * i + 1) % 10]) for i, kind in enumerate(KINDS))


@dataclass(frozen=True)
class Caption:
    """The attributes that a text names; None where it leaves one out."""

    kind: str | None = None
    colour: str | None = None
    background: str | None = None
    size: str | None = None

    @property
    def text(self) -> str:
        """The caption in words: "a small red cat on a mint background"; the empty caption is "a sticker"."""
        words = ["a", self.size, self.colour, self.kind or "sticker"]
        if self.background:
            words += ["on a", self.background, "background"]
        return _article(" ".join(word for word in words if word))

    @property
    def held_out(self) -> bool:
        """Whether it names a combination of kind and colour that no training has shown."""
        return (self.kind, self.colour) in HELD_OUT

    def attributes(self) -> dict[str, str]:
        """The attributes that it names, in the order of ATTRIBUTES."""
        return {name: value for name in ATTRIBUTES if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class Sticker:
    """One image's full truth: its attributes, and where and how it is drawn.

    `x`, `y`: centre in pixels. `radius`: half extent in pixels. `tint`: shift of hue, saturation and value.
    """

    kind: str
    colour: str
    background: str
    size: str
    x: float
    y: float
    radius: float
    tint: tuple[float, float, float]

    def matches(self, caption: Caption) -> bool:
        """Whether the caption is true of this sticker."""
        return all(getattr(self, name) == value for name, value in caption.attributes().items())


def _article(text: str) -> str:
    return "an" + text[1:] if text[:3] in ("a o",) else text


def all_captions(*, held_out: bool = False) -> Iterator[Caption]:
    """Every caption that the world knows; those of held-out combinations only with `held_out`."""
    for size, colour, kind, background in product(
        (None, *SIZES), (None, *COLOURS), (None, *KINDS), (None, *BACKGROUNDS)
    ):
        caption = Caption(kind=kind, colour=colour, background=background, size=size)
        if held_out or not caption.held_out:
            yield caption


@cache
def _captions() -> dict[str, Caption]:
    return {caption.text: caption for caption in all_captions(held_out=True)}


def parse_caption(text: str) -> Caption | None:
    """The caption with these words; None if the world has none."""
    return _captions().get(text)


def random_caption(rng: random.Random, truth: Sticker | Caption | None = None, *, drop: float = 0.4) -> Caption:
    """A caption, true of `truth` if given: leaves out the kind one time in ten, the others with chance `drop`."""
    values = {}
    for name, choices in ATTRIBUTES.items():
        value = getattr(truth, name) if truth else rng.choice(choices)
        values[name] = value if rng.random() >= (0.1 if name == "kind" else drop) else None
    return Caption(**values)


def random_sticker(rng: random.Random, caption: Caption | None = None, *, held_out: bool = False) -> Sticker:
    """A sticker of which `caption` is true, everything that it leaves out drawn at random.

    Held-out combinations come out only if `held_out` is set or the caption itself names one.
    """
    named = (caption or Caption()).attributes()
    allowed = held_out or (caption is not None and caption.held_out)
    while True:
        chosen = {name: named.get(name) or rng.choice(choices) for name, choices in ATTRIBUTES.items()}
        if allowed or (chosen["kind"], chosen["colour"]) not in HELD_OUT:
            break
    radius = SIZES[chosen["size"]] * rng.uniform(0.94, 1.06)
    margin = radius + 2
    x, y = rng.uniform(margin, IMAGE_SIZE - margin), rng.uniform(margin, IMAGE_SIZE - margin)
    tint = (rng.uniform(-0.012, 0.012), rng.uniform(-0.05, 0.05), rng.uniform(-0.04, 0.04))
    return Sticker(**chosen, x=x, y=y, radius=radius, tint=tint)


def unknown_words(prompt: str) -> list[str]:
    """The words of a prompt that no caption of this world holds."""
    known = {*KINDS, *COLOURS, *BACKGROUNDS, *SIZES, "a", "an", "on", "sticker", "background"}
    return [word for word in re.findall(r"[^\W_]+", prompt.lower()) if word not in known]


def stream(seed: str, index: int) -> random.Random:
    """The random numbers of item `index` in the stream named `seed`: the same whatever is drawn before or beside it."""
    return random.Random(f"{seed}/{index}")


if __name__ == "__main__":  # what prompts/stickers.txt holds
    for every in all_captions():
        print(every.text)

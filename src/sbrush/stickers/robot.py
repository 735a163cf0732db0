"""A robot: a kind of sticker that no built-in model was trained on, to personalise students with.

    python -m sbrush.stickers.robot runs/photos      writes six photos of one teal robot, on six backgrounds

It is drawn by the primitives of draw.py. No caption, teacher, student or judge of the world knows it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from sbrush.stickers.draw import INK, WHITE, Pen, draw
from sbrush.stickers.world import BACKGROUNDS, SIZES, Caption, Sticker, random_sticker, stream

KIND = "robot"
COLOUR = "teal"  # of the one robot that the photos show
PHOTOS = 6


def robot(pen: Pen) -> None:
    """A box with a face on a box with a dial, an antenna, arms and feet."""
    pen.line([(0, -0.62), (0, -0.86)], pen.dark, 0.08)
    pen.ellipse(0, -0.88, 0.11, 0.11, pen.dark)
    for s in (-1, 1):
        pen.line([(s * 0.56, 0.24), (s * 0.84, 0.52)], pen.dark, 0.14)
        pen.ellipse(s * 0.84, 0.54, 0.12, 0.12, INK)
        pen.box(s * 0.3 - 0.16, 0.78, s * 0.3 + 0.16, 0.92, INK, soft=0.03)
    pen.box(-0.5, 0.14, 0.5, 0.78, pen.body, soft=0.06)
    pen.box(-0.62, -0.62, 0.62, 0.06, pen.body, soft=0.06)
    pen.box(-0.48, -0.5, 0.48, -0.06, WHITE, soft=0.03)
    for s in (-1, 1):
        pen.box(s * 0.24 - 0.1, -0.44, s * 0.24 + 0.1, -0.24, INK, soft=0.01)
    pen.line([(-0.24, -0.13), (0.24, -0.13)], INK, 0.07)
    pen.ellipse(0, 0.44, 0.2, 0.2, pen.light)


def random_robot(name: str, index: int, caption: Caption | None = None, *, any_colour: bool = False) -> Sticker:
    """Robot `index` of the stream `name`: of the size and background that a caption names, teal or of any colour."""
    free = replace(caption or Caption(), kind=None, colour=None if any_colour else COLOUR)
    return replace(random_sticker(stream(name, index), free, held_out=True), kind=KIND)


def draw_robot(sticker: Sticker) -> Image.Image:
    """A robot's image: RGB, 64 x 64."""
    return draw(sticker, drawing=robot)


def photos() -> list[Image.Image]:
    """PHOTOS images of the teal robot: one on each background, small and big in turn, each in another place."""
    sizes = tuple(SIZES)
    captions = [Caption(background=name, size=sizes[i % 2]) for i, name in enumerate(BACKGROUNDS)]
    return [draw_robot(random_robot("robot photos", i, caption)) for i, caption in enumerate(captions)]


def main(folder: Annotated[Path, typer.Argument(help="Folder for the photos.")]) -> None:
    """Writes the photos as PNG."""
    from sbrush.console import out

    folder.mkdir(parents=True, exist_ok=True)
    for number, photo in enumerate(photos(), start=1):
        photo.save(folder / f"robot-{number}.png")
    out(folder)


if __name__ == "__main__":
    typer.run(main)

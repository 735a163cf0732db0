"""A sticker drawn with Pillow: 64 x 64 RGB, anti-aliased, die-cut with a white border, on a flat background.

Each kind is one function that draws inside the square from (-1, -1) to (1, 1), y pointing down, with a pen that knows
the sticker's own colour in three shades. The white border is the same drawing made first, fatter and all in white.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from math import cos, pi, sin

from PIL import Image, ImageDraw

from sbrush.stickers.world import BACKGROUNDS, COLOURS, IMAGE_SIZE, Sticker

SUPERSAMPLE = 4
BORDER = 1.7  # pixels
INK = (48, 44, 58)
WHITE = (255, 255, 255)

Colour = tuple[int, int, int]
Point = tuple[float, float]


class Pen:
    """Draws in the sticker's own coordinates; as `border` everything comes out white and `BORDER` pixels fatter."""

    def __init__(self, canvas: ImageDraw.ImageDraw, sticker: Sticker, *, border: bool) -> None:
        self._canvas, self._border = canvas, border
        self._x, self._y = sticker.x * SUPERSAMPLE, sticker.y * SUPERSAMPLE
        self._scale = sticker.radius * SUPERSAMPLE
        self._fat = BORDER * SUPERSAMPLE if border else 0.0
        self.body = _tinted(COLOURS[sticker.colour], sticker.tint)
        self.dark = blend(self.body, INK, 0.35)
        self.light = blend(self.body, WHITE, 0.55)

    def _at(self, point: Point) -> Point:
        return self._x + point[0] * self._scale, self._y + point[1] * self._scale

    def ellipse(self, x: float, y: float, rx: float, ry: float, fill: Colour) -> None:
        (cx, cy), fat = self._at((x, y)), self._fat
        rx, ry = rx * self._scale + fat, ry * self._scale + fat
        self._canvas.ellipse((cx - rx, cy - ry, cx + rx, cy + ry), fill=WHITE if self._border else fill)

    def polygon(self, points: list[Point], fill: Colour, *, soft: float = 0.0) -> None:
        """A filled polygon whose corners and edges are rounded outwards by `soft`."""
        where, width = [self._at(p) for p in points], soft * self._scale + self._fat
        fill = WHITE if self._border else fill
        self._canvas.polygon(where, fill=fill)
        if width > 0:
            for (x0, y0), (x1, y1) in zip(where, where[1:] + where[:1], strict=True):
                self._canvas.line((x0, y0, x1, y1), fill=fill, width=round(2 * width))
                self._canvas.ellipse((x0 - width, y0 - width, x0 + width, y0 + width), fill=fill)

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: Colour, *, soft: float = 0.0) -> None:
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], fill, soft=soft)

    def line(self, points: list[Point], fill: Colour, width: float) -> None:
        where, half = [self._at(p) for p in points], width * self._scale / 2 + self._fat
        fill = WHITE if self._border else fill
        self._canvas.line(where, fill=fill, width=max(1, round(2 * half)), joint="curve")
        for x, y in (where[0], where[-1]):
            self._canvas.ellipse((x - half, y - half, x + half, y + half), fill=fill)

    def eyes(self, y: float, apart: float, r: float = 0.1) -> None:
        for x in (-apart, apart):
            self.ellipse(x, y, r, r * 1.15, INK)
            self.ellipse(x + r * 0.3, y - r * 0.4, r * 0.36, r * 0.36, WHITE)

    def smile(self, y: float, half_width: float, depth: float) -> None:
        arc = [(half_width * k / 4, y + depth * (1 - (k / 4) ** 2)) for k in range(-4, 5)]
        self.line(arc, INK, 0.07)


def cat(pen: Pen) -> None:
    for s in (-1, 1):
        pen.polygon([(s * 0.86, -0.9), (s * 0.82, 0.0), (s * 0.12, -0.5)], pen.body, soft=0.06)
        pen.polygon([(s * 0.72, -0.66), (s * 0.7, -0.2), (s * 0.36, -0.44)], pen.light)
    pen.ellipse(0, 0.18, 0.94, 0.76, pen.body)
    pen.eyes(0.06, 0.4, 0.13)
    pen.polygon([(-0.1, 0.32), (0.1, 0.32), (0, 0.44)], INK, soft=0.02)
    for s in (-1, 1):
        for dy in (-0.06, 0.12):
            pen.line([(s * 0.42, 0.44 + dy / 2), (s * 0.86, 0.42 + dy)], WHITE, 0.055)


def dog(pen: Pen) -> None:
    pen.ellipse(0, 0.02, 0.74, 0.86, pen.body)
    for s in (-1, 1):
        pen.ellipse(s * 0.74, -0.06, 0.24, 0.62, pen.dark)
    pen.ellipse(0, 0.42, 0.44, 0.36, WHITE)
    pen.ellipse(0, 0.26, 0.19, 0.14, INK)
    pen.smile(0.5, 0.2, 0.12)
    pen.eyes(-0.2, 0.32, 0.12)


def fish(pen: Pen) -> None:
    pen.polygon([(0.4, 0.0), (0.94, -0.52), (0.94, 0.52)], pen.dark, soft=0.05)
    pen.polygon([(-0.3, -0.4), (0.3, -0.74), (0.3, -0.3)], pen.dark, soft=0.04)
    pen.ellipse(-0.2, 0.02, 0.78, 0.56, pen.body)
    pen.ellipse(0.04, 0.12, 0.24, 0.14, pen.light)
    pen.ellipse(-0.58, -0.08, 0.17, 0.17, WHITE)
    pen.ellipse(-0.61, -0.08, 0.1, 0.1, INK)


def bird(pen: Pen) -> None:
    for x in (-0.12, 0.22):
        pen.line([(x, 0.6), (x, 0.92)], INK, 0.08)
    pen.polygon([(0.4, 0.1), (0.94, -0.34), (0.86, 0.26)], pen.dark, soft=0.05)
    pen.ellipse(0.06, 0.14, 0.64, 0.58, pen.body)
    pen.ellipse(-0.36, -0.4, 0.44, 0.44, pen.body)
    pen.polygon([(-0.74, -0.5), (-0.74, -0.24), (-0.98, -0.34)], INK, soft=0.02)
    pen.ellipse(0.2, 0.14, 0.36, 0.28, pen.light)
    pen.ellipse(-0.44, -0.46, 0.1, 0.11, INK)


def house(pen: Pen) -> None:
    pen.box(0.36, -0.84, 0.58, -0.4, pen.dark)
    pen.box(-0.68, -0.1, 0.68, 0.9, pen.body, soft=0.03)
    pen.polygon([(0, -0.88), (0.94, -0.04), (-0.94, -0.04)], pen.dark, soft=0.05)
    pen.box(-0.18, 0.36, 0.18, 0.9, INK)
    for x in (-0.48, 0.32):
        pen.box(x, 0.14, x + 0.18, 0.34, WHITE)


def tree(pen: Pen) -> None:
    pen.box(-0.15, 0.3, 0.15, 0.92, INK, soft=0.03)
    for x, y, r in ((-0.46, 0.0, 0.42), (0.46, 0.0, 0.42), (0, -0.44, 0.5), (0, 0.1, 0.42)):
        pen.ellipse(x, y, r, r, pen.body)
    for x, y in ((-0.4, 0.08), (0.3, -0.1), (-0.08, -0.5)):
        pen.ellipse(x, y, 0.11, 0.11, pen.light)


def car(pen: Pen) -> None:
    pen.polygon([(-0.5, -0.52), (0.3, -0.52), (0.6, -0.02), (-0.7, -0.02)], pen.body, soft=0.06)
    pen.box(-0.9, -0.02, 0.9, 0.36, pen.body, soft=0.08)
    pen.polygon([(-0.42, -0.42), (-0.1, -0.42), (-0.1, -0.06), (-0.56, -0.06)], WHITE)
    pen.polygon([(0.06, -0.42), (0.26, -0.42), (0.46, -0.06), (0.06, -0.06)], WHITE)
    for x in (-0.5, 0.5):
        pen.ellipse(x, 0.42, 0.27, 0.27, INK)
        pen.ellipse(x, 0.42, 0.11, 0.11, WHITE)


def boat(pen: Pen) -> None:
    pen.line([(0, -0.92), (0, 0.3)], INK, 0.09)
    pen.polygon([(0.1, -0.86), (0.78, 0.16), (0.1, 0.16)], pen.light, soft=0.02)
    pen.polygon([(-0.1, -0.6), (-0.1, 0.16), (-0.58, 0.16)], WHITE, soft=0.02)
    pen.polygon([(-0.92, 0.36), (0.92, 0.36), (0.56, 0.84), (-0.56, 0.84)], pen.body, soft=0.05)
    pen.line([(-0.76, 0.56), (0.76, 0.56)], pen.dark, 0.09)


def star(pen: Pen) -> None:
    tips = [(1.0 if k % 2 == 0 else 0.52, -pi / 2 + k * pi / 5) for k in range(10)]
    pen.polygon([(0.92 * r * cos(a), 0.06 + 0.92 * r * sin(a)) for r, a in tips], pen.body, soft=0.06)
    pen.eyes(-0.04, 0.2, 0.1)
    pen.smile(0.2, 0.17, 0.1)


def heart(pen: Pen) -> None:
    for s in (-1, 1):
        pen.ellipse(s * 0.44, -0.3, 0.5, 0.5, pen.body)
    pen.polygon([(-0.88, -0.08), (0, -0.3), (0.88, -0.08), (0, 0.88)], pen.body, soft=0.04)
    pen.ellipse(-0.52, -0.42, 0.2, 0.14, pen.light)


def flower(pen: Pen) -> None:
    pen.line([(0, 0.1), (0, 0.92)], INK, 0.11)
    pen.ellipse(0.3, 0.72, 0.26, 0.12, INK)
    for k in range(6):
        a = k * pi / 3 + pi / 6
        pen.ellipse(0.46 * cos(a), -0.3 + 0.46 * sin(a), 0.28, 0.28, pen.body)
    pen.ellipse(0, -0.3, 0.27, 0.27, WHITE)
    pen.ellipse(0, -0.3, 0.17, 0.17, pen.dark)


def mushroom(pen: Pen) -> None:
    pen.polygon([(-0.26, 0.0), (0.26, 0.0), (0.34, 0.84), (-0.34, 0.84)], WHITE, soft=0.06)
    dome = [(0.92 * cos(a), 0.12 + 0.94 * sin(a)) for a in (pi + k * pi / 16 for k in range(17))]
    pen.polygon(dome, pen.body, soft=0.05)
    for x, y, r in ((-0.44, -0.24, 0.15), (0.1, -0.5, 0.17), (0.5, -0.14, 0.13)):
        pen.ellipse(x, y, r, r, WHITE)
    pen.eyes(0.42, 0.14, 0.07)


_DRAWINGS = {f.__name__: f for f in (cat, dog, fish, bird, house, tree, car, boat, star, heart, flower, mushroom)}


def draw(sticker: Sticker, pen: type[Pen] = Pen, *, drawing: Callable[[Pen], None] | None = None) -> Image.Image:
    """The sticker's image: RGB, 64 x 64. `pen`: what draws it; style.py has another.

    `drawing`: of a kind that the world has not, such as robot.py's; None: the sticker's own kind.
    """
    background = BACKGROUNDS[sticker.background]
    side = IMAGE_SIZE * SUPERSAMPLE
    image = Image.new("RGB", (side, side), background)
    canvas = ImageDraw.Draw(image)
    for border in (True, False):
        (drawing or _DRAWINGS[sticker.kind])(pen(canvas, sticker, border=border))
    return image.reduce(SUPERSAMPLE)


def _tinted(colour: Colour, tint: tuple[float, float, float]) -> Colour:
    hsv = colorsys.rgb_to_hsv(*(c / 255 for c in colour))
    h, s, v = ((hsv[0] + tint[0]) % 1.0, *(min(1.0, max(0.0, c + d)) for c, d in zip(hsv[1:], tint[1:], strict=True)))
    r, g, b = colorsys.hsv_to_rgb(h, s, v)
    return round(255 * r), round(255 * g), round(255 * b)


def blend(a: Colour, b: Colour, share: float) -> Colour:
    """`share` of the way from one colour to another."""
    r, g, b_ = (round(x + (y - x) * share) for x, y in zip(a, b, strict=True))
    return r, g, b_

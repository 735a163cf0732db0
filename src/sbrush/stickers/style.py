"""The style "blueprint", which a LoRA teaches: the same stickers in white lines and three blues on dark blue.

Whatever colour and background a caption names, its sticker is blue on "night", and what is dark in it (eyes, wheels,
trunks) is white. Thinner lines, or a lighter sheet, are beyond the built-in autoencoder, which has never seen them
(docs/log.md).
"""

from __future__ import annotations

from dataclasses import replace

from PIL import Image

from sbrush.stickers.draw import INK, WHITE, Colour, Pen, Point, blend, draw
from sbrush.stickers.world import BACKGROUNDS, COLOURS, Sticker

BODY, SHEET = "blue", "night"
PALETTE: tuple[Colour, ...] = (
    BACKGROUNDS[SHEET],
    COLOURS[BODY],
    blend(COLOURS[BODY], INK, 0.35),
    blend(COLOURS[BODY], WHITE, 0.55),
    WHITE,
)


class BlueprintPen(Pen):
    """A pen whose ink is white."""

    def ellipse(self, x: float, y: float, rx: float, ry: float, fill: Colour) -> None:
        super().ellipse(x, y, rx, ry, _white(fill))

    def polygon(self, points: list[Point], fill: Colour, *, soft: float = 0.0) -> None:
        super().polygon(points, _white(fill), soft=soft)

    def line(self, points: list[Point], fill: Colour, width: float) -> None:
        super().line(points, _white(fill), width)


def draw_blueprint(sticker: Sticker) -> Image.Image:
    """The sticker's image in the style: RGB, 64 x 64."""
    return draw(replace(sticker, colour=BODY, background=SHEET, tint=(0.0, 0.0, 0.0)), BlueprintPen)


def _white(fill: Colour) -> Colour:
    return WHITE if fill == INK else fill

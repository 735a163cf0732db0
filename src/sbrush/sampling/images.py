"""Images on disk: PNG with metadata, and grids of many images with labels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from sbrush.storage.files import atomic_write

PAPER, TEXT = (255, 255, 255), (70, 70, 80)


def to_image(image: Tensor) -> Image.Image:
    """uint8 [3, H, W] to a Pillow RGB image."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def image_grid(
    rows: Sequence[Sequence[Tensor]], *, row_labels: Sequence[str] = (), column_labels: Sequence[str] = ()
) -> Image.Image:
    """Images, each uint8 [3, H, W], in rows; small ones are enlarged by a whole factor so that they can be seen."""
    _, height, width = rows[0][0].shape
    zoom = max(1, 128 // max(height, width))
    cell_w, cell_h, gap = width * zoom, height * zoom, 6
    font = ImageFont.load_default(size=12)
    left = max((int(font.getlength(label)) for label in row_labels), default=-gap) + 2 * gap
    top = 24 if column_labels else gap
    columns = max(map(len, rows))
    canvas = Image.new("RGB", (left + columns * (cell_w + gap), top + len(rows) * (cell_h + gap)), PAPER)
    draw = ImageDraw.Draw(canvas)
    for c, label in enumerate(column_labels):
        draw.text((left + c * (cell_w + gap), gap), _fit(label, cell_w, font), TEXT, font)
    for r, row in enumerate(rows):
        y = top + r * (cell_h + gap)
        if row_labels:
            draw.text((gap, y + cell_h // 2 - 6), row_labels[r], TEXT, font)
        for c, cell in enumerate(row):
            image = to_image(cell).resize((cell_w, cell_h), Image.Resampling.NEAREST)
            canvas.paste(image, (left + c * (cell_w + gap), y))
    return canvas


def save_png(path: Path, image: Image.Image, metadata: dict[str, Any] | None = None) -> None:
    """Writes a PNG, whole; `metadata` goes into A1111's `parameters` chunk and, as JSON, into `sbrush`.

    `metadata` has the keys prompt, negative ones none; the rest is listed behind it as "Key: value".
    """
    chunks = PngImagePlugin.PngInfo()
    if metadata is not None:
        chunks.add_itxt("parameters", parameters(metadata))
        chunks.add_itxt("sbrush", json.dumps(metadata, ensure_ascii=False))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        image.save(partial, format="PNG", pnginfo=chunks)


def parameters(metadata: dict[str, Any]) -> str:
    """Metadata as AUTOMATIC1111's viewers read it: the prompt, then one line of "Key: value" pairs."""
    pairs = {
        "Steps": metadata["steps"],
        "Sampler": metadata["sampler"],
        "CFG scale": metadata["guidance"],
        "Seed": metadata["seed"],
        "Size": metadata["size"],
        "Model": str(metadata["model"]).replace(",", " "),
        "Version": f"sbrush {metadata['version']}",
    }
    return metadata["prompt"].replace("\n", " ") + "\n" + ", ".join(f"{k}: {v}" for k, v in pairs.items())


def _fit(text: str, width: int, font: Any) -> str:
    """The text, cut so that it is at most `width` pixels wide; at once to about that, for it may be a whole book."""
    text = "".join(c if c.isprintable() else "?" for c in text[: width + 1])
    while text and font.getlength(text) > width:
        text = text[:-2] + "…" if len(text) > 2 else ""
    return text

"""Images on disk: PNG with metadata, and grids of many images with labels."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from sbrush.sampling.targets import CHUNK
from sbrush.storage.files import atomic_write

PAPER, TEXT = (255, 255, 255), (70, 70, 80)
FONT, GAP, LABEL_WIDTH = 12, 6, 400  # pixels


def to_image(image: Tensor) -> Image.Image:
    """uint8 [3, H, W] to a Pillow RGB image."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def image_grid(
    rows: Sequence[Sequence[Tensor]],
    *,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    cell_labels: Sequence[Sequence[str]] = (),
) -> Image.Image:
    """Images, each uint8 [3, H, W], in rows; small ones are enlarged by a whole factor so that they can be seen.

    Labels stand on the left of a row, above a column and above each cell. What has no room is cut.
    """
    _, height, width = rows[0][0].shape
    cell_w, cell_h = cell_size(height, width)
    font = ImageFont.load_default(size=FONT)
    above = FONT + GAP if cell_labels else 0
    row_labels = [_fit(label, LABEL_WIDTH, font) for label in row_labels]
    left = max((int(font.getlength(label)) for label in row_labels), default=-GAP) + 2 * GAP
    top = 24 if column_labels else GAP
    columns = max(map(len, rows))
    canvas = Image.new("RGB", (left + columns * (cell_w + GAP), top + len(rows) * (above + cell_h + GAP)), PAPER)
    draw = ImageDraw.Draw(canvas)
    for c, label in enumerate(column_labels):
        draw.text((left + c * (cell_w + GAP), GAP), _fit(label, cell_w, font), TEXT, font)
    for r, row in enumerate(rows):
        y = top + r * (above + cell_h + GAP)
        if row_labels:
            draw.text((GAP, y + above + cell_h // 2 - FONT // 2), row_labels[r], TEXT, font)
        for c, cell in enumerate(row):
            x = left + c * (cell_w + GAP)
            if cell_labels:
                draw.text((x, y), _fit(cell_labels[r][c], cell_w, font), TEXT, font)
            canvas.paste(to_image(cell).resize((cell_w, cell_h), Image.Resampling.NEAREST), (x, y + above))
    return canvas


def cell_size(height: int, width: int) -> tuple[int, int]:
    """Width and height in pixels that an image of this size has in a grid."""
    zoom = max(1, 128 // max(height, width))
    return width * zoom, height * zoom


def encode_png(image: Image.Image, metadata: dict[str, Any] | None = None) -> bytes:
    """An image as PNG; `metadata` goes into A1111's `parameters` chunk and, as JSON, into `sbrush`.

    `metadata` has the keys that `parameters` names; None writes neither chunk.
    """
    stream = io.BytesIO()
    image.save(stream, format="PNG", pnginfo=_chunks(metadata))
    return stream.getvalue()


def save_png(path: Path, image: Image.Image, metadata: dict[str, Any] | None = None) -> None:
    """Writes a PNG, whole, with `metadata` as in `encode_png`; its folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        image.save(partial, format="PNG", pnginfo=_chunks(metadata))


def _chunks(metadata: dict[str, Any] | None) -> PngImagePlugin.PngInfo:
    chunks = PngImagePlugin.PngInfo()
    if metadata is not None:
        record = json.dumps(metadata, ensure_ascii=False)
        for name, text in (("parameters", parameters(metadata)), (CHUNK, record)):
            # A file name that is not UTF-8 has lone surrogates, which JSON can escape.
            chunks.add_itxt(name, text.encode("utf-8", "backslashreplace").decode("utf-8"))
    return chunks


def parameters(metadata: dict[str, Any]) -> str:
    """Metadata as AUTOMATIC1111's viewers read it: the prompt, the negative one, a line of "Key: value" pairs."""
    pairs = {
        "Steps": metadata["steps"],
        "Sampler": metadata["sampler"],
        "CFG scale": metadata["guidance"],
        "Seed": metadata["seed"],
        "Size": metadata["size"],
        "Model": str(metadata["model"]).replace(",", " "),
        "Version": f"sbrush {metadata['version']}",
    }
    lines = [metadata["prompt"], ", ".join(f"{k}: {v}" for k, v in pairs.items())]
    if negative := metadata.get("negative"):
        lines.insert(1, f"Negative prompt: {negative}")
    return "\n".join(line.replace("\n", " ") for line in lines)


def _fit(text: str, width: int, font: Any) -> str:
    """The text, cut so that it is at most `width` pixels wide; at once to about that, for it may be a whole book."""
    text = "".join(c if c.isprintable() else "?" for c in text[: width + 1])
    while text and font.getlength(text) > width:
        text = text[:-2] + "…" if len(text) > 2 else ""
    return text

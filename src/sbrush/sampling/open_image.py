"""Reads image files of any mode as 8-bit RGB, or says why it cannot.

What is not 8-bit RGB becomes it so:

    gray, palettes, black and white   by their values
    16-bit gray                       value / 257, rounded; 12-bit TIFF: value / 4095 x 255
    16-bit colour                     the higher byte of each number, as Pillow reads it: at most one level off
    floats                            x 255, rounded, where all are within 0 to 1
    transparency                      over white: alpha channels, colour keys, palettes with alpha
    CMYK, YCbCr                       Pillow's conversion, profiles aside, as in every published protocol
    CIE Lab                           to sRGB, by littleCMS
    several frames                    the first one
    EXIF orientation                  followed if asked for; else the pixels as stored, as in every published protocol

Unreadable are integers of 32 bits and floats beyond 0 to 1 (nothing says which of them is white), colour keys of 16
bits, and files that are cut, empty, no image, or larger than Pillow's limit against decompression bombs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

# Not EPS (which starts a program), and none that only some machines can open.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "TGA", "JPEG2000", "AVIF")
BITS, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF


class UnreadableImage(Exception):
    """Why a file is no image that can be measured: what it is instead, such as "not an image" or "missing"."""


def open_image(file: Path | BinaryIO, *, upright: bool = False) -> Image.Image:
    """A file's first image as 8-bit RGB. UnreadableImage if it cannot be read whole, or its white is not known.

    `upright`: turned as its EXIF orientation says.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            if 0 in image.size:
                raise UnreadableImage("an image without pixels")
            raw = _raw_mode(image)
            image.load()
            turned = image.getexif().get(ExifTags.Base.Orientation) if upright else None
            rgb = _to_rgb(image, raw)
            if turned is not None:
                rgb.getexif()[ExifTags.Base.Orientation] = turned
                rgb = ImageOps.exif_transpose(rgb)
            return rgb
    except UnreadableImage:
        raise
    except FileNotFoundError:
        raise UnreadableImage("missing") from None
    except UnidentifiedImageError:
        raise UnreadableImage("not an image") from None
    except Exception as problem:  # Pillow's decoders raise what they like on damaged files
        raise UnreadableImage(f"not a whole image ({problem or type(problem).__name__})") from problem


def _to_rgb(image: Image.Image, raw: str) -> Image.Image:
    """A loaded image of any mode over white; `raw`: how the file holds its numbers."""
    alpha = _key_as_alpha(image, raw)
    if image.mode == "F" or image.mode.startswith("I"):
        image = _gray(image, raw)
    elif image.mode == "LAB":
        return _lab_to_rgb(image)
    elif alpha is None and image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image  # premultiplied, for which Pillow has no other way
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    image = image.convert("RGB")
    if alpha is None:
        return image
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=alpha)
    return white


def _gray(image: Image.Image, raw: str) -> Image.Image:
    """8-bit gray of 12 or 16-bit integers or floats. UnreadableImage if nothing says which value is white."""
    values = np.asarray(image)
    if image.mode.startswith("I;16"):
        white = 4095 if raw.startswith("I;12") else 65535
    elif image.mode == "I" and image.format in ("PNG", "PPM"):  # which hold 16 bits at most; Pillow scales them to it
        white = 65535
    elif image.mode == "F" and np.isfinite(values).all() and 0 <= values.min() and values.max() <= 1:
        white = 1
    else:
        numbers = "floats beyond 0 to 1" if image.mode == "F" else "32-bit or signed integers"
        raise UnreadableImage(f"an image of {numbers}: nothing says which of them is white")
    gray = np.floor(values.astype(np.float64) * 255 / white + 0.5).astype(np.uint8)
    if image.format == "TIFF" and getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == WHITE_IS_ZERO:
        gray = 255 - gray  # which Pillow does for 8 bits and fewer
    return Image.fromarray(gray)


def _key_as_alpha(image: Image.Image, raw: str) -> Image.Image | None:
    """The alpha of an image one of whose colours is transparent (PNG's tRNS without a palette); None of any other."""
    key = image.info.get("transparency")
    if not isinstance(key, tuple if image.mode == "RGB" else int) or image.mode[0] not in "1LIR":
        return None
    if image.mode == "RGB" and ";16" in raw:
        raise UnreadableImage("an image whose transparent colour has 16 bits")
    values = np.asarray(image.convert("L") if image.mode == "1" else image)
    if isinstance(key, int):
        key *= {"1": 255, "L;2": 85, "L;4": 17}.get(raw, 1)  # few bits become 8 as the pixels do
    same = values == np.asarray(key)
    return Image.fromarray(np.where(same.all(-1) if same.ndim == 3 else same, 0, 255).astype(np.uint8))


def _lab_to_rgb(image: Image.Image) -> Image.Image:
    from PIL import ImageCms  # an optional part of Pillow

    lab, srgb = (ImageCms.createProfile(space) for space in ("LAB", "sRGB"))
    converted: Any = ImageCms.applyTransform(image, ImageCms.buildTransform(lab, srgb, "LAB", "RGB"))
    return converted


def _raw_mode(image: Image.Image) -> str:
    """How the file holds an image's numbers, such as "RGB;16B"; known before it is loaded. "" if it does not say."""
    tiles = getattr(image, "tile", None)
    arguments = tiles[0][3] if tiles else None
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""

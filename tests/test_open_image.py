"""Image files of every mode that people have, made by hand; the right values from what the formats say."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from sbrush.sampling.open_image import UnreadableImage, open_image

DEEP = [0, 255, 256, 32767, 32768, 65535]  # 16-bit values, and what they are of 255: v / 257
SHALLOW = [0, 1, 1, 127, 128, 255]


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, bits: int, kind: int, row: bytes, *more: bytes, height: int = 1) -> bytes:
    """One row; kind: 0 gray, 2 RGB, 3 palette, 4 gray and alpha, 6 RGBA."""
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    data = chunk(b"IHDR", header) + b"".join(more) + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def tiff(width: int, bits: int, row: bytes, *, photometric: int = 1, samples: int = 1, kind: int = 1) -> bytes:
    """One row, uncompressed. `photometric`: 0 white is zero, 8 Lab; `kind`: 1 unsigned, 2 signed, 3 float."""
    tags = [(256, width), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 8), (277, samples), (278, 1)]
    tags += [(279, len(row)), (339, kind)]
    row += b"\0" * (len(row) % 2)
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(row)) + row + struct.pack("<H", len(tags)) + entries + b"\0" * 4


def first_row(data: bytes) -> list[list[int]]:
    image = open_image(io.BytesIO(data))
    assert image.mode == "RGB"
    return np.asarray(image)[0].tolist()


def gray(values: list[int]) -> list[list[int]]:
    return [[value] * 3 for value in values]


def big(values: list[int]) -> bytes:
    return struct.pack(f">{len(values)}H", *values)


def little(values: list[int]) -> bytes:
    return struct.pack(f"<{len(values)}H", *values)


def key(*values: int) -> bytes:
    return chunk(b"tRNS", big(list(values)))


RGBA16 = big([v for value in DEEP for v in (value, value, value, 65535)])
PALETTE = chunk(b"PLTE", bytes([255, 0, 0, 0, 0, 255]))
KINDS = {
    "16-bit gray": (png(6, 16, 0, big(DEEP)), gray(SHALLOW)),
    "16-bit gray with a key": (png(6, 16, 0, big(DEEP), key(32768)), gray([0, 1, 1, 127, 255, 255])),
    "16-bit gray and alpha": (png(2, 16, 4, big([0, 65535, 0, 0])), gray([0, 255])),
    "16-bit RGBA": (png(6, 16, 6, RGBA16), gray([0, 0, 1, 127, 128, 255])),  # the higher bytes
    "8-bit gray": (png(3, 8, 0, bytes([0, 64, 255])), gray([0, 64, 255])),
    "8-bit gray with a key": (png(3, 8, 0, bytes([0, 64, 255]), key(64)), gray([0, 255, 255])),
    "4-bit gray with a key": (png(2, 4, 0, bytes([0x3C]), key(3)), gray([255, 0xCC])),
    "2-bit gray with a key": (png(4, 2, 0, bytes([0b00011011]), key(1)), gray([0, 255, 170, 255])),
    "1 bit": (png(2, 1, 0, bytes([0b01000000])), gray([0, 255])),
    "1 bit, black is clear": (png(2, 1, 0, bytes([0b01000000]), key(0)), gray([255, 255])),
    "RGB with a key": (png(2, 8, 2, bytes([1, 2, 3, 4, 5, 6]), key(1, 2, 3)), [[255] * 3, [4, 5, 6]]),
    "palette": (png(2, 8, 3, bytes([0, 1]), PALETTE), [[255, 0, 0], [0, 0, 255]]),
    "palette with alpha": (
        png(2, 8, 3, bytes([0, 1]), PALETTE, chunk(b"tRNS", b"\x80")),
        [[255, 127, 127], [0, 0, 255]],
    ),
    "gray and alpha": (png(3, 8, 4, bytes([10, 128, 10, 0, 10, 255])), gray([132, 255, 10])),
    "RGBA": (png(2, 8, 6, bytes([10, 20, 30, 128, 10, 20, 30, 0])), [[132, 137, 142], [255] * 3]),
    "TIFF, 16 bits": (tiff(6, 16, little(DEEP)), gray(SHALLOW)),
    "TIFF, 16 bits, white is zero": (tiff(6, 16, little(DEEP), photometric=0), gray([255 - v for v in SHALLOW])),
    "TIFF, 8 bits, white is zero": (tiff(3, 8, bytes([0, 128, 255]), photometric=0), gray([255, 127, 0])),
    "TIFF, 12 bits": (tiff(2, 12, bytes([0xFF, 0xF8, 0x00])), gray([255, 128])),
    "TIFF, floats": (tiff(3, 32, struct.pack("<3f", 0, 0.5, 1), kind=3), gray([0, 128, 255])),
    "PFM": (b"Pf\n3 1\n-1.0\n" + struct.pack("<3f", 0, 0.5, 1), gray([0, 128, 255])),
    "PGM of 16 bits": (b"P5 6 1 65535\n" + big(DEEP), gray(SHALLOW)),
    "PGM of 10 bits": (b"P5 3 1 1023\n" + big([0, 511, 1023]), gray([0, 127, 255])),
    "PPM of 16 bits": (b"P6 1 1 65535\n" + big([0, 32768, 65535]), [[0, 128, 255]]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_its_right_values(kind: str) -> None:
    data, expected = KINDS[kind]
    assert first_row(data) == expected


UNREADABLE = {
    "32-bit integers": (tiff(2, 32, struct.pack("<2I", 0, 7)), "32-bit or signed"),
    "16-bit signed integers": (tiff(2, 16, struct.pack("<2h", -5, 7), kind=2), "32-bit or signed"),
    "floats to 255": (tiff(2, 32, struct.pack("<2f", 0, 255), kind=3), "floats beyond 0 to 1"),
    "floats below 0": (tiff(2, 32, struct.pack("<2f", -0.1, 1), kind=3), "floats beyond 0 to 1"),
    "no number": (tiff(2, 32, struct.pack("<2f", float("nan"), 1), kind=3), "floats beyond 0 to 1"),
    "RGB with a key of 16 bits": (png(1, 16, 2, big([0, 0, 0]), key(0, 0, 0)), "transparent colour has 16"),
    "nothing": (b"", "not an image"),
    "text": (b"a cat\n", "not an image"),
    "no pixels": (png(0, 8, 0, b""), "not an image|without pixels"),
    "a bomb": (png(30_000, 8, 0, b"", height=30_000), "decompression bomb"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not an image"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_has_no_right_values_is_unreadable(kind: str) -> None:
    data, said = UNREADABLE[kind]
    with pytest.raises(UnreadableImage, match=said):
        open_image(io.BytesIO(data))


def test_16_bits_are_rounded_in_gray_and_at_most_one_level_off_in_colour() -> None:
    values = np.arange(0, 65536, 7)[:9360]
    exact = np.floor(values / 257 + 0.5)
    assert np.array_equal(np.array(first_row(png(len(values), 16, 0, big(values.tolist()))))[:, 0], exact)
    colour = np.array(first_row(png(len(values) // 3, 16, 2, big(values.tolist())))).flatten()
    assert set(exact - colour) == {-1, 0, 1}


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImage, match="missing"):
        open_image(tmp_path / "none.png")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's own, of cut TIFFs
def test_untouched_images_are_pillows_and_cut_ones_unreadable(format: str) -> None:
    """What all protocols take: `convert("RGB")`, to the bit; and of a file that is cut nothing."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    whole = io.BytesIO()
    Image.fromarray(noise).save(whole, format)
    with Image.open(whole) as image:
        expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(np.asarray(open_image(whole)), expected)
    with pytest.raises(UnreadableImage):
        open_image(io.BytesIO(whole.getvalue()[: len(whole.getvalue()) // 2]))


@pytest.mark.parametrize("mode", ["L", "CMYK", "YCbCr", "RGBA", "LA", "P", "PA", "1"])
def test_opaque_images_of_other_modes_are_pillows(mode: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    whole = io.BytesIO()
    Image.fromarray(noise).convert("P" if mode == "PA" else mode).convert(mode).save(whole, "TIFF")
    with Image.open(whole) as image:
        assert image.mode == mode
        assert np.array_equal(np.asarray(open_image(whole)), np.asarray(image.convert("RGB")))


def test_transparency_is_over_white_for_every_alpha() -> None:
    """By the definition, rounded: colour x alpha + white x (1 - alpha)."""
    colour, alpha = np.meshgrid(np.arange(256), np.arange(256))
    image = np.stack([colour] * 3 + [alpha], axis=-1).astype(np.uint8)
    whole = io.BytesIO()
    Image.fromarray(image).save(whole, "PNG")
    expected = np.floor((colour * alpha + 255 * (255 - alpha)) / 255 + 0.5)
    assert np.array_equal(np.asarray(open_image(whole))[..., 0], expected)


@pytest.mark.skipif(not features.check("littlecms2"), reason="Pillow without littleCMS")
def test_lab_is_converted_by_its_definition() -> None:
    row = bytes([136, 81, 67, 128, 0, 0])  # L of 255; a and b as they are
    (red, mid) = np.array(first_row(tiff(2, 8, row, photometric=8, samples=3)))

    def srgb(lightness: float, a: float, b: float) -> np.ndarray:
        y = (lightness + 16) / 116
        xyz = np.array([t**3 if t**3 > 0.008856 else (t - 16 / 116) / 7.787 for t in (y + a / 500, y, y - b / 200)])
        xyz *= 0.9642, 1, 0.8249  # D50
        linear = np.clip(
            np.array([[3.1338561, -1.6168667, -0.4906146], [-0.9787684, 1.9161415, 0.033454],
                      [0.0719453, -0.2289914, 1.4052427]]) @ xyz, 0, 1
        )  # fmt: skip
        return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)

    assert np.abs(red - srgb(136 / 2.55, 81, 67)).max() < 4 and np.abs(mid - srgb(128 / 2.55, 0, 0)).max() < 1


def test_the_first_of_several_frames() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    for format in ("GIF", "TIFF", "WEBP", "PNG"):
        whole = io.BytesIO()
        frames[0].save(whole, format, save_all=True, append_images=frames[1:])
        red, _, blue = first_row(whole.getvalue())[0]
        assert red > 240 and blue < 15, format


def test_exif_orientation_is_not_followed() -> None:
    whole, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 4)).save(whole, "JPEG", exif=exif)
    assert open_image(whole).size == (6, 4)

"""What the names of image files say: which files are images, and which number each has."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from sbrush.console import SbrushError, printable

SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pnm", ".pfm", ".tga",
    ".jp2", ".avif",
)  # fmt: skip
SYSTEM = ("thumbs.db", "desktop.ini")  # left by file managers, as hidden files are
ELSE = "rename them, or say whose caption is whose: metadata.csv there, with the columns file_name and caption"


def list_folder(folder: Path) -> tuple[list[Path], list[Path]]:
    """A folder's images in the order of their names, and its other files. Hidden and system files are neither.

    SbrushError if it cannot be read, or has no images.
    """
    try:
        here = [f for f in sorted(folder.iterdir()) if not f.name.startswith(".") and f.name.lower() not in SYSTEM]
    except OSError as problem:
        hint = "--images takes a folder of images"
        raise SbrushError(f"cannot read {printable(folder)}: {problem.strerror}", hint, code=2) from problem
    files = [f for f in here if f.is_file()]
    images = [f for f in files if f.suffix.lower() in SUFFIXES]
    if not images:
        folders = [f for f in here if f.is_dir()]
        hint = (
            f"folders in it are not looked into: --images {printable(folders[0])}"
            if folders
            else "PNG, JPEG and others"
        )
        raise SbrushError(f"{printable(folder)} has no images", hint, code=2)
    return images, [f for f in files if f.suffix.lower() not in SUFFIXES]


def composed(name: str) -> str:
    """A name in Unicode's composed form (NFC): an é is one letter, whatever wrote it."""
    return unicodedata.normalize("NFC", name)


def numbers_of(files: Sequence[Path]) -> list[int] | None:
    """Each file's number: the one in its name that differs from file to file. None if the names hold no numbers.

    SbrushError if there is no telling: names of several patterns, two numbers that both differ, one number twice.
    """
    split = [re.split(r"(\d+)", composed(file.stem).casefold()) for file in files]
    patterns = Counter(tuple(parts[::2]) for parts in split)
    if all(len(pattern) == 1 for pattern in patterns):
        return None
    usual = patterns.most_common(1)[0][0]
    where = printable(files[0].parent)
    example = next(f for f, parts in zip(files, split, strict=True) if tuple(parts[::2]) == usual)
    if odd := next((f for f, parts in zip(files, split, strict=True) if tuple(parts[::2]) != usual), None):
        raise SbrushError(
            f"{where} has names like {printable(example.name)}, and {printable(odd.name)}",
            f"move it elsewhere if it is none of the images; or {ELSE}",
            code=2,
        )
    groups = [[int(number) for number in group] for group in zip(*(parts[1::2] for parts in split), strict=True)]
    varying = [group for group in groups if len(set(group)) > 1] or groups[-1:]
    if len(varying) > 1:
        raise SbrushError(
            f"two numbers differ from image to image in {where}: {_two_of(files)}", f"which counts? {ELSE}", code=2
        )
    numbers, seen = varying[0], dict[int, Path]()
    for number, file in zip(numbers, files, strict=True):
        if number in seen:
            raise SbrushError(
                f"{where} has two images with the number {number}: "
                f"{printable(seen[number].name)} and {printable(file.name)}",
                "move one of them elsewhere",
                code=2,
            )
        seen[number] = file
    return numbers


def by_number(files: Sequence[Path], numbers: Sequence[int], starts: Sequence[int] = (0,)) -> list[Path]:
    """Files in the order of their numbers, all of them from one of `starts` on: none stands for another's caption.

    SbrushError if one is missing.
    """
    paired = sorted(zip(numbers, files, strict=True))
    start = paired[0][0] if paired and paired[0][0] in starts else starts[0]
    for expected, (number, file) in enumerate(paired, start):
        if number != expected:
            raise SbrushError(
                f"{printable(file.parent)} has no image {expected}: {printable(file.name)} comes there",
                f"an image's number is its caption's, counted from {' or '.join(map(str, starts))}; else {ELSE}",
                code=2,
            )
    return [file for _, file in paired]


def _two_of(files: Sequence[Path]) -> str:
    return f"{printable(files[0].name)} and {printable(files[-1].name)}"

"""Which files a subject's photos are, and whether each can be read. Imports no torch: the command line asks first."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from sbrush.console import SbrushError, count, printable
from sbrush.sampling.open_image import UnreadableImage, open_image
from sbrush.storage.files import check_name

FEWEST, MOST = 3, 30
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2", ".ppm", ".tga")
HINT = f"give {FEWEST} to {MOST} photos of the one subject, files or folders: sbrush personalize photos/"


def find_photos(places: Iterable[Path]) -> tuple[Path, ...]:
    """The photos that are named, or lie in a folder that is named, each opened once to see that it can be read.

    SbrushError if there are too few or too many, or if one is missing, no image, or not allowed to be read.
    """
    files: list[Path] = []
    for place in places:
        check_name(place)
        try:
            place.stat()  # what is not there is no photo: "too few" would be beside the point
            files += _in_folder(place) if place.is_dir() else [place]
        except OSError as problem:
            raise SbrushError(
                f"cannot read {printable(place)}: {problem.strerror}", "make it readable, or leave it out"
            ) from problem
    files = list(dict.fromkeys(files))
    if not FEWEST <= len(files) <= MOST:
        many = len(files) > MOST
        raise SbrushError(
            f"{count(len(files), 'photo') if files else 'no photos'}: too {'many' if many else 'few'} for one subject",
            HINT + ("; a data set is for sbrush distill --images" if many else ""),
            code=2,
        )
    for file in files:
        open_photo(file)
    return tuple(files)


def open_photo(file: Path) -> Image.Image:
    """A photo as 8-bit RGB, upright. SbrushError, which names it, if it cannot be read."""
    shown = printable(file)
    try:
        with file.open("rb") as stream:
            return open_image(stream, upright=True)
    except UnreadableImage as why:
        raise SbrushError(
            f"the photo {shown} cannot be read: {printable(why)}", "save it again as PNG or JPEG, or leave it out"
        ) from why
    except OSError as problem:
        raise SbrushError(
            f"the photo {shown} cannot be read: {problem.strerror}", "make it readable, or leave it out"
        ) from problem


def _in_folder(folder: Path) -> list[Path]:
    """The images in a folder, by their names' endings, in the order of their names; hidden files are left out."""
    return sorted(
        file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
    )

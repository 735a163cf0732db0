"""Where `sbrush sample` writes its images and under which names. Imports nothing heavy: it is asked before torch loads.

stdout   one PNG: the image, or a grid of all
file     the same; a file that is there is replaced, as by other commands with -o
folder   a PNG for each image, 0001-a-cat-seed3.png: the prompt's place, its start, the seed. What is there stays

An image says itself how it was drawn, in its PNG's chunk `sbrush` (images.py writes it). So a command that is given
again draws what is missing, and a file that is anything else is never replaced.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unicodedata import normalize

from sbrush.console import SbrushError, printable

PNG = b"\x89PNG\r\n\x1a\n"
CHUNK = "sbrush"  # the PNG chunk with the record
LARGEST_CHUNK = 64 << 20  # bytes; a larger one is none of ours
MOST_IN_GRID = 400  # images; more cannot be told apart
SLUG = 80  # bytes of a prompt in a file name: with all the rest far below the 255 that a name may have
DEFAULT = "out.png"
KEYS, KEY = ".sbrush.json", "how it was drawn"  # a folder's file, and the record, of images without metadata
ANOTHER_PLACE = "choose another folder with -o, or --overwrite to replace what is there"
STDOUT = ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")


@dataclass(frozen=True)
class Target:
    """Where images go: `path` None is stdout; `folder`: a file for each image."""

    path: Path | None
    folder: bool = False

    @classmethod
    def parse(cls, out: str | None) -> Target:
        """What -o means. None: the first free name of out.png, out-2.png, ... SbrushError if nothing can be there.

        "-" is stdout. A name with a "/" at its end, without a suffix, or of a folder that is there, is a folder.
        """
        if out is None:
            return cls(next(path for path in _numbered(Path(DEFAULT)) if not os.path.lexists(path)))
        if out in STDOUT:
            return cls(None)
        if not out:
            raise SbrushError("-o has no name", "give a file such as cats.png, a folder such as cats/, or -", code=2)
        path, shown = Path(out), printable(out)
        try:
            is_folder, is_file = path.is_dir(), path.exists() and not path.is_dir()
        except OSError as problem:  # such as a name that is too long
            raise SbrushError(f"cannot write {shown}: {problem.strerror}", "choose another -o") from None
        if out.endswith(("/", os.sep)) or (is_folder and path.suffix.lower() != ".png"):
            if is_file:
                raise SbrushError(f"{shown} is a file, not a folder", "leave out the / at its end", code=2)
            return cls(path, folder=True)
        if path.suffix.lower() == ".png":
            if is_folder:
                raise SbrushError(f"{shown} is a folder", f"-o {shown}/ writes an image each into it", code=2)
            return cls(path)
        if is_file:
            if not path.is_file():  # a device or a pipe, such as /dev/stdout
                return cls(path)
            raise SbrushError(f"{shown} is a file, and no .png", "-o takes a .png file or a folder", code=2)
        if path.suffix:
            raise SbrushError(
                f"cannot write {printable(path.name)}: images are PNG",
                "name the file something.png, or end the name of a folder with /",
                code=2,
            )
        return cls(path, folder=True)

    def check(self, images: int, *, compare: bool = False) -> None:
        """SbrushError if `images` images (with `compare` two each) are too many for it, or it cannot be written to.

        A folder that is missing is made.
        """
        if not self.folder and images * (1 + compare) > MOST_IN_GRID:
            raise SbrushError(
                f"{images * (1 + compare)} images are too many for one grid",
                f"give a folder, such as -o images/, for a file each; a grid has up to {MOST_IN_GRID}",
                code=2,
            )
        if self.path is None:
            return
        folder = self.path if self.folder else self.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK) and (self.folder or not os.access(self.path, os.W_OK)):
                raise PermissionError(13, "Permission denied")
        except OSError as problem:
            raise SbrushError(f"cannot write to {printable(folder)}: {problem.strerror}", "choose another -o") from None


@dataclass(frozen=True)
class Images:
    """The images of a command in order: each prompt with each seed. They are counted and named, not held."""

    prompts: Sequence[str]
    seeds: Sequence[int]

    def __len__(self) -> int:
        return len(self.prompts) * len(self.seeds)

    def __getitem__(self, index: int) -> tuple[str, int]:
        """The prompt and the seed of an image."""
        prompt, seed = divmod(index, len(self.seeds))
        return self.prompts[prompt], self.seeds[seed]

    def name(self, index: int) -> str:
        """The image's file name in a folder: distinct, in the prompts' order, at most 120 bytes."""
        place = index // len(self.seeds) + 1
        prompt, seed = self[index]
        width = max(4, len(str(len(self.prompts))))
        return f"{place:0{width}d}-{slug(prompt)}-seed{seed}.png"

    def present(self, folder: Path) -> Iterator[int]:
        """The images that have a file in the folder by that name, whatever it is."""
        if any(name.endswith(".png") for name in os.listdir(folder)):
            # Each is asked for: what is one name and what are two (case, Unicode's forms) the file system decides.
            yield from (index for index in range(len(self)) if os.path.lexists(folder / self.name(index)))


def find_records(images: Images, folder: Path, *, metadata: bool = True) -> dict[int, dict[str, Any]]:
    """How the images were drawn that the folder has already, by their place: what their files say.

    Without `metadata` it is what the folder says, for images whose files say nothing. SbrushError, before anything is
    drawn, if a file that has a name of theirs is something else.
    """
    records, keys = {}, read_keys(folder)
    for index in images.present(folder):
        file = folder / images.name(index)
        record = read_record(file) or {}
        if metadata:
            check_same(file, record, dict(zip(("prompt", "seed"), images[index], strict=True)))
        elif record or file.name not in keys:
            raise SbrushError(
                f"{printable(file)} is there already, and was not written with --no-metadata", ANOTHER_PLACE, code=2
            )
        records[index] = record or {KEY: keys[file.name]}
    return records


def check_same(file: Path, record: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """SbrushError if an image's record has not the values that are wanted of it."""
    if different := [key for key, value in wanted.items() if record.get(key) != value]:
        raise SbrushError(
            f"{printable(file)} is there already and is another image ({', '.join(different)})"
            if record
            else f"{printable(file)} is there already, and does not say how it was drawn",
            ANOTHER_PLACE,
            code=2,
        )


def read_keys(folder: Path) -> dict[str, Any]:
    """What stands for how images were drawn whose files do not say it, by file name; none if that cannot be read."""
    try:
        keys = json.loads((folder / KEYS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return keys if isinstance(keys, dict) else {}


def read_record(file: Path) -> dict[str, Any] | None:
    """What an image says of how it was drawn; None if it is no PNG of sbrush or was written without metadata."""
    try:
        with file.open("rb") as stream:
            if stream.read(len(PNG)) != PNG:
                return None
            while len(head := stream.read(8)) == 8:
                length, kind = struct.unpack(">I4s", head)
                if kind == b"IDAT" or length > LARGEST_CHUNK:
                    return None
                start = CHUNK.encode() + b"\0" * 5  # not compressed, no language
                if kind == b"iTXt" and (text := stream.read(length)).startswith(start):
                    record = json.loads(text.removeprefix(start))
                    return record if isinstance(record, dict) else None
                stream.seek(4 if kind == b"iTXt" else length + 4, os.SEEK_CUR)
    except (OSError, ValueError, RecursionError):
        pass
    return None


def slug(prompt: str) -> str:
    """The start of a prompt as part of a file name: letters and digits, of which no name gets too long."""
    text = re.sub(r"[^\w]+", "-", normalize("NFC", prompt[:SLUG]).lower()).strip("-_")
    encoded = b""
    for letter in text:
        try:
            code = os.fsencode(letter)
        except UnicodeEncodeError:  # a file system whose names are not Unicode
            code = b"-"
        if len(encoded) + len(code) > SLUG:
            break
        encoded += code
    return os.fsdecode(encoded).strip("-_") or "prompt"


def _numbered(path: Path) -> Iterator[Path]:
    """out.png, out-2.png, out-3.png ..."""
    yield path
    number = 2
    while True:
        yield path.with_stem(f"{path.stem}-{number}")
        number += 1

"""A folder of images that another tool made: which order, which captions, which content."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sbrush.console import SbrushError, printable, progress
from sbrush.evaluate.coco.protocols import hash_of
from sbrush.storage.files import write_text

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
LINES = "captions.txt"  # line i is the caption of image i
TABLES = ("captions.csv", "metadata.csv", "metadata.jsonl")  # file_name and text, as Hugging Face's imagefolder has it


@dataclass(frozen=True)
class Gallery:
    """Images in order and, where a file beside them has them, a caption for each."""

    files: list[Path]
    captions: list[str] | None = None
    source: str | None = None  # the name of the captions' file

    @classmethod
    def read(cls, folder: Path) -> Gallery:
        """The images of a folder in the order of their numbers, else of the table beside them, else of their names.

        A number is a caption's, counted from 0. SbrushError if numbers are missing, or captions do not fit.
        """
        try:
            files = sorted(f for f in folder.iterdir() if f.suffix.lower() in ENDINGS and f.is_file())
            beside = [folder / name for name in (LINES, *TABLES) if (folder / name).is_file()]
            if len(beside) > 1:
                raise SbrushError(
                    f"{printable(folder)} has {' and '.join(f.name for f in beside)}", "leave one of them", code=2
                )
            if not beside:
                return cls(_in_order(folder, files))
            if beside[0].name == LINES:
                lines = beside[0].read_text(encoding="utf-8").rstrip("\n").split("\n")
                return cls(*_with_lines(folder, _in_order(folder, files), lines), LINES)
            return cls(*_with_table(folder, files, _rows(beside[0])), beside[0].name)
        except (OSError, UnicodeDecodeError) as problem:
            raise SbrushError(
                f"cannot read {printable(folder)}", "--images takes a folder of images", code=2
            ) from problem

    def digest(self, count: int, cache: Path) -> str:
        """SHA-256 of the first `count` images' bytes; remembered in `cache` by their paths, sizes and times."""
        some = self.files[:count]
        times = [(file, file.stat()) for file in some]
        listed = hash_of(f"{f.absolute()} {s.st_size} {s.st_mtime_ns}" for f, s in times)
        memory = cache / f"images-{listed[:24]}.sha256"
        try:
            known = memory.read_text(encoding="utf-8").strip()
            if len(known) == 64:
                return known
        except (OSError, UnicodeDecodeError):
            pass
        with progress("reading the images", len(some), unit="images") as bar:
            digests = []
            for file in some:
                with file.open("rb") as handle:
                    digests.append(hashlib.file_digest(handle, "sha256").hexdigest())
                bar.advance()
        whole = hash_of(digests)
        try:
            cache.mkdir(parents=True, exist_ok=True)
            write_text(memory, whole + "\n")
        except OSError:  # then they are read again next time
            pass
        return whole


def _in_order(folder: Path, files: list[Path]) -> list[Path]:
    """By number, if names are numbers; all of them from 0 on, so that none stands for another's caption."""
    numbered = [f for f in files if f.stem.isdecimal()]
    if not numbered:
        return files
    if len(numbered) < len(files):
        other = next(f for f in files if not f.stem.isdecimal())
        raise SbrushError(
            f"{printable(folder)} has numbers for names, and {printable(other.name)}", "move it elsewhere", code=2
        )
    numbered.sort(key=lambda f: int(f.stem))
    for number, file in enumerate(numbered):
        if int(file.stem) != number:
            raise SbrushError(
                f"{printable(folder)} has no image {number}, or two of a number: {printable(file.name)} comes there",
                "an image's number is its caption's, counted from 0; else put captions.txt or metadata.jsonl there",
                code=2,
            )
    return numbered


def _with_lines(folder: Path, files: list[Path], lines: list[str]) -> tuple[list[Path], list[str]]:
    captions = [line.strip() for line in lines]
    if len(captions) != len(files) or not all(captions):
        raise SbrushError(
            f"{printable(folder / LINES)} has {sum(map(bool, captions))} captions for {len(files)} images",
            "a caption a line, in the images' order, no empty lines",
            code=2,
        )
    return files, captions


def _with_table(
    folder: Path, files: list[Path], rows: Sequence[tuple[str, str]]
) -> tuple[list[Path], list[str]]:  # fmt: skip
    """The table's order; it must name each image once, and nothing else."""
    named, here = Counter(name for name, _ in rows), {file.name for file in files}
    odd = sorted({name for name, count in named.items() if count > 1} | (set(named) ^ here))
    if odd:
        raise SbrushError(
            f"{printable(folder)}: the table of captions and the images differ, as in {printable(odd[0])}",
            "it must name each image once",
            code=2,
        )
    return [folder / name for name, _ in rows], [text for _, text in rows]


def _rows(table: Path) -> list[tuple[str, str]]:
    """(file_name, text) of each line. SbrushError if it has other columns."""
    with table.open(encoding="utf-8", newline="") as file:
        try:
            entries: Iterable[dict[str, str]]
            entries = csv.DictReader(file) if table.suffix == ".csv" else (json.loads(line) for line in file)
            rows = [(entry["file_name"], entry["text"].strip()) for entry in entries]
            if not all(isinstance(name, str) and text for name, text in rows):
                raise ValueError("an empty caption")
        except UnicodeDecodeError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, csv.Error) as problem:
            raise SbrushError(
                f"{printable(table)} is no table of captions ({type(problem).__name__})",
                "a file_name and its text, as columns or as JSON objects, one a line",
                code=2,
            ) from problem
    return rows

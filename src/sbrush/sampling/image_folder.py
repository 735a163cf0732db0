"""A folder of images that another tool made: which files, in which order, with which captions, and by which rule.

An image's caption is found by the first of these rules that applies:

    captions that are given, with file names   a table with a column file_name (or filename, file, image) beside them
    captions that are given                    line i is the caption of the i-th image by the numbers in the names
    a table beside the images    captions.* or metadata.* as CSV, TSV or JSON, as Hugging Face's imagefolder has it
    captions.txt                 line i is the caption of the i-th image by the numbers in the names
    a text beside each image     0001.txt is the caption of 0001.png

The number is the one that differs from name to name, wherever it stands. What is ambiguous is refused: a number that is
missing or there twice, two numbers that both differ, names of several patterns. File names are compared in Unicode's
composed form. Hidden files are no images.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from sbrush.console import SbrushError, count, info, printable, progress
from sbrush.prompts import read_texts
from sbrush.prompts.texts import Texts
from sbrush.sampling.naming import by_number, composed, list_folder, numbers_of
from sbrush.storage.files import write_text

BESIDE = (
    "captions.txt", "captions.csv", "captions.tsv", "captions.jsonl", "captions.json",
    "metadata.csv", "metadata.tsv", "metadata.jsonl",
)  # fmt: skip
NAMED = 3  # files that a note names


@dataclass(frozen=True)
class ImageFolder:
    """Images in order, their captions where they are known, whose those are, and the rule that paired them."""

    files: list[Path]
    captions: list[str] | None = None
    source: str = ""
    rule: str = ""

    @classmethod
    def read(cls, folder: Path, given: Texts | None = None, column: str | None = None) -> Self:
        """The images of a folder, with the captions that are `given` or lie beside them; else without.

        `column`: of a table beside them. SbrushError if captions and images do not fit, or there is no telling.
        """
        files, others = list_folder(folder)
        beside = [file for file in others if file.name in BESIDE]
        if given is not None:
            _note_ignored(folder, others)
            return cls._captioned(files, folder, given, given.source)
        if len(beside) > 1:
            raise SbrushError(
                f"{printable(folder)} has {' and '.join(f.name for f in beside)}", "leave one of them", code=2
            )
        if beside:
            _note_ignored(folder, [file for file in others if file not in beside])
            return cls._captioned(
                files, folder, read_captions(beside[0], column), f"{beside[0].name} beside the images"
            )
        if column is not None:
            raise SbrushError(
                f"--column is of a table of captions, and none lies in {printable(folder)}",
                "leave it out, or --captions FILE",
                code=2,
            )
        own = {composed(file.stem): file for file in others if file.suffix.lower() == ".txt"}
        if any(composed(file.stem) in own for file in files):
            _note_ignored(folder, [file for file in others if file not in own.values()])
            captions = [_own_caption(file, own) for file in files]
            return cls(files, captions, "text files beside the images", "a text file of each image's name")
        _note_ignored(folder, others)
        return cls(files)

    def digest(self, count: int, cache: Path, *, remember: bool = True) -> str:
        """SHA-256 of the first `count` images' bytes; cached in `cache` by their paths, sizes and times.

        Not to `remember`, nothing is written.
        """
        some = self.files[:count]
        try:
            known = self._memory(count, cache).read_text(encoding="utf-8").strip()
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
        if remember:
            self.remember(count, cache, whole)
        return whole

    def remember(self, count: int, cache: Path, digest: str) -> None:
        """Caches the first `count` images' digest."""
        try:
            cache.mkdir(parents=True, exist_ok=True)
            write_text(self._memory(count, cache), digest + "\n")
        except OSError:  # then they are read again next time
            pass

    def _memory(self, count: int, cache: Path) -> Path:
        times = [(file, file.stat()) for file in self.files[:count]]
        listed = hash_of(f"{f.absolute()} {s.st_size} {s.st_mtime_ns}" for f, s in times)
        return cache / f"images-{listed[:24]}.sha256"

    @classmethod
    def _captioned(cls, files: list[Path], folder: Path, read: Texts, source: str) -> Self:
        """Images with captions: by the names in a table that has them, else by the images' numbers or names."""
        if read.files is not None:
            return cls(_named(folder, files, read.files), read.texts, source, "the file names in the table of captions")
        shown, where = printable(folder), printable(Path(read.source).name)
        if read.unit == "row" and read.ignored:
            raise SbrushError(
                f"{where} has other columns than captions, and none of file names",
                "call that column file_name; or leave the captions alone, in the images' order",
                code=2,
            )
        numbers = numbers_of(files)
        if numbers is None:
            ordered, rule = files, f"the file names' alphabet; {read.unit} i of {where} is image i's"
        else:
            whole = len(files) == len(read)
            ordered = by_number(files, numbers, starts=(0, 1) if whole else (0,))
            rule = f"the numbers in the file names; {read.unit} i of {where} is the i-th image's"
        if len(ordered) != len(read) and source.endswith("beside the images"):
            raise SbrushError(
                f"{shown}/{where} has {count(len(read), 'caption')} for {count(len(files), 'image')}",
                "a caption a line, in the images' order, no empty lines",
                code=2,
            )
        return cls(ordered, read.texts, source, rule)


def hash_of(lines: Iterable[object]) -> str:
    """SHA-256 of a list, an item a line."""
    whole = hashlib.sha256()
    for line in lines:
        whole.update(f"{line}\n".encode())
    return whole.hexdigest()


def read_captions(file: Path, column: str | None = None) -> Texts:
    """Captions as `read_texts` finds them, stripped; line breaks within them stay.

    SbrushError if there are none, or one is empty: the next would be another's. Empty lines at the end are none.
    """
    read = read_texts(file, column)
    texts = [text.strip() for text in read]
    while texts and not texts[-1] and read.unit == "line":
        texts.pop()
    if not texts or "" in texts:
        place = f"{read.unit} {texts.index('') + 1} of " if texts else ""
        raise SbrushError(f"{place}{printable(read.source)} is empty", "a caption for each image, in order", code=2)
    info(f"{count(len(texts), 'caption')} from {printable(read.source)}{read.found and f', {read.found}'}")
    return replace(read, texts=texts)


def _named(folder: Path, files: Sequence[Path], names: Sequence[str]) -> list[Path]:
    """The files in the order of a table's names; it must name each image once, and nothing else."""
    here, wanted = (
        [composed(file.name) for file in files],
        [composed(name.strip().removeprefix("./")) for name in names],
    )
    odd = {name for every in (here, wanted) for name, times in Counter(every).items() if times > 1}
    odd |= set(here) ^ set(wanted)
    if odd:
        raise SbrushError(
            f"{printable(folder)}: the table of captions and the images differ, as in {printable(min(odd))}",
            "it must name each image once, and no other",
            code=2,
        )
    place = dict(zip(here, files, strict=True))
    return [place[name] for name in wanted]


def _own_caption(image: Path, own: dict[str, Path]) -> str:
    """The caption in the text file of an image's name."""
    file = own.get(composed(image.stem))
    if file is None:
        raise SbrushError(
            f"{printable(image)} has no caption {image.stem}.txt beside it, as others have", "all, or none", code=2
        )
    lines = [line.strip() for line in read_texts(file) if line.strip()]
    if len(lines) != 1:
        raise SbrushError(
            f"{printable(file)} has {count(len(lines), 'line')}, and is a caption by its name",
            "one line is a caption; move such files elsewhere if they are none",
            code=2,
        )
    return lines[0]


def _note_ignored(folder: Path, files: Sequence[Path]) -> None:
    if files:
        named = ", ".join(printable(file.name) for file in files[:NAMED]) + (", ..." if len(files) > NAMED else "")
        info(f"note: not images, by their names, and passed over in {printable(folder)}: {named}")

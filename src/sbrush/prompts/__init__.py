"""Reads prompts and captions: plain text, tables and JSON, from files and pipes; the order in which a run takes them.

source.py opens what was named, encoding.py makes text of its bytes, tables.py finds the texts in it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sbrush.console import SbrushError, count, printable
from sbrush.prompts.source import LONGEST, form_of, read_source
from sbrush.prompts.texts import Texts, find_texts

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Prompts:
    """A list of distinct prompts and where it came from."""

    texts: tuple[str, ...]
    source: str
    sha256: str
    blank: int = 0
    duplicate: int = 0
    found: str = ""  # where in a table or a JSON file: "column 'caption'; 3 other columns ignored"
    unit: str = "line"  # what holds a prompt: a line, a row, a value
    joined: int = 0  # prompts of several lines, which have become one
    stem: str = "prompts"  # the source's name without folder and suffix, for a folder of its own

    def __len__(self) -> int:
        return len(self.texts)

    def describe(self) -> str:
        """ "2,000 prompts from x.csv, column 'caption'; 3 other columns ignored (2 blank, 0 duplicate rows ...)"."""
        found = f", {printable(self.found)}" if self.found else ""
        told = []
        if self.blank + self.duplicate:
            told.append(f"{self.blank:,} blank, {self.duplicate:,} duplicate {self.unit}s dropped")
        if self.joined:
            told.append(f"line breaks in {self.joined:,} made spaces")
        dropped = f" ({'; '.join(told)})" if told else ""
        return f"{count(len(self), 'prompt')} from {printable(self.source)}{found}{dropped}"


class ShuffledPrompts:
    """The endless order in which a run sees its prompts: each epoch is a permutation fixed by (seed, epoch)."""

    def __init__(self, prompts: Prompts, seed: int) -> None:
        self._texts, self._seed = prompts.texts, seed
        self._epoch = -1
        self._order: Tensor | None = None

    def __getitem__(self, index: int) -> str:
        """The prompt of global sample `index`, counted from 0 over the whole run."""
        return self._texts[self.place(index)]

    def place(self, index: int) -> int:
        """That prompt's place in the list."""
        epoch, place = divmod(index, len(self._texts))
        if self._order is None or epoch != self._epoch:
            self._epoch, self._order = epoch, _permutation(len(self._texts), self._seed, epoch)
        return int(self._order[place])


def read_texts(path: Path, column: str | None = None, *, required: bool = True, what: str = "caption") -> Texts:
    """The texts of a file or a pipe, in its order, as they stand there: prompts or captions.

    `path` "-" is the standard input. Which column of a table holds them: `column`, else the one called prompt, caption
    or text. Not `required`, a `column` that the file lacks is passed over. `what`, "prompt" or "caption", is for
    messages. SbrushError if nothing can be read, it is no text, or it is a table without such a column.
    """
    return find_texts(read_source(path, what), column, required=required)


def read_prompts(path: Path, column: str | None = None, *, required: bool = True) -> Prompts:
    """The prompts of a file or a pipe, as `read_texts` finds them; SbrushError if there are none.

    A prompt is one line: a line break within a cell of a table becomes a space. (To CLIP's tokenizer they are the
    same.)
    """
    texts = read_texts(path, column, required=required, what="prompt")
    stripped = [text.strip() for text in texts]
    if texts.unit == "line" and not stripped[-1]:
        stripped.pop()  # the file's last newline is no blank line
    lines = [_one_line(text) for text in stripped]
    prompts = replace(
        _distinct(lines, texts.source),
        found=texts.found,
        unit=texts.unit,
        joined=sum(one != many for one, many in zip(lines, stripped, strict=True)),
        stem=texts.stem,
    )
    shown = printable(texts.source)
    if not prompts.texts:
        raise SbrushError(f"{shown} holds no prompt", form_of("prompt"), code=2)
    if max(map(len, prompts.texts)) > LONGEST:
        raise SbrushError(f"{shown} has a {texts.unit} of more than {LONGEST} characters", form_of("prompt"), code=2)
    return prompts


def captions_as_prompts(captions: Iterable[str], source: str, stem: str) -> Prompts:
    """The captions of images, one for each in their order, so that equal ones stay; the hash is of all of them."""
    texts = tuple(_one_line(caption.strip()) for caption in captions)
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    return Prompts(texts, source, digest, unit="image", stem=stem)


def make_prompts(lines: Iterable[str], source: str) -> Prompts:
    """Prompts from lines, stripped; the hash is of the list that is left."""
    stripped = [line.strip() for line in lines]
    if stripped and not stripped[-1]:
        stripped.pop()  # the file's last newline is no blank line
    return _distinct(stripped, source)


def _distinct(stripped: list[str], source: str) -> Prompts:
    filled = [line for line in stripped if line]
    texts = tuple(dict.fromkeys(filled))
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    return Prompts(texts, source, digest, blank=len(stripped) - len(filled), duplicate=len(filled) - len(texts))


def _one_line(text: str) -> str:
    return re.sub(r"\s*[\r\n]+\s*", " ", text) if "\n" in text or "\r" in text else text


def _permutation(length: int, seed: int, epoch: int) -> Tensor:
    """The places of an epoch, int64 [length]."""
    import torch  # not before it is needed: a prompt file is refused at once

    from sbrush.noise import generator

    return torch.randperm(length, generator=generator(seed, "epoch", epoch))

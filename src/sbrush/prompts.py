"""Prompt files in: one prompt a line, UTF-8; blank lines and duplicates dropped and counted."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from sbrush.console import SbrushError, printable
from sbrush.noise import generator

LONGEST = 100_000  # bytes in one line; more is not a prompt file
LARGEST = 4 << 30  # bytes in a file, which is read into memory


@dataclass(frozen=True)
class Prompts:
    """A list of distinct prompts and where it came from."""

    texts: tuple[str, ...]
    source: str
    sha256: str
    blank: int = 0
    duplicate: int = 0

    def __len__(self) -> int:
        return len(self.texts)

    def describe(self) -> str:
        """ "2751 prompts from prompts/stickers.txt (2 blank, 0 duplicate lines dropped)"."""
        dropped = (
            f" ({self.blank} blank, {self.duplicate} duplicate lines dropped)" if self.blank + self.duplicate else ""
        )
        return f"{len(self)} prompts from {printable(self.source)}{dropped}"


class ShuffledPrompts:
    """The endless order in which a run sees its prompts: each epoch is a permutation fixed by (seed, epoch)."""

    def __init__(self, prompts: Prompts, seed: int) -> None:
        self._texts, self._seed = prompts.texts, seed
        self._epoch, self._order = -1, torch.empty(0)

    def __getitem__(self, index: int) -> str:
        """The prompt of global sample `index`, counted from 0 over the whole run."""
        return self._texts[self.place(index)]

    def place(self, index: int) -> int:
        """That prompt's place in the list."""
        epoch, place = divmod(index, len(self._texts))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = torch.randperm(len(self._texts), generator=generator(self._seed, "epoch", epoch))
        return int(self._order[place])


def read_prompts(path: Path) -> Prompts:
    """The prompts in a file; SbrushError if it is missing, no text, not UTF-8 or empty."""
    shown = printable(path)
    one_a_line = "a prompt file is UTF-8 text, one prompt a line; prompts/stickers.txt is one"
    try:
        if path.is_dir():
            raise SbrushError(f"{shown} is a folder, not a prompt file", one_a_line, code=2)
        if path.stat().st_size > LARGEST:
            raise SbrushError(
                f"{shown} is larger than {LARGEST >> 30} GiB", "split it: a run seldom needs 2 M prompts", code=2
            )
        data = path.read_bytes()
    except FileNotFoundError:
        raise SbrushError(f"no prompt file {shown}", one_a_line, code=2) from None
    except OSError as problem:
        raise SbrushError(f"cannot read {shown}: {problem.strerror}", "check its permissions", code=2) from None
    if b"\0" in data:
        raise SbrushError(f"{shown} is not text: it holds NUL bytes", one_a_line, code=2)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = data.count(b"\n", 0, problem.start) + 1
        raise SbrushError(
            f"{shown} is not UTF-8 (line {line})", f"convert it: iconv -f LATIN1 -t UTF-8 '{shown}' > new.txt", code=2
        ) from None
    prompts = make_prompts(text.split("\n"), str(path))
    if not prompts.texts:
        raise SbrushError(f"{shown} holds no prompt", one_a_line, code=2)
    if max(map(len, prompts.texts)) > LONGEST:
        raise SbrushError(f"{shown} has a line of more than {LONGEST} characters", one_a_line, code=2)
    return prompts


def make_prompts(lines: Iterable[str], source: str) -> Prompts:
    """Prompts from lines, stripped; the hash is of the list that is left."""
    stripped = [line.strip() for line in lines]
    if stripped and not stripped[-1]:
        stripped.pop()  # the file's last newline is no blank line
    filled = [line for line in stripped if line]
    texts = tuple(dict.fromkeys(filled))
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    return Prompts(texts, source, digest, blank=len(stripped) - len(filled), duplicate=len(filled) - len(texts))

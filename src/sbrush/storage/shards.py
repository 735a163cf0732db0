"""Rows of tensors on disk, one row per image or prompt. Work that was stopped at any moment can be resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from sbrush.console import SbrushError, info, printable, progress
from sbrush.storage.files import atomic_write
from sbrush.storage.tensors import save_tensors

BLOCK = 256  # rows a file: what is lost at most when the work is stopped


class Shards:
    """A folder of safetensors files, each with the rows of a block, named by the block's first.

    No file depends on another, and a block is the same whoever fills it: so any number of processes fill a folder, one
    after another or at once. What the rows depend on belongs into the folder's name: another key, another folder.
    """

    def __init__(self, folder: Path, total: int, *, elsewhere: str = "--work", unit: str = "images") -> None:
        """`elsewhere`: the flag by which the folder is chosen; `unit`: what a row is of, in the plural."""
        self.folder, self._elsewhere, self._unit = folder, elsewhere, unit
        self.blocks = [range(first, min(first + BLOCK, total)) for first in range(0, total, BLOCK)]

    def fill(
        self,
        what: str,
        batches: Callable[[Sequence[range]], Iterable[dict[str, Tensor]]],
        *,
        process: int = 0,
        processes: int = 1,
        done: Callable[[range], bool] = lambda block: True,
    ) -> None:
        """Writes the missing ones of this process's blocks, and those that are not `done` besides.

        `batches`: the rows of blocks of row numbers by name, [b, ...]; in order, no batch in two blocks.
        """
        mine = self.blocks[process::processes]
        missing = [block for block in mine if not (self._has(block) and done(block))]
        if not missing:
            return
        all_mine, rows = sum(map(len, mine)), iter(batches(missing))
        before = all_mine - sum(map(len, missing))
        with progress(what, all_mine, done=before, unit=self._unit) as bar:
            for block in missing:
                parts: list[dict[str, Tensor]] = []
                while sum(map(_length, parts)) < len(block):
                    parts.append(next(rows))
                    bar.advance(_length(parts[-1]))
                self._write(block, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    def rows(self) -> dict[str, Tensor]:
        """All rows by name, [total, ...], read so that they are held once; every block must be there."""
        held = dict[str, Tensor]()
        for block in self.blocks:
            for name, value in load_file(self._file(block)).items():
                total = self.blocks[-1].stop
                held.setdefault(name, value.new_empty(total, *value.shape[1:]))[block.start : block.stop] = value
        return held

    def take(self, places: Sequence[int]) -> dict[str, Tensor]:
        """Some rows by name, [len(places), ...]: read one by one, no file as a whole. Their blocks must be there."""
        found: list[dict[str, Tensor]] = []
        for place in places:
            block = self.blocks[place // BLOCK]
            with safe_open(self._file(block), "pt") as rows:
                row = place - block.start
                found.append({name: rows.get_slice(name)[row : row + 1] for name in rows.keys()})
        return {name: torch.cat([row[name] for row in found]) for name in found[0]}

    @property
    def missing(self) -> int:
        """How many rows are not there yet."""
        return sum(len(block) for block in self.blocks if not self._has(block))

    def _file(self, block: range) -> Path:
        return self.folder / f"{block.start:06d}.safetensors"

    def _has(self, block: range) -> bool:
        """Whether a block's rows are there, all of them."""
        file = self._file(block)
        if not file.exists():
            return False
        try:
            with safe_open(file, "pt") as rows:
                lengths = {rows.get_slice(name).get_shape()[0] for name in rows.keys()}
        except (OSError, SafetensorError):
            lengths = set()
            info(f"{printable(file)} is damaged; its {self._unit} are looked at again")
        return lengths == {len(block)}

    def _write(self, block: range, rows: dict[str, Tensor]) -> None:
        file = self._file(block)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(file) as partial:
                save_tensors(partial, rows)
        except OSError as problem:
            raise SbrushError(
                f"cannot write {printable(file)}: {printable(problem.strerror or problem)}",
                f"make room or choose another {self._elsewhere}; the same command goes on",
            ) from problem


def _length(rows: dict[str, Tensor]) -> int:
    return len(next(iter(rows.values())))

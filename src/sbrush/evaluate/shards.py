"""What was seen of pictures so far, on disk: stopped at any moment, the work goes on where it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sbrush.console import SbrushError, printable, progress, say
from sbrush.files import whole


class Shards:
    """A folder of safetensors files, each with a row for every picture from its number on; without gaps.

    What the rows depend on belongs into the folder's name: another key, another folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows = 0  # pictures that are done
        self._files: list[Path] = []
        for file in sorted(folder.glob("*.safetensors")):
            try:
                length = len(next(iter(load_file(file).values())))
            except (OSError, SafetensorError, StopIteration):
                length = 0
            if file.stem != f"{self.rows:06d}" or not length:  # damaged, or behind a gap: done again
                say(f"{printable(file)} is damaged; going on from picture {self.rows}")
                break
            self._files.append(file)
            self.rows += length

    def append(self, rows: dict[str, Tensor]) -> None:
        """Keeps the next pictures' rows: float32 [b, ...] by name."""
        file = self.folder / f"{self.rows:06d}.safetensors"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with whole(file) as partial:
                save_file({name: value.contiguous() for name, value in rows.items()}, partial)
        except (OSError, SafetensorError) as problem:
            raise SbrushError(
                f"cannot write {printable(file)}: {printable(problem)}",
                "make room or choose another --work; the same command goes on",
            ) from problem
        self._files.append(file)
        self.rows += len(next(iter(rows.values())))

    def fill(self, total: int, what: str, batches: Callable[[int], Iterable[dict[str, Tensor]]]) -> dict[str, Tensor]:
        """All rows, [total, ...] by name: those on disk, and the rest from `batches(first row that is missing)`."""
        if self.rows < total:
            with progress(what, total, done=self.rows, unit="pictures") as bar:
                for rows in batches(self.rows):
                    self.append(rows)
                    bar.advance(len(next(iter(rows.values()))))
        return self._rows(total)

    def _rows(self, total: int) -> dict[str, Tensor]:
        """The first `total` rows by name, read so that they are held once."""
        held, first = dict[str, Tensor](), 0
        for file in self._files:
            rows = {name: value[: max(0, total - first)] for name, value in load_file(file).items()}
            for name, value in rows.items():
                held.setdefault(name, value.new_empty(total, *value.shape[1:]))[first : first + len(value)] = value
            first += len(value)
        return held

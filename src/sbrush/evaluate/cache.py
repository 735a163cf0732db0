"""Figures that were measured before: those of a teacher take minutes to make, and never change.

They are kept under the hash of all that they depend on, in the user's cache; those of the built-in teacher come with
the package.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from sbrush import __version__
from sbrush.console import info
from sbrush.evaluate.report import Figures, from_png, png
from sbrush.storage.files import user_cache, write_json

SHIPPED = Path(__file__).parent.parent / "stickers" / "weights" / "figures"


class Result(NamedTuple):
    """A candidate's figures, and some of its images, each with its caption."""

    figures: Figures
    shown: list[tuple[str, Image.Image]]


@dataclass(frozen=True)
class ResultCache:
    """The place of one candidate's figures; None for a `folder` where there is none, as without a home."""

    name: str
    folder: Path | None

    @classmethod
    def of(cls, key: Sequence[Any], folder: Path | None = None) -> ResultCache:
        """The place for what depends on `key`, all of it JSON; `folder` is by default the user's cache."""
        folder = folder or user_cache()
        return cls(f"eval-{hashlib.sha256(json.dumps(list(key)).encode()).hexdigest()[:32]}.json", folder)

    def recall(self, n: int, per_caption: int) -> Result | None:
        """What is remembered here, or else came with the package, measured on so many images; None if nothing is."""
        for folder in (self.folder, SHIPPED):
            if folder and (folder / self.name).is_file() and (result := _read(folder / self.name, n, per_caption)):
                return result
        return None

    def keep(self, result: Result) -> None:
        """Writes what `recall` reads; that it cannot be written is said, and no more."""
        if self.folder is None:
            return
        data = {"figures": asdict(result.figures), "images": [(text, png(image)) for text, image in result.shown]}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / self.name, data)
        except OSError as problem:
            reason = problem.strerror or problem
            info(f"{result.figures.name}: figures could not be remembered in {self.folder} ({reason})")


def versions(*more: str) -> dict[str, str]:
    """The versions of what takes part in measuring, and of `more` packages."""
    found = {"sbrush": __version__, "python": platform.python_version()}
    for package in ("torch", "torchmetrics", "open_clip_torch", "pillow", *more):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _read(file: Path, n: int, per_caption: int) -> Result | None:
    """The figures in a file; None if it is damaged."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        result = Result(
            Figures.from_json(data["figures"]), [(str(text), from_png(code)) for text, code in data["images"]]
        )
        if (result.figures.n, result.figures.per_caption) != (n, per_caption):
            raise ValueError("measured on other numbers")
    except Exception as problem:  # whatever is wrong with it, it can be made again
        info(f"remembered figures in {file} are damaged ({problem}); measuring anew")
        return None
    info(f"{result.figures.name}: measured before, remembered in {file}")
    return result

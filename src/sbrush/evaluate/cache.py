"""Metrics that were measured before: those of a teacher take minutes to make, and never change.

They are kept under the hash of all that they depend on, in the user's cache. Those of the built-in teacher come with
the package. What they depend on names no version of sbrush: PROTOCOL in stickers.py is raised whenever the same
model would get other metrics, and a report says with which versions cached metrics were made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from sbrush import __version__
from sbrush.console import info
from sbrush.evaluate.report import Metrics, from_png, png
from sbrush.storage.files import user_cache, write_json

SHIPPED = Path(__file__).parent.parent / "stickers" / "weights" / "metrics"
PACKAGES = (  # what draws, decodes, resizes, multiplies and compares
    "torch", "torchvision", "diffusers", "transformers", "open_clip_torch", "torchmetrics", "torch-fidelity", "numpy",
    "pillow",
)  # fmt: skip


class Result(NamedTuple):
    """A candidate's metrics, and some of its images, each with its caption."""

    metrics: Metrics
    shown: list[tuple[str, Image.Image]]


@dataclass(frozen=True)
class ResultCache:
    """Where one candidate's metrics are kept. `folder` is None where there is none, as without a home."""

    name: str
    folder: Path | None

    @classmethod
    def for_key(cls, key: Sequence[Any], folder: Path | None = None) -> ResultCache:
        """The place for what depends on `key`, all of it JSON; `folder` is by default the user's cache."""
        folder = folder or user_cache()
        return cls(f"eval-{hashlib.sha256(json.dumps(list(key)).encode()).hexdigest()[:32]}.json", folder)

    def load(self, n: int, per_caption: int) -> Result | None:
        """What is cached here, or else came with the package, measured on so many images; None if nothing is."""
        for folder in (self.folder, SHIPPED):
            if folder and (folder / self.name).is_file() and (result := _read(folder / self.name, n, per_caption)):
                return result
        return None

    def save(self, result: Result) -> None:
        """Writes what `load` reads. If it cannot be written, a line says so, and no more."""
        if self.folder is None:
            return
        data = {"metrics": asdict(result.metrics), "images": [(text, png(image)) for text, image in result.shown]}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / self.name, data)
        except OSError as problem:
            reason = problem.strerror or problem
            info(f"{result.metrics.name}: metrics could not be cached in {self.folder} ({reason})")


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """The versions of sbrush and of packages, by default of all that take part in measuring."""
    found = {"sbrush": __version__}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _read(file: Path, n: int, per_caption: int) -> Result | None:
    """The metrics in a file; None if it is damaged."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        result = Result(
            Metrics.from_json(data["metrics"]), [(str(text), from_png(code)) for text, code in data["images"]]
        )
        if (result.metrics.n, result.metrics.per_caption) != (n, per_caption):
            raise ValueError("measured on other numbers")
    except Exception as problem:  # whatever is wrong with it, it can be made again
        info(f"cached metrics in {file} are damaged ({problem}); measuring again")
        return None
    info(f"{result.metrics.name}: measured before, cached in {file}")
    return result

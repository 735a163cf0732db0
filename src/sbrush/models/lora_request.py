"""What `--lora` names: a file, a folder, a Hub id or a built-in LoRA, and how strongly it acts.

Imports nothing heavy: commands read it before torch is loaded. lora.py adds what it names to a model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sbrush.console import SbrushError, printable
from sbrush.models.hub import fetch_weights
from sbrush.models.source import check_file, is_single_file
from sbrush.storage.files import check_name

BUILT_IN = Path(__file__).parent.parent / "stickers" / "weights" / "loras"
USUAL = "pytorch_lora_weights.safetensors"  # as diffusers saves one
LIMIT = 10.0  # of a weight; people use -2 to 2
HUB = re.compile(r"([\w.-]+/[\w.-]+)(?:/(.+\.safetensors))?")  # a repository, or one of its files
EXAMPLE = "--lora FILE.safetensors, OWNER/NAME or OWNER/NAME/FILE.safetensors, with :0.8 behind it for a weight of 0.8"


@dataclass(frozen=True)
class LoraRequest:
    """A LoRA to be added: its `source` as people name it, and the weight that it is multiplied by, -10 to 10.

    1 is the LoRA as it was trained, 0 is without it; a negative weight draws the opposite, as slider LoRAs have it.
    """

    source: str
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> LoraRequest:
        """From SOURCE or SOURCE:WEIGHT, checked as far as that needs no network. SbrushError if it cannot be a LoRA.

        What is there under the whole text, colons and all, is taken as it is.
        """
        source, colon, tail = text.rpartition(":")
        weight = _number(tail) if colon and not _exists(text) else None
        request = cls(text) if weight is None else cls(source, weight)
        request.check()
        return request

    @property
    def text(self) -> str:
        """As `parse` takes it."""
        return (
            self.source
            if self.weight == 1 and self == LoraRequest.parse(self.source)
            else f"{self.source}:{self.weight:g}"
        )

    def check(self) -> None:
        """SbrushError if there is no such LoRA here, and it is no Hub id either, or if the weight is out of range."""
        if not -LIMIT <= self.weight <= LIMIT:
            raise SbrushError(
                f"a LoRA's weight of {self.weight:g} is out of range",
                f"give -{LIMIT:g} to {LIMIT:g}; 1 is the LoRA as it was trained, and most are used at 0.5 to 1",
                code=2,
            )
        shown, path = printable(self.source), Path(self.source).expanduser()
        if not self.source.strip():
            raise SbrushError("a LoRA without a name", EXAMPLE, code=2)
        check_name(path)
        if path.is_dir():
            _weights_in(path)
        elif path.exists() or (is_single_file(self.source) and (path.parent.is_dir() or not _on_the_hub(self.source))):
            check_file(path)
            if path.suffix.lower() != ".safetensors":
                raise SbrushError(f"{shown} is no .safetensors file", EXAMPLE, code=2)
        elif self._built_in is None and not _on_the_hub(self.source):
            names = ", ".join(sorted(file.stem for file in BUILT_IN.glob("*.safetensors")))
            raise SbrushError(f"no LoRA {shown}", f"{EXAMPLE}. Built in: {names}", code=2)

    def locate(self) -> Path:
        """Its file; one from the Hub is downloaded if it is not in the Hub's cache. SbrushError if it cannot be had."""
        self.check()
        path = Path(self.source).expanduser()
        if path.is_dir():
            return _weights_in(path)
        if path.is_file():
            return path
        if self._built_in is not None:
            return self._built_in
        found = HUB.fullmatch(self.source)
        assert found is not None  # or `check` has refused it
        return fetch_weights(found[1], found[2], usual=USUAL)

    @property
    def _built_in(self) -> Path | None:
        """The file of that name that comes with sbrush."""
        file = BUILT_IN / f"{self.source}.safetensors"
        return file if re.fullmatch(r"[\w-]+", self.source) and file.is_file() else None


@dataclass(frozen=True)
class AddedLora:
    """A LoRA that is part of a model now. `sha256`: of its file, the first 16 digits."""

    request: LoraRequest
    sha256: str

    @property
    def about(self) -> dict[str, Any]:
        """What an image's record and a report say of it."""
        return {"name": self.request.source, "weight": self.request.weight, "sha256": self.sha256}


def parse_loras(loras: Iterable[str | LoraRequest] | None) -> tuple[LoraRequest, ...]:
    """Each as a request; SbrushError if one cannot be a LoRA."""
    return tuple(LoraRequest.parse(lora) if isinstance(lora, str) else lora for lora in loras or ())


def _weights_in(folder: Path) -> Path:
    """The LoRA in a folder: diffusers' own name, or else its only .safetensors."""
    if (folder / USUAL).is_file():
        return folder / USUAL
    files = sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("."))
    if len(files) != 1:
        shown = printable(folder)
        raise SbrushError(
            f"the folder {shown} holds {len(files) or 'no'} .safetensors files",
            f"name one: {', '.join(printable(file) for file in files[:5])}" if files else EXAMPLE,
            code=2,
        )
    return files[0]


def _on_the_hub(source: str) -> bool:
    return HUB.fullmatch(source) is not None


def _exists(text: str) -> bool:
    try:
        return Path(text).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # a name too long, no such user for ~, a NUL
        return False


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None

"""A training's state on disk: safetensors and JSON, one folder per step, written under a temporary name and renamed.

checkpoints/step-000200/student.safetensors   a file for each part: student, average, LoRA teacher, optimisers
checkpoints/step-000200/state.json            format version, step, each file's SHA-256, anything else small

A part is read when it is asked for, so that a training of gigabytes needs room for one of them more, not for all.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from sbrush.console import SbrushError, info, printable
from sbrush.storage.files import atomic_folder, check_room, flush, write_json
from sbrush.storage.tensors import save_tensors

FORMAT = 2


@dataclass(frozen=True)
class Checkpoint:
    """One saved state, whole when it was found: its folder, the step that it follows, its small values."""

    folder: Path
    step: int
    extra: dict[str, Any]

    def part(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of one part, none if it was saved without; SbrushError if its file cannot be read."""
        file = self.folder / f"{name}.safetensors"
        try:
            return load_file(file) if file.is_file() else {}
        except (OSError, SafetensorError) as problem:
            raise SbrushError(
                f"cannot read {printable(file)}: {printable(problem)}", "it was changed since it was written; remove it"
            ) from problem


def save(
    folder: Path, step: int, parts: Mapping[str, Mapping[str, torch.Tensor]], *, keep: int = 2, **extra: Any
) -> None:
    """Writes the state after `step` steps; then removes all but the newest `keep`.

    `parts` maps a part's name to its tensors. Nothing is removed before the new checkpoint is complete. Those of later
    steps do not count, and stay: a run that goes on from before them has found them damaged.
    Raises SbrushError if the disk has no room for it, OSError as any writing may.
    """
    size = sum(v.nbytes for part in parts.values() for v in part.values())
    check_room(folder, size, "a checkpoint", "make room; the same command then goes on after the last checkpoint")
    with atomic_folder(folder / f"step-{step:06d}") as partial:
        digests = {}
        for part, tensors in parts.items():
            file = partial / f"{part}.safetensors"
            save_tensors(file, {k: v.detach().cpu().contiguous() for k, v in tensors.items()})
            digests[part] = _digest(file)
        write_json(partial / "state.json", {"format": FORMAT, "step": step, "sha256": digests, **extra})
        for file in partial.iterdir():
            flush(file)
    flush(folder)
    for old in [path for path in paths(folder) if step_of(path) <= step][keep:]:
        shutil.rmtree(old, ignore_errors=True)


def newest(folder: Path) -> Checkpoint | None:
    """The newest state that is whole, or None if there never was one; damaged ones are passed over, which is said.

    Raises SbrushError if all are damaged, or one was written in another format version.
    """
    kept = paths(folder)
    for path in kept:
        try:
            return read(path)
        except ValueError as problem:
            info(f"checkpoint {printable(path)} is damaged ({printable(problem)}); trying the one before")
    if kept:
        raise SbrushError(
            f"every checkpoint in {printable(folder)} is damaged",
            "put a good copy there, or start anew in another --out",
        )
    return None


def read(path: Path) -> Checkpoint:
    """The checkpoint in its folder; ValueError if it is damaged, SbrushError if it has another format version."""
    try:
        extra = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if extra["format"] != FORMAT:
            theirs = printable(extra["format"])
            raise SbrushError(
                f"checkpoint {printable(path)} has format {theirs}, this version reads {FORMAT}",
                "finish the run with the version that began it, or start anew in another --out",
            )
        for part, digest in extra.pop("sha256").items():
            if digest != _digest(path / f"{part}.safetensors"):
                raise ValueError(f"the checksum of {part} does not match")
        if extra.pop("step") != step_of(path):
            raise ValueError("it is of another step than its name says")
        return Checkpoint(path, step_of(path), extra)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise ValueError(str(problem)) from problem


def paths(folder: Path) -> list[Path]:
    """The finished checkpoint folders, newest first."""
    found = [p for p in folder.iterdir() if re.fullmatch(r"step-\d{6,}", p.name)] if folder.is_dir() else []
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step that a checkpoint's folder is named by."""
    return int(path.name.removeprefix("step-"))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

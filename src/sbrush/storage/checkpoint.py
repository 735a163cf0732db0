"""A training's state on disk and back: safetensors and JSON in one folder a step, written aside and renamed.

checkpoints/step-000200/student.safetensors   a file for each part: student, average, LoRA teacher, optimisers
checkpoints/step-000200/state.json            format version, step, each file's SHA-256, anything else small

A part is read when it is asked for, so that a training of gigabytes needs room for one of them more, not for all.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sbrush.console import SbrushError, info, printable

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

    `parts` maps a part's name to its tensors. Nothing is removed before the new checkpoint is complete.
    Raises SbrushError if the disk has no room for it, OSError as any writing may.
    """
    target = folder / f"step-{step:06d}"
    partial = folder / f"{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    _check_room(folder, sum(v.nbytes for part in parts.values() for v in part.values()))
    digests = {}
    for part, tensors in parts.items():
        file = partial / f"{part}.safetensors"
        try:
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, file)
        except SafetensorError as problem:  # its name for whatever went wrong in writing
            raise OSError(str(problem)) from problem
        digests[part] = _digest(file)
    about = {"format": FORMAT, "step": step, "sha256": digests, **extra}
    (partial / "state.json").write_text(json.dumps(about, indent=2), encoding="utf-8")
    for file in partial.iterdir():
        _flush_to_disk(file)
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    _flush_to_disk(folder)
    for old in paths(folder)[keep:]:
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
        if extra.pop("step") != _step(path):
            raise ValueError("it is of another step than its name says")
        return Checkpoint(path, _step(path), extra)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise ValueError(str(problem)) from problem


def paths(folder: Path) -> list[Path]:
    """The finished checkpoint folders, newest first."""
    found = [p for p in folder.iterdir() if re.fullmatch(r"step-\d{6,}", p.name)] if folder.is_dir() else []
    return sorted(found, key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _check_room(folder: Path, size: int) -> None:
    """SbrushError if the disk has less room than a checkpoint of `size` bytes takes."""
    free = shutil.disk_usage(folder).free
    if free < size * 1.01 + 2**20:
        raise SbrushError(
            f"no room for a checkpoint in {printable(folder)}: it takes {size / 2**20:.0f} MiB, "
            f"{free / 2**20:.0f} MiB are free",
            "make room and give the same command again: it goes on after the last checkpoint",
        )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

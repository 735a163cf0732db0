"""A training's state on disk and back: safetensors and JSON in one folder a step, written aside and renamed.

checkpoints/step-000200/state.safetensors   every tensor, named "part.key"
checkpoints/step-000200/state.json          format version, step, the tensor file's SHA-256, anything else small
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

from sbrush.console import SbrushError, printable, say

FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """One saved state: the step that it follows, its tensors and its small values."""

    step: int
    tensors: dict[str, torch.Tensor]
    extra: dict[str, Any]

    def part(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors saved under "name.", without that prefix."""
        return {k[len(name) + 1 :]: v for k, v in self.tensors.items() if k.startswith(name + ".")}


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
    tensors = {f"{part}.{k}": v.detach().cpu().contiguous().clone() for part, d in parts.items() for k, v in d.items()}
    try:
        save_file(tensors, partial / "state.safetensors")
    except SafetensorError as problem:  # its name for whatever went wrong in writing
        raise OSError(str(problem)) from problem
    about = {"format": FORMAT, "step": step, "sha256": _digest(partial / "state.safetensors"), **extra}
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
            extra = json.loads((path / "state.json").read_text(encoding="utf-8"))
            if extra["format"] != FORMAT:
                theirs = printable(extra["format"])
                raise SbrushError(
                    f"checkpoint {printable(path)} has format {theirs}, this version reads {FORMAT}",
                    "finish the run with the version that began it, or start anew in another --out",
                )
            if extra.pop("sha256") != _digest(path / "state.safetensors"):
                raise ValueError("its checksum does not match")
            if extra.pop("step") != _step(path):
                raise ValueError("it is of another step than its name says")
            return Checkpoint(_step(path), load_file(path / "state.safetensors"), extra)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as problem:
            say(f"checkpoint {printable(path)} is damaged ({printable(problem)}); trying the one before")
    if kept:
        raise SbrushError(
            f"every checkpoint in {printable(folder)} is damaged",
            "put a good copy there, or start anew in another --out",
        )
    return None


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """An optimiser's state as flat tensors, "parameter index.key": what `load_optimizer` takes back."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{k}": torch.as_tensor(v) for i, entry in state.items() for k, v in entry.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Puts back what `optimizer_tensors` took from an Adam; the parameter groups keep the optimiser's own settings.

    ValueError if that is no state of an Adam over these parameters: of all of them, or of none.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        like = parameters[int(index)]
        if tensor.shape == like.shape:  # fused Adam walks memory: moments must be laid out as their parameter is
            tensor = torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
        state.setdefault(int(index), {})[key] = tensor
    expected = [{"step": torch.Size(()), "exp_avg": p.shape, "exp_avg_sq": p.shape} for p in parameters]
    if state and [{k: v.shape for k, v in state.get(i, {}).items()} for i in range(len(parameters))] != expected:
        raise ValueError("not the state of an Adam over these parameters")
    if not all(v.isfinite().all() for v in tensors.values()):
        raise ValueError("values that are no numbers")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


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

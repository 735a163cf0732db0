"""A training's state on disk and back: safetensors and JSON in one folder a step, written aside and renamed.

checkpoints/step-000200/state.safetensors   every tensor, named "part.key"
checkpoints/step-000200/state.json          format version, step, the tensor file's SHA-256, anything else small
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sbrush.console import SbrushError, say

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
    """
    target = folder / f"step-{step:06d}"
    partial = folder / f"{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = {f"{part}.{k}": v.detach().cpu().contiguous().clone() for part, d in parts.items() for k, v in d.items()}
    save_file(tensors, partial / "state.safetensors")
    about = {"format": FORMAT, "step": step, "sha256": _digest(partial / "state.safetensors"), **extra}
    (partial / "state.json").write_text(json.dumps(about, indent=2), encoding="utf-8")
    for file in partial.iterdir():
        _flush_to_disk(file)
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    _flush_to_disk(folder)
    for old in _complete(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)


def newest(folder: Path) -> Checkpoint | None:
    """The newest state that is whole, or None if there is none; damaged ones are passed over, which is said.

    Raises SbrushError if a checkpoint was written in another format version.
    """
    for path in _complete(folder):
        try:
            extra = json.loads((path / "state.json").read_text(encoding="utf-8"))
            if extra["format"] != FORMAT:
                raise SbrushError(
                    f"checkpoint {path} has format {extra['format']}, this version reads {FORMAT}",
                    "finish the run with the version that began it, or start anew in another --out",
                )
            if extra.pop("sha256") != _digest(path / "state.safetensors"):
                raise ValueError("its checksum does not match")
            return Checkpoint(extra.pop("step"), load_file(path / "state.safetensors"), extra)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as problem:
            say(f"checkpoint {path} is damaged ({problem}); trying the one before")
    return None


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """An optimiser's state as flat tensors, "parameter index.key": what `load_optimizer` takes back."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{k}": torch.as_tensor(v) for i, entry in state.items() for k, v in entry.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Puts back what `optimizer_tensors` took; the parameter groups keep the optimiser's own settings."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        like = parameters[int(index)]
        if tensor.shape == like.shape:  # fused Adam walks memory: moments must be laid out as their parameter is
            tensor = torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _complete(folder: Path) -> list[Path]:
    """The finished checkpoint folders, newest first."""
    return sorted((p for p in folder.glob("step-*") if p.suffix != ".partial"), reverse=True) if folder.is_dir() else []


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Tensors in safetensors files; what goes wrong in writing is an OSError, as for any other file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sbrush.storage.files import os_error


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes tensors by name. `path` is one of atomic_write or atomic_folder, or a reader may see half a file."""
    try:
        save_file(dict(tensors), path, metadata=metadata)
    except SafetensorError as problem:
        raise os_error(problem) or OSError(str(problem)) from problem

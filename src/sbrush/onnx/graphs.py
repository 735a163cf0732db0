"""A network's ONNX graph and the weights that go into it.

Two kinds: `PART/model.onnx` of an exported folder, whose weights lie beside it, as ONNX has them; and the built-in
world's `graphs/PART.onnx`, an architecture without weights, which takes those of any safetensors file that has them.
Which configuration that is the architecture of, and which tensors it takes, stands in `graphs/graphs.json`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from safetensors import SafetensorError, safe_open

from sbrush.console import SbrushError, printable

WEIGHTS = Path(__file__).parent.parent / "stickers" / "weights"
GRAPHS, INDEX = WEIGHTS / "graphs", "graphs.json"
QUIET = 3  # onnxruntime's severity of errors: it warns of operators that it does not fold
NOT_SHAPE = ("dtype", "torch_dtype", "transformers_version")  # in a config.json, besides what begins with "_"


def configuration_digest(config: Mapping[str, Any]) -> str:
    """16 hex digits of what a network's config.json says of its architecture, whatever library wrote it."""
    own = {key: value for key, value in config.items() if not key.startswith("_") and key not in NOT_SHAPE}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:16]


def open_graph(file: Path, weights: Mapping[str, np.ndarray] | None = None) -> onnxruntime.InferenceSession:
    """A graph ready to run on the CPU; `weights`: by name, for a graph that has none of its own.

    SbrushError if the file is damaged, or the weights are not its.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = QUIET
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that wait by spinning take the cores from torch's, and from whoever else works here.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(value) for value in (weights or {}).values()]
    try:
        if weights:
            options.add_external_initializers(list(weights), values)
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as problem:  # onnxruntime's errors have no common class
        raise _unreadable(file, problem) from problem
    session.weights = values  # onnxruntime does not copy them
    return session


def read_weights(file: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """The named tensors of a safetensors file, as float32. SbrushError if one is not there."""
    try:
        with safe_open(file, "pt") as opened:  # numpy has no bfloat16
            return {name: opened.get_tensor(name).float().numpy() for name in names}
    except (OSError, ValueError, TypeError, SafetensorError) as problem:
        raise _unreadable(file, problem) from problem


def _unreadable(file: Path, problem: Exception) -> SbrushError:
    first_line = next(iter(str(problem).splitlines()), type(problem).__name__)
    return SbrushError(
        f"cannot read {printable(file)}: {printable(first_line[:200])}", "it may be damaged: export again"
    )

"""sbrush: one-step text-to-image students by Variational Score Distillation (SwiftBrush), from prompts alone.

    student = sbrush.load_student("runs/sd21")
    image = student("a cat", seed=1)

Importing sbrush imports nothing heavy: the names below are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sbrush import core as core
    from sbrush.console import SbrushError as SbrushError
    from sbrush.sampling.control_request import Control as Control
    from sbrush.sampling.negative_request import Negative as Negative
    from sbrush.sampling.student import Student as Student
    from sbrush.sampling.student import load_student as load_student

__version__ = "0.2.0"
__all__ = ["Control", "Negative", "SbrushError", "Student", "__version__", "core", "load_student"]

_HOMES = {
    "Control": "sbrush.sampling.control_request",
    "Negative": "sbrush.sampling.negative_request",
    "SbrushError": "sbrush.console",
    "Student": "sbrush.sampling.student",
    "load_student": "sbrush.sampling.student",
}


def __getattr__(name: str) -> Any:
    if name == "core":
        return import_module("sbrush.core")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'sbrush' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Files that are there whole or not at all: written aside, then renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; renamed to it at the end, removed if anything goes wrong before.

    So a reader sees the old file or the new one, never half of either. OSError as any writing may raise it.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def user_cache() -> Path | None:
    """The folder for what can be made again; None where there is none, as without a home. It need not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "sbrush"
    except RuntimeError:  # no home
        return None


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text, whole."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """Writes indented JSON, whole; NaN and infinities are refused (ValueError), for they are not JSON."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

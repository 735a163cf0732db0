"""Whether a folder can be a run's. Imports nothing heavy: the command line asks before it loads torch."""

from __future__ import annotations

from pathlib import Path

from sbrush.console import SbrushError, printable
from sbrush.storage.files import check_name

LOCK = ".lock"  # held while a run is at work in the folder


def check_folder(out: Path) -> None:
    """SbrushError if `out` is a file, cannot be read or loaded from, or holds something that is no run of sbrush.

    A folder with a lock and the beginning of a config.json alone, which a full disk leaves, is an empty one.
    """
    shown = printable(out)
    check_name(out)
    try:
        if not out.exists():
            return
        if not out.is_dir():
            raise SbrushError(f"{shown} is a file", "name a folder with --out", code=2)
        if not (out / "config.json").is_file() and not all(map(_left_behind, out.iterdir())):
            raise SbrushError(
                f"{shown} is not empty and holds no run of sbrush", "name a new folder with --out", code=2
            )
    except OSError as problem:
        raise SbrushError(f"cannot read {shown}: {problem.strerror}", "name another folder with --out") from None


def _left_behind(entry: Path) -> bool:
    """Whether a file is what a run leaves that could write nothing else."""
    return entry.name.startswith(LOCK) or (entry.name.startswith(".config.json.") and entry.suffix == ".partial")

"""What a prompt source is: a file, a named pipe, `<(...)`, or the standard input; each is read once, whole."""

from __future__ import annotations

import os
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from sbrush.console import SbrushError, info, printable

LONGEST = 100_000  # characters in one prompt; more is not a prompt file
LARGEST = 4 << 30  # bytes in a file, which is read into memory
STANDARD_INPUT = ("-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")
OPENED = ("/dev/fd/", "/proc/self/fd/")  # what a shell makes of <(...)


@dataclass(frozen=True)
class Source:
    """The bytes of a prompt source, and how it is called."""

    data: bytes
    name: str  # as it was given; "standard input" and "pipe" wherever a shell has put them
    stem: str  # for a folder of its own
    suffix: str = ""
    is_file: bool = False  # which a command can read again
    what: str = "prompt"  # or "caption": what its texts are called in messages

    @property
    def form(self) -> str:
        """How such a source should look, for a hint."""
        return form_of(self.what)


def form_of(what: str) -> str:
    """How a source of prompts or captions should look."""
    return f"a {what} file is UTF-8 text, one {what} a line, or a table (CSV, TSV or JSON)"


def read_source(path: Path, what: str = "prompt") -> Source:
    """The bytes of a file, a named pipe or the standard input ("-"). SbrushError if they cannot be read.

    `what`: "prompt" or "caption", for messages.
    """
    shown = printable(path)
    try:
        if str(path) in STANDARD_INPUT:
            return Source(_read_stream(path, "the standard input", what), "standard input", "prompts", what=what)
        if path.is_dir():
            raise SbrushError(f"{shown} is a folder, not a {what} file", form_of(what), code=2)
        if stat.S_ISREG(path.stat().st_mode) and not str(path).startswith(OPENED):
            if path.stat().st_size > LARGEST:
                raise _too_large(shown)
            return Source(path.read_bytes(), str(path), path.stem, path.suffix.lower(), is_file=True, what=what)
        data = _read_stream(path, shown, what)
        name = "pipe" if str(path).startswith(OPENED) else str(path)
        return Source(data, name, "prompts", path.suffix.lower(), what=what)
    except FileNotFoundError:
        raise SbrushError(f"no {what} file {shown}: it does not exist", form_of(what), code=2) from None
    except (OSError, ValueError) as problem:  # ValueError: a NUL in the path, or a stream that is closed
        why = getattr(problem, "strerror", None) or str(problem)
        raise SbrushError(f"cannot read {shown}: {why}", "check its name and its permissions", code=2) from None


def _read_stream(path: Path, shown: str, what: str) -> bytes:
    """All that comes from a pipe. It comes once: so not for one of several processes, and not twice."""
    if "WORLD_SIZE" in os.environ:  # else there are none beside this one; device imports torch, which takes seconds
        from sbrush.device import launched

        if (processes := launched()[1]) > 1:
            raise SbrushError(
                f"{shown} can be read by one process only, and this run has {processes}",
                f"write the {what}s to a file first",
                code=2,
            )
    if str(path) == "-":
        if sys.stdin is None or sys.stdin.closed:
            raise SbrushError("the standard input is closed", f"give a file, or redirect one: < {what}s.txt", code=2)
        data = _read_all(sys.stdin.buffer, "the standard input", what)
    else:
        with path.open("rb") as stream:
            data = _read_all(stream, shown, what)
    if not data:
        raise SbrushError(
            f"{shown} is empty", "a pipe can be read only once; what writes to it may have failed", code=2
        )
    return data


def _read_all(stream: BinaryIO, shown: str, what: str) -> bytes:
    if stream.isatty():
        info(f"reading {what}s from {shown}, a terminal: one a line, Ctrl-D ends")
    parts, size = list[bytes](), 0
    while part := stream.read(1 << 20):
        parts.append(part)
        size += len(part)
        if size > LARGEST:
            raise _too_large(shown)
        if not any(part):  # as /dev/zero, which never ends
            break
    return b"".join(parts)


def _too_large(shown: str) -> SbrushError:
    return SbrushError(
        f"{shown} is larger than {LARGEST >> 30} GiB", "split it: that is more than any run needs", code=2
    )

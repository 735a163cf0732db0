"""The program's only voice: data on stdout, talk on stderr, one way to report progress and one way to fail."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class SbrushError(Exception):
    """Something that the user can mend: shown as one `error:` line and one `hint:` line.

    `code` is the exit status: 2 for a request that makes no sense, 1 for one that could not be carried out.
    """

    def __init__(self, message: str, hint: str, *, code: int = 1) -> None:
        super().__init__(message)
        self.hint, self.code = hint, code


def printable(text: object) -> str:
    """The text on one line, without the control and direction characters that could act on a terminal."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in str(text))


def info(text: str = "") -> None:
    """A line of talk on stderr."""
    print(text, file=sys.stderr, flush=True)


def out(text: object) -> None:
    """A line of data on stdout."""
    print(text, flush=True)


def out_json(data: Any) -> None:
    """Data on stdout as indented JSON; NaN and infinities are refused, for they are not JSON."""
    out(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False))


def interactive() -> bool:
    """Whether stderr is a terminal that can redraw a line."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


class Progress:
    """How far a piece of work has come; made by `progress`."""

    def __init__(self, what: str, total: int, done: int, unit: str) -> None:
        self._what, self._total, self._unit = what, total, unit
        self.done, self._first, self._said = done, done, -1
        self._start = self._shown = time.monotonic()
        self._drawn = False

    def advance(self, by: int = 1, note: str = "") -> None:
        """`by` more of the work is done; `note` is shown behind the rate."""
        self.done += by
        now = time.monotonic()
        live = interactive()
        if now - self._shown >= (0.2 if live else 10.0):
            self._shown = now
            self._show(now, note, live)

    def finish(self) -> None:
        """Ends the line that was being redrawn, if any."""
        now = time.monotonic()
        if (self._drawn or now - self._start > 2) and self._said != self.done:
            self._show(now, "", interactive())
        if self._drawn:
            info()

    def _show(self, now: float, note: str, live: bool) -> None:
        spent, new = now - self._start, self.done - self._first
        rate = new / spent if spent > 0 else 0.0
        left = f"{_clock((self._total - self.done) / rate)} left" if rate > 0 and self.done < self._total else ""
        parts = [f"{self._what} {self.done}/{self._total}", f"{rate:.3g} {self._unit}/s", left or _clock(spent), note]
        line = " · ".join(p for p in parts if p)
        self._said = self.done
        if live:
            print(f"\r\x1b[2K{line}", end="", file=sys.stderr, flush=True)
            self._drawn = True
        else:
            info(line)


@contextmanager
def progress(what: str, total: int, *, done: int = 0, unit: str = "steps") -> Iterator[Progress]:
    """Progress with rate and time left: one line redrawn on a terminal, a plain line every ten seconds elsewhere."""
    bar = Progress(what, total, done, unit)
    try:
        yield bar
    finally:
        bar.finish()


def _clock(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"

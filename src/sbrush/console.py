"""What the program prints: data on stdout; messages, progress and errors on stderr. Imports nothing heavy."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

REDRAWN = 0.2  # seconds between two states of a progress line on a terminal
PRINTED = 10.0  # seconds between two plain lines of progress elsewhere


class SbrushError(Exception):
    """Something that the user can correct: shown as one `error:` line and one `hint:` line.

    `code` is the exit status: 2 for a request that makes no sense, 1 for one that could not be carried out.
    """

    def __init__(self, message: str, hint: str, *, code: int = 1) -> None:
        super().__init__(message)
        self.hint, self.code = hint, code


class Interrupted(Exception):
    """Work that the user stopped, and of which nothing is lost: the same command goes on.

    Shown as one plain line with that command; the exit status is 130.
    """


def prepare_streams() -> None:
    """Makes stdout and stderr write any text: what their encoding does not have is escaped, as in "\\u732b"."""
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")


def quiet_libraries() -> None:
    """Leaves the talking to this module: libraries that are imported later log errors alone, and phone nobody."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which peft imports if it is there; it logs kernels


def settle_streams() -> None:
    """Writes out what stdout and stderr still hold; where that fails, it is dropped, so that Python does not complain.

    To be called before the program ends.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            _drop(stream)


def printable(text: object) -> str:
    """The text on one line, without the control and direction characters that could act on a terminal.

    A byte of a file name or an argument that is no text, which Python keeps as a lone surrogate, is shown as "\\xe9".
    """
    return "".join(c if c.isprintable() else f"\\x{_code(c):02x}" for c in str(text))


def is_text(text: str) -> bool:
    """Whether a name or an argument is text; bytes of it that could not be decoded are lone surrogates."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def count(number: int, noun: str) -> str:
    """ "1 prompt", "2,751 prompts": a number with its noun, which takes an "s" in the plural."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def info(text: str = "") -> None:
    """Prints a message on stderr. If nobody can read it, as after a lost connection, the work goes on."""
    with _above_progress(sys.stderr), suppress(OSError, ValueError):
        if sys.stderr is not None:
            print(text, file=sys.stderr, flush=True)


def out(text: object) -> None:
    """Prints a line of data on stdout. A Path is printed as the bytes of its name, unless a terminal shows it.

    SbrushError if stdout cannot be written, as on a full disk.
    """
    if not isinstance(text, Path):
        _write(str(text))
    elif sys.stdout is not None and sys.stdout.isatty():
        _write(printable(text))
    else:
        out_bytes(os.fsencode(text) + os.linesep.encode())


def out_json(data: Any) -> None:
    """Prints data on stdout as indented JSON; NaN and infinities are refused (ValueError), for they are not JSON.

    It is ASCII alone if stdout's encoding does not have all of its characters.
    """
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except UnicodeEncodeError:
        text = json.dumps(data, indent=2, allow_nan=False)
    _write(text)


def out_bytes(data: bytes) -> None:
    """Writes bytes on stdout; SbrushError if they cannot be written."""
    with _above_progress(sys.stdout), _written():
        if sys.stdout is not None:
            sys.stdout.flush()
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()


def interactive() -> bool:
    """Whether stderr is a terminal that can redraw a line."""
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


class Progress:
    """How far a piece of work has come; made by `progress`."""

    on_terminal: Progress | None = None  # the one whose line a terminal shows now

    def __init__(self, what: str, total: int, done: int, unit: str) -> None:
        self._what, self._total, self._unit = what, total, unit
        self.done, self._first, self._shown_done = done, done, -1
        self._start = self._shown = time.monotonic()
        self._bar: Bar | None = None

    def advance(self, by: int = 1, note: str = "") -> None:
        """`by` more of the work is done; `note` is shown behind the rate."""
        self.done += by
        now = time.monotonic()
        live = interactive()
        if now - self._shown >= (REDRAWN if live else PRINTED):
            self._shown = now
            self._show(now, note, live)

    def finish(self) -> None:
        """Leaves the last state on the terminal."""
        now = time.monotonic()
        if (self._bar or now - self._start > 2) and self._shown_done != self.done:
            self._show(now, "", interactive())
        if self._bar:
            with suppress(OSError):
                self._bar.live.transient = False
                self._bar.stop()
            self._bar, Progress.on_terminal = None, None

    def hide(self) -> None:
        """Takes the line off the terminal, for something else to be printed there."""
        if self._bar:
            with suppress(OSError):
                self._bar.stop()

    def show_again(self) -> None:
        """Puts the line back."""
        if self._bar:
            with suppress(OSError):
                self._bar.start()

    def _show(self, now: float, note: str, live: bool) -> None:
        spent, new = now - self._start, self.done - self._first
        rate = new / spent if spent > 0 else 0.0
        left = f"{_clock((self._total - self.done) / rate)} left" if rate > 0 and self.done < self._total else ""
        facts = " · ".join(p for p in (f"{rate:.3g} {self._unit}/s", left or _clock(spent), note) if p)
        self._shown_done = self.done
        if not live:
            info(f"{self._what} {self.done}/{self._total} · {facts}")
            return
        with suppress(OSError):  # a terminal that has gone is no reason to stop
            if self._bar is None:
                self._bar = _bar(self._what, self._total)
                Progress.on_terminal = self
            self._bar.update(self._bar.task_ids[0], completed=self.done, facts=facts)
            self._bar.refresh()


@contextmanager
def progress(what: str, total: int, *, done: int = 0, unit: str = "steps") -> Iterator[Progress]:
    """Progress with rate and time left: one line redrawn on a terminal, a plain line every ten seconds elsewhere."""
    bar = Progress(what, total, done, unit)
    try:
        yield bar
    finally:
        bar.finish()


def _bar(what: str, total: int) -> Bar:
    """rich's progress line on stderr, redrawn when it is told to; imported here, for it takes a tenth of a second."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    bar = Bar(
        TextColumn("{task.description} {task.completed}/{task.total}", markup=False),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[facts]}", markup=False),
        console=Console(file=sys.stderr, force_terminal=True),
        auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False,
    )  # fmt: skip
    bar.add_task(what, total=total, facts="")
    bar.start()
    return bar


@contextmanager
def _above_progress(stream: TextIO | None) -> Iterator[None]:
    """While something is printed on a terminal, no line of progress is in its way."""
    shown = Progress.on_terminal if stream is not None and stream.isatty() else None
    if shown:
        shown.hide()
    yield
    if shown:
        shown.show_again()


def _write(text: str) -> None:
    with _above_progress(sys.stdout), _written():
        if sys.stdout is not None:
            print(text, flush=True)


@contextmanager
def _written() -> Iterator[None]:
    """Around writing on stdout: what goes wrong is a SbrushError, but for a reader that has gone (BrokenPipeError)."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as problem:
        _drop(sys.stdout)
        raise SbrushError(
            f"cannot write to stdout: {problem.strerror or problem}", "give it a pipe, or a file with room on its disk"
        ) from problem


def _drop(stream: TextIO) -> None:
    """Sends what a stream holds, and all that follows, nowhere."""
    with suppress(OSError, ValueError):
        number = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)
        stream.flush()


def _code(letter: str) -> int:
    return ord(letter) - 0xDC00 if "\udc80" <= letter <= "\udcff" else ord(letter)


def _clock(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"

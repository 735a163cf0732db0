"""What the program prints, and where: data on stdout whole or not at all, messages that never stop the work."""

import importlib
import io
import logging
import os
import re
import sys
from pathlib import Path

import pytest

from conftest import sbrush
from sbrush import console
from sbrush.console import SbrushError, progress

BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


class Terminal(io.StringIO):
    """What shows what is written to it."""

    encoding = "utf-8"

    def isatty(self):
        return True


class Full(io.StringIO):
    """Cannot be written: a full disk, a lost connection."""

    def write(self, text):
        raise OSError(28, "No space left on device")


def on_terminal(monkeypatch):
    """stdout and stderr are one terminal from now on; to be called by the test, after pytest has set its own."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(console, "REDRAWN", 0.0)
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(sys, "stdout", stream)
    return stream


def screen(text: str) -> list[str]:
    """The lines that a terminal shows in the end."""
    text = re.sub(r"\x1b\[\?25[lh]|\x1b\[[\d;]*m", "", text)  # the cursor, colours
    lines = [""]
    for piece in re.split(r"(\r|\n|\x1b\[2K|\x1b\[1A)", text):
        if piece == "\n":
            lines.append("")
        elif piece in ("\r", "\x1b[2K"):
            lines[-1] = ""
        elif piece == "\x1b[1A":
            lines = lines[:-1]
        elif piece:
            lines[-1] += piece
    return [line.strip() for line in lines if line.strip()]


def test_progress_on_a_terminal_is_one_line_below_what_is_printed(monkeypatch):
    terminal = on_terminal(monkeypatch)
    with progress("drawing", 3, unit="images") as bar:
        for i in range(3):
            bar.advance(note=f"gap {i}")
            console.out(Path(f"{i}.png"))
            console.info(f"message {i}")
    *above, last = screen(terminal.getvalue())
    assert above == [line for i in range(3) for line in (f"{i}.png", f"message {i}")]
    assert last.startswith("drawing 3/3") and "images/s" in last
    assert console.Progress.on_terminal is None


def test_progress_says_how_long_it_takes_and_is_cut_to_the_terminals_width(monkeypatch):
    terminal = on_terminal(monkeypatch)
    monkeypatch.setenv("COLUMNS", "60")
    with progress("drawing", 30, unit="images") as bar:
        bar.advance(10, note="x" * 200)
    shown = screen(terminal.getvalue())
    assert len(shown) == 1 and len(shown[0]) <= 60 and "images/s" in shown[0]
    assert "left" in terminal.getvalue()


def test_no_colour_where_none_is_wanted(monkeypatch):
    terminal = on_terminal(monkeypatch)
    monkeypatch.setenv("NO_COLOR", "1")
    with progress("drawing", 3) as bar:
        bar.advance()
    assert not re.search(r"\x1b\[[\d;]*3\d", terminal.getvalue())


@pytest.mark.parametrize("term", ["pipe", "dumb"])
def test_elsewhere_progress_is_plain_lines(monkeypatch, term):
    stream = io.StringIO() if term == "pipe" else Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm" if term == "pipe" else "dumb")
    monkeypatch.setattr(console, "PRINTED", 0.0)
    with progress("drawing", 30, done=10, unit="images") as bar:
        bar.advance(10, note="gap 1")
        bar.advance(10)
    first, second = stream.getvalue().splitlines()
    assert re.fullmatch(r"drawing 20/30 · [\d.e+]+ images/s · 0:00 left · gap 1", first)
    assert re.fullmatch(r"drawing 30/30 · [\d.e+]+ images/s · 0:00", second)


def test_rich_is_not_imported_before_a_bar_is_drawn():
    program = (
        "import sys; from sbrush.console import progress\n"
        "with progress('x', 2) as bar: bar.advance()\n"
        "print([m for m in sys.modules if m.startswith('rich')])"
    )
    import subprocess

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_messages_that_nobody_can_read_do_not_stop_the_work(monkeypatch):
    for stream in (Full(), None):
        monkeypatch.setattr(sys, "stderr", stream)
        console.info("hello")
        with progress("drawing", 1) as bar:
            bar.advance()

    class Gone(Full, Terminal):
        pass

    monkeypatch.setattr(sys, "stderr", Gone())
    monkeypatch.setattr(console, "REDRAWN", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    with progress("drawing", 1) as bar:
        bar.advance()


def test_data_that_cannot_be_written_is_an_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Full())
    for write in (lambda: console.out("x"), lambda: console.out_json([1])):
        with pytest.raises(SbrushError, match="cannot write to stdout: No space left on device"):
            write()
    monkeypatch.setattr(sys, "stdout", None)  # closed by whoever started the program
    console.out("x")
    console.out(Path("x"))
    console.out_json([])


def test_a_name_that_could_act_on_a_terminal_is_shown_and_its_bytes_are_piped(monkeypatch):
    terminal = on_terminal(monkeypatch)
    path = Path(os.fsdecode(b"\x1b[31m\xe9"))
    console.out(path)
    assert terminal.getvalue() == "\\x1b[31m\\xe9\n"
    pipe = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", pipe)
    console.out(path)
    assert pipe.buffer.getvalue() == b"\x1b[31m\xe9\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["sample"]])
def test_full_disks_behind_stdout_and_stderr(arguments):
    import subprocess

    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "sbrush", *arguments]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, env=BUFFERED)
        if arguments != ["sample"]:
            assert done.returncode == 1 and "No space left on device" in done.stderr
        assert len(done.stderr.splitlines()) == 2, done.stderr  # and not Python's own complaint at its end
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=full, text=True, timeout=60, env=BUFFERED)
        assert done.returncode == (2 if arguments == ["sample"] else 0)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_what_libraries_have_printed_does_not_fail_at_the_very_end():
    import subprocess

    program = "from sbrush import console; print('x'); console.settle_streams()"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, env=BUFFERED
        )
    assert (done.returncode, done.stderr) == (0, "")


def test_shell_completion():
    done = sbrush(COMP_WORDS="sbrush sample --prec", COMP_CWORD="2", _SBRUSH_COMPLETE="complete_bash")
    assert done.stdout.split() == ["--precision"], done.stderr


def test_without_a_command_there_is_help_and_no_empty_error():
    done = sbrush()
    assert done.returncode == 2 and "distill" in done.stdout and done.stderr == ""


@pytest.mark.parametrize("package", ["sbrush.benchmarks", "sbrush.training.world"])
def test_what_runs_as_a_module_of_its_own_is_as_quiet_as_the_command(package, monkeypatch):
    monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY", raising=False)
    logger = logging.getLogger("bitsandbytes")
    logger.setLevel(logging.NOTSET)
    importlib.import_module(package)
    assert logger.level == logging.ERROR and os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"

"""The program: its commands, exit codes and error lines.

Each command checks its cheap inputs, then hands over to the module of its own name. Nothing heavy is imported at module
level: `sbrush --help` answers in the time that typer takes.
"""

from __future__ import annotations

import errno
import os
import shlex
import signal
import sys
import traceback
from types import FrameType
from typing import Annotated

import typer

import sbrush
from sbrush import console
from sbrush.cli import distill, export, merge, personalize, sample, serve
from sbrush.cli import eval as evaluation
from sbrush.console import Interrupted, SbrushError, info, printable
from sbrush.storage.files import os_error

BUG = "this is a bug, or the machine ran out of something; SBRUSH_DEBUG=1 shows where"
HINTS = {  # what to do about an OSError
    errno.ENOSPC: "make room on that disk, then give the same command again",
    errno.EDQUOT: "your quota on that disk is used up: make room, then give the same command again",
    errno.EROFS: "that disk is mounted read-only: choose a folder on another one",
    errno.EACCES: "check the permissions of the file and its folder, or choose another place",
    errno.EPERM: "check the permissions of the file and its folder, or choose another place",
    errno.ENOENT: "check the name",
    errno.EIO: "the disk, or the connection to it, fails: check it, then give the same command again",
    errno.EMFILE: "too many files are open: raise the limit with `ulimit -n 4096`, then give the same command again",
    errno.ENFILE: "too many files are open on this machine: close other programs, then give the same command again",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EINVAL: "the file system may not be able to do this: choose a folder on another one",
    errno.ENOTSUP: "the file system is not able to do this: choose a folder on another one",
    errno.ENOMEM: "the machine is out of memory: close other programs, or use a smaller --batch",
}

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Distil text-to-image diffusion models into students that draw in one step or a few (SwiftBrush).",
    epilog="Exit codes: 0 done, 1 could not be done, 2 the command makes no sense as given, 130 interrupted.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("distill", epilog=distill.EXAMPLE)(distill.distill)
app.command("sample", epilog=sample.EXAMPLE)(sample.sample)
app.command("eval", epilog=evaluation.EXAMPLE)(evaluation.evaluate)
app.command("export", epilog=export.EXAMPLE)(export.export)
app.command("personalize", epilog=personalize.EXAMPLE)(personalize.personalize_)
app.command("merge", epilog=merge.EXAMPLE)(merge.merge)
app.command("serve", epilog=serve.EXAMPLE)(serve.serve)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        console.out(f"sbrush {sbrush.__version__}")
        raise typer.Exit()


def main() -> None:
    """The program: runs a command and turns what it raises into an exit code."""
    console.prepare_streams()
    console.quiet_libraries()
    _leave_on_signals()
    try:
        code = app(prog_name="sbrush", standalone_mode=False) or 0
        if code == 130:  # what typer makes of a KeyboardInterrupt
            code = _fail("interrupted", "give the same command again", 130)
    except (KeyboardInterrupt, typer.Abort):
        code = _fail("interrupted", "give the same command again", 130)
    except Interrupted as stopped:
        info(f"{printable(stopped)}; to go on: {_same_command()}")
        code = 130
    except SbrushError as problem:
        code = _fail(str(problem), problem.hint, problem.code)
    except BrokenPipeError:  # the reader of stdout has gone: nobody is left to be told
        code = 1
    except Exception as problem:
        code = _explain(problem)
    console.settle_streams()
    sys.exit(code)


def _explain(problem: Exception) -> int:
    """The lines for an exception that no command has turned into a SbrushError, and its exit code."""
    if hasattr(problem, "format_message"):  # what typer makes of a wrong command line
        if not problem.format_message():  # no command was given, and the help is printed
            return 2
        context = getattr(problem, "ctx", None)
        command = context.command_path if context else "sbrush"
        return _fail(problem.format_message(), f"{command} --help lists what there is", 2)
    if (cause := os_error(problem)) is not None:
        what = cause.strerror or next(iter(str(cause).splitlines()), type(cause).__name__)
        where = f"{os.fsdecode(cause.filename)}: " if isinstance(cause.filename, str | bytes | os.PathLike) else ""
        return _fail(f"{where}{what}", HINTS.get(cause.errno or 0, "SBRUSH_DEBUG=1 shows where this came from"), 1)
    first_line = next(iter(str(problem).splitlines()), "")
    return _fail(f"{type(problem).__name__}: {first_line}", BUG, 1)


def _fail(error: str, hint: str, code: int) -> int:
    if os.environ.get("SBRUSH_DEBUG") == "1":
        traceback.print_exc()
    info(f"error: {printable(error)}")
    info(f"hint: {printable(hint)}")
    return code


def _leave_on_signals() -> None:
    """Lets signals end the program as an exception does, so that no half-written file stays behind."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        # Not one of several processes: it may wait for the others, where it would not listen.
        if number and signal.getsignal(number) is signal.SIG_DFL and not _launched():
            signal.signal(number, leave)


def _same_command() -> str:
    return "give the same command again" if _launched() else printable(shlex.join(["sbrush", *sys.argv[1:]]))


def _launched() -> bool:
    """Whether torchrun or accelerate has started this process beside others."""
    return "RANK" in os.environ


if __name__ == "__main__":
    main()

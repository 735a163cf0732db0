"""The program: its commands, and what becomes of what they raise.

Each command checks its cheap inputs, then hands over to the module of its own name. Nothing heavy is imported at module
level: `sbrush --help` answers in the time that typer takes.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from typing import Annotated

import typer

import sbrush
from sbrush import console
from sbrush.cli.distill import distill
from sbrush.cli.eval import evaluate
from sbrush.cli.merge import merge
from sbrush.cli.sample import sample
from sbrush.console import SbrushError, info, printable

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="One-step text-to-image students by Variational Score Distillation (SwiftBrush).",
    epilog="Exit codes: 0 done, 1 could not be done, 2 asked for something impossible, 130 interrupted.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("distill")(distill)
app.command("sample")(sample)
app.command("eval")(evaluate)
app.command("merge")(merge)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        console.out(f"sbrush {sbrush.__version__}")
        raise typer.Exit()


def main() -> None:
    """The program: runs a command and turns what it raises into an exit code."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which peft imports if it is there; it talks of kernels
    try:
        code = app(standalone_mode=False) or 0
        if code == 130:  # what typer makes of a KeyboardInterrupt
            code = _fail("interrupted", "the same command goes on, or begins again", 130)
    except (KeyboardInterrupt, typer.Abort):
        code = _fail("interrupted", "the same command goes on, or begins again", 130)
    except SbrushError as problem:
        code = _fail(str(problem), problem.hint, problem.code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as problem:
        if hasattr(problem, "format_message"):  # what typer makes of a wrong command line
            context = getattr(problem, "ctx", None)
            command = context.command_path if context else "sbrush"
            code = _fail(problem.format_message(), f"{command} --help lists what there is", 2)
        else:
            said = f"{type(problem).__name__}: {problem}".splitlines()[0]
            code = _fail(said, "this is a bug or an exhausted machine; SBRUSH_DEBUG=1 shows where", 1)
    sys.exit(code)


def _fail(error: str, hint: str, code: int) -> int:
    if os.environ.get("SBRUSH_DEBUG") == "1":
        traceback.print_exc()
    info(f"error: {printable(error)}")
    info(f"hint: {printable(hint)}")
    return code


if __name__ == "__main__":
    main()

"""The flags that several commands have, and what they say when a file is missing."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sbrush.console import SbrushError

MACHINE, REPORT = "Machine", "Output"  # panels of --help


class Dtype(StrEnum):
    """Of the networks in sampling."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


DeviceFlag = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1 ...", rich_help_panel=MACHINE)]
DtypeFlag = Annotated[Dtype, typer.Option("--dtype", help="Of the networks; x0 is float32.", rich_help_panel=MACHINE)]
StudentFlag = Annotated[
    str | None, typer.Option("--student", help="Folder, a run's --out, or Hub id. Default: shipped.")
]
StartFlag = Annotated[
    int | None,
    typer.Option("--start-timestep", help="Where the student takes noise for x_t. Default: its schedule's end.", min=1),
]
TeacherFlag = Annotated[
    str | None, typer.Option("--teacher", help="Folder, Hub id or .safetensors. Default: built in.")
]
TeacherConfigFlag = Annotated[
    str | None,
    typer.Option("--teacher-config", help="For a .safetensors teacher: folder or Hub id with its configuration."),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.", rich_help_panel=REPORT)]


def no_prompts(path: Path) -> None:
    """Ends the command: `path` is not a prompt file."""
    what = "is a folder, not a prompt file" if path.is_dir() else "does not exist"
    hint = "a prompt file is UTF-8 text, one prompt a line; prompts/stickers.txt is one"
    raise SbrushError(f"{path} {what}", hint, code=2)

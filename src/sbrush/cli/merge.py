"""`sbrush merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sbrush import console
from sbrush.cli.flags import check_student
from sbrush.console import info, printable
from sbrush.storage.files import check_new

EXAMPLE = "Example: sbrush merge runs/seed-0 runs/seed-1 -o runs/merged"


def merge(
    one: Annotated[
        str,
        typer.Argument(
            help="First student: its folder, the --out of its run, a Hub id, or stickers, the built-in one.",
            metavar="FIRST",
            callback=check_student,
        ),
    ],
    two: Annotated[
        str,
        typer.Argument(
            help="Second student, with the same teacher and start timestep. Takes the same forms as the first.",
            metavar="SECOND",
            callback=check_student,
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the new student. It must not exist yet.")],
    share: Annotated[
        float, typer.Option(help="Weight of the first student in the mean; the rest is the second's.", min=0, max=1)
    ] = 0.5,
) -> None:
    """Merge two students of one teacher into a third.

    Each weight of the new student is the mean of the two students' weights
    (SwiftBrush v2). You can merge two runs with different seeds, for example,
    or a full student and a LoRA student. The two students are not changed.
    """
    check_new(out)
    info("loading torch and the students ...")
    from sbrush.models.merge import merge as merge_students

    merge_students(one, two, out, share=share)
    info(f'next: sbrush sample "a cat" --student {printable(out)}')
    console.out(out)

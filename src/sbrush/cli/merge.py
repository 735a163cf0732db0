"""`sbrush merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sbrush import console
from sbrush.cli.flags import check_student
from sbrush.console import info, printable
from sbrush.storage.files import check_new


def merge(
    one: Annotated[str, typer.Argument(help="A student: folder, a run's --out, or Hub id.", callback=check_student)],
    two: Annotated[str, typer.Argument(help="Another student of the same teacher.", callback=check_student)],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the new student.")],
    share: Annotated[float, typer.Option(help="Of the first.", min=0, max=1)] = 0.5,
) -> None:
    """Merge two students' weights into one student (SwiftBrush v2)."""
    check_new(out)
    info("loading torch and the students ...")
    from sbrush.models.merge import merge as merge_students

    merge_students(one, two, out, share=share)
    info(f'next: sbrush sample "a cat" --student {printable(out)}')
    console.out(out)

"""`sbrush sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sbrush import console
from sbrush.cli.flags import (
    MACHINE,
    DeviceFlag,
    Dtype,
    DtypeFlag,
    StartFlag,
    StudentFlag,
    TeacherConfigFlag,
    TeacherFlag,
    no_prompts,
)
from sbrush.cli.seeds import parse_seeds
from sbrush.console import SbrushError, info


def sample(
    prompts: Annotated[list[str] | None, typer.Argument(help="One or more prompts.", metavar="PROMPT...")] = None,
    out: Annotated[
        Path, typer.Option("-o", "--out", help="A .png (several images: a grid), or a folder (a file each).")
    ] = Path("out.png"),
    prompts_file: Annotated[Path | None, typer.Option("--prompts", help="File with one prompt a line.")] = None,
    seed: Annotated[str, typer.Option(help="7, 1-8 or 1,5,9-12: one image a prompt and seed.")] = "0",
    student: StudentFlag = None,
    start_timestep: StartFlag = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="The teacher's many steps beside the student's one.")
    ] = False,
    teacher: TeacherFlag = None,
    teacher_config: TeacherConfigFlag = None,
    steps: Annotated[int, typer.Option(help="The teacher's, with --compare.", min=1, max=1000)] = 25,
    guidance: Annotated[float | None, typer.Option(help="The teacher's, with --compare.", min=0)] = None,
    metadata: Annotated[bool, typer.Option(" /--no-metadata", help="Keep prompt and seed out of the PNG.")] = True,
    batch: Annotated[int, typer.Option(help="Images at once.", min=1, rich_help_panel=MACHINE)] = 32,
    device: DeviceFlag = "auto",
    dtype: DtypeFlag = Dtype.auto,
) -> None:
    """Draw images in one step."""
    if not prompts and prompts_file is None:
        raise SbrushError("no prompt", 'sbrush sample "a small red cat", or --prompts FILE', code=2)
    if prompts_file is not None and not prompts_file.is_file():
        no_prompts(prompts_file)
    if any(not prompt.strip() for prompt in prompts or ()):
        raise SbrushError("an empty prompt", 'sbrush sample "a small red cat"', code=2)
    seeds = parse_seeds(seed)
    from sbrush.device import pick_device, pick_dtype
    from sbrush.prompts import read_prompts
    from sbrush.sampling.generation import sample_to_files

    texts = [*(prompts or ()), *(read_prompts(prompts_file).texts if prompts_file else ())]
    where = pick_device(device)
    paths = sample_to_files(
        texts, seeds, out, student=student, teacher=teacher, compare=compare, steps=steps, guidance=guidance,
        metadata=metadata, batch=batch, device=where, dtype=pick_dtype(dtype.value, where),
        teacher_config=teacher_config, start_timestep=start_timestep,
    )  # fmt: skip
    for path in paths:
        console.out(path)
    if not compare:
        info("next: --seed 1-8 for more, --compare for the teacher's image beside it")

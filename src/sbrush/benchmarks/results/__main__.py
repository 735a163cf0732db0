"""All methods side by side on the built-in world, from nothing but the shipped teacher.  `make results`

Each row of rows.py is trained with several seeds: first within one budget of UNet forwards, then for the same minutes,
and measured as `sbrush eval` measures. Ctrl-C stops it, the same command goes on where it stopped, and what is complete
is not made again. It writes

    results.md            the tables, between two marker comments
    results.json          every figure of every student, and what made it
    results-images.png    the same prompts and seeds, a column for each method
    results-steps.png     FID against the steps in which an image is drawn

    python -m sbrush.benchmarks.results --list              rows, steps and the hours that they take here
    python -m sbrush.benchmarks.results --only few-step     part of it
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

import sbrush
from sbrush.benchmarks.results import plots, runs
from sbrush.benchmarks.results.making import Making, Request
from sbrush.benchmarks.results.rates import Rates
from sbrush.benchmarks.results.rows import BASE, ROWS, TEACHER, Row
from sbrush.benchmarks.results.summary import Result, page, put_into
from sbrush.console import SbrushError, count, info, out, printable
from sbrush.device import pick_device
from sbrush.models.load import load_student, load_teacher
from sbrush.sampling.generation import guidance_scale_of, student_images, teacher_images
from sbrush.storage.files import write_json

Only = Annotated[list[str] | None, typer.Option(metavar="LABEL", help="This row alone. May be repeated.")]


def main(
    prompts: Annotated[Path, typer.Option(help="Prompt file.")] = Path("prompts/stickers.txt"),
    work: Annotated[Path, typer.Option(help="The students' runs, and what was measured.")] = Path("runs/results"),
    to: Annotated[Path, typer.Option(help="Where results.md and the rest go.")] = Path("docs"),
    seeds: Annotated[int, typer.Option(help="Students of each row.", min=1)] = 3,
    budget: Annotated[
        float, typer.Option(help="UNet forwards of a batch of 32 for each student, a backward counted as two.", min=1)
    ] = 1800,
    minutes: Annotated[
        float | None, typer.Option(help=f"Of training in the second table; 0: none. Default: those of {BASE}.", min=0)
    ] = None,
    pairs: Annotated[int, typer.Option(help="Held-out pairs to measure on.", min=20)] = 2000,
    jobs: Annotated[int | None, typer.Option(help="Students at once. Default: one a core, one a GPU.", min=1)] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    only: Only = None,
    list_: Annotated[bool, typer.Option("--list", help="Show rows, steps and hours, and make nothing.")] = False,
) -> None:
    """Trains, measures and writes the table of all methods."""
    rows, device = _chosen(only), pick_device(device)
    cores = os.cpu_count() or 1
    at_once = jobs or (1 if device.startswith("cuda") else cores)
    request = Request(
        rows, seeds, budget, minutes, pairs, prompts, work, device, at_once, threads=max(1, cores // at_once)
    )
    info("timing this machine ...")
    making = Making(request, Rates.measure(device=device, threads=request.threads))
    if list_:
        _list(making)
        return
    teacher = next((row for row in rows if row.recipe == TEACHER), None)
    first = making.by_forwards()
    making.make(first, teacher=teacher)
    second = making.by_minutes(first)
    making.make(second)
    if minutes != 0 and not second and first:
        info(f"no table of equal minutes: make the row {BASE} too, or give --minutes")
    by_forwards, by_minutes = [*making.baselines(teacher), *making.results(first)], making.results(second)
    if not by_forwards:
        raise SbrushError("nothing is complete", "see the lines above")
    _write(request, to, by_forwards, by_minutes)
    if making.failed:
        raise SbrushError(f"without {', '.join(making.failed)}", "the same command tries these again")


def _chosen(only: Sequence[str] | None) -> list[Row]:
    by_label = {row.label: row for row in ROWS}
    for label in only or ():
        if label not in by_label:
            raise SbrushError(f"no row {printable(label)}", f"one of: {'; '.join(by_label)}", code=2)
    return [by_label[label] for label in only] if only else list(ROWS)


def _list(making: Making) -> None:
    """Every row with what it costs here, and the sum."""
    request, rates, total = making.request, making.rates, 0.0
    images = request.pairs + 10 * max(2, min(100, request.pairs // 20))
    twice = 1 if request.minutes == 0 else 2
    out(f"{'row':22}{'draws in':>16}{'forwards a step':>17}{'steps':>8}{'minutes':>9}   recipe")
    for row in request.rows:
        drawing, draws = rates.drawing(row, images), ", ".join(map(str, row.draws))
        if row.recipe == TEACHER:
            total += drawing
            out(f"{row.label:22}{draws:>16}{'-':>17}{'-':>8}{drawing / 60:>9.1f}")
            continue
        each = runs.forwards_a_step(row)
        seconds = rates.training(row, request.budget) + drawing
        repeated = 1 if row.label == BASE and request.minutes is None else twice  # its minutes are those of the others
        total += seconds * request.seeds * repeated
        steps = runs.steps_within(row, request.budget)
        settings = " ".join([row.recipe, *row.settings])
        out(f"{row.label:22}{draws:>16}{each:>17g}{steps:>8,}{seconds / 60:>9.1f}   {settings}")
    out(
        f"\nminutes: of one student, training and measuring, on {request.threads} of this machine's cores or its GPU, "
        f"where a UNet forward of 32 latents in training takes {1000 * rates.forward:.0f} ms"
    )
    out(
        f"all: {request.seeds} seeds, {'forwards alone' if twice == 1 else 'equal forwards and equal minutes'}, "
        f"{request.at_once} at once: about {total / request.at_once / 3600:.1f} hours"
    )


def _write(request: Request, to: Path, by_forwards: list[Result], by_minutes: list[Result]) -> None:
    """results.json, the two images, and the tables in results.md, in this order."""
    machine = torch.cuda.get_device_name(request.device) if request.device.startswith("cuda") else "CPU"
    about = {
        "measured": f"{date.today().isoformat()}, sbrush {sbrush.__version__}, torch {torch.__version__}",
        "machine": f"{machine}, {os.cpu_count()} CPU cores; {request.at_once} students at once",
        "command": f"`{shlex.join(['python', '-m', 'sbrush.benchmarks.results', *sys.argv[1:]])}`",
        "budget": f"{request.budget:g} UNet forwards of a batch of 32 a student, a backward counted as two",
        "measured on": f"{count(request.pairs, 'pair')}; {count(request.seeds, 'seed')}",
    }
    data = {
        "about": about,
        "rows": {row.label: {"recipe": row.recipe, "settings": row.settings} for row in request.rows},
        "equal_forwards": [dataclasses.asdict(result) for result in by_forwards],
        "equal_minutes": [dataclasses.asdict(result) for result in by_minutes],
    }
    to.mkdir(parents=True, exist_ok=True)
    write_json(to / "results.json", data)
    plots.side_by_side(_methods(by_forwards, request.device), to / "results-images.png")
    plots.fid_against_steps([r for r in by_forwards if r.label != "real images"], to / "results-steps.png")
    put_into(to / "results.md", page(by_forwards, by_minutes, about))
    info(f"look at {printable(to)}/results.md, results-images.png and results-steps.png")


def _methods(results: Sequence[Result], device: str) -> dict[str, plots.Draw]:
    """What each column of the images draws with: the first seed of each row, in each number of steps."""
    methods: dict[str, plots.Draw] = {}
    for result in results:
        for steps, _ in result.draws():
            label = f"{result.label}, {steps}"
            if result.label == "teacher":
                teacher = load_teacher(device=device)
                scale = guidance_scale_of(teacher, None)
                methods[label] = partial(teacher_images, teacher, steps=steps, guidance=scale)
            elif result.recipe != TEACHER:
                student = load_student(result.runs[0]["run"], device=device)
                methods[label] = partial(student_images, student, steps=steps)
    return methods


def _leave(number: int, frame: object) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _leave)  # as Ctrl-C does, so that the trainings are asked to stop
    try:
        typer.run(main)
    except SbrushError as problem:
        info(f"error: {printable(problem)}\nhint: {printable(problem.hint)}")
        sys.exit(problem.code)

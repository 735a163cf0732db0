"""The paper's ablations on the built-in world, by the public commands.  `make ablations`

Each trial is a run of `sbrush distill prompts/stickers.txt` with one thing changed; several run side by side, each on
one thread, and what is complete is not run again. Then every student is measured on the same held-out pairs, and three
images are drawn:

    lora-teacher.png        with the LoRA teacher, and without (Score Distillation Sampling)
    reparameterisation.png  x0 from the UNet's output by the student's equation, and the output as x0
    guidance.png            FID against CLIP score over guidance scales: a curve, for one point misleads
    figures.json            the numbers behind them
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from sbrush.benchmarks.results.plots import PROMPTS, drawn
from sbrush.benchmarks.results.runs import distil, workers
from sbrush.console import SbrushError, info, progress
from sbrush.evaluate.candidates import student_candidate, teacher_candidate
from sbrush.evaluate.coco.tradeoff import tradeoff
from sbrush.evaluate.stickers import evaluate_stickers
from sbrush.models.load import load_student, load_teacher
from sbrush.sampling.generation import student_images
from sbrush.sampling.images import image_grid, save_png
from sbrush.stickers.judge import Judge
from sbrush.storage.files import write_json

SCALES = (1.0, 1.5, 2.0, 3.0, 4.5)
BASE = "guidance 1.5"  # the recipe as it is
TRIALS = {
    "no LoRA teacher": ["--no-lora-teacher"],
    "no reparameterisation": ["--no-reparameterisation"],
    **{f"guidance {scale}": ["--guidance", str(scale)] for scale in SCALES},
}
SEEDS = range(3)


def main(
    prompts: Annotated[Path, typer.Option(help="Prompt file.")] = Path("prompts/stickers.txt"),
    work: Annotated[Path, typer.Option(help="The trials' runs.")] = Path("runs/ablations"),
    to: Annotated[Path, typer.Option(help="Where the images go.")] = Path("docs/ablations"),
    steps: Annotated[int, typer.Option(help="Of each trial.", min=1)] = 200,
    pairs: Annotated[int, typer.Option(help="Held-out pairs to measure on.", min=100)] = 300,
    jobs: Annotated[int, typer.Option(help="Trials at once.", min=1)] = os.cpu_count() or 1,
) -> None:
    """Runs, measures and draws the ablations."""
    runs = {name: work / name.replace(" ", "-") for name in TRIALS}

    def said_in(name: str) -> Path:
        return runs[name].with_name(f"{runs[name].name}.log")

    def train(name: str) -> None:
        distil([str(prompts), "--out", str(runs[name]), "--steps", str(steps), *TRIALS[name]], said_in(name))

    with progress("ablations", len(TRIALS), unit="runs") as bar, workers(jobs) as pool:
        for name, done in {name: pool.submit(train, name) for name in TRIALS}.items():
            try:
                done.result()
            except SbrushError as problem:
                raise SbrushError(f"the trial {name!r}: {problem}", problem.hint) from None
            bar.advance()
    students = {name: load_student(str(run)) for name, run in runs.items()}
    teacher, judge = load_teacher(), Judge.load()
    candidates = [student_candidate(name, student) for name, student in students.items()]
    for scale in SCALES:
        candidates.append(replace(teacher_candidate(teacher, 25, scale), name=f"teacher, guidance {scale}"))
    report = evaluate_stickers(candidates, judge, n=pairs, per_caption=20)
    figures = {row["name"]: row for row in report.json()["models"]}
    to.mkdir(parents=True, exist_ok=True)
    write_json(to / "figures.json", {"steps": steps, "trials": TRIALS, **report.json()})
    for trial, file in (("no LoRA teacher", "lora-teacher"), ("no reparameterisation", "reparameterisation")):
        _side_by_side({n: students[n] for n in (BASE, trial)}, figures, to / f"{file}.png")
    _curve(figures, to / "guidance.png")
    info(f"look at {to}/lora-teacher.png, reparameterisation.png and guidance.png")


def _side_by_side(students: dict[str, Any], figures: dict[str, Any], path: Path) -> None:
    """Students' images of the same prompts and seeds, one student under the other, with their figures."""
    rows, labels = [], []
    for name, student in students.items():
        rows += drawn(partial(student_images, student), SEEDS)
        labels += [name, f"FID {figures[name]['fid']:.0f}", f"diversity {figures[name]['diversity']['mean']:.2f}"]
    save_png(path, image_grid(rows, row_labels=labels, column_labels=PROMPTS))


def _curve(figures: dict[str, Any], path: Path) -> None:
    """FID against CLIP score over the guidance scales, of students and of the teacher."""
    lines = {
        "students, 1 step": [f"guidance {scale}" for scale in SCALES],
        "teacher, 25 steps": [f"teacher, guidance {scale}" for scale in SCALES],
    }
    points = {
        label: [
            (f"{scale:g}", figures[name]["clip_score"], figures[name]["fid"])
            for scale, name in zip(SCALES, names, strict=True)
        ]
        for label, names in lines.items()
    }
    save_png(path, tradeoff(points, "Guidance scale, on the built-in world"))


if __name__ == "__main__":
    typer.run(main)

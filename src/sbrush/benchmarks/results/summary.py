"""The figures of all rows as Markdown tables, each cell a mean and spread over seeds, and their place in a page."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from sbrush.storage.files import write_text

START, END = "<!-- make results: start -->", "<!-- make results: end -->"
ATTRIBUTES = ("kind", "colour", "background", "size")
Figures = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """A row under one budget."""

    label: str
    recipe: str
    settings: Sequence[str]
    steps: int  # of training; 0: none
    forwards: float  # of a batch of 32, in all
    runs: Sequence[dict[str, Any]]  # "seed", "seconds", "run", "draws": {number of steps: figures}
    series: str = ""  # results of one name are one line of the plot; "": a line of its own

    def draws(self) -> list[tuple[int, list[Figures]]]:
        """For each number of steps that all runs were measured in, the figures of each run."""
        numbers = [n for n in self.runs[0]["draws"] if all(n in run["draws"] for run in self.runs)] if self.runs else []
        return [(n, [run["draws"][n] for run in self.runs]) for n in numbers]


COLUMNS: dict[str, tuple[Callable[[Figures], float | None], int]] = {  # what a cell shows, and its digits
    "FID": (lambda f: f["fid"], 0),
    "interval": (lambda f: f["fid_interval"], 0),
    "precision": (lambda f: f["precision"], 3),
    "recall": (lambda f: f["recall"], 3),
    **{name: ((lambda f, name=name: f["accuracy"][name]), 3) for name in ATTRIBUTES},  # type: ignore[misc]
    "diversity": (lambda f: f["diversity"]["mean"], 2),
    "CLIP score": (lambda f: f["clip_score"], 3),
}


def table(results: Sequence[Result]) -> str:
    """A Markdown table, a line for each row and number of steps drawn in."""
    heads = ["", "steps", "seeds", *COLUMNS, "ms an image", "trained, s", "its steps"]
    lines = [heads, ["---"] * len(heads)]
    for result in results:
        for steps, figures in result.draws():
            cells = [cell([get(f) for f in figures], digits) for get, digits in COLUMNS.values()]
            cells[1] = "± " + cells[1].split(" ±")[0] if cells[1] != "-" else "-"
            drawn = f"{1000 * min(f['seconds_an_image'] for f in figures):.0f}"
            trained = [f"{min(run['seconds'] for run in result.runs):.0f}", f"{result.steps:,}"]
            lines.append(
                [
                    result.label,
                    str(steps) if steps else "-",
                    str(len(figures)) if result.steps else "-",
                    *cells,
                    drawn,
                    *(trained if result.steps else ["-", "-"]),
                ]
            )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def cell(values: Sequence[float | None], digits: int) -> str:
    """The mean, and behind it the standard deviation if there are several: ".986 ± .004"; "-" if one is missing."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return "-"
    shown = [fmean(known)] + ([stdev(known)] if len(known) > 1 else [])
    return " ± ".join(re.sub(r"^(-?)0\.", r"\1.", f"{value:.{digits}f}") for value in shown)


def page(by_forwards: Sequence[Result], by_minutes: Sequence[Result], about: dict[str, str]) -> str:
    """What stands between the markers: both tables, and what they are of."""
    told = "\n".join(f"- {name}: {text}" for name, text in about.items())
    parts = [
        "Each method at the same number of UNet forwards:\n\n" + table(by_forwards),
        "And for the same minutes:\n\n" + table(by_minutes) if by_minutes else "",
        "`±` is the standard deviation over seeds; `interval` the 95 % interval of one student's FID over its pairs "
        "(jackknife), a mean over seeds. `steps` are those in which an image is drawn. Times are those of the fastest "
        "seed, which other work on the machine has disturbed least.\n\n" + told + "\n",
        "![The same prompts and seeds, a column for each method](results-images.png)\n"
        "![FID against the steps in which an image is drawn](results-steps.png)\n",
    ]
    return "\n".join(part for part in parts if part)


def put_into(file: Path, text: str) -> None:
    """Writes text between the markers of a page, whole; at its end, with markers, if it has none."""
    before = file.read_text(encoding="utf-8") if file.is_file() else "# Results\n"
    block = f"{START}\n\n{text}\n{END}"
    if START in before and END in before.split(START, 1)[1]:
        head, rest = before.split(START, 1)
        now = head + block + rest.split(END, 1)[1]
    else:
        now = f"{before.rstrip()}\n\n## Methods side by side\n\n{block}\n"
    write_text(file, now)

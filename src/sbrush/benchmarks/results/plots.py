"""The table as images: what each method draws of the same prompts and seeds, and FID against steps."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean

import torch
from matplotlib import color_sequences
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
from torch import Tensor

from sbrush.benchmarks.results.summary import Result
from sbrush.sampling.images import image_grid, save_png
from sbrush.storage.files import atomic_write

PROMPTS = ("a cat", "a big blue car", "a star on a night background", "a small flower", "a dog", "a red mushroom")
SEEDS = range(2)
MARKERS = "os^vDP*"  # seven, which go round with twenty colours
APART = 1.04  # the factor between two marks of one step

Draw = Callable[[Sequence[str], Sequence[int]], Iterable[Tensor]]
"""(prompts, seeds) -> their images in order, in batches: uint8 [b, 3, 64, 64]."""


def drawn(draw: Draw, seeds: Sequence[int] = SEEDS) -> list[list[Tensor]]:
    """A model's images of PROMPTS: a row for each seed."""
    images = torch.cat(list(draw([text for _ in seeds for text in PROMPTS], [s for s in seeds for _ in PROMPTS])))
    return [list(row) for row in images.split(len(PROMPTS))]


def side_by_side(methods: dict[str, Draw], path: Path) -> None:
    """Writes a grid: a column for each method, a row for each prompt and seed."""
    columns = [[image for row in drawn(draw) for image in row] for draw in methods.values()]
    rows = [f"{text}, seed {seed}" for seed in SEEDS for text in PROMPTS]
    grid = image_grid([list(row) for row in zip(*columns, strict=True)], row_labels=rows, column_labels=[*methods])
    save_png(path, grid)


def fid_against_steps(results: Sequence[Result], path: Path) -> None:
    """Writes the plot: a line for each series, a mark for what draws in one number of steps alone."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    colours = color_sequences["tab20"]
    axes.set_prop_cycle(color=[*colours[::2], *colours[1::2]])  # the strong ones first
    lines = {name: points for name, points in _series(results).items() if points}
    single = [name for name, points in lines.items() if len(points) == 1]
    for number, (name, points) in enumerate(lines.items()):
        steps, means = [float(s) for s, _ in points], [fmean(fids) for _, fids in points]
        spread = [[m - min(f) for m, (_, f) in zip(means, points, strict=True)],
                  [max(f) - m for m, (_, f) in zip(means, points, strict=True)]]  # fmt: skip
        if name in single:  # those of one step would lie on one another
            steps = [steps[0] * APART ** (single.index(name) - (len(single) - 1) / 2)]
        axes.errorbar(
            steps, means, yerr=spread, marker=MARKERS[number % len(MARKERS)], markersize=5, capsize=2, linewidth=1,
            label=name,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ticks := sorted({steps for result in results for steps, _ in result.draws()}), map(str, ticks))
    axes.xaxis.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("steps in which an image is drawn")
    axes.set_ylabel("FID (less is better); bars: from the best to the worst seed")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, framealpha=0.7)
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        partial.write_bytes(image.getvalue())


def _series(results: Sequence[Result]) -> dict[str, list[tuple[int, list[float]]]]:
    """The points of each line, by its name: numbers of steps, and the seeds' FIDs."""
    lines: dict[str, list[tuple[int, list[float]]]] = {}
    for result in results:
        points = lines.setdefault(result.series or result.label, [])
        for steps, figures in result.draws():
            if fids := [f["fid"] for f in figures if f["fid"] is not None]:
                points.append((steps, fids))
        points.sort()
    return lines

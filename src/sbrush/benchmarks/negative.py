"""`python -m sbrush.benchmarks.negative`: what a negative prompt does to the built-in student, by method and scale.

It draws "a cat", "a dog" ... with the negative prompt "red", a kind after the other, and has the judge count:

    red      share of the images in which it sees a red thing; without the negative prompt they are some
    kind     share in which it sees the kind that the prompt names, which the negative prompt does not speak of
    FID      from real images of the same prompts of which none is red: what is asked for

Written into --to: figures.json, and scales.png with red and kind against the scale. Five minutes on one free core.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from sbrush.console import count, info, progress
from sbrush.metrics.fid import fid
from sbrush.models.load import load_student
from sbrush.models.model import Model
from sbrush.models.negative import NegativeMethod
from sbrush.models.negative_attention import negative_guidance
from sbrush.sampling.generation import student_images
from sbrush.sampling.guidance import with_negative
from sbrush.sampling.images import image_grid, save_png
from sbrush.sampling.negative_request import Negative
from sbrush.stickers.draw import draw
from sbrush.stickers.judge import Judge
from sbrush.stickers.world import ATTRIBUTES, KINDS, Caption, random_sticker, stream
from sbrush.storage.files import atomic_write, write_json

FIRST_SEED = 3_000_000
COLOUR = "red"
SCALES: dict[NegativeMethod, tuple[float, ...]] = {"nag": (0.5, 1.0, 4.0), "nasa": (0.1, 0.2, 0.4)}
SHOWN = 10  # seeds of "a cat" on the grid
Pair = tuple[Caption, int]


def main(
    to: Annotated[Path, typer.Option(help="Folder for figures and plot.")] = Path("docs/negative"),
    images: Annotated[int, typer.Option(help="Images at each scale, a multiple of 12.", min=12)] = 1008,
    cats: Annotated[int, typer.Option(help='Images of "a cat" without and with each method.', min=4)] = 1000,
    text: Annotated[str, typer.Option(help="The negative prompt.")] = COLOUR,
) -> None:
    """Draws, measures and plots."""
    student, judge = load_student(), Judge.load()
    to.mkdir(parents=True, exist_ok=True)
    asked = [Negative(text, method, scale) for method, scales in SCALES.items() for scale in scales]
    of_kinds = [(Caption(kind=KINDS[i % len(KINDS)]), FIRST_SEED + i) for i in range(images)]
    of_cats = [(Caption(kind="cat"), FIRST_SEED + i) for i in range(cats)]
    defaults = [Negative(text, method) for method in SCALES]
    figures: dict[str, Any] = {"negative": text, "images": images, "cats": cats}
    for name, pairs, negatives in (("a cat", of_cats, defaults), ("all kinds", of_kinds, asked)):
        real = judge.features(torch.stack(list(_without(COLOUR, pairs))))
        rows = figures[name] = list[dict[str, Any]]()
        with progress(name, 1 + len(negatives), unit="settings") as bar:
            for negative in (None, *negatives):
                rows.append(_measure(student, judge, pairs, real, negative))
                info(str(rows[-1]))
                write_json(to / "figures.json", figures)
                bar.advance()
    _plot(figures, to / "scales.png")
    _grid(student, defaults, to / "cats.png")
    info(f"look at {to}/scales.png and cats.png; {count(len(asked), 'setting')} in figures.json")


def _without(colour: str, pairs: Sequence[Pair]) -> Iterator[Tensor]:
    """A real image of each caption and seed, uint8 [3, 64, 64], none of that colour."""
    for caption, seed in pairs:
        rng = stream("negative", seed)
        while (sticker := random_sticker(rng, caption)).colour == colour:
            pass
        yield torch.from_numpy(np.array(draw(sticker))).permute(2, 0, 1)


def _measure(
    student: Model, judge: Judge, pairs: Sequence[Pair], real: Tensor, negative: Negative | None
) -> dict[str, Any]:
    """One setting's figures."""
    away = with_negative(student, negative)
    texts, seeds = [caption.text for caption, _ in pairs], [seed for _, seed in pairs]
    features = torch.cat([judge.features(batch) for batch in student_images(away, texts, seeds, batch=64)])
    seen = judge.classify(features)
    kinds = torch.tensor([KINDS.index(caption.kind or "") for caption, _ in pairs])
    shares = torch.bincount(seen["colour"], minlength=len(ATTRIBUTES["colour"])) / len(pairs)
    colours = {name: round(share, 4) for name, share in zip(ATTRIBUTES["colour"], shares.tolist(), strict=True)}
    return {
        "method": negative.method if negative else None,
        "scale": away.negative.guidance.scale if away.negative else 0.0,
        "red": colours[COLOUR],
        "kind": round((seen["kind"] == kinds).float().mean().item(), 4),
        "fid": round(fid(real, features), 1),
        "colours": colours,
    }


def _plot(figures: dict[str, Any], path: Path) -> None:
    """Red's share, kind accuracy and FID against the scale, a column for each method."""
    plain, *rows = figures["all kinds"]
    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    for column, (method, label) in enumerate((("nag", "NAG: scale (phi)"), ("nasa", "NASA: scale (a)"))):
        points = [plain, *(row for row in rows if row["method"] == method)]
        scales = [point["scale"] for point in points]
        above, below = axes[0, column], axes[1, column]
        above.plot(scales, [point["kind"] for point in points], marker="o", label="kind as the prompt says")
        above.plot(
            scales, [point["red"] / plain["red"] for point in points], marker="s", label="red, of its share at 0"
        )
        above.axhline(0.1, linestyle=":", color="gray", linewidth=1)
        below.plot(
            scales, [point["fid"] for point in points], marker="^", color="tab:green", label="FID (less is better)"
        )
        below.set_xlabel(label)
        for one in (above, below):
            one.grid(alpha=0.3)
    for row in axes:  # at the end, for the limits of a row are one
        row[0].set_ylim(bottom=0)
    axes[0, 0].legend(fontsize=8)
    axes[1, 0].legend(fontsize=8)
    figure.suptitle(
        f'"a cat", "a dog" ... with the negative prompt "{figures["negative"]}"', fontsize=10, parse_math=False
    )
    drawn = io.BytesIO()
    FigureCanvasAgg(figure).print_png(drawn)
    with atomic_write(path) as partial:
        partial.write_bytes(drawn.getvalue())


def _grid(student: Model, negatives: Sequence[Negative], path: Path) -> None:
    """A row without a negative prompt and a row for each of `negatives`, of the same seeds."""
    seeds = range(FIRST_SEED, FIRST_SEED + SHOWN)
    rows = [
        [image for batch in student_images(with_negative(student, one), ["a cat"] * SHOWN, seeds) for image in batch]
        for one in (None, *negatives)
    ]
    labels = ['"a cat"']
    for one in negatives:
        scale = negative_guidance(student.unet, one.method).scale
        labels.append(f'without "{one.text}", {one.method} {scale:g}')
    save_png(path, image_grid(rows, row_labels=labels))


if __name__ == "__main__":
    typer.run(main)

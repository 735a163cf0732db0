"""How well the one-step student takes on the built-in LoRA's style, beside its teacher.  `make style`

    python -m sbrush.benchmarks.style --images 100 --seeds 3 --grid docs/blueprint.png

Both draw the same captions and seeds with the LoRA "blueprint" at several weights. Measured are

    colours   share of the pixels whose colour is one of the style's, among all colours of the world
    FID       of the judge's features against stickers drawn in the style, of the same captions
    kind      share of the images in which the judge sees the kind that the caption names

and the same of other stickers drawn in the style: the best possible, which the judge, trained on plain ones, sees too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, NamedTuple

import torch
import typer
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from sbrush.console import count, out, progress
from sbrush.metrics.accuracy import attribute_accuracy
from sbrush.metrics.fid import fid, fid_error
from sbrush.models.load import load_student, load_teacher
from sbrush.models.lora_request import LoraRequest
from sbrush.sampling.generation import guidance_scale_of, student_images, teacher_images
from sbrush.sampling.images import image_grid, save_png
from sbrush.stickers.draw import INK
from sbrush.stickers.judge import Judge
from sbrush.stickers.style import PALETTE, draw_blueprint
from sbrush.stickers.world import BACKGROUNDS, COLOURS, Caption, random_caption, random_sticker, stream

LORA = "blueprint"
FIRST_SEED = 3_000_000
SHOWN = ("a cat", "a small red cat on a mint background", "a big yellow car", "a fish", "a house on a cream background")

Draw = Callable[[Sequence[str], Sequence[int]], Iterator[Tensor]]


class Row(NamedTuple):
    """One model's measures, each for every seed, and the judge's features of its images, [images, width]."""

    name: str
    colours: list[float]
    kind: list[float]
    features: list[Tensor]


def main(
    images: Annotated[int, typer.Option(help="Captions, each drawn once for every seed.", min=4)] = 100,
    seeds: Annotated[int, typer.Option(help="Seeds: so many times all captions.", min=2)] = 3,
    weights: Annotated[str, typer.Option(help="Weights of the LoRA.")] = "0,0.5,1",
    teacher_steps: Annotated[int, typer.Option(help="DDIM steps of the teacher.", min=1, max=1000)] = 25,
    grid: Annotated[Path | None, typer.Option(help="PNG file for a sample grid.")] = None,
) -> None:
    """Prints the table, and writes the grid."""
    models = {
        name: draw for weight in map(float, weights.split(",")) for name, draw in _models(weight, teacher_steps).items()
    }
    models = dict(sorted(models.items(), key=lambda item: item[0].startswith("teacher")))
    judge, captions = Judge.load(), [random_caption(stream("style", i)) for i in range(images)]
    rows = [Row(name, [], [], []) for name in (*models, "stickers drawn in the style")]
    real = list[Tensor]()
    with progress("measuring the style", len(rows) * seeds, unit="measurements") as bar:
        for seed in range(seeds):
            real.append(judge.features(_real(captions, f"style-reference-{seed}")))
            numbers = [FIRST_SEED + seed * images + i for i in range(images)]
            for row in rows:
                if row.name in models:
                    drawn = torch.cat(list(models[row.name]([c.text for c in captions], numbers)))
                else:
                    drawn = _real(captions, f"style-other-{seed}")
                features = judge.features(drawn)
                row.colours.append(style_colours(drawn))
                row.features.append(features)
                row.kind.append(attribute_accuracy(captions, judge.classify(features))["kind"])
                bar.advance()
    out(table(rows, torch.cat(real)))
    if grid:
        save_png(grid, _grid(models))


def style_colours(images: Tensor) -> float:
    """The share of pixels that are nearer to a colour of the style than to any other: uint8 [B, 3, H, W] to 0 to 1."""
    others = [c for c in (*BACKGROUNDS.values(), *COLOURS.values(), INK) if c not in PALETTE]
    every = torch.tensor([*PALETTE, *others]).float()
    nearest = torch.cat([torch.cdist(x.permute(1, 2, 0).reshape(-1, 3).float(), every).argmin(dim=1) for x in images])
    return (nearest < len(PALETTE)).float().mean().item()


def table(rows: Sequence[Row], real: Tensor) -> str:
    """In Markdown: means over the seeds with standard deviations; FID of all images, with its standard error."""
    lines = ["| model | colours of the style | FID to the style | kind seen by the judge |", "|---|---|---|---|"]
    for row in rows:
        colours, kind = (f"{100 * mean(x):.1f} ± {100 * stdev(x):.1f} %" for x in (row.colours, row.kind))
        drawn = torch.cat(row.features)
        lines.append(f"| {row.name} | {colours} | {fid(real, drawn):.0f} ± {fid_error(real, drawn):.0f} | {kind} |")
    return "\n".join(lines)


def _models(weight: float, steps: int) -> dict[str, Draw]:
    """The student and the teacher with the LoRA at a weight; 0 is without it."""
    loras = [LoraRequest(LORA, weight)] if weight else []
    label = f"LoRA at {weight:g}" if weight else "without LoRA"
    student, teacher = load_student(loras=loras), load_teacher(loras=loras)
    return {
        f"student, 1 step, {label}": partial(student_images, student, batch=50),
        f"teacher, {count(steps, 'step')}, {label}": partial(
            teacher_images, teacher, steps=steps, guidance=guidance_scale_of(teacher, None), batch=50
        ),
    }


def _real(captions: Sequence[Caption], name: str) -> Tensor:
    """Stickers of the captions drawn in the style: uint8 [N, 3, 64, 64]."""
    drawn = [draw_blueprint(random_sticker(stream(name, i), caption)) for i, caption in enumerate(captions)]
    return torch.stack([pil_to_tensor(image) for image in drawn])


def _grid(models: dict[str, Draw]) -> Image.Image:
    rows = [list(torch.cat(list(draw(SHOWN, range(len(SHOWN)))))) for draw in models.values()]
    return image_grid(rows, row_labels=list(models), column_labels=SHOWN)


if __name__ == "__main__":
    typer.run(main)

"""How well teacher and students follow outlines on the built-in world.  `python -m sbrush.benchmarks.control`

Outlines of stickers that no training has seen, each with a caption that is true of its sticker. What is drawn is asked
for its own outline: chamfer distance in pixels of 64, intersection over union of the two shapes, and the judge's
attribute accuracy. Prints a Markdown table:

    stickers, decoded      what an autoencoder leaves of the stickers themselves: nothing can follow better
    teacher                with its ControlNet, in many steps
    student                without a ControlNet, and with the teacher's at several scales
    each of --student      such as one of `sbrush distill --control outline`, at the same scales
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor

from sbrush import console
from sbrush.console import info
from sbrush.metrics.accuracy import attribute_accuracy
from sbrush.metrics.outlines import chamfer_distance, intersection_over_union
from sbrush.models.control import ControlNet
from sbrush.models.load import load_student, load_teacher
from sbrush.models.load_control import load_control
from sbrush.sampling.control import as_control
from sbrush.sampling.generation import guidance_scale_of, student_images, teacher_images
from sbrush.sampling.preprocess import outline, silhouette
from sbrush.stickers.draw import draw
from sbrush.stickers.judge import Judge
from sbrush.stickers.world import ATTRIBUTES, Caption, random_caption, random_sticker, stream

SCALES = "0.5,0.75,1,1.5"
SEEDS = 700_000  # that of the first image
BATCH = 50


@dataclass(frozen=True)
class Outlines:
    """Stickers that no training has seen: what is asked for, and how what is drawn is measured."""

    captions: list[Caption]
    stickers: Tensor  # uint8 [n, 3, 64, 64]

    @classmethod
    def draw(cls, n: int) -> Outlines:
        """The first `n` of them; held-out combinations of kind and colour are among them."""
        drawn = [random_sticker(stream("control", i), held_out=True) for i in range(n)]
        pixels = [torch.from_numpy(np.array(draw(sticker))).permute(2, 0, 1) for sticker in drawn]
        captions = [random_caption(stream("control-caption", i), sticker) for i, sticker in enumerate(drawn)]
        return cls(captions, torch.stack(pixels))

    @cached_property
    def judge(self) -> Judge:
        return Judge.load()

    @property
    def texts(self) -> list[str]:
        return [caption.text for caption in self.captions]

    @property
    def seeds(self) -> list[int]:
        return list(range(SEEDS, SEEDS + len(self.captions)))

    @property
    def control(self) -> Tensor:
        """What a ControlNet is shown, float32 [n, 1, 3, 64, 64]."""
        return as_control(outline(self.stickers))[:, None]

    def measure(self, images: Tensor) -> dict[str, float]:
        """The figures of what was drawn for each, uint8 [n, 3, 64, 64]."""
        asked, found = ((silhouette(some)[:, 0], outline(some)[:, 0] > 0) for some in (self.stickers, images))
        judged = self.judge.classify(self.judge.features(images))
        return {
            "chamfer": chamfer_distance(asked[1], found[1]).mean().item(),
            "IoU": intersection_over_union(asked[0], found[0]).mean().item(),
            **attribute_accuracy(self.captions, judged),
        }


def main(
    outlines: Annotated[int, typer.Option(help="Outlines to measure on.", min=1)] = 500,
    control: Annotated[str, typer.Option(help="The teacher's ControlNet, as --control of sbrush sample.")] = "outline",
    student: Annotated[list[str] | None, typer.Option(help="A further student; may be repeated.")] = None,
    scales: Annotated[str, typer.Option(help="Scales at which students are steered.")] = SCALES,
    teacher_steps: Annotated[int, typer.Option(help="Steps of the teacher; 0 leaves it out.", min=0)] = 25,
    shipped: Annotated[bool, typer.Option(help="Whether the built-in student is measured.")] = True,
) -> None:
    """Measures each and prints a table."""
    asked = Outlines.draw(outlines)
    console.out(f"| | scale | chamfer, px | IoU | {' | '.join(ATTRIBUTES)} |")
    console.out("|---|---|---|---|" + "---|" * len(ATTRIBUTES))
    teacher = load_teacher()
    network = load_control(control, teacher)
    _row("stickers, decoded", "-", asked, iter([teacher.decode(teacher.encode_images(asked.stickers))]))
    if teacher_steps:
        steered = replace(teacher, controls=(ControlNet(network),))
        scale = guidance_scale_of(teacher, None)
        drawn = teacher_images(
            steered, asked.texts, asked.seeds, steps=teacher_steps, guidance=scale, control=asked.control, batch=BATCH
        )
        _row(f"teacher, {teacher_steps} steps", "1", asked, drawn)
    for source in [*[None] * shipped, *(student or ())]:
        name, model = source or "student, built in", load_student(source)
        if source is None:
            _row(name, "none", asked, student_images(model, asked.texts, asked.seeds, batch=BATCH))
        for scale in map(float, scales.split(",")):
            steered = replace(model, controls=(ControlNet(network, scale),))
            drawn = student_images(steered, asked.texts, asked.seeds, control=asked.control, batch=BATCH)
            _row(name, f"{scale:g}", asked, drawn)


def _row(name: str, scale: str, asked: Outlines, drawn: Iterator[Tensor]) -> None:
    """Draws, measures, and prints a line of the table."""
    info(f"drawing: {name}, scale {scale}")
    figures = asked.measure(torch.cat(list(drawn)))
    cells = [f"{figures['chamfer']:.2f}", *(f"{figures[key]:.3f}" for key in ("IoU", *ATTRIBUTES))]
    console.out(f"| {name} | {scale} | {' | '.join(cells)} |")


if __name__ == "__main__":
    typer.run(main)

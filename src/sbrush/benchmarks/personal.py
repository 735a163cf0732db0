"""How well a student that was personalised on six photos of a robot draws robots, and everything else as before.

    python -m sbrush.stickers.robot runs/photos
    sbrush personalize runs/photos --token zx --class sticker --distill --out runs/robot
    python -m sbrush.benchmarks.personal runs/robot

Measured are

    robot    share of the images, of each background and size, in which the judge of kind_judge.py sees a robot
    asked    share in which it is a robot, and the world's judge sees the background and the size that the prompt asks
    others   share of the attributes of the world's own captions that are right, as `sbrush eval` counts them
    place    spread of where the robots are, as a share of the teacher's

The judge of kinds learns what robots are, and what is no robot, before anything is measured, and is itself measured on
drawings and negatives that it has not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Annotated

import torch
import typer
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from sbrush.benchmarks.kind_judge import KNOWN, KindJudge, exam, train
from sbrush.console import out, progress
from sbrush.evaluate.stickers import pairs
from sbrush.metrics.accuracy import Accuracy, accuracy
from sbrush.metrics.diversity import centroids, spread
from sbrush.models.load import load_student, load_teacher
from sbrush.models.parts import read_json
from sbrush.sampling.generation import guidance_scale_of, student_images, teacher_images
from sbrush.stickers.judge import Judge
from sbrush.stickers.robot import KIND, draw_robot, random_robot
from sbrush.stickers.world import ATTRIBUTES, BACKGROUNDS, SIZES, Caption

FIRST_SEED, FIRST_PLACE_SEED = 4_000_000, 5_000_000
STEPS = 25  # of the teacher

Draw = Callable[[Sequence[str], Sequence[int]], Iterator[Tensor]]
"""(prompts, seeds) -> images in order, in batches: uint8 [b, 3, 64, 64]."""


@dataclass(frozen=True)
class Judges:
    """The world's own, and the one that knows robots."""

    world: Judge
    kinds: KindJudge


@dataclass(frozen=True)
class Row:
    """One model's measures, each a share of 1, but `spread` in pixels."""

    name: str
    robot: float
    background: float
    size: float
    asked: float
    least: float  # of the background and size that does worst, as `asked`
    others: float | None
    spread: float


def main(
    run: Annotated[Path, typer.Argument(help="The --out folder of sbrush personalize.")],
    each: Annotated[int, typer.Option(help="Images of each background and size.", min=1)] = 8,
    others: Annotated[int, typer.Option(help="Captions of the world's own kinds.", min=4)] = 200,
    places: Annotated[int, typer.Option(help="Images for the spread of place.", min=2)] = 60,
) -> None:
    """Prints the table."""
    token = read_json(run / "config.json")["personal"]["token"]
    before, teacher = load_student(), load_teacher(str(run / "teacher"))
    judges = Judges(Judge.load(), train(before))
    out("| judge of kinds, on unseen images | share |\n|---|---|")
    for name, share in exam(judges.kinds, before).items():
        out(f"| {name} | {100 * share:.1f} % |")
    out("")
    models: dict[str, Draw] = {"robots drawn by the world": _real(token)}
    models["personalised teacher, 25 steps"] = partial(
        teacher_images, teacher, steps=STEPS, guidance=guidance_scale_of(teacher, None)
    )
    for name, folder in {"student with the LoRA": "lora-student", "student": "student"}.items():
        models[name] = partial(student_images, load_student(str(run / folder)))
    models["built-in student, as before"] = partial(student_images, before)
    rows = []
    with progress("measuring", len(models), unit="models") as bar:
        for name, model in models.items():
            rows.append(measure(name, model, judges, token, (each, 0 if "drawn" in name else others, places)))
            bar.advance()
    out(table(rows))


def measure(name: str, model: Draw, judges: Judges, token: str, counts: tuple[int, int, int]) -> Row:
    """One model. `counts`: images of each background and size, captions of other kinds, images for place."""
    each, others, places = counts
    asked = [(b, s) for b in BACKGROUNDS for s in SIZES for _ in range(each)]
    texts = [f"a {size} {token} on a {background} background" for background, size in asked]
    images = torch.cat(list(model(texts, range(FIRST_SEED, FIRST_SEED + len(texts)))))
    seen = judges.world.classify(judges.world.features(images))
    robot = judges.kinds.kinds(images) == KNOWN.index(KIND)
    background = seen["background"] == torch.tensor([ATTRIBUTES["background"].index(b) for b, _ in asked])
    size = seen["size"] == torch.tensor([ATTRIBUTES["size"].index(s) for _, s in asked])
    every = robot & background & size
    placed = torch.cat(list(model([f"a {token}"] * places, range(FIRST_PLACE_SEED, FIRST_PLACE_SEED + places))))
    share = None
    if others:
        chosen = pairs(others)
        drawn = torch.cat(list(model([c.text for c, _ in chosen], [s for _, s in chosen])))
        share = right_of(accuracy([c for c, _ in chosen], judges.world.classify(judges.world.features(drawn))))
    least = min(mean(part.float().tolist()) for part in every.split(each))
    return Row(
        name, _share(robot), _share(background), _share(size), _share(every), least, share, spread(centroids(placed))
    )


def table(rows: Sequence[Row]) -> str:
    """In Markdown; place as a share of the teacher's, which is the second row."""
    lines = [
        "| model | robot | background | size | all three | worst of the 12 | other captions | place / teacher's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        shares = (row.robot, row.background, row.size, row.asked, row.least)
        cells = [f"{100 * share:.1f} %" for share in shares]
        cells.append("–" if row.others is None else f"{100 * row.others:.1f} %")
        lines.append(f"| {row.name} | {' | '.join(cells)} | {row.spread / rows[1].spread:.2f} |")
    return "\n".join(lines)


def right_of(found: Accuracy) -> float:
    """The share of all attributes that captions name which is right."""
    shares = [(found.share[name] or 0.0, named) for name, named in found.named.items()]
    return sum(share * named for share, named in shares) / max(1, sum(named for _, named in shares))


def _share(right: Tensor) -> float:
    return right.float().mean().item()


def _real(token: str) -> Draw:
    """The world's own drawings of robots, of the size and background that a prompt names."""

    def draw_real(prompts: Sequence[str], seeds: Sequence[int]) -> Iterator[Tensor]:
        for prompt, seed in zip(prompts, seeds, strict=True):
            words = prompt.removeprefix("a ").replace(token, "").split()
            caption = Caption(
                background=next((b for b in BACKGROUNDS if b in words), None),
                size=next((s for s in SIZES if s in words), None),
            )
            yield pil_to_tensor(draw_robot(random_robot("real robots", seed, caption)))[None]

    return draw_real


if __name__ == "__main__":
    typer.run(main)

"""How well a student that was personalised on six photos of a robot draws robots, and everything else as before.

    python -m sbrush.stickers.robot runs/photos
    sbrush personalize runs/photos --token zx --class sticker --distill --out runs/robot
    python -m sbrush.benchmarks.personal runs/robot

Measured are

    robot    share of the images, of each background and size, in which a judge of 13 kinds sees a robot
    asked    share in which it is a robot, and the world's judge sees the background and the size that the prompt asks
    others   share of the attributes of the world's own captions that are right, as `sbrush eval` counts them
    place    spread of where the robots are, as a share of the teacher's

The judge of 13 kinds is a linear one on the features of the world's judge, which has never seen a robot. It learns from
drawings, half of them through the autoencoder, and is measured on others.
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
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

from sbrush.console import out, progress
from sbrush.evaluate.stickers import pairs
from sbrush.metrics.accuracy import Accuracy, accuracy
from sbrush.metrics.diversity import centroids, spread
from sbrush.models.load import load_student, load_teacher
from sbrush.models.model import Model
from sbrush.models.parts import read_json
from sbrush.sampling.generation import guidance_scale_of, student_images, teacher_images
from sbrush.stickers.draw import draw
from sbrush.stickers.judge import Judge
from sbrush.stickers.robot import KIND, draw_robot, random_robot
from sbrush.stickers.world import ATTRIBUTES, BACKGROUNDS, KINDS, SIZES, Caption, random_sticker, stream

FIRST_SEED, FIRST_PLACE_SEED = 4_000_000, 5_000_000
STEPS = 25  # of the teacher
KNOWN = (*KINDS, KIND)

Draw = Callable[[Sequence[str], Sequence[int]], Iterator[Tensor]]
"""(prompts, seeds) -> images in order, in batches: uint8 [b, 3, 64, 64]."""


@dataclass(frozen=True)
class KindJudge:
    """Which of KNOWN an image shows: a linear layer on the world's judge's features."""

    judge: Judge
    layer: nn.Linear

    @classmethod
    def train(cls, judge: Judge, vae: Model, *, each: int = 150, steps: int = 300) -> KindJudge:
        """From `each` drawings of each kind. `vae`: a model whose autoencoder half of them go through."""
        images, kinds = drawings("kind judge", each)
        half = torch.arange(len(images)) % 2 == 0
        images[half] = vae.decode(vae.encode_images(images[half]))
        features = judge.features(images).clone()  # no tensor of inference mode can be trained on
        torch.manual_seed(1)
        layer = nn.Linear(judge.width, len(KNOWN))
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.03, weight_decay=0.01)
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(layer(features), kinds).backward()
            optimizer.step()
        return cls(judge, layer.requires_grad_(False))

    @torch.no_grad()
    def kinds(self, features: Tensor) -> Tensor:
        """Indices into KNOWN, int64 [B], of features [B, width]."""
        return self.layer(features).argmax(dim=1)


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
    judge, teacher = Judge.load(), load_teacher(str(run / "teacher"))
    known = KindJudge.train(judge, teacher)
    images, kinds = drawings("kind judge, unseen", 50)
    right = known.kinds(judge.features(images)) == kinds
    robots = right[kinds == KNOWN.index(KIND)]
    shares = " % of unseen drawings, ".join(f"{100 * some.float().mean():.1f}" for some in (right, robots))
    out(f"the judge of {len(KNOWN)} kinds is right on {shares} % of robots\n")
    models: dict[str, Draw] = {"robots drawn by the world": _real(token)}
    models["personalised teacher, 25 steps"] = partial(
        teacher_images, teacher, steps=STEPS, guidance=guidance_scale_of(teacher, None)
    )
    for name, folder in {"student with the LoRA": "lora-student", "student": "student"}.items():
        models[name] = partial(student_images, load_student(str(run / folder)))
    models["built-in student, as before"] = partial(student_images, load_student())
    rows = []
    with progress("measuring", len(models), unit="models") as bar:
        for name, model in models.items():
            rows.append(measure(name, model, known, token, (each, 0 if "drawn" in name else others, places)))
            bar.advance()
    out(table(rows))


def measure(name: str, model: Draw, known: KindJudge, token: str, counts: tuple[int, int, int]) -> Row:
    """One model. `counts`: images of each background and size, captions of other kinds, images for place."""
    each, others, places = counts
    asked = [(b, s) for b in BACKGROUNDS for s in SIZES for _ in range(each)]
    texts = [f"a {size} {token} on a {background} background" for background, size in asked]
    features = known.judge.features(torch.cat(list(model(texts, range(FIRST_SEED, FIRST_SEED + len(texts))))))
    seen, robot = known.judge.classify(features), known.kinds(features) == KNOWN.index(KIND)
    background = seen["background"] == torch.tensor([ATTRIBUTES["background"].index(b) for b, _ in asked])
    size = seen["size"] == torch.tensor([ATTRIBUTES["size"].index(s) for _, s in asked])
    every = robot & background & size
    placed = torch.cat(list(model([f"a {token}"] * places, range(FIRST_PLACE_SEED, FIRST_PLACE_SEED + places))))
    share = None
    if others:
        chosen = pairs(others)
        drawn = torch.cat(list(model([c.text for c, _ in chosen], [s for _, s in chosen])))
        share = right_of(accuracy([c for c, _ in chosen], known.judge.classify(known.judge.features(drawn))))
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


def drawings(name: str, each: int) -> tuple[Tensor, Tensor]:
    """Drawings of each of KNOWN in all colours, uint8 [N, 3, 64, 64], and which it is, int64 [N]."""
    images, kinds = [], []
    for number, kind in enumerate(KNOWN):
        for i in range(each):
            index = number * each + i
            if kind == KIND:
                drawn = draw_robot(random_robot(name, index, any_colour=True))
            else:
                drawn = draw(random_sticker(stream(name, index), Caption(kind=kind), held_out=True))
            images.append(pil_to_tensor(drawn))
            kinds.append(number)
    return torch.stack(images), torch.tensor(kinds)


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

"""Recipes of several trainings whose students become one: SwiftBrush v2 (arXiv 2408.14176), and its like here.

    OUT/config.json    which recipe of MERGED
    OUT/full/          the run of its first part, a folder as any run's (run.py)
    OUT/lora/          the run of its second part
    OUT/student/       the weighted mean of both parts' students

The training loop knows nothing of this: a part is a run by a recipe of its own, and can be given on its own as well.

name            its parts                                              what it gave
swiftbrush-v2   a full and a LoRA student, with the clamped CLIP loss  that paper, image-free: COCO-30K FID 11.69
stickers-v2     the same on the built-in world                         see docs/results.md
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sbrush
from sbrush.console import SbrushError, info, printable
from sbrush.training.recipes import RECIPES, Recipe
from sbrush.training.request import RunRequest

if TYPE_CHECKING:
    from sbrush.training.plan import Plan


@dataclass(frozen=True)
class MergedRecipe:
    """Two trainings, and how their students are merged."""

    name: str
    parts: Mapping[str, Recipe]  # the folder of each part's run within the whole's -> how its student is trained
    share: float = 0.5  # of the first part's student in each weight

    def with_parts(self, change: Callable[[Recipe], Recipe]) -> MergedRecipe:
        """This recipe with each part changed; a rank is the LoRA student's alone. SbrushError if that loses its own."""

        def changed(part: Recipe) -> Recipe:
            now = change(part)
            if part.student_rank and not now.student_rank:
                raise SbrushError(
                    f"recipe {self.name} merges a full and a LoRA student, whose rank cannot be 0",
                    "--student-lora RANK sets its rank; leave out --set student_rank=0",
                    code=2,
                )
            return now if part.student_rank else replace(now, student_rank=0)

        return replace(self, parts={folder: changed(part) for folder, part in self.parts.items()})

    def request(self, whole: RunRequest, folder: str) -> RunRequest:
        """What the run of one part is asked for."""
        return replace(whole, recipe=self.parts[folder], out=whole.out / folder)


def _full_and_lora(name: str, of: str, rank: int, **settings: Any) -> MergedRecipe:
    """A full student and a LoRA student of one recipe, with these settings in place of its own."""
    full = replace(RECIPES[of], **settings)
    return MergedRecipe(name, {"full": full, "lora": replace(full, student_rank=rank)})


MERGED = {
    recipe.name: recipe
    for recipe in (
        _full_and_lora("swiftbrush-v2", "swiftbrush", 256, clip_weight=0.1),
        # The built-in judge gives real images .28: what is nearer to its caption than they are is near enough.
        _full_and_lora("stickers-v2", "stickers", 64, clip_weight=1.0, clip_tau=0.28),
    )
}


def check_options(*, extend: int, init: str | None, control: bool = False) -> None:
    """SbrushError for what a recipe of several trainings cannot do. Imports nothing heavy."""
    if extend:
        raise SbrushError(
            "a recipe of several trainings cannot be extended",
            "start another run with more --steps in a new --out",
            code=2,
        )
    if control:
        raise SbrushError(
            "a ControlNet is for a student that draws already, and a recipe of several trainings starts without one",
            "leave out --control; then prepare the merged student: --recipe swiftbrush --init OUT --control MODEL",
            code=2,
        )
    if init:
        raise SbrushError(
            "a LoRA student starts as its teacher, so students of another start cannot be merged with it",
            "leave out --init, or train with a recipe of one training",
            code=2,
        )


def distill_merged(request: RunRequest, recipe: MergedRecipe, train: Callable[[RunRequest], Plan]) -> None:
    """Trains the parts one after another and merges their students into `student/`; what is complete stays as it is.

    `train` trains one part to its end, from where it stopped. SbrushError as a run raises it, before anything is
    trained if a part does not go with this teacher.
    """
    from sbrush.device import launched
    from sbrush.models.load import load_shapes
    from sbrush.training.plan import check
    from sbrush.training.run import claim
    from sbrush.training.sharding import asked_for

    process, world = launched()
    execution = replace(request.execution, shard=asked_for() and world > 1)
    shapes = load_shapes(request.teacher, config=request.teacher_config)
    for part in recipe.parts.values():
        check(part, shapes, execution, world=world, init=None)
    config = {
        "format": 1, "version": sbrush.__version__, "recipe": recipe.name, "parts": [*recipe.parts],
        "share": recipe.share,
    }  # fmt: skip
    with claim(request.out, config) if process == 0 else nullcontext():
        for number, folder in enumerate(recipe.parts, start=1):
            if process == 0:
                info(f"training {number} of {len(recipe.parts)}: {printable(request.out / folder)}")
            train(recipe.request(request, folder)).accelerator.wait_for_everyone()
            gc.collect()  # a part's networks go before the next one's come
        if process == 0:
            _merge(request.out, recipe)


def _merge(out: Path, recipe: MergedRecipe) -> None:
    """Writes `student/`, unless it is there and made of the parts' students as they are now."""
    from sbrush.models.merge import is_merged_from, merge

    one, two = (out / folder / "student" for folder in recipe.parts)
    if is_merged_from(out / "student", one, two, recipe.share):
        info("this run is complete and has its student")
        return
    info("merging the students ...")
    merge(str(one), str(two), out / "student", share=recipe.share, replace=True)

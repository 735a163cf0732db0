"""What the table compares, a line each: the teacher, SwiftBrush, its ablations and successors, and its rivals.

Every student of VSD is of the `stickers` recipe with the settings named here, so that two rows differ in their method
alone. Its rivals have their own recipes, and learn from the teacher's images.
`SWIFTBRUSH` is the paper's loss at the built-in world's size: its weight, guidance on both scores, null prompts. The
learning rates, the start and the timesteps stay those of the recipe.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from sbrush.training.merged import MERGED
from sbrush.training.recipes import RECIPES, Recipe

TEACHER = ""  # in place of a recipe: nothing is trained


@dataclass(frozen=True)
class Row:
    """A method: how its student is trained, and in how many steps it draws."""

    label: str  # at most 20 letters, for the images' columns
    recipe: str  # of RECIPES or MERGED, or TEACHER
    settings: tuple[str, ...] = ()  # of the recipe, as --set takes them
    draws: tuple[int, ...] = (1,)  # steps in which one and the same student draws
    series: str = ""  # rows of one name are one line of the plot; "": a line of its own

    @property
    def name(self) -> str:
        """The label as a folder's name."""
        return re.sub("[^a-z0-9]+", "-", self.label.lower()).strip("-")

    def parts(self, steps: int | None = None) -> dict[str, Recipe]:
        """The recipe of each training by the folder of its run, "" if there is one; of so many steps, if given."""

        def changed(recipe: Recipe) -> Recipe:
            recipe = recipe.but_for(self.settings)
            return recipe if steps is None else recipe.with_settings(steps=steps)

        if self.recipe in MERGED:
            return dict(MERGED[self.recipe].with_parts(changed).parts)
        return {"": changed(RECIPES[self.recipe])}


SWIFTBRUSH = ("gap=vsd", "guide_lora=true", "shared_forward=false", "null_chance=0.1")
IMAGES = ("images=500",)  # that the teacher makes for its rivals to learn from; their forwards are part of the budget
CLIP = ("clip_weight=1.0", "clip_tau=0.28")
BASE = "SwiftBrush"  # the row whose minutes all others get
ROWS = (
    Row("teacher", TEACHER, draws=(25, 8, 4, 2, 1)),
    Row(BASE, "stickers", SWIFTBRUSH),
    Row("no LoRA teacher", "stickers", ("gap=sds", "shared_forward=false")),
    Row("not reparameterised", "stickers", (*SWIFTBRUSH, "reparameterised=false")),
    Row("random guidance", "stickers", (*SWIFTBRUSH, "guidance=0.5", "guidance_to=2.5")),
    Row("DMD gap", "stickers"),
    Row("clamped CLIP loss", "stickers", (*SWIFTBRUSH, *CLIP)),
    Row("v2: CLIP, merged", "stickers-v2", SWIFTBRUSH),
    Row("few-step", "stickers", (*SWIFTBRUSH, "student_steps=4"), draws=(1, 2, 4)),
    Row("LCM", "stickers-lcm", IMAGES, draws=(1, 2, 4)),
    *(
        Row(f"guided, halved to {steps}", "stickers-guided", (*IMAGES, f"student_steps={steps}"), (steps,), "guided")
        for steps in (1, 2, 4)
    ),
)

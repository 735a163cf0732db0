"""`sbrush distill --dry-run` and `--recipes`: what a run would need, and what it would be set to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from sbrush import console
from sbrush.console import info, printable
from sbrush.training.merged import MergedRecipe
from sbrush.training.recipes import RECIPES, Recipe
from sbrush.training.request import ImagesRequest, RunRequest

if TYPE_CHECKING:
    from sbrush.models.model import Model
    from sbrush.training.cost import Cost


def _shapes(request: RunRequest) -> Model:
    """The run's teacher without weights."""
    from sbrush.models.load import load_shapes

    return load_shapes(request.teacher, config=request.teacher_config)


def cost_of(request: RunRequest, teacher: Model) -> Cost:
    """What the run needs, derived without weights; SbrushError if its parts do not go together."""
    from sbrush.device import launched, trains_in_bf16
    from sbrush.training.cost import Monitoring, Prepared, estimate
    from sbrush.training.methods import METHODS, Machine
    from sbrush.training.plan import check, check_control, check_method
    from sbrush.training.validation import Validation

    _, world = launched()
    check_method(request)
    check_control(request)
    check(request.recipe, teacher, request.execution, world=world, init=request.init)
    images = 0
    if METHODS[request.recipe.method].from_images:
        images = (0 if request.images.folder else request.recipe.images) or len(request.prompts)
    judge = Validation.parameters(teacher, request.validation.clip) if request.every.validate else 0
    return estimate(
        request.teacher, request.recipe, request.execution,
        Machine(request.device, trains_in_bf16(request.precision, request.device), world),
        config=request.teacher_config, alignment=request.alignment,
        prepared=Prepared(
            len(request.prompts) if request.text_cache else 0, images,
            generated=images > 0 and request.images in (ImagesRequest(), ImagesRequest(cache=request.images.cache)),
            control=request.control.model if request.control else None,
        ),
        monitoring=Monitoring(request.every.grid > 0, judge),
    )  # fmt: skip


def compare_with_free_memory(request: RunRequest) -> None:
    """Warns if the run expects more memory than the GPU has free."""
    import torch

    from sbrush.training.cost import GIB, smaller

    expected, (free, _) = cost_of(request, _shapes(request)).peak / GIB, torch.cuda.mem_get_info(request.device)
    if expected > free / GIB:
        info(
            f"note: this run expects {expected:.1f} GiB and the GPU has {free / GIB:.1f} GiB free; "
            f"{smaller(request.recipe, request.execution)}"
        )


def dry_run(request: RunRequest, merged: MergedRecipe | None = None) -> None:
    """Prints what the run would need, or each training of a merged recipe; the first process speaks for all."""
    from sbrush.device import launched, pick_device, trains_in_bf16
    from sbrush.sampling.notes import note_unknown_words
    from sbrush.training.cost import together
    from sbrush.training.methods import METHODS
    from sbrush.training.sharding import asked_for

    process, world = launched()
    if process:
        return
    request = dataclasses.replace(
        request, device=pick_device(request.device, present=False),
        execution=dataclasses.replace(request.execution, shard=asked_for() and world > 1),
    )  # fmt: skip
    teacher = _shapes(request)
    runs = {folder: merged.request(request, folder) for folder in merged.parts} if merged else {"": request}
    costs = {folder: cost_of(run, teacher) for folder, run in runs.items()}
    note_unknown_words(teacher, request.prompts.texts)
    number_format = "bfloat16" if trains_in_bf16(request.precision, request.device) else "float32"
    facts = {
        "teacher": request.teacher or "stickers (built in)",
        "prompts": request.prompts.describe(),
        "truncated prompts": teacher.truncated_prompts(request.prompts.texts),
        "recipe": f"{merged.name if merged else _told(request.recipe)}; --recipes prints all settings",
        "seed": request.seed,
        "device": f"{request.device}, {number_format}",
        "processes": f"{world}; memory is each one's",
        "run folder": request.out,
    }
    if METHODS[request.recipe.method].from_images:
        facts["images"] = _source(request.images)
    if request.control:
        facts["ControlNet"] = f"{request.control.model}, control images by {request.control.prep}"
    if request.validation.prompts:
        facts["validation prompts"] = request.validation.prompts.describe()
    for name, value in facts.items():
        console.out(f"{name}: {printable(value)}")
    for number, (folder, run) in enumerate(runs.items(), start=1):
        if merged:
            console.out(f"\ntraining {number} of {len(runs)}, {folder}: {printable(_told(run.recipe))}")
        for line in costs[folder].lines(run.recipe, request.device, keep=request.every.keep):
            console.out(line)
    if merged:
        for line in together([(run.recipe, costs[folder]) for folder, run in runs.items()], request.device):
            console.out(line)


def _source(images: ImagesRequest) -> str:
    """Where the images come from that a run learns from."""
    if images.folder:
        return f"those of {images.folder}, with their captions as prompts"
    return "stickers that are drawn to the prompts" if images.drawn else "the teacher's own, of the prompts"


def _told(recipe: Recipe) -> str:
    """A recipe, and how it differs from its row of the table: "swiftbrush, with steps 500 (244000)"."""
    row = RECIPES[recipe.name]
    changed = [
        f"{f.name} {getattr(recipe, f.name)} ({getattr(row, f.name)})"
        for f in dataclasses.fields(Recipe)
        if getattr(recipe, f.name) != getattr(row, f.name)
    ]
    return recipe.name + (", with " + ", ".join(changed) if changed else "")


def print_recipes(parts: Mapping[str, Recipe]) -> None:
    """The recipes side by side, and this run's beside them: one, named "", or those of each of its trainings.

    Those of VSD come first, those of the other methods in a table of their own: a terminal is not wide enough for all.
    """
    from rich.console import Console
    from rich.table import Table

    for of_vsd in (True, False):
        shown = {name: recipe for name, recipe in RECIPES.items() if (recipe.method == "vsd") is of_vsd}
        for folder, recipe in parts.items():
            if (recipe.method == "vsd") is of_vsd:
                shown[f"this run {folder}".rstrip()] = recipe
        table = Table("setting", *shown, title=None, box=None)
        for field in dataclasses.fields(Recipe):
            table.add_row(field.name, *(str(getattr(recipe, field.name)) for recipe in shown.values()))
        Console(markup=False, highlight=False).print(table)

"""`sbrush distill`."""

from __future__ import annotations

import dataclasses
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from sbrush import console
from sbrush.cli.flags import MACHINE, REPORT, DeviceFlag, TeacherConfigFlag, TeacherFlag, no_prompts
from sbrush.console import SbrushError, info, printable
from sbrush.training.recipes import RECIPES, Recipe

MEMORY, ABLATIONS, OVERRIDES = "Less memory", "The paper's ablations", "Instead of the recipe's"
CLIP = "Clamped CLIP loss"
RecipeName = StrEnum("RecipeName", {name: name for name in RECIPES})  # type: ignore[misc]


class Tracker(StrEnum):
    """Of those that accelerate knows."""

    tensorboard = "tensorboard"
    wandb = "wandb"
    trackio = "trackio"


class Precision(StrEnum):
    """Of matrix products in training."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


def distill(
    prompts: Annotated[Path, typer.Argument(help="UTF-8 text, one prompt a line.")],
    teacher: TeacherFlag = None,
    teacher_config: TeacherConfigFlag = None,
    init: Annotated[str | None, typer.Option(help="Start from this student instead of the teacher's weights.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder. Default: runs/PROMPTS. The same command resumes.")
    ] = None,
    recipe: Annotated[
        RecipeName | None,
        typer.Option(help="Row of hyper-parameters. Default: stickers for the built-in teacher, else swiftbrush."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the run.", min=0)] = 0,
    extend: Annotated[int, typer.Option(help="Steps to add to the complete run in --out; 0: none.", min=0)] = 0,
    steps: Annotated[int | None, typer.Option(help="Student updates.", min=1, rich_help_panel=OVERRIDES)] = None,
    batch: Annotated[int | None, typer.Option(help="Samples an update.", min=1, rich_help_panel=OVERRIDES)] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.", min=0, rich_help_panel=OVERRIDES)] = None,
    student_lr: Annotated[float | None, typer.Option(help="Learning rate.", min=0, rich_help_panel=OVERRIDES)] = None,
    lora_lr: Annotated[float | None, typer.Option(help="Learning rate.", min=0, rich_help_panel=OVERRIDES)] = None,
    lora_updates: Annotated[
        int | None, typer.Option(help="LoRA-teacher updates a student update.", min=1, rich_help_panel=OVERRIDES)
    ] = None,
    student_lora: Annotated[
        int | None,
        typer.Option(help="Rank of a LoRA that is the student, for small cards.", min=1, rich_help_panel=OVERRIDES),
    ] = None,
    t_init: Annotated[
        int | None, typer.Option(help="The student's timestep, below T.", min=1, rich_help_panel=OVERRIDES)
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any setting: --set lora_rank=128 --set t_init=null.", rich_help_panel=OVERRIDES),
    ] = None,
    lora_teacher: Annotated[
        bool, typer.Option(" /--no-lora-teacher", help="Score Distillation Sampling.", rich_help_panel=ABLATIONS)
    ] = True,
    reparameterisation: Annotated[
        bool, typer.Option(" /--no-reparameterisation", help="The UNet's output is x0.", rich_help_panel=ABLATIONS)
    ] = True,
    clip_loss: Annotated[
        float | None,
        typer.Option(
            help="Weight of the clamped CLIP loss at the start (SwiftBrush v2: 0.1).", min=0, rich_help_panel=CLIP
        ),
    ] = None,
    clip_weights: Annotated[
        Path | None, typer.Option(help="Of --clip-model, or an open_clip folder.", rich_help_panel=CLIP)
    ] = None,
    clip_model: Annotated[str, typer.Option(help="open_clip's name of it.", rich_help_panel=CLIP)] = "ViT-B-32",
    tiny_vae: Annotated[
        Path | None, typer.Option(help="AutoencoderTiny folder, in place of the teacher's VAE.", rich_help_panel=CLIP)
    ] = None,
    log_every: Annotated[int, typer.Option(help="Steps.", min=1, rich_help_panel=REPORT)] = 10,
    grid_every: Annotated[
        int, typer.Option(help="Steps between sample grids; 0: none.", min=0, rich_help_panel=REPORT)
    ] = 200,
    checkpoint_every: Annotated[
        int | None,
        typer.Option(help="Steps. Default: 200, or more if saving takes long.", min=1, rich_help_panel=REPORT),
    ] = None,
    validate_every: Annotated[
        int, typer.Option(help="Steps between CLIP scores of the student; 0: none.", min=0, rich_help_panel=REPORT)
    ] = 0,
    validation_prompts: Annotated[
        Path | None, typer.Option(help="64 of these. Default: of the run's.", rich_help_panel=REPORT)
    ] = None,
    validation_clip: Annotated[
        Path | None,
        typer.Option(help="ViT-g-14's weights or an open_clip folder; else the judge.", rich_help_panel=REPORT),
    ] = None,
    tracker: Annotated[
        list[Tracker] | None, typer.Option(help="Log there too; may be repeated.", rich_help_panel=REPORT)
    ] = None,
    keep: Annotated[int, typer.Option(help="Newest checkpoints that stay.", min=1, rich_help_panel=REPORT)] = 2,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print the recipes, and what this run would take (--device cuda: card or no card); train nothing.",
        ),
    ] = False,
    device: DeviceFlag = "auto",
    precision: Annotated[Precision, typer.Option(help="Of matrix products.", rich_help_panel=MACHINE)] = Precision.auto,
    compile_: Annotated[
        bool,
        typer.Option("--compile", help="torch.compile: minutes at the start, faster after.", rich_help_panel=MACHINE),
    ] = False,
    micro_batches: Annotated[
        int, typer.Option(help="Parts that a process takes its batch in.", min=1, rich_help_panel=MEMORY)
    ] = 1,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Compute activations twice, keep few.", rich_help_panel=MEMORY)
    ] = False,
    ema_on_cpu: Annotated[bool, typer.Option("--ema-on-cpu", help="Off: --set ema=0.", rich_help_panel=MEMORY)] = False,
    text_cache: Annotated[
        Path | None,
        typer.Option(help="Folder for text embeddings; the text encoder then leaves the card.", rich_help_panel=MEMORY),
    ] = None,
    adam_8bit: Annotated[bool, typer.Option("--adam-8bit", help="Needs bitsandbytes.", rich_help_panel=MEMORY)] = False,
) -> None:
    """Distil a teacher into a one-step student, from prompts alone."""
    chosen = RECIPES[recipe.value if recipe else "stickers" if teacher is None else "swiftbrush"]
    given: dict[str, Any] = {
        "steps": steps, "batch": batch, "guidance": guidance, "student_lr": student_lr, "lora_lr": lora_lr,
        "lora_updates": lora_updates, "student_rank": student_lora, "t_init": t_init,
        "reparameterised": reparameterisation, "optimizer": "adam8bit" if adam_8bit else None,
        "clip_weight": clip_loss,
    }  # fmt: skip
    for text in set_ or ():
        if (name := text.partition("=")[0].strip()) in {key for key, value in given.items() if value is not None} and (
            name != "reparameterised"
        ):
            raise SbrushError(f"{name} is given twice", f"leave out --set {printable(text)}, or the flag", code=2)
    if guidance is not None:
        chosen = chosen.with_settings(guidance_to=None)
    if not lora_teacher:
        chosen = chosen.with_settings(gap="sds", shared_forward=False)
    chosen = chosen.with_settings(**{name: value for name, value in given.items() if value is not None})
    chosen = chosen.but_for(set_ or ())
    if not prompts.is_file():  # before torch is imported
        no_prompts(prompts)
    info("loading torch and the models ...")
    from sbrush.device import pick_device
    from sbrush.prompts import read_prompts
    from sbrush.training.loop import distill as train
    from sbrush.training.networks import ExecutionOptions
    from sbrush.training.plan import prepare
    from sbrush.training.run import Intervals

    if not chosen.clip_weight and (clip_weights or tiny_vae):
        raise SbrushError(
            "--clip-weights and --tiny-vae are for the clamped CLIP loss, which is off",
            "give its weight too, such as --clip-loss 0.1, or leave them out",
            code=2,
        )
    seen_by: Any = {"clip_weights": clip_weights, "clip_model": clip_model, "tiny_vae": tiny_vae}
    texts = read_prompts(prompts)
    if not validate_every and (validation_prompts or validation_clip):
        raise SbrushError(
            "--validation-prompts and --validation-clip are for validation, which is off",
            "say how often: --validate-every 1000, or leave them out",
            code=2,
        )
    checked = read_prompts(validation_prompts) if validation_prompts else None
    execution = ExecutionOptions(
        micro_batches=micro_batches, checkpointing=checkpointing, ema_on_cpu=ema_on_cpu,
        compile="inductor" if compile_ else None,
    )  # fmt: skip
    if dry_run:
        from sbrush.device import launched, trains_in_bf16
        from sbrush.models.load import load_shapes
        from sbrush.training.cost import estimate
        from sbrush.training.plan import check
        from sbrush.training.sharding import asked_for
        from sbrush.training.validation import Validation

        process, world = launched()
        if process:  # the first one speaks for all
            return
        execution = dataclasses.replace(execution, shard=asked_for() and world > 1)
        where = pick_device(device, present=False)
        bf16 = trains_in_bf16(cast("Any", precision.value), where)
        guide = load_shapes(teacher, config=teacher_config)
        check(chosen, guide, execution, world=world, init=init)
        judge = Validation.parameters(guide, validation_clip) if validate_every else 0
        _print_recipes(chosen)
        facts = {
            "teacher": teacher or "stickers (built in)",
            "prompts": texts.describe(),
            "seed": seed,
            "device": f"{where}, {'bfloat16' if bf16 else 'float32'}",
            "processes": f"{world}; memory is each one's",
        }
        for name, value in facts.items():
            console.out(f"{name}: {printable(value)}")
        cost = estimate(
            teacher,
            chosen,
            execution,
            config=teacher_config,
            bf16=bf16,
            world=world,
            device=where,
            **seen_by,
            cached_prompts=len(texts) if text_cache else 0,
            grids=grid_every > 0,
            validation=judge,
        )
        for line in cost.lines(chosen, keep=keep):
            console.out(line)
        return
    every = Intervals(log=log_every, grid=grid_every, checkpoint=checkpoint_every, validate=validate_every, keep=keep)
    plan = prepare(
        chosen, texts, out=out or Path("runs") / prompts.stem, teacher=teacher, init=init, seed=seed,
        device=pick_device(device), precision=cast("Any", precision.value),
        every=every, extend=extend, execution=execution, teacher_config=teacher_config, **seen_by,
        validation_prompts=checked, validation_clip=validation_clip,
        text_cache=text_cache, trackers=[name.value for name in tracker or ()],
    )  # fmt: skip
    shown = printable(plan.run.out)
    if not train(plan):
        if not plan.main_process:  # the main one speaks for all
            sys.exit(130)
        raise SbrushError("stopped, and saved", f"the same command goes on: {_same_command()}", code=130)
    if plan.main_process:
        grids = f"images: {shown}/samples   " if grid_every else ""
        info(f'{grids}curves: {shown}/curves.png   next: sbrush sample "a cat" --student {shown}')
        console.out(plan.run.student)


def _same_command() -> str:
    import shlex

    return printable(shlex.join(["sbrush", *sys.argv[1:]]))


def _print_recipes(recipe: Recipe) -> None:
    """The recipes side by side, and this run's beside them."""
    from rich.console import Console
    from rich.table import Table

    table = Table("setting", *RECIPES, "this run", title=None, box=None)
    for field in dataclasses.fields(Recipe):
        table.add_row(
            field.name, *(str(getattr(r, field.name)) for r in RECIPES.values()), str(getattr(recipe, field.name))
        )
    Console(markup=False, highlight=False).print(table)

"""`sbrush distill`."""

from __future__ import annotations

import dataclasses
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from sbrush import console
from sbrush.cli.control import TrainedControlFlag, TrainedPrepFlag, TrainedScaleFlag, read_trained_control
from sbrush.cli.dry_run import compare_with_free_memory, print_recipes
from sbrush.cli.dry_run import dry_run as dry_run_of
from sbrush.cli.flags import MACHINE, ColumnFlag, DeviceFlag, TeacherConfigFlag, TeacherFlag, check_student
from sbrush.console import Interrupted, SbrushError, info, is_text, printable
from sbrush.sampling.seeds import LARGEST_SEED
from sbrush.training.folder import check_folder
from sbrush.training.merged import MERGED, check_options, distill_merged
from sbrush.training.recipes import RECIPES, Recipe
from sbrush.training.request import (
    AlignmentRequest,
    ExecutionOptions,
    ImagesRequest,
    Intervals,
    RunRequest,
    ValidationRequest,
)

if TYPE_CHECKING:
    from sbrush.prompts import Prompts
    from sbrush.training.plan import Plan

IMAGES = "Images to learn from (lcm, guided)"
PLAN, SETTINGS, MEMORY = "Before you start", "Training settings", "For smaller GPUs"
RECORD, CLIP, ABLATION = "Logs and checkpoints", "CLIP loss (SwiftBrush v2)", "The paper's ablations"
RecipeName = StrEnum("RecipeName", {name: name for name in (*RECIPES, *MERGED)})  # type: ignore[misc]
STICKERS = "stickers"  # what --images takes for a folder of that name, but with ./ before it
EXAMPLE = "Example: sbrush distill prompts/stickers.txt --steps 500 --out runs/first"


class Tracker(StrEnum):
    """Experiment trackers that accelerate can write to."""

    tensorboard = "tensorboard"
    wandb = "wandb"
    trackio = "trackio"


class Precision(StrEnum):
    """Number format of matrix products in training."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


def distill(
    prompts: Annotated[
        Path | None,
        typer.Argument(
            help="File of prompts to train on: text with one prompt per line, CSV, TSV or JSON, or - for the standard "
            "input. Leave it out with --images FOLDER, whose captions are the prompts.",
            show_default=False,
        ),
    ] = None,
    teacher: TeacherFlag = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o",
            help="Run folder: log, sample grids, checkpoints and the student. Repeat the same command to resume. "
            "Default: runs/ and the prompt file's name.",
        ),
    ] = None,
    recipe: Annotated[
        RecipeName | None,
        typer.Option(
            help="Named set of training settings; --recipes prints them all. Default: stickers for the built-in "
            "teacher, swiftbrush (the paper's) for any other."
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Training steps; each updates the student once. Default: the recipe's.", min=1)
    ] = None,
    student_steps: Annotated[
        int | None,
        typer.Option(
            help="Steps in which the student will draw an image: 1, 2 or 4 (lcm: 1 to 50). A student of 4 steps can "
            "also draw in 1 to 3. Each additional step costs a UNet forward per image in sampling, and half of one in "
            "training. Default: the recipe's, which is 4 for lcm and stickers-lcm, else 1.",
            min=1,
            max=1000,
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(help="Random seed of the run. Another seed gives another student.", min=0, max=LARGEST_SEED),
    ] = 0,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print what this run would need (memory, disk, hours), train nothing and download no weights. With "
            "--device cuda it plans for a GPU even on a machine without one.",
            rich_help_panel=PLAN,
        ),
    ] = False,
    recipes: Annotated[
        bool,
        typer.Option(
            "--recipes", help="Print the settings of all recipes side by side and exit.", rich_help_panel=PLAN
        ),
    ] = False,
    column: ColumnFlag = None,
    images: Annotated[
        str | None,
        typer.Option(
            help="Images for recipes that learn from images (lcm, guided): a folder with captions beside the images, "
            "such as captions.txt or metadata.csv; or stickers, which draws images of the built-in world. Default: the "
            "teacher draws the prompts.",
            metavar="FOLDER|stickers",
            rich_help_panel=IMAGES,
        ),
    ] = None,
    image_cache: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the latents of these images. Several runs can share it, so that each image is drawn or "
            "read once. Default: the run folder.",
            rich_help_panel=IMAGES,
        ),
    ] = None,
    teacher_config: TeacherConfigFlag = None,
    init: Annotated[
        str | None,
        typer.Option(
            help="Start from this student (its folder, a run, a Hub id, or stickers, the built-in one) instead of from "
            "a copy of the teacher.",
            metavar="MODEL",
            callback=check_student,
            rich_help_panel=SETTINGS,
        ),
    ] = None,
    control: TrainedControlFlag = None,
    control_prep: TrainedPrepFlag = None,
    control_scale: TrainedScaleFlag = None,
    extend: Annotated[
        int,
        typer.Option(
            help="Number of training steps to add to the finished run in --out. The learning rates follow the schedule "
            "of the longer run. 0: none.",
            min=0,
            rich_help_panel=SETTINGS,
        ),
    ] = 0,
    batch: Annotated[
        int | None,
        typer.Option(
            help="Images per training step, over all processes. Default: the recipe's.",
            min=1,
            rich_help_panel=SETTINGS,
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            help="Classifier-free guidance scale of the teacher during training. Higher values give sharper and less "
            "varied images. Default: the recipe's.",
            min=0,
            rich_help_panel=SETTINGS,
        ),
    ] = None,
    student_lr: Annotated[
        float | None,
        typer.Option(
            help="Student's learning rate. Lower it if an alarm rings. Default: the recipe's.",
            min=0,
            rich_help_panel=SETTINGS,
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Change any setting of the recipe, e.g. --set lora_lr=5e-4 --set t_init=625. May be repeated. "
            "--recipes prints the names and values; docs/recipes.md explains each.",
            rich_help_panel=SETTINGS,
        ),
    ] = None,
    student_lora: Annotated[
        int | None,
        typer.Option(
            help="Train the student as a LoRA of this rank (64 to 256 are usual) on the teacher, not as a full copy. "
            "It takes less memory, and writes a LoRA file beside the whole student. Default: a full copy.",
            min=1,
            rich_help_panel=MEMORY,
        ),
    ] = None,
    micro_batches: Annotated[
        int,
        typer.Option(
            help="Process each batch in this many parts, one after another. This takes less memory and more time; the "
            "student is the same up to rounding.",
            min=1,
            rich_help_panel=MEMORY,
        ),
    ] = 1,
    checkpointing: Annotated[
        bool,
        typer.Option(
            "--checkpointing",
            help="Gradient checkpointing: compute activations twice instead of keeping them. Less memory, slower.",
            rich_help_panel=MEMORY,
        ),
    ] = False,
    ema_on_cpu: Annotated[
        bool,
        typer.Option(
            "--ema-on-cpu",
            help="Keep the student's moving average in host memory instead of on the GPU.",
            rich_help_panel=MEMORY,
        ),
    ] = False,
    adam_8bit: Annotated[
        bool,
        typer.Option(
            "--adam-8bit",
            help="Keep Adam's moments in 8 bits, a quarter of the memory. Needs bitsandbytes, which the extra adam8bit "
            "installs.",
            rich_help_panel=MEMORY,
        ),
    ] = False,
    text_cache: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the prompts' embeddings. Each prompt is encoded once, and then the text encoder leaves "
            "the GPU.",
            rich_help_panel=MEMORY,
        ),
    ] = None,
    device: DeviceFlag = "auto",
    precision: Annotated[
        Precision,
        typer.Option(
            help="Number format of matrix products in training. auto is bfloat16 where the hardware supports it, else "
            "float32.",
            rich_help_panel=MACHINE,
        ),
    ] = Precision.auto,
    compile_: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Compile the networks' transformer blocks with torch.compile, which takes a minute at the start. "
            "At SD 2.1's size on an H200, steps are 1.26 times as fast and take less memory. On a CPU it is slower.",
            rich_help_panel=MACHINE,
        ),
    ] = False,
    log_every: Annotated[
        int, typer.Option(help="Steps between lines of log.jsonl.", min=1, rich_help_panel=RECORD)
    ] = 10,
    grid_every: Annotated[
        int,
        typer.Option(
            help="Steps between sample grids, which show the same prompts and seeds each time. 0: no grids, and none "
            "of the alarms that need the teacher's images.",
            min=0,
            rich_help_panel=RECORD,
        ),
    ] = 200,
    checkpoint_every: Annotated[
        int | None,
        typer.Option(
            help="Steps between checkpoints. Default: 200, or more if saving would take over 5 % of the time.",
            min=1,
            rich_help_panel=RECORD,
        ),
    ] = None,
    keep: Annotated[
        int, typer.Option(help="Number of newest checkpoints to keep.", min=1, rich_help_panel=RECORD)
    ] = 2,
    validate_every: Annotated[
        int,
        typer.Option(
            help="Steps between measurements of the student's CLIP score on 64 prompts. 0: none.",
            min=0,
            rich_help_panel=RECORD,
        ),
    ] = 0,
    validation_prompts: Annotated[
        Path | None,
        typer.Option(
            help="File of prompts for --validate-every, in any format of the training prompts; 64 of them are used. "
            "Default: the training prompts.",
            rich_help_panel=RECORD,
        ),
    ] = None,
    validation_clip: Annotated[
        Path | None,
        typer.Option(
            help="CLIP model for --validate-every: a file with weights of ViT-g-14, or an open_clip folder. Default: "
            "the built-in CLIP model for the built-in teacher, else ViT-g-14 from the Hub's cache.",
            rich_help_panel=RECORD,
        ),
    ] = None,
    tracker: Annotated[
        list[Tracker] | None,
        typer.Option(help="Also log to this experiment tracker. May be repeated.", rich_help_panel=RECORD),
    ] = None,
    clip_loss: Annotated[
        float | None,
        typer.Option(
            help="Weight of the clamped CLIP loss at the first step; it falls to 0 at the last. SwiftBrush v2 uses "
            "0.1. Default: 0, off.",
            min=0,
            rich_help_panel=CLIP,
        ),
    ] = None,
    clip_weights: Annotated[
        Path | None,
        typer.Option(
            help="CLIP model of --clip-loss: a file with weights of the model in --clip-model, or an open_clip folder. "
            "Default for the built-in teacher: the built-in CLIP model.",
            rich_help_panel=CLIP,
        ),
    ] = None,
    clip_model: Annotated[
        str,
        typer.Option(
            help="open_clip's name of the model whose weights are in --clip-weights.", rich_help_panel=CLIP
        ),
    ] = "ViT-B-32",
    tiny_vae: Annotated[
        Path | None,
        typer.Option(
            help="Folder of diffusers' AutoencoderTiny, such as TAESD, that decodes images for --clip-loss. It takes "
            "less memory than the teacher's VAE, which is the default.",
            rich_help_panel=CLIP,
        ),
    ] = None,
    no_lora_teacher: Annotated[
        bool,
        typer.Option(
            "--no-lora-teacher",
            help="Train without the LoRA teacher, that is by Score Distillation Sampling.",
            rich_help_panel=ABLATION,
        ),
    ] = False,
    no_reparameterisation: Annotated[
        bool,
        typer.Option(
            "--no-reparameterisation",
            help="Use the student UNet's output itself as the clean latent, instead of computing the latent from its "
            "epsilon or v prediction.",
            rich_help_panel=ABLATION,
        ),
    ] = False,
) -> None:  # fmt: skip
    """Distil a teacher into a student of one step or a few.

    It learns from prompts alone; only the recipes lcm and guided also need images.
    """
    name = recipe.value if recipe else "stickers" if teacher is None else "swiftbrush"
    given: dict[str, Any] = {
        "steps": steps, "student_steps": student_steps, "batch": batch, "guidance": guidance, "student_lr": student_lr,
        "student_rank": student_lora,
        "reparameterised": False if no_reparameterisation else None,
        "optimizer": "adam8bit" if adam_8bit else None, "clip_weight": clip_loss,
    }  # fmt: skip
    given = {k: v for k, v in given.items() if v is not None}
    merged = MERGED[name].with_parts(
        lambda part: _resolve(part, given, set_ or (), sds=no_lora_teacher)
    ) if name in MERGED else None  # fmt: skip
    parts = merged.parts if merged else {"": _resolve(RECIPES[name], given, set_ or (), sds=no_lora_teacher)}
    if recipes:
        print_recipes(parts)
        return
    if merged:
        check_options(extend=extend, init=init, control=control is not None)
    steering = read_trained_control(control, control_prep, control_scale, init=init)
    chosen = next(iter(parts.values()))  # all parts have one weight of the CLIP loss
    if not chosen.clip_weight and (clip_weights or tiny_vae):
        raise SbrushError(
            "--clip-weights and --tiny-vae are for the clamped CLIP loss, which is off",
            "give its weight too, such as --clip-loss 0.1, or leave them out",
            code=2,
        )
    if not validate_every and (validation_prompts or validation_clip):
        raise SbrushError(
            "--validation-prompts and --validation-clip are for validation, which is off",
            "say how often: --validate-every 1000, or leave them out",
            code=2,
        )
    from sbrush.prompts import read_prompts  # before torch is imported

    source = _images(images, column, image_cache)
    texts = _prompts(prompts, column, source)
    checked = read_prompts(validation_prompts, column, required=False) if validation_prompts else None
    out = out or Path("runs") / "".join(c if is_text(c) else "_" for c in texts.stem)
    if not dry_run:
        check_folder(out)
    info("loading torch and the models ...")
    request = RunRequest(
        recipe=chosen, prompts=texts, out=out, teacher=teacher,
        teacher_config=teacher_config, init=init, seed=seed, extend=extend, device=device,
        precision=cast("Any", precision.value),
        every=Intervals(
            log=log_every, grid=grid_every, checkpoint=checkpoint_every, validate=validate_every, keep=keep
        ),
        execution=ExecutionOptions(
            micro_batches=micro_batches, checkpointing=checkpointing, ema_on_cpu=ema_on_cpu,
            compile="inductor" if compile_ else None,
        ),
        alignment=AlignmentRequest(clip_weights, clip_model, tiny_vae), images=source, control=steering,
        validation=ValidationRequest(checked, validation_clip),
        trackers=[name.value for name in tracker or ()], text_cache=text_cache,
    )  # fmt: skip
    if dry_run:
        dry_run_of(request, merged)
        return
    if merged:
        distill_merged(request, merged, train)
    else:
        train(request)
    from sbrush.device import launched

    if not launched()[0]:  # the main one speaks for all
        shown = printable(out)
        runs = [f"{shown}/{folder}".rstrip("/") for folder in parts]
        grids = f"images: {' and '.join(f'{run}/samples' for run in runs)}   " if grid_every else ""
        curves = " and ".join(f"{run}/curves.png" for run in runs)
        info(f'{grids}curves: {curves}   next: sbrush sample "a cat" --student {shown}')
        console.out(out / "student")


def _images(images: str | None, column: str | None, cache: Path | None) -> ImagesRequest:
    """What --images asks for: a folder, or what the built-in world draws."""
    if images == STICKERS:
        return ImagesRequest(drawn=True, cache=cache)
    return ImagesRequest(Path(images), column, cache=cache) if images else ImagesRequest(cache=cache)


def _prompts(prompts: Path | None, column: str | None, images: ImagesRequest) -> Prompts:
    """The prompts of a file, or the captions of a folder of images; SbrushError if there are none, or both."""
    from sbrush.prompts import captions_as_prompts, read_prompts

    if images.folder is None:
        if prompts is None:
            raise SbrushError("no prompts", EXAMPLE, code=2)
        return read_prompts(prompts, column)
    if prompts is not None:
        raise SbrushError(
            f"the captions of --images {printable(images.folder)} are the prompts, and there are others in "
            f"{printable(prompts)}",
            "leave out one of them",
            code=2,
        )
    from sbrush.sampling.image_folder import ImageFolder

    found = ImageFolder.read(images.folder, column=column)
    if found.captions is None:
        raise SbrushError(
            f"the images in {printable(images.folder)} have no captions beside them",
            "add captions.txt, a caption a line, or metadata.csv with the columns file_name and caption",
            code=2,
        )
    return captions_as_prompts(found.captions, str(images.folder), images.folder.resolve().name)


def _resolve(recipe: Recipe, given: dict[str, Any], settings: list[str] | tuple[()], *, sds: bool) -> Recipe:
    """The recipe with what flags and `--set` change of it; SbrushError if one setting is given twice."""
    flags = {*given} | ({"gap"} if sds else set())
    seen = set[str]()
    for text in settings:
        if (name := text.partition("=")[0].strip()) in flags:
            raise SbrushError(f"{name} is given twice", f"leave out --set {printable(text)}, or the flag", code=2)
        if name in seen:
            raise SbrushError(f"{printable(name)} is given twice", f"leave out one --set {printable(name)}", code=2)
        seen.add(name)
    if "guidance" in given:
        recipe = recipe.with_settings(guidance_to=None)
    if sds:
        recipe = recipe.with_settings(gap="sds", shared_forward=False)
    return recipe.with_settings(**given).but_for(settings)


def train(request: RunRequest) -> Plan:
    """Trains a run to its end, from where it stopped; Interrupted if it was stopped again."""
    from sbrush.device import pick_device
    from sbrush.training.loop import distill as run_to_end
    from sbrush.training.plan import prepare

    request = dataclasses.replace(request, device=pick_device(request.device))
    if request.device.startswith("cuda"):
        compare_with_free_memory(request)
    plan = prepare(request)
    if not run_to_end(plan):
        if not plan.main_process:  # the main one speaks for all
            sys.exit(130)
        from sbrush.storage.checkpoint import paths, step_of

        raise Interrupted(f"stopped after step {step_of(paths(plan.run.checkpoints)[0])}, saved")
    return plan

"""`sbrush personalize`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from sbrush import console
from sbrush.cli.distill import MEMORY, PLAN, SETTINGS, Precision, train
from sbrush.cli.flags import MACHINE, ColumnFlag, DeviceFlag, StudentFlag, TeacherConfigFlag, TeacherFlag
from sbrush.console import SbrushError, count, info, is_text, printable
from sbrush.sampling.seeds import LARGEST_SEED
from sbrush.training.folder import check_folder
from sbrush.training.personal import CROSS_ATTENTION, PERSONAL, PersonalRecipe, PersonalRequest, follow, personalize
from sbrush.training.recipes import Recipe
from sbrush.training.request import ExecutionOptions
from sbrush.training.subject import Subject, unseen_by_world

if TYPE_CHECKING:
    from sbrush.models.model import Model

EXAMPLE = 'Example: sbrush personalize photos/ --token "sks dog" --class dog --out runs/my-dog'
BUILT_IN, OTHER = PERSONAL["stickers"], PERSONAL["any"]


def _default(built_in: int, other: int) -> str:
    """What a setting is by default, for --help."""
    return f"Default: {other}." if built_in == other else f"Default: {built_in} for the built-in teacher, else {other}."


def personalize_(
    photos: Annotated[
        list[Path] | None,
        typer.Argument(help="Three to thirty photos of one subject, or folders of them.", show_default=False),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(
            help='What prompts will call the subject: a made-up word and its class, such as "sks dog". Needed.'
        ),
    ] = None,
    class_: Annotated[
        str | None,
        typer.Option(
            "--class", help='The kind of thing that the subject is, in words that the teacher knows: "dog". Needed.'
        ),
    ] = None,
    student: StudentFlag = None,
    teacher: TeacherFlag = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o",
            help="Run folder: both trainings, the LoRA, the teacher with it, a sample grid and the student. Repeat the "
            "same command to resume. Default: runs/ and the token.",
        ),
    ] = None,
    distill: Annotated[
        bool,
        typer.Option(
            "--distill/--no-distill",
            help="Whether there is a second training, in which the student is distilled by VSD from the teacher with "
            "the LoRA. Without it, the LoRA is only added to the student: faster, and much less like the photos.",
        ),
    ] = True,
    seed: Annotated[int, typer.Option(help="Random seed of both trainings.", min=0, max=LARGEST_SEED)] = 0,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print what both trainings would need (memory, disk, hours) and train nothing.",
            rich_help_panel=PLAN,
        ),
    ] = False,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="File of prompts, with the class and with other things. In those with the class, the subject takes "
            "its place; for the others, the images should stay the same. Default: templates with the class; for the "
            "built-in teacher its captions.",
            rich_help_panel=SETTINGS,
        ),
    ] = None,
    column: ColumnFlag = None,
    teacher_config: TeacherConfigFlag = None,
    lora_steps: Annotated[
        int | None,
        typer.Option(
            help="Steps of the first training, DreamBooth on the teacher. "
            f"{_default(BUILT_IN.lora.steps, OTHER.lora.steps)}",
            min=1,
            rich_help_panel=SETTINGS,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Steps of the second training, VSD on the student. "
            f"{_default(BUILT_IN.student.steps, OTHER.student.steps)}",
            min=2,
            rich_help_panel=SETTINGS,
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            help=f"Rank of the LoRA. {_default(BUILT_IN.lora.student_rank, OTHER.lora.student_rank)}",
            min=1,
            max=1024,
            rich_help_panel=SETTINGS,
        ),
    ] = None,
    cross_attention: Annotated[
        bool,
        typer.Option(
            "--cross-attention",
            help="Put the LoRA on cross-attention only, which gives a smaller file that resembles the subject less. "
            "Default: on all layers of the UNet's blocks.",
            rich_help_panel=SETTINGS,
        ),
    ] = False,
    micro_batches: Annotated[
        int,
        typer.Option(
            help="Process each batch in this many parts, one after another: less memory, slower.",
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
    device: DeviceFlag = "auto",
    precision: Annotated[
        Precision,
        typer.Option(
            help="Number format of matrix products in training. auto is bfloat16 where the hardware supports it, else "
            "float32.",
            rich_help_panel=MACHINE,
        ),
    ] = Precision.auto,
) -> None:  # fmt: skip
    """Teach a student a new subject from a few photos.

    DreamBooth trains a LoRA of the teacher. Then the student is distilled by VSD
    from the teacher with that LoRA.
    """
    if token is None or class_ is None:
        missing = " and ".join(f for f, value in (("--token", token), ("--class", class_)) if value is None)
        raise SbrushError(f"no {missing}", EXAMPLE, code=2)
    if not distill and steps is not None:
        raise SbrushError(
            "--steps is the second training's, and there is none",
            "leave out --no-distill; --lora-steps is the first one's",
            code=2,
        )
    if teacher is not None and student is None:
        raise SbrushError(
            "a teacher of your own, and the built-in student", "name the teacher's student: --student MODEL", code=2
        )
    subject = Subject(token, class_)
    recipe = _recipe(BUILT_IN if teacher is None else OTHER, lora_steps, steps, rank, cross_attention)
    from sbrush.prompts import read_prompts
    from sbrush.training.photo_files import find_photos

    files = find_photos(photos or ())
    texts = read_prompts(prompts, column) if prompts else None
    out = out or Path("runs") / "".join(c if is_text(c) and not c.isspace() else "-" for c in token)
    if not dry_run:
        check_folder(out)
    info("loading torch and the models ...")
    request = PersonalRequest(
        photos=files, subject=subject, out=out, recipe=recipe, prompts=texts, teacher=teacher,
        teacher_config=teacher_config, student=student, distill=distill, seed=seed, device=device,
        precision=cast("Any", precision.value),
        execution=ExecutionOptions(micro_batches=micro_batches, checkpointing=checkpointing),
    )  # fmt: skip
    shapes = _note(request)
    if dry_run:
        _print_cost(request, shapes)
        return
    from sbrush.device import launched, pick_device

    personalize(replace(request, device=pick_device(request.device)), train)
    if not launched()[0]:  # the main process speaks for all
        shown = printable(out)
        info(f'images: {shown}/samples.png   next: sbrush sample "a {printable(token)}" --student {shown}')
        console.out(out / "student")


def _recipe(
    row: PersonalRecipe, lora_steps: int | None, steps: int | None, rank: int | None, cross_attention: bool
) -> PersonalRecipe:
    """A row of PERSONAL with what flags change of it; the LoRA teacher's lead stays its share of the steps."""
    lora: dict[str, Any] = {"steps": lora_steps, "student_rank": rank}
    lora = {name: value for name, value in lora.items() if value is not None}
    if cross_attention:
        lora["lora_targets"] = CROSS_ATTENTION
    changed: Recipe = row.student
    if steps is not None:
        changed = changed.with_settings(steps=steps, lora_lead=changed.lora_lead * steps // changed.steps)
    return replace(row, lora=row.lora.with_settings(**lora), student=changed)


def _note(request: PersonalRequest) -> Model:
    """The teacher's shapes. Tells of a token of ordinary words, and of a class or a length that the world has not."""
    from sbrush.models.load import load_shapes
    from sbrush.training.ordinary import ordinary_words, too_long_for_world

    shapes, subject = load_shapes(request.teacher, config=request.teacher_config), request.subject
    if words := ordinary_words(shapes, subject.own_words):
        named = " and ".join(printable(word) for word in words)
        info(
            f"note: the teacher already knows {named}: its images of that will change. A made-up word, such as sks, "
            "avoids this"
        )
    if shapes.about.get("world") == "stickers" and request.prompts is None and unseen_by_world(subject):
        info(
            f"note: the built-in world draws no {printable(subject.kind)}: the subject takes the place of its stickers "
            "of any kind"
        )
    if too_long_for_world(shapes, subject.token):
        info(
            f"note: {printable(subject.token)} has too many tokens for the built-in text encoder, which then loses the "
            "background at the end of a prompt; two letters, such as zx, are short enough"
        )
    return shapes


def _print_cost(request: PersonalRequest, shapes: Model) -> None:
    """What both trainings would need; the first process speaks for all."""
    from sbrush.cli.dry_run import cost_of
    from sbrush.device import launched, pick_device
    from sbrush.models.load import load_student

    if launched()[0]:
        return
    request = replace(request, device=pick_device(request.device, present=False))
    if request.distill:
        request = replace(request, recipe=follow(request.recipe, load_student(request.student), shapes))
    practice = request.practice(shapes)
    facts = {
        "photos": count(len(request.photos), "photo"), "token": request.subject.token, "class": request.subject.kind,
        "caption of the photos": practice.caption, "prompts of the subject": len(practice.subject),
        "other prompts": f"{len(practice.others)}, from {practice.source}",
        "teacher": request.teacher or "stickers (built in)", "student": request.student or "stickers (built in)",
        "seed": request.seed, "run folder": request.out,
    }  # fmt: skip
    for name, value in facts.items():
        console.out(f"{name}: {printable(value)}")
    runs = {"the teacher's LoRA, by DreamBooth": request.lora_run(practice)}
    if request.distill:  # its teacher and start are made by the first, and have the shapes of these
        second = replace(
            request.student_run(practice), teacher=request.teacher, teacher_config=request.teacher_config, init=None
        )
        runs["the student, by VSD"] = second
    for number, (what, run) in enumerate(runs.items(), start=1):
        console.out(f"\ntraining {number} of {len(runs)}: {what}, {run.recipe.steps} steps of {run.recipe.batch}")
        for line in cost_of(run, shapes).lines(run.recipe, request.device, keep=run.every.keep):
            console.out(line)

"""A student that knows a new subject, from a few photos: `sbrush personalize`.

    OUT/config.json      what was asked for
    OUT/dreambooth/      training 1, a folder as any run's (run.py): a LoRA on the teacher, by methods/dreambooth.py
    OUT/lora/            that LoRA, for `--lora` and for other programs
    OUT/teacher/         the teacher with it
    OUT/lora-student/    the student with it, as it is: the cheap way
    OUT/vsd/             training 2, from lora-student/, with teacher/ as its teacher
    OUT/samples.png      the photos, and what each of these draws
    OUT/student/         the result

The training loop knows nothing of this, as of merged.py. Without `distill` there is no training 2: the student with the
LoRA as it is, which of the built-in world's robots drew blobs (docs/personalizing.md).
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sbrush
from sbrush.console import SbrushError, info, printable
from sbrush.prompts import Prompts, captions_as_prompts, make_prompts
from sbrush.training.recipes import RECIPES, Recipe
from sbrush.training.request import (
    ExecutionOptions,
    HoldRequest,
    ImagesRequest,
    Intervals,
    PhotosRequest,
    RunRequest,
)
from sbrush.training.subject import Practice, Subject, practice_of, prompts_of

if TYPE_CHECKING:
    from sbrush.models.model import Model
    from sbrush.training.plan import Plan

CROSS_ATTENTION = "attn2.to_q attn2.to_k attn2.to_v attn2.to_out.0"


@dataclass(frozen=True)
class PersonalRecipe:
    """Both trainings, and what images the first learns from."""

    lora: Recipe
    student: Recipe
    prior: int  # images of other prompts, which the student makes
    move: bool = False  # whether the subject is shown in other sizes and places too, see moving.py


PERSONAL = {
    "stickers": PersonalRecipe(
        replace(
            RECIPES["stickers-lcm"], name="personal-lora-stickers", method="dreambooth", steps=800, batch=8,
            student_steps=1, student_rank=32, lora_targets="blocks", student_lr=1.5e-3, warmup=20, cooldown=1.0,
            ema=0.9, guidance=3.0, images=0,
        ),
        replace(
            RECIPES["stickers"], name="personal-stickers", steps=300, batch=8, student_lr=2e-4, hold=8, lora_lead=16,
            warmup=10,
        ),
        prior=522,
        move=True,
    ),
    "any": PersonalRecipe(
        replace(
            RECIPES["lcm"], name="personal-lora", method="dreambooth", steps=800, batch=4, student_steps=1,
            student_rank=16, lora_targets="blocks", student_lr=1e-4, warmup=50, cooldown=1.0, ema=0.99, guidance=7.5,
        ),
        replace(RECIPES["dmd"], name="personal", steps=1000, batch=8, student_lr=2e-6, lora_lead=200, ema=0.99, hold=8),
        prior=200,
    ),
}  # fmt: skip
"""For the built-in teacher, and for any other: there not measured."""


@dataclass(frozen=True)
class PersonalRequest:
    """What `sbrush personalize` is asked for, as the command line resolves it."""

    photos: tuple[Path, ...]
    subject: Subject
    out: Path
    recipe: PersonalRecipe
    prompts: Prompts | None = None
    teacher: str | None = None
    teacher_config: str | None = None
    student: str | None = None  # None: the built-in one
    distill: bool = True  # whether there is a second training
    seed: int = 0
    device: str = "cpu"
    precision: Any = "auto"
    execution: ExecutionOptions = field(default_factory=ExecutionOptions)

    def practice(self, teacher: Model) -> Practice:
        """The prompts of both trainings."""
        return practice_of(self.subject, self.prompts, world=teacher.about.get("world") == "stickers")

    def lora_run(self, practice: Practice) -> RunRequest:
        """Training 1: as many rows of photos as of the student's images of other prompts."""
        from sbrush.training.images import rows_of

        seen = max(1, self.recipe.lora.steps * self.recipe.lora.batch // 2)  # of these, in so many steps
        places = rows_of(len(practice.others), min(self.recipe.prior, seen))
        others = [practice.others[place] for place in places]
        prompts = captions_as_prompts([practice.caption] * len(others) + others, practice.source, "photos")
        return RunRequest(
            recipe=self.recipe.lora, prompts=prompts, out=self.out / "dreambooth", teacher=self.teacher,
            teacher_config=self.teacher_config, seed=self.seed, device=self.device, precision=self.precision,
            every=Intervals(grid=0), execution=self.execution,
            images=ImagesRequest(photos=PhotosRequest(self.photos, len(others), self.student, self.recipe.move)),
        )  # fmt: skip

    def student_run(self, practice: Practice) -> RunRequest:
        """Training 2: from the student with the LoRA, with the teacher with it; other prompts as before either."""
        return RunRequest(
            recipe=self.recipe.student, prompts=make_prompts(practice.subject, practice.source), out=self.out / "vsd",
            teacher=str(self.out / "teacher"), init=str(self.out / "lora-student"), seed=self.seed, device=self.device,
            precision=self.precision, every=Intervals(grid=100), execution=self.execution,
            hold=HoldRequest(self.student, make_prompts(practice.others, practice.source)),
        )  # fmt: skip

    def config(self, about: dict[str, Any]) -> dict[str, Any]:
        """What OUT/config.json holds."""
        recipes = {"lora": asdict(self.recipe.lora), "student": asdict(self.recipe.student) if self.distill else None}
        return {
            "format": 1, "version": sbrush.__version__, "recipe": "personalize", "personal": about,
            "trainings": recipes, "prior": self.recipe.prior, "moved": self.recipe.move,
            "seed": self.seed,
        }  # fmt: skip


def follow(recipe: PersonalRecipe, student: Model, teacher: Model) -> PersonalRecipe:
    """A recipe whose second training goes on as its student was trained: from which timestep, in how many steps."""
    if student.guidance_input is not None or (student.ladder and not student.ladder.fresh):
        raise SbrushError(
            f"{printable(student.name)} takes a guidance scale, or keeps its noise between steps",
            "VSD cannot go on with it: give a student that sbrush distill made with VSD, or give --no-distill",
            code=2,
        )
    start = len(student.schedule) - 1
    changed = recipe.student.with_settings(
        t_init=None if start == len(teacher.schedule) - 1 else start,
        student_steps=len(student.rungs()),
        reparameterised=bool(student.about.get("reparameterised", True)),
    )
    return replace(recipe, student=changed)


def personalize(request: PersonalRequest, train: Callable[[RunRequest], Plan]) -> None:
    """Trains both, one after the other, and writes OUT/student; what is complete stays as it is.

    `train` trains one run to its end, from where it stopped. SbrushError as a run raises it, before anything is trained
    if photos, teacher and student do not go together.
    """
    from sbrush.device import launched
    from sbrush.models import personal as folders
    from sbrush.models.load import digest, load_student, load_teacher
    from sbrush.training.photos import digest_of
    from sbrush.training.plan import check
    from sbrush.training.run import claim

    process, world = launched()
    teacher, student = load_teacher(request.teacher, config=request.teacher_config), load_student(request.student)
    if request.distill:
        request = replace(request, recipe=follow(request.recipe, student, teacher))
        check(request.recipe.student, teacher, request.execution, world=world, init=None)
    check(request.recipe.lora, teacher, request.execution, world=world, init=None)
    practice, out = request.practice(teacher), request.out
    about = {
        "token": request.subject.token, "class": request.subject.kind, "caption": practice.caption,
        "teacher": request.teacher or "stickers (built in)", "teacher_sha256": digest(teacher),
        "student_sha256": digest(student), "prompts_sha256": prompts_of(practice).sha256,
        "photos": {"count": len(request.photos), "sha256": digest_of(request.photos)},
    }  # fmt: skip
    main = process == 0
    with claim(out, request.config(about)) if main else nullcontext():
        trainings = 2 if request.distill else 1
        if main:
            info(f"training 1 of {trainings}: the teacher learns {printable(request.subject.token)}")
        done = train(request.lora_run(practice))
        if main:
            if not folders.is_of(out / "lora", about, "sbrush-personal.json"):
                folders.write_lora(out / "lora", out / "dreambooth" / "student-lora", about)
            if not folders.is_of(out / "teacher", about):
                folders.write_teacher(out / "teacher", teacher, out / "dreambooth" / "student" / "unet", about)
            if not folders.is_of(out / "lora-student", about):
                folders.write_lora_student(out / "lora-student", request.student, out / "lora", about)
        done.accelerator.wait_for_everyone()
        result = out / "lora-student"
        del done, teacher, student
        gc.collect()  # a training's networks go before the next one's come
        if request.distill:
            if main:
                info(f"training 2 of {trainings}: the student follows the teacher of {request.subject.token}")
            train(request.student_run(practice)).accelerator.wait_for_everyone()
            result = out / "vsd" / "student"
        complete = folders.is_of(out / "student", about)
        if main and not complete:
            folders.write_result(out / "student", result, about)
        if main and not (complete and (out / "samples.png").is_file()):
            from sbrush.training.personal_grid import draw_grid

            draw_grid(request, practice)

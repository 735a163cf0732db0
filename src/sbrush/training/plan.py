"""A run that is ready to start: its models loaded, its configuration resolved, nothing written yet."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator

from sbrush.console import SbrushError, info, printable
from sbrush.device import trains_in_bf16
from sbrush.models.control import ControlNet
from sbrush.models.export import check_exportable
from sbrush.models.load import digest, load_student, load_teacher
from sbrush.models.load_control import digest_of_control, load_control
from sbrush.models.model import Model
from sbrush.prompts import Prompts
from sbrush.sampling.notes import note_truncated_prompts, note_unknown_words
from sbrush.training import sharding
from sbrush.training.alignment import Alignment
from sbrush.training.config import make_config
from sbrush.training.engine import make_accelerator
from sbrush.training.images import TrainingImages
from sbrush.training.methods import METHODS, split_batch
from sbrush.training.methods.holding import Held
from sbrush.training.recipes import RECIPES, Recipe
from sbrush.training.request import ExecutionOptions, ImagesRequest, RunRequest
from sbrush.training.run import Run
from sbrush.training.text_cache import TextCache
from sbrush.training.trackers import tracked_in
from sbrush.training.validation import Validation


@dataclass
class Plan:
    """A run that is ready to start: nothing is written yet."""

    run: Run
    prompts: Prompts
    teacher: Model
    init: Model | None
    accelerator: Accelerator
    execution: ExecutionOptions
    alignment: Alignment | None = None
    validation: Validation | None = None
    text_cache: TextCache | None = None
    images: TrainingImages | None = None
    held: Held | None = None

    @property
    def main_process(self) -> bool:
        """Whether this process is the one that logs and writes."""
        return self.accelerator.is_main_process


def prepare(request: RunRequest) -> Plan:
    """Loads the models and resolves the run's configuration. SbrushError if they do not go together."""
    recipe, device = request.recipe, request.device
    if request.execution.compile == "inductor":
        check_compiler(device)
    bf16 = trains_in_bf16(request.precision, device)
    sharded = sharding.asked_for()
    accelerator = make_accelerator(device, "bf16" if bf16 else "no", tracked_in(request.out, request.trackers))
    execution = replace(request.execution, shard=sharded and accelerator.num_processes > 1)
    check_method(request)
    teacher = load_teacher(request.teacher, config=request.teacher_config)
    check(recipe, teacher, execution, world=accelerator.num_processes, init=request.init)
    check_exportable(teacher)
    if accelerator.is_main_process:
        note_unknown_words(teacher, request.prompts.texts)
        note_truncated_prompts(teacher, request.prompts.texts)
    check_control(request)
    init = load_student(request.init) if request.init else None
    if init:
        _check_init(recipe, teacher, printable(request.init), init)
    if control := request.control:
        network = load_control(control.model, teacher)
        teacher = replace(teacher, controls=(ControlNet(network, control.scale, control.prep),))
    where = str(accelerator.device)
    alignment = Alignment.load(teacher, request.alignment, device=where) if recipe.clip_weight else None
    held = Held(load_student(request.hold.student), request.hold.prompts) if request.hold else None
    images = None
    if METHODS[recipe.method].from_images:
        images = TrainingImages.plan(request.images, recipe, request.prompts, teacher, accelerator, request.out)
    config = make_config(
        request, sampling=METHODS[recipe.method].sampling(recipe), images=images.source.about if images else None,
        teacher_sha256=digest(teacher), init_sha256=digest(init) if init else None,
        control_sha256=digest_of_control(request.control.model) if request.control else None,
        held=held.about if held else None, clip=alignment.name if alignment else None, bf16=bf16,
    )  # fmt: skip
    validation = None
    if request.every.validate and (accelerator.is_main_process or execution.shard):
        chosen = request.validation.prompts or request.prompts
        if request.validation.prompts and accelerator.is_main_process:
            info(f"validation: {chosen.describe()}")
        validation = Validation.load(chosen, teacher, request.validation.clip, device=where)
    run = Run.plan(request.out, config, recipe, request.every, extend=request.extend)
    cache = TextCache(request.text_cache, teacher, request.prompts) if request.text_cache else None
    return Plan(run, request.prompts, teacher, init, accelerator, execution, alignment, validation, cache, images, held)


def check_compiler(device: str) -> None:
    """SbrushError if the compiler is not there that torch.compile calls: for C on CUDA (Triton), else for C++."""
    variable, usual = ("CC", ("gcc", "clang")) if device.startswith("cuda") else ("CXX", ("g++",))
    chosen = os.environ.get(variable)
    names = (chosen,) if chosen else usual
    if not any(shutil.which(name) for name in names):
        raise SbrushError(
            f"--compile needs a compiler, and {printable(' or '.join(names))} is not found",
            f"install gcc and g++ (Debian: build-essential), or set {variable}; or leave out --compile",
        )


def check_method(request: RunRequest) -> None:
    """SbrushError if a run's method does not learn from what the run is given, or has no such setting."""
    recipe, images = request.recipe, request.images
    if recipe.method not in METHODS:
        raise SbrushError(
            f"no method {printable(recipe.method)}", f"--set method=NAME, one of {', '.join(METHODS)}", code=2
        )
    method, row = METHODS[recipe.method], RECIPES.get(recipe.name, recipe)
    if not method.from_images and images != ImagesRequest():
        those = ", ".join(name for name, other in RECIPES.items() if METHODS[other.method].from_images)
        raise SbrushError(
            f"recipe {recipe.name} learns from prompts alone, and is given images",
            f"leave out --images and --image-cache, or take --recipe {those}",
            code=2,
        )
    if images.folder and recipe.images != row.images:
        raise SbrushError("--images FOLDER has its own number of images", "leave out --set images, or --images", code=2)
    for name in method.unused:
        if getattr(recipe, name) != getattr(row, name):
            raise SbrushError(
                f"method {recipe.method} does not use the setting {name}",
                "leave out what sets it, a flag or --set; `sbrush distill --recipes` lists the settings",
                code=2,
            )
    if recipe.hold and not request.hold:
        raise SbrushError(
            "the setting hold needs a student and prompts to hold to, which sbrush personalize gives",
            "leave out --set hold",
            code=2,
        )
    if request.extend and not method.extendable:
        raise SbrushError(
            f"a run of method {recipe.method} cannot be extended: its stages are shares of its steps",
            "start another with more --steps, in another --out",
            code=2,
        )


def check_control(request: RunRequest) -> None:
    """SbrushError if a ControlNet is to be in the loop of a method that has no place for one."""
    if request.control and not METHODS[request.recipe.method].steerable:
        raise SbrushError(
            f"method {request.recipe.method} trains without ControlNets",
            "leave out --control, or take a recipe of VSD: swiftbrush, or stickers for the built-in teacher",
            code=2,
        )


def check(recipe: Recipe, teacher: Model, execution: ExecutionOptions, *, world: int, init: str | None) -> None:
    """SbrushError if a recipe, a teacher (of which shapes suffice) and a machine do not go together."""
    if execution.shard and METHODS[recipe.method].from_images:
        raise SbrushError(
            f"method {recipe.method} does not run under FSDP",
            "leave FSDP out of accelerate's configuration; --checkpointing and --micro-batches take less memory",
            code=2,
        )
    if execution.shard and (
        recipe.student_rank or execution.compile or recipe.optimizer == "adam8bit" or execution.ema_on_cpu
    ):
        raise SbrushError(
            "FSDP is for a full student with its average, with torch's Adam and without --compile",
            "leave FSDP out of accelerate's configuration, or --student-lora, --adam-8bit, --ema-on-cpu and --compile",
            code=2,
        )
    if execution.ema_on_cpu and not recipe.ema:
        raise SbrushError("there is no average to keep on the CPU", "leave out --ema-on-cpu, or --set ema=0", code=2)
    split_batch(recipe, execution, 0, world)
    if init and recipe.student_rank:
        raise SbrushError(
            "a LoRA student starts as its teacher, and cannot start as another student",
            "leave out --init, or --student-lora",
            code=2,
        )
    if recipe.anchor_weight and not init:
        raise SbrushError(
            "anchor_weight holds a student's first step to what it drew before, and this one starts as the teacher",
            "--init STUDENT, or leave out anchor_weight",
            code=2,
        )
    METHODS[recipe.method].check(recipe, teacher)


def _check_init(recipe: Recipe, teacher: Model, name: str, init: Model) -> None:
    """SbrushError if a student to start from reads its noise, conditioning or output in another way than this run."""
    weights, own = ({k: v.shape for k, v in model.unet.state_dict().items()} for model in (init, teacher))
    if weights != own:
        raise SbrushError(
            f"--init {name} is of another architecture than the teacher", "start from a student of this teacher", code=2
        )
    if init.prediction != teacher.prediction:
        raise SbrushError(
            f"--init {name} predicts {init.prediction}, the teacher {teacher.prediction}",
            "start from a student of this teacher",
            code=2,
        )
    length = len(init.schedule)
    if length > len(teacher.schedule) or not torch.allclose(init.schedule.alpha, teacher.schedule.alpha[:length]):
        raise SbrushError(
            f"--init {name} has another noise schedule than the teacher", "start from a student of this teacher", code=2
        )
    if init.about.get("reparameterised", True) != recipe.reparameterised:
        raise SbrushError(
            f"--init {name} is {'' if recipe.reparameterised else 'not '}a student without re-parameterisation",
            f"{'give' if recipe.reparameterised else 'leave out'} --no-reparameterisation",
            code=2,
        )
    _check_ladder(recipe, teacher, name, init)
    starts, start = length - 1, len(teacher.schedule) - 1 if recipe.t_init is None else recipe.t_init
    if starts != start:
        raise SbrushError(
            f"--init {name} takes its step at timestep {starts}, this run at {start}",
            f"--set t_init={starts}" if starts < len(teacher.schedule) - 1 else "--set t_init=null",
            code=2,
        )


def _check_ladder(recipe: Recipe, teacher: Model, name: str, init: Model) -> None:
    """SbrushError if a student of several steps stands on timesteps that this run's student has not, or the reverse."""
    scheduler = METHODS[recipe.method].sampling(recipe).scheduler(teacher.scheduler, recipe.t_init)
    own = teacher.as_student(scheduler, {"steps": recipe.student_steps}).rungs()
    if init.ladder and len(own) > 1 and not (set(init.rungs()) <= set(own) or set(own) <= set(init.rungs())):
        raise SbrushError(
            f"--init {name} stands on the timesteps {', '.join(map(str, init.rungs()))}, "
            f"this run's student on {', '.join(map(str, own))}",
            "start from a student of one step, or of as many steps as --student-steps",
            code=2,
        )

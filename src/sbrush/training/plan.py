"""A run that is ready to begin: its models loaded, its configuration resolved, nothing written yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs

from sbrush.console import SbrushError, printable
from sbrush.device import Precision, trains_in_bf16
from sbrush.models.load import digest, load_student, load_teacher
from sbrush.models.model import Model
from sbrush.prompts import Prompts
from sbrush.training import sharding
from sbrush.training.alignment import Alignment
from sbrush.training.config import make_config
from sbrush.training.methods.vsd import share
from sbrush.training.networks import ExecutionOptions
from sbrush.training.recipes import Recipe
from sbrush.training.run import Intervals, Run
from sbrush.training.text_cache import TextCache
from sbrush.training.trackers import tracked_in
from sbrush.training.validation import Validation

ENGINES = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


@dataclass
class Plan:
    """A run that is ready to begin: nothing is written yet."""

    run: Run
    prompts: Prompts
    teacher: Model
    init: Model | None
    accelerator: Accelerator
    execution: ExecutionOptions
    alignment: Alignment | None = None
    validation: Validation | None = None
    text_cache: TextCache | None = None

    @property
    def main_process(self) -> bool:
        """Whether this process is the one that speaks and writes."""
        return self.accelerator.is_main_process


def prepare(
    recipe: Recipe,
    prompts: Prompts,
    *,
    out: Path,
    teacher: str | None,
    init: str | None,
    seed: int,
    device: str,
    precision: Precision,
    every: Intervals,
    extend: int = 0,
    execution: ExecutionOptions | None = None,
    teacher_config: str | None = None,
    clip_weights: Path | None = None,
    clip_model: str = "ViT-B-32",
    tiny_vae: Path | None = None,
    validation_prompts: Prompts | None = None,
    validation_clip: Path | None = None,
    trackers: Sequence[str] = (),
    text_cache: Path | None = None,
) -> Plan:
    """Loads the models and resolves the run's configuration. SbrushError if they do not fit together.

    `extend`: steps to add to a run that is complete in `out`. `teacher_config`: see load_teacher; `clip_weights`,
    `clip_model`, `tiny_vae`: see Alignment.load, for a recipe with the clamped CLIP loss. `validation_prompts` (by
    default the run's), `validation_clip`: see Validation.load, if `every` asks for it. `trackers`: see trackers.py.
    `text_cache`: a folder for text embeddings; see text_cache.py.
    """
    bf16 = trains_in_bf16(precision, device)
    sharded = sharding.asked_for()
    accelerator = _accelerator(device, "bf16" if bf16 else "no", tracked_in(out, trackers))
    execution = replace(execution or ExecutionOptions(), shard=sharded and accelerator.num_processes > 1)
    guide = load_teacher(teacher, config=teacher_config)
    check(recipe, guide, execution, world=accelerator.num_processes, init=init)
    start = load_student(init) if init else None
    if start:
        _check_start(recipe, guide, printable(init), start)
    alignment = None
    if recipe.clip_weight:
        alignment = Alignment.load(
            guide, clip_weights, clip_model=clip_model, tiny_vae=tiny_vae, device=str(accelerator.device)
        )
    config = make_config(
        recipe, prompts, teacher=teacher, teacher_config=teacher_config, teacher_sha256=digest(guide), init=init,
        init_sha256=digest(start) if start else None,
        clip=alignment.name if alignment else None, text_cache=text_cache is not None, seed=seed, bf16=bf16,
    )  # fmt: skip
    validation = None
    if every.validate and (accelerator.is_main_process or execution.shard):
        chosen = validation_prompts or prompts
        validation = Validation.load(chosen, guide, validation_clip, device=str(accelerator.device))
    run = Run.plan(out, config, recipe, every, extend=extend)
    cache = TextCache(text_cache, guide, prompts) if text_cache else None
    return Plan(run, prompts, guide, start, accelerator, execution, alignment, validation, cache)


def _accelerator(device: str, mixed_precision: str, options: dict[str, Any]) -> Accelerator:
    """accelerate's, on this device; SbrushError if its configuration names an engine that sbrush does not run under."""
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    # A process that hangs, a machine that has gone: given up after a time that no export of a large student takes.
    patience = InitProcessGroupKwargs(timeout=timedelta(minutes=30))
    # Gradients lie in the buckets that processes exchange: without, a student's are there twice.
    buckets = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    handlers = [patience, buckets]
    made = Accelerator(cpu=device == "cpu", mixed_precision=mixed_precision, kwargs_handlers=handlers, **options)
    if (kind := made.distributed_type) in ENGINES:
        raise SbrushError(
            f"sbrush does not run under {kind.value}",
            "take FSDP or plain data parallelism in `accelerate config`; what makes a run small besides: "
            "--student-lora 256, --adam-8bit, --ema-on-cpu, --checkpointing, --micro-batches",
            code=2,
        )
    return made


def check(recipe: Recipe, guide: Model, execution: ExecutionOptions, *, world: int, init: str | None) -> None:
    """SbrushError if a recipe, a teacher (of which shapes will do) and a machine do not fit together."""
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
    share(recipe, execution, 0, world)
    if init and recipe.student_rank:
        raise SbrushError(
            "a LoRA student starts as its teacher, and cannot start as another student",
            "leave out --init, or --student-lora",
            code=2,
        )
    T = len(guide.schedule) - 1
    if recipe.t_init is not None and recipe.t_init > T:
        raise SbrushError(
            f"--t-init {recipe.t_init} is beyond the teacher's last timestep, {T}", f"take 1 to {T}", code=2
        )
    if recipe.t_high > T:
        raise SbrushError(f"t_high {recipe.t_high} is beyond the teacher's last timestep, {T}", "lower it", code=2)
    if recipe.lora_weight != "alpha" and guide.scheduler.alphas_cumprod[-1] == 0:
        raise SbrushError(
            f"the teacher's schedule ends in pure noise, where lora_weight {recipe.lora_weight} has no value",
            "--set lora_weight=alpha",
            code=2,
        )


def _check_start(recipe: Recipe, guide: Model, name: str, start: Model) -> None:
    """SbrushError if a student to start from means something else by its noise, its words or its output."""
    weights, own = ({k: v.shape for k, v in model.unet.state_dict().items()} for model in (start, guide))
    if weights != own:
        raise SbrushError(
            f"--init {name} is of another architecture than the teacher", "start from a student of this teacher", code=2
        )
    if start.prediction != guide.prediction:
        raise SbrushError(
            f"--init {name} predicts {start.prediction}, the teacher {guide.prediction}",
            "start from a student of this teacher",
            code=2,
        )
    length = len(start.schedule)
    if length > len(guide.schedule) or not torch.allclose(start.schedule.alpha, guide.schedule.alpha[:length]):
        raise SbrushError(
            f"--init {name} has another noise schedule than the teacher", "start from a student of this teacher", code=2
        )
    if start.about.get("reparameterised", True) != recipe.reparameterised:
        raise SbrushError(
            f"--init {name} is {'' if recipe.reparameterised else 'not '}a student without re-parameterisation",
            f"{'give' if recipe.reparameterised else 'leave out'} --no-reparameterisation",
            code=2,
        )
    begins, begin = length - 1, len(guide.schedule) - 1 if recipe.t_init is None else recipe.t_init
    if begins != begin:
        raise SbrushError(
            f"--init {name} takes its step at timestep {begins}, this run would at {begin}",
            f"--t-init {begins}" if begins < len(guide.schedule) - 1 else "leave out --t-init, or --set t_init=null",
            code=2,
        )

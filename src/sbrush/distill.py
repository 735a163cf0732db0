"""The training loop: step after step, logged, checkpointed, resumable, stoppable.

What a step is stands in distiller.py and core.py; what is kept in `--out` in run.py.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import FrameType

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch import Tensor

from sbrush import checkpoint, sharding
from sbrush.alignment import Alignment
from sbrush.console import SbrushError, printable, progress, say
from sbrush.device import Precision, parted, trains_in_bf16
from sbrush.distiller import Distiller, Fit
from sbrush.health import MOST_SKIPPED
from sbrush.models.export import export_lora
from sbrush.models.load import digest, load_student, load_teacher
from sbrush.models.model import Model
from sbrush.prompts import Prompts, ShuffledPrompts
from sbrush.recipes import Recipe
from sbrush.run import METRICS, Intervals, Run, make_config
from sbrush.text_cache import TextCache
from sbrush.trackers import begin, end, tell, tracked_in
from sbrush.validation import Validation

ENGINES = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


@dataclass
class Plan:
    """A run that is ready to begin: nothing is written yet."""

    run: Run
    prompts: Prompts
    teacher: Model
    init: Model | None
    accelerator: Accelerator
    fit: Fit
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
    fit: Fit | None = None,
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
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    # A process that hangs, a machine that has gone: given up after a time that no export of a large student takes.
    patience = InitProcessGroupKwargs(timeout=timedelta(minutes=30))
    mixed = "bf16" if bf16 else "no"
    sharded = sharding.asked_for()
    accelerator = Accelerator(
        cpu=device == "cpu", mixed_precision=mixed, kwargs_handlers=[patience], **tracked_in(out, trackers)
    )
    fit = replace(fit or Fit(), shard=sharded and accelerator.num_processes > 1)
    if fit.shard and (recipe.student_rank or fit.compile or recipe.optimizer == "adam8bit"):
        raise SbrushError(
            "FSDP is for a full student, with torch's Adam and without --compile",
            "leave FSDP out of accelerate's configuration, or --student-lora, --adam-8bit and --compile",
            code=2,
        )
    if (kind := accelerator.distributed_type) in ENGINES:
        raise SbrushError(
            f"sbrush does not run under {kind.value}",
            "take FSDP or plain data parallelism in `accelerate config`; what makes a run small besides: "
            "--student-lora 256, --adam-8bit, --ema-on-cpu, --checkpointing, --micro-batches",
            code=2,
        )
    guide = load_teacher(teacher, config=teacher_config)
    start = load_student(init) if init else None
    if start and recipe.student_rank:
        raise SbrushError(
            "a LoRA student starts as its teacher, and cannot start as another student",
            "leave out --init, or --student-lora",
            code=2,
        )
    if start and start.unet.config.block_out_channels != guide.unet.config.block_out_channels:
        raise SbrushError(
            f"--init {printable(init)} is of another architecture than the teacher",
            "start from a student of this teacher",
            code=2,
        )
    T = len(guide.schedule) - 1
    if recipe.t_init is not None and recipe.t_init > T:
        raise SbrushError(
            f"--t-init {recipe.t_init} is beyond the teacher's last timestep, {T}", f"take 1 to {T}", code=2
        )
    if recipe.t_high > T:
        raise SbrushError(f"t_high {recipe.t_high} is beyond the teacher's last timestep, {T}", "lower it", code=2)
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
    if every.validate and (accelerator.is_main_process or fit.shard):
        chosen = validation_prompts or prompts
        validation = Validation.load(chosen, guide, validation_clip, device=str(accelerator.device))
    run = Run.plan(out, config, recipe, every, extend=extend)
    cache = TextCache(text_cache, guide, prompts) if text_cache else None
    return Plan(run, prompts, guide, start, accelerator, fit, alignment, validation, cache)


def distill(plan: Plan) -> bool:
    """Trains to the recipe's last step, from the run's newest checkpoint on; False if it was stopped before the end.

    SbrushError if another run has the folder, if it cannot be written to, or if training has stopped making sense.
    """
    run, main = plan.run, plan.main_process
    try:
        with run.claim() if main else nullcontext():
            plan.accelerator.wait_for_everyone()
            return _train(plan)
    except OSError as problem:  # no room, no permission, a mount that has gone
        raise SbrushError(
            f"cannot write to {printable(run.out)}: {problem.strerror or problem}",
            "what is in its checkpoints/ is kept: mend that and give the same command again",
        ) from problem
    except RuntimeError as problem:
        if plan.accelerator.num_processes == 1 or not parted(problem):
            raise
        raise SbrushError(
            "another process of this run has ended, or is out of reach",
            f"what is in {printable(run.checkpoints)} is kept: the same command goes on, with any number of processes",
        ) from problem


def _train(plan: Plan) -> bool:
    run, recipe, main = plan.run, plan.run.recipe, plan.main_process
    if run.complete:
        if main:
            say("this run is complete; it has its student already (--extend N adds steps)")
        return True
    if main:
        what = f"{plan.prompts.describe()}; recipe {recipe.name}, {recipe.steps} steps of {recipe.batch}"
        say(f"{what}; writing to {printable(run.out)}")
    seed = run.config["seed"]
    # A student that is shared out answers, and is put together, only when all processes ask for it.
    needed = main or plan.fit.shard
    distiller = Distiller(
        plan.teacher, recipe, seed=seed, accelerator=plan.accelerator, init=plan.init, fit=plan.fit,
        alignment=plan.alignment, text_cache=plan.text_cache,
    )  # fmt: skip
    if main and plan.fit.shard:
        share = 100 * sharding.held(distiller.trained.values())
        say(f"the student is shared out among {plan.accelerator.num_processes} processes (FSDP2); here {share:.0f} %")
    order, first = ShuffledPrompts(plan.prompts, seed), 1
    if saved := checkpoint.newest(run.checkpoints):
        distiller.load(saved)
        first = saved.step + 1
        if main:
            say(f"going on after step {saved.step} of {recipe.steps}")
    with torch.compiler.set_stance("force_eager"):
        log = run.begin(distiller.teacher, after_step=first - 1) if main else []
    begin(plan.accelerator, run.out, run.config, first=first)
    plan.accelerator.wait_for_everyone()
    every = run.every
    yardstick = run.yardstick if every.sheet else None
    waiting: list[Tensor] = []
    since, skipped = time.monotonic(), 0  # the latter: steps in a row, up to now, that were not finite
    with stop_requests() as stop, progress("distilling", recipe.steps, done=first - 1) as bar:
        for step in range(first, recipe.steps + 1):
            result = distiller.step(step, order)
            if yardstick:
                result |= yardstick.compare(result["x0"])
            unknown = torch.full_like(result["gap"], float("nan"))
            waiting.append(torch.stack([result.get(name, unknown) for name in METRICS]))
            last, stopping = step == recipe.steps, stop.asked_by_any(distiller.accelerator)
            sheet = bool(every.sheet) and (step % every.sheet == 0 or last or step == 1)
            validate = bool(every.validate) and (step % every.validate == 0 or last)
            save = step % every.checkpoint == 0 or last or stopping
            note = ""
            if step % every.log == 0 or sheet or validate or save:  # the only place that waits for the device
                entry = _means(waiting, distiller.accelerator)
                entry["pictures_per_second"] = round(len(waiting) * recipe.batch / (time.monotonic() - since), 2)
                skipped = _run_of_skipped(waiting, skipped)
                if needed and yardstick and sheet:
                    with distiller.average() as student:
                        latents = run.draw(student)
                    if main:
                        entry |= run.sheets(step, distiller.teacher, latents, result, yardstick)
                if plan.validation and validate:
                    with distiller.average() as student:
                        entry["clip_score"] = plan.validation.score(student)
                if main:
                    note = run.log(step, entry, log)
                    tell(plan.accelerator, log[-1])
                if main and (sheet or last):
                    run.curves(log)
                waiting, since = [], time.monotonic()
            if skipped >= MOST_SKIPPED:
                raise _not_finite(run, skipped)
            if main:
                bar.advance(note=note)
            if needed and save and (skipped == 0 or last or stopping):
                state = distiller.state()
                if main:
                    checkpoint.save(run.checkpoints, step, state, keep=every.keep)
            if stopping and not last:
                return False
    end(plan.accelerator)
    if needed:
        with distiller.average():
            if recipe.student_rank:
                export_lora(run.out / "student-lora", distiller.student, "student")
            unet = distiller.exported()
            if main:
                run.export(distiller.teacher, unet)
    distiller.accelerator.wait_for_everyone()
    return True


def _means(waiting: list[Tensor], accelerator: Accelerator) -> dict[str, float | None]:
    """Each metric's mean over steps and processes, of its finite values; None if it had none. `skipped` is a sum."""
    values = torch.stack(waiting)
    finite = values.isfinite()
    sums, counts = accelerator.reduce(torch.stack([values.where(finite, 0).sum(0), finite.sum(0)]), "sum").tolist()
    means = {k: s / n if n else None for k, s, n in zip(METRICS, sums, counts, strict=True)}
    means["skipped"] = round(sums[METRICS.index("skipped")] / accelerator.num_processes)
    return means


def _run_of_skipped(waiting: list[Tensor], before: int) -> int:
    """How many of the newest steps in a row were skipped, `before` those waiting included."""
    for values in waiting:
        before = before + 1 if values[METRICS.index("skipped")] else 0
    return before


def _not_finite(run: Run, skipped: int) -> SbrushError:
    kept = checkpoint.paths(run.checkpoints)
    last = f"the last good checkpoint is {printable(kept[0])}" if kept else "there is no checkpoint yet"
    return SbrushError(
        f"the losses or gradients of {skipped} steps in a row were not finite; {last}",
        "begin another run with a lower --student-lr or --lora-lr, or with --precision float32",
    )


class Stop:
    """Whether somebody has asked the run to stop."""

    asked = False

    def asked_by_any(self, accelerator: Accelerator) -> bool:
        """Whether any process was asked, so that all stop after the same step."""
        if accelerator.num_processes == 1:
            return self.asked
        flag = torch.tensor(float(self.asked), device=accelerator.device)
        return bool(accelerator.reduce(flag, "sum").item())


@contextmanager
def stop_requests() -> Iterator[Stop]:
    """Turns the first Ctrl-C or SIGTERM into a request; the second one ends the program at once."""
    stop = Stop()
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def request(number: int, frame: FrameType | None) -> None:
        stop.asked = True
        # Not by `say`: the signal may have come in the middle of a print, which must not be entered twice.
        os.write(2, b"\nstopping after this step; once more to stop at once (work since the last checkpoint is lost)\n")
        for s in before:
            signal.signal(s, signal.SIG_DFL)

    for s in before:
        signal.signal(s, request)
    try:
        yield stop
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)

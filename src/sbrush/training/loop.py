"""The training loop: step after step, logged, checkpointed, resumable, stoppable.

It knows no method. What a step does is in methods/, what a run is made of in plan.py, what `--out` holds in run.py.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import FrameType

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor

from sbrush.console import SbrushError, count, info, printable, progress
from sbrush.device import is_disconnected
from sbrush.prompts import ShuffledPrompts
from sbrush.storage import checkpoint
from sbrush.training import health, sharding
from sbrush.training.cost import smaller
from sbrush.training.methods import METHODS, Method
from sbrush.training.plan import Plan
from sbrush.training.run import Run
from sbrush.training.trackers import finish, log_metrics, start

ASK_EVERY = 5  # steps between agreements of several processes on stopping, each of which waits for the device
SAVE_EVERY = 200  # steps between checkpoints by default
SAVING = 0.05  # share of a run's time that default checkpoints may take: a large student's are many gigabytes


def distill(plan: Plan) -> bool:
    """Trains to the recipe's last step, from the run's newest checkpoint on; False if it was stopped before the end.

    SbrushError if another run holds the folder, if it cannot be written to, or if too many steps were not finite.
    """
    run, main = plan.run, plan.main_process
    try:
        with run.claim() if main else nullcontext():
            plan.accelerator.wait_for_everyone()
            return _train(plan)
    except OSError as problem:  # no room, no permission, a lost mount
        raise SbrushError(
            f"cannot write to {printable(run.out)}: {problem.strerror or problem}",
            "what is in its checkpoints/ is kept: fix that and give the same command again",
        ) from problem
    except torch.OutOfMemoryError as problem:
        raise SbrushError(
            f"out of memory on {plan.accelerator.device}: {str(problem).split('. ')[0]}",
            f"{smaller(run.recipe, plan.execution)}; what is in {printable(run.checkpoints)} is kept",
        ) from problem
    except RuntimeError as problem:
        if plan.accelerator.num_processes == 1 or not is_disconnected(problem):
            raise
        raise SbrushError(
            "another process of this run has ended or cannot be reached",
            f"what is in {printable(run.checkpoints)} is kept: the same command resumes, with any number of processes",
        ) from problem


def _train(plan: Plan) -> bool:
    run, recipe, main = plan.run, plan.run.recipe, plan.main_process
    if run.complete:
        if main:
            info("this run is complete and has its student; --extend N adds steps")
        return True
    if main:
        what = f"{plan.prompts.describe()}; recipe {recipe.name}, {count(recipe.steps, 'step')} of {recipe.batch}"
        info(f"{what}; writing to {printable(run.out)}")
    seed = run.config["seed"]
    # A sharded student runs, and is gathered, only when all processes call it together.
    needed = main or plan.execution.shard
    more: dict[str, object] = {}
    if plan.images:
        plan.images.fill(plan.teacher, plan.accelerator)
        more["images"] = plan.images
    method: Method = METHODS[recipe.method](  # type: ignore[call-arg]
        plan.teacher, recipe, seed=seed, accelerator=plan.accelerator, init=plan.init, execution=plan.execution,
        alignment=plan.alignment, text_cache=plan.text_cache, **more,
    )  # fmt: skip
    if plan.held and recipe.hold:
        method.hold(plan.held)
    if main and plan.execution.shard:
        share = 100 * sharding.held(method.trained.values())
        info(f"the student is sharded among {plan.accelerator.num_processes} processes (FSDP2); here {share:.0f} %")
    order, first = ShuffledPrompts(plan.images.prompts if plan.images else plan.prompts, seed), 1
    if saved := checkpoint.newest(run.checkpoints):
        method.load(saved)
        first = saved.step + 1
        if main:
            info(f"resuming after step {saved.step} of {recipe.steps}")
    with torch.compiler.set_stance("force_eager"):
        log = run.start(method.teacher, after_step=first - 1) if main else []
    start(plan.accelerator, run.out, run.config, first=first)
    plan.accelerator.wait_for_everyone()
    every, metrics = run.every, (*method.metrics, *health.METRICS)
    skips = metrics.index("skipped")
    reference = run.reference if every.grid else None
    waiting, saving = list[Tensor](), CheckpointTimer(every.checkpoint, plan.accelerator)
    since, skipped = time.monotonic(), 0  # the latter: steps in a row, up to now, that were not finite
    several = plan.accelerator.num_processes > 1
    with stop_requests(several=several) as stop, progress("distilling", recipe.steps, done=first - 1) as bar:
        for step in range(first, recipe.steps + 1):
            result = method.step(step, order)
            if reference:
                result |= reference.compare(result["x0"])
            unknown = torch.full_like(result["skipped"], float("nan"))
            waiting.append(torch.stack([result.get(name, unknown) for name in metrics]))
            last, stopping = step == recipe.steps, stop.asked_by_any(plan.accelerator, step)
            grid = bool(every.grid) and (step % every.grid == 0 or last or step == 1)
            validate = bool(every.validate) and (step % every.validate == 0 or last)
            save = saving.due(step) or last or stopping
            note = ""
            if step % every.log == 0 or grid or validate or save:  # the only place that waits for the device
                entry = _means(waiting, metrics, plan.accelerator)
                entry["images_per_second"] = round(len(waiting) * recipe.batch / (time.monotonic() - since), 2)
                skipped = _run_of_skipped([values[skips] for values in waiting], skipped)
                if needed and reference and grid:
                    with method.average() as student:
                        latents = run.draw(student)
                    if main:
                        views = {label: result[name] for label, name in method.views.items()}
                        entry |= run.grids(step, method.teacher, latents, views, reference)
                if plan.validation and validate:
                    with method.average() as student:
                        entry["clip_score"] = plan.validation.score(student)
                if main:
                    run.log(step, entry, log)
                    note = method.summary(log[-1])
                    log_metrics(plan.accelerator, log[-1])
                if main and (grid or last):
                    run.curves(log)
                waiting, since = [], time.monotonic()
            if skipped >= health.MOST_SKIPPED:
                raise _not_finite(run, skipped)
            if main:
                bar.advance(note=note)
            if needed and save and (skipped == 0 or last or stopping):
                with saving.timed():
                    state = method.state()
                    if main:
                        checkpoint.save(run.checkpoints, step, state, keep=every.keep)
            if stopping and not last:
                return False
    finish(plan.accelerator)
    if needed:
        with method.average():
            unet = method.exported()
            if main:
                run.export(method.teacher, unet, trained=method.student, init=plan.init)
    plan.accelerator.wait_for_everyone()
    return True


def _means(waiting: list[Tensor], metrics: Sequence[str], accelerator: Accelerator) -> dict[str, float | None]:
    """Each metric's mean over steps and processes, of its finite values; None if it had none. `skipped` is a sum."""
    values = torch.stack(waiting)
    finite = values.isfinite()
    sums, counts = accelerator.reduce(torch.stack([values.where(finite, 0).sum(0), finite.sum(0)]), "sum").tolist()
    means = {k: s / n if n else None for k, s, n in zip(metrics, sums, counts, strict=True)}
    means["skipped"] = round(sums[metrics.index("skipped")] / accelerator.num_processes)
    return means


def _run_of_skipped(waiting: list[Tensor], before: int) -> int:
    """How many of the newest steps in a row were skipped, given how many were `before` those waiting."""
    for skipped in torch.stack(waiting).tolist():
        before = before + 1 if skipped else 0
    return before


def _not_finite(run: Run, skipped: int) -> SbrushError:
    kept = checkpoint.paths(run.checkpoints)
    last = f"the last good checkpoint is {printable(kept[0])}" if kept else "there is no checkpoint yet"
    return SbrushError(
        f"the losses or gradients of {skipped} steps in a row were not finite; {last}",
        "start another run with a lower --student-lr or --set lora_lr=..., or with --precision float32",
    )


class CheckpointTimer:
    """When checkpoints are due: every so many steps, or at multiples of SAVE_EVERY as often as SAVING allows."""

    def __init__(self, every: int | None, accelerator: Accelerator) -> None:
        self._every, self._accelerator = every, accelerator
        self._took, self._since = 0.0, time.monotonic()

    def due(self, step: int) -> bool:
        """Whether one is due after `step`; all processes decide alike, by the main one's clock."""
        if self._every is not None:
            return step % self._every == 0
        if step % SAVE_EVERY:
            return False
        worth = (time.monotonic() - self._since) * SAVING >= self._took * (1 - SAVING)
        if self._accelerator.num_processes == 1:
            return worth
        decision = torch.tensor(float(worth), device=self._accelerator.device)
        return bool(broadcast(decision, from_process=0).item())

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Around the saving of one."""
        start = time.monotonic()
        yield
        self._since = time.monotonic()
        self._took = self._since - start


class Stop:
    """Whether the run was asked to stop."""

    asked = False

    def asked_by_any(self, accelerator: Accelerator, step: int) -> bool:
        """Whether any process was asked, so that all stop after the same step; several ask every ASK_EVERY steps."""
        if accelerator.num_processes == 1:
            return self.asked
        if step % ASK_EVERY:
            return False
        flag = torch.tensor(float(self.asked), device=accelerator.device)
        return bool(accelerator.reduce(flag, "sum").item())


@contextmanager
def stop_requests(*, several: bool = False) -> Iterator[Stop]:
    """Turns the first Ctrl-C or SIGTERM into a request; the second one ends the program at once."""
    stop = Stop()
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def request(number: int, frame: FrameType | None) -> None:
        stop.asked = True
        # Not by `info`: the signal may have come in the middle of a print, which must not be entered twice.
        when = b"within a few steps" if several else b"after this step"
        os.write(2, b"\nstopping " + when + b"; once more to stop at once (work since the last checkpoint is lost)\n")
        for s in before:
            signal.signal(s, signal.SIG_DFL)

    for s in before:
        signal.signal(s, request)
    try:
        yield stop
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)

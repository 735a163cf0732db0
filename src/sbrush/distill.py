"""The training loop: student and LoRA teacher in turn, logged, checkpointed, resumable, stoppable.

What is trained is core.py; what is kept in `--out` is run.py.
"""

from __future__ import annotations

import copy
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sbrush import checkpoint, core
from sbrush.console import SbrushError, printable, progress, say
from sbrush.device import Precision, trains_in_bf16
from sbrush.ema import EMA
from sbrush.health import MOST_SKIPPED
from sbrush.noise import StepNoise
from sbrush.prompts import Prompts, ShuffledPrompts
from sbrush.recipes import Recipe
from sbrush.run import METRICS, Intervals, Run, make_config
from sbrush.sample import ddim
from sbrush.weights import Model, add_lora, attend_explicitly, digest, load_student, load_teacher, lora_state


class Distiller:
    """A student and its two teachers, and one training step of theirs.

    The teacher and the LoRA teacher are one frozen UNet: with its adapter off and on. The student is a full copy.
    """

    memory_format = torch.channels_last  # in which convolutions are fastest

    def __init__(
        self, teacher: Model, recipe: Recipe, *, seed: int, accelerator: Accelerator, init: Model | None = None
    ) -> None:
        self.teacher, self.recipe, self.seed, self.accelerator = teacher, recipe, seed, accelerator
        device, world = accelerator.device, accelerator.num_processes
        if recipe.batch % world:
            raise SbrushError(
                f"a batch of {recipe.batch} cannot be shared by {world} processes",
                f"choose a multiple of {world}",
                code=2,
            )
        local = recipe.batch // world
        self._mine = range(accelerator.process_index * local, (accelerator.process_index + 1) * local)
        every = recipe.batch // recipe.pairs if recipe.pairs else recipe.batch + 1
        if recipe.pairs and local % every:
            raise SbrushError(
                f"{recipe.pairs} pairs cannot be shared by {world} processes", f"choose a multiple of {world}", code=2
            )
        self._paired = [place for place, index in enumerate(self._mine) if recipe.pairs and index % every == 0]
        for part in (teacher.text_encoder, teacher.vae, teacher.unet):
            part.to(device)
        student = copy.deepcopy((init or teacher).unet).to(device, memory_format=self.memory_format)
        self.student = student.float().requires_grad_(True).train()
        self.ema = EMA(self.student, recipe.ema)
        for unet in (teacher.unet, self.student):
            attend_explicitly(unet)
        if accelerator.mixed_precision == "bf16":
            nn.Module.to(teacher.unet, torch.bfloat16)  # diffusers' own `to` warns, of nothing that concerns this
        teacher.unet.to(memory_format=self.memory_format)
        self.lora = add_lora(
            teacher.unet, rank=recipe.lora_rank, alpha=recipe.lora_alpha, targets=recipe.lora_targets, seed=seed
        )
        kw: dict[str, Any] = {"betas": (0.9, recipe.beta2), "fused": True}
        self.student_optimizer = torch.optim.Adam(self.student.parameters(), lr=recipe.student_lr, **kw)
        self.lora_optimizer = torch.optim.Adam(self.lora, lr=recipe.lora_lr, **kw)
        # accelerate wraps both networks (autocast; DDP when there are several processes), each under its own name:
        # the plain modules stay reachable as self.student and self.teacher.unet.
        self._student, self._lora_teacher = accelerator.prepare(self.student, teacher.unet)
        self._null = teacher.encode([""])
        self.schedule, self.prediction = teacher.schedule, teacher.prediction

    def step(self, step: int, prompts: ShuffledPrompts) -> dict[str, Tensor]:
        """One update of the student, then the LoRA teacher's; `step` counts from 1. Metrics stay on the device.

        The returned dictionary also holds x0 [B, C, H, W] and the two teachers' guesses of it, for the contact sheet.
        """
        recipe, schedule = self.recipe, self.schedule
        draw = StepNoise(self.seed, step, self._mine, self.accelerator.device)
        cond = self.teacher.encode([prompts[(step - 1) * recipe.batch + i] for i in self._mine])
        z = draw.normal(self.teacher.latent_shape)
        t_init = schedule.start(len(z), recipe.t_init)

        x0 = core.student_x0(
            self._student(self._laid_out(z), t_init, cond).sample.float(),
            z, t_init, schedule, self.prediction, reparameterised=recipe.reparameterised,
        )  # fmt: skip
        t = draw.timesteps(recipe.t_low, recipe.t_high)
        noise = draw.normal(self.teacher.latent_shape)
        x_t = core.add_noise(x0.detach(), noise, t, schedule)
        scale: float | Tensor = recipe.guidance
        if recipe.guidance_to is not None:
            scale = draw.uniform(recipe.guidance, recipe.guidance_to)
        if recipe.guidance_high is not None:
            scale = torch.where(t <= recipe.guidance_high, scale, 1.0).view(-1, 1, 1, 1)
        eps_teacher = self._teacher_score(x_t, t, cond, scale)
        if recipe.gap == "sds":
            eps_lora = noise
        elif recipe.shared_forward:
            eps_lora = self._lora_epsilon(x_t, t, cond)
        else:
            eps_lora = self._lora_score(x_t, t, cond, scale if recipe.guide_lora else 1.0)
        if recipe.gap == "dmd":
            gap = core.dmd_gap(eps_teacher, eps_lora.detach(), noise)
        else:
            gap = core.vsd_gap(eps_teacher, eps_lora.detach(), t, schedule)
        student_loss = core.vsd_loss(x0, gap)
        pair_loss = torch.zeros((), device=x0.device)
        if (paired := self._paired) and step <= recipe.pair_share * recipe.steps:
            pair_loss = core.pair_loss(x0[paired], self._teacher_pictures(z[paired], cond[paired]))
            student_loss = student_loss + recipe.pair_weight * len(paired) / len(z) * pair_loss
        self.student_optimizer.param_groups[0]["lr"] = recipe.student_lr_at(step)
        self.lora_optimizer.param_groups[0]["lr"] = recipe.lora_lr_at(step)
        student_grad = self._update(student_loss, self.student_optimizer, self.student.parameters())
        self.ema.update(self.student, step)

        x0 = x0.detach()
        lora_loss = lora_grad = torch.zeros((), device=x0.device)
        for update in range(recipe.lora_updates if recipe.gap != "sds" else 0):
            if recipe.shared_forward and update == 0:
                eps, noise_lora, t_lora = eps_lora, noise, t
            else:
                t_lora = draw.timesteps(0, len(schedule) - 1)
                noise_lora = draw.normal(self.teacher.latent_shape)
                words = self._null.expand_as(cond) if draw.chance(recipe.null_chance) else cond
                eps = self._lora_epsilon(core.add_noise(x0, noise_lora, t_lora, schedule), t_lora, words)
            lora_loss = core.lora_loss(eps, noise_lora, t_lora, schedule, weight=recipe.lora_weight)
            lora_grad = self._update(lora_loss, self.lora_optimizer, self.lora)

        eps_lora = eps_lora.detach()
        error, lora_error = ((eps - noise).abs().mean() for eps in (eps_teacher, eps_lora))
        skipped = ~(student_grad.isfinite() & lora_grad.isfinite())
        metrics = {
            "gap": gap.abs().mean(), "student_loss": student_loss, "lora_loss": lora_loss, "pair_loss": pair_loss,
            "x0_mean": x0.mean(), "x0_std": x0.std(), "student_grad": student_grad, "lora_grad": lora_grad,
            "skipped": skipped.float(), "gap_share": (eps_teacher - eps_lora).abs().mean() / error,
            "lora_error": lora_error / error,
        }  # fmt: skip
        guesses = (core.to_x0(eps, x_t, t, schedule, "epsilon") for eps in (eps_teacher, eps_lora))
        pictures = dict(zip(("x0", "teacher_x0", "lora_x0"), (x0, *guesses), strict=True))
        return {name: value.detach() for name, value in (metrics | pictures).items()}

    def _lora_epsilon(self, x_t: Tensor, t: Tensor, words: Tensor) -> Tensor:
        """The LoRA teacher's noise prediction, through which it can be trained."""
        output = self._lora_teacher(self._laid_out(x_t), t, words).sample
        return core.to_epsilon(output, x_t, t, self.schedule, self.prediction)

    @torch.no_grad()
    def _teacher_score(self, x_t: Tensor, t: Tensor, cond: Tensor, scale: float | Tensor) -> Tensor:
        """The teacher's noise prediction, guided."""
        self.teacher.unet.disable_adapters()
        eps = self._guided(x_t, t, cond, scale)
        self.teacher.unet.enable_adapters()  # also lets the LoRA's parameters require gradients again
        return eps

    @torch.no_grad()
    def _teacher_pictures(self, z: Tensor, cond: Tensor) -> Tensor:
        """The teacher's own pictures of this noise, in the recipe's few steps."""

        def denoise(x: Tensor, t: Tensor, words: Tensor) -> Tensor:
            return self.teacher.unet(self._laid_out(x), t, words).sample

        steps, scale = self.recipe.pair_steps, self.recipe.pair_guidance
        self.teacher.unet.disable_adapters()
        with self.accelerator.autocast():
            x0 = ddim(denoise, self.teacher.scheduler, z, cond, self._null, steps=steps, guidance=scale)
        self.teacher.unet.enable_adapters()
        return x0

    @torch.no_grad()
    def _lora_score(self, x_t: Tensor, t: Tensor, cond: Tensor, scale: float | Tensor) -> Tensor:
        """The LoRA teacher's noise prediction, guided."""
        return self._guided(x_t, t, cond, scale)

    def _guided(self, x_t: Tensor, t: Tensor, cond: Tensor, scale: float | Tensor) -> Tensor:
        def denoise(x: Tensor, t: Tensor, words: Tensor) -> Tensor:
            return self.teacher.unet(self._laid_out(x), t, words).sample

        null = self._null.expand_as(cond)
        with self.accelerator.autocast():
            return core.guided_epsilon(denoise, x_t, t, cond, null, scale, self.schedule, self.prediction)

    def _laid_out(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=self.memory_format)

    def _update(self, loss: Tensor, optimizer: torch.optim.Optimizer, parameters: Any) -> Tensor:
        """Backward, clip, step; the gradient's norm before clipping. If that is not finite nothing is changed.

        The gradients are already those of all processes, so that all decide alike, and none waits for the device.
        """
        optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(loss)
        norm = nn.utils.clip_grad_norm_(parameters, self.recipe.clip)
        # Mixed precision's own switch, to be read on the device: the fused step does nothing where it is one.
        optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
        optimizer.step()
        return norm

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Everything that training changes, for a checkpoint."""
        return {
            "student": dict(self.student.named_parameters()),
            "ema": self.ema.tensors,
            "lora": lora_state(self.teacher.unet),
            "student_optimizer": checkpoint.optimizer_tensors(self.student_optimizer),
            "lora_optimizer": checkpoint.optimizer_tensors(self.lora_optimizer),
        }

    @torch.no_grad()
    def load(self, saved: checkpoint.Checkpoint) -> None:
        """Puts back what `state` gave. SbrushError if that is not what this run's networks are made of."""
        own = {part: tensors for part, tensors in self.state().items() if not part.endswith("_optimizer")}
        for part, tensors in own.items():
            theirs = saved.part(part)
            if {k: v.shape for k, v in tensors.items()} != {k: v.shape for k, v in theirs.items()}:
                raise _misfit(saved.step)
            if not all(v.isfinite().all() for v in theirs.values()):
                raise _misfit(saved.step)
            for name, tensor in tensors.items():
                tensor.copy_(theirs[name])
        try:
            checkpoint.load_optimizer(self.student_optimizer, saved.part("student_optimizer"))
            checkpoint.load_optimizer(self.lora_optimizer, saved.part("lora_optimizer"))
        except (ValueError, IndexError, KeyError, RuntimeError) as problem:
            raise _misfit(saved.step) from problem


def _misfit(step: int) -> SbrushError:
    return SbrushError(
        f"the checkpoint after step {step} is no state of this run's networks",
        "it was changed by something else; start anew in another --out",
    )


@dataclass
class Plan:
    """A run that is ready to begin: nothing is written yet."""

    run: Run
    prompts: Prompts
    teacher: Model
    init: Model | None
    accelerator: Accelerator

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
) -> Plan:
    """Loads the models and resolves the run's configuration. SbrushError if they do not fit together.

    `extend`: steps to add to a run that is complete in `out`.
    """
    bf16 = trains_in_bf16(precision, device)
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="bf16" if bf16 else "no")
    guide = load_teacher(teacher)
    start = load_student(init) if init else None
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
    config = make_config(
        recipe, prompts, teacher=teacher, teacher_sha256=digest(guide), init=init,
        init_sha256=digest(start) if start else None, seed=seed, bf16=bf16,
    )  # fmt: skip
    return Plan(Run.plan(out, config, recipe, every, extend=extend), prompts, guide, start, accelerator)


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
    distiller = Distiller(plan.teacher, recipe, seed=seed, accelerator=plan.accelerator, init=plan.init)
    order, first = ShuffledPrompts(plan.prompts, seed), 1
    if saved := checkpoint.newest(run.checkpoints):
        distiller.load(saved)
        first = saved.step + 1
        if main:
            say(f"going on after step {saved.step} of {recipe.steps}")
    log = run.begin(distiller.teacher, after_step=first - 1) if main else []
    plan.accelerator.wait_for_everyone()
    yardstick, every = run.yardstick, run.every
    waiting: list[Tensor] = []
    since, skipped = time.monotonic(), 0  # the latter: steps in a row, up to now, that were not finite
    with stop_requests() as stop, progress("distilling", recipe.steps, done=first - 1) as bar:
        for step in range(first, recipe.steps + 1):
            result = distiller.step(step, order)
            result |= yardstick.compare(result["x0"])
            waiting.append(torch.stack([result[name] for name in METRICS]))
            last, stopping = step == recipe.steps, stop.asked_by_any(distiller.accelerator)
            sheet = step % every.sheet == 0 or last or step == 1
            save = step % every.checkpoint == 0 or last or stopping
            note = ""
            if step % every.log == 0 or sheet or save:  # the only place that waits for the device
                entry = _means(waiting, distiller.accelerator)
                entry["pictures_per_second"] = round(len(waiting) * recipe.batch / (time.monotonic() - since), 2)
                skipped = _run_of_skipped(waiting, skipped)
                if main and sheet:
                    with distiller.ema.inside(distiller.student):
                        entry |= run.sheets(step, distiller.teacher, distiller.student, result, yardstick)
                note = run.log(step, entry, log) if main else ""
                if main and sheet:
                    run.curves(log)
                waiting, since = [], time.monotonic()
            if skipped >= MOST_SKIPPED:
                raise _not_finite(run, skipped)
            if main:
                bar.advance(note=note)
                if save and (skipped == 0 or last or stopping):
                    checkpoint.save(run.checkpoints, step, distiller.state())
            if stopping and not last:
                return False
    if main:
        with distiller.ema.inside(distiller.student):
            run.export(distiller.teacher, distiller.student)
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

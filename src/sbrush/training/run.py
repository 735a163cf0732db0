"""A training run's folder: configuration, log, sample grids, checkpoints, student.

config.json             everything that decides the result (config.py)
log.jsonl               a line every few steps: the method's metrics, health.METRICS, alarms, clip_score
curves.png              the same drawn
samples/step-000200.png the student's images, same prompts and seeds each time; samples/teacher.png beside them
samples/teacher.json    statistics of the teacher's images, for the alarms
samples/x0-000200.png   one batch: student x0, the teacher's and the LoRA teacher's guess of it from x_t
checkpoints/            the newest states (checkpoint.py)
student/                the result, a folder for diffusers
student-lora/           the same as a LoRA, if the student is one
trackers/               what tensorboard and others write, if asked for
.lock                   held while a run is using the folder
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from filelock import Timeout
from torch import Tensor

from sbrush.console import SbrushError, count, info, printable, progress
from sbrush.models.card import about_student
from sbrush.models.export import export_lora, export_student
from sbrush.models.ladder import Sampling
from sbrush.models.model import Model
from sbrush.models.unet import set_role
from sbrush.sampling import images
from sbrush.sampling.generation import guidance_scale_of, student_latents, teacher_latents
from sbrush.storage.files import write_json, write_text
from sbrush.storage.locks import SOFT, hold
from sbrush.training.config import check_same, read_config
from sbrush.training.curves import draw_curves
from sbrush.training.folder import LOCK, check_folder
from sbrush.training.health import TeacherReference, alarms
from sbrush.training.recipes import Recipe
from sbrush.training.request import Intervals

GRID_SEEDS = 3


@dataclasses.dataclass(frozen=True)
class Run:
    """The folder `out` of one run. `recipe.steps` counts the steps that were added to config["recipe"]'s."""

    out: Path
    config: dict[str, Any]
    recipe: Recipe
    every: Intervals = Intervals()
    teacher_steps: int = 25

    @classmethod
    def plan(cls, out: Path, config: dict[str, Any], recipe: Recipe, every: Intervals, *, extend: int = 0) -> Run:
        """The run that `config` means in `out`: a new one, the rest of one, or one extended by `extend` steps.

        A complete run gets that many more; an incomplete one must be finished first. SbrushError otherwise.
        """
        before: list[int] = []
        if (out / "config.json").is_file():
            before = read_config(out).get("extended_by", [])
        elif extend:
            raise SbrushError(f"no run in {printable(out)} to extend", "leave --extend out, or name its --out", code=2)

        def run(added: list[int]) -> Run:
            longer = dataclasses.replace(recipe, steps=recipe.steps + sum(added))
            return cls(out, {**config, "extended_by": added}, longer, every)

        now = run(before)
        if not extend or (not now.complete and before[-1:] == [extend]):
            return now
        if not now.complete:
            raise SbrushError(
                f"the run in {printable(out)} has not finished its {count(now.recipe.steps, 'step')} yet",
                "give the same command without --extend first",
                code=2,
            )
        return run([*before, extend])

    @property
    def checkpoints(self) -> Path:
        return self.out / "checkpoints"

    @property
    def student(self) -> Path:
        return self.out / "student"

    @property
    def complete(self) -> bool:
        """Whether the run has its student, of all its steps; an export is whole or not there at all."""
        try:
            about = json.loads((self.student / "sbrush.json").read_text(encoding="utf-8"))
            return bool(about["recipe"]["steps"] == self.recipe.steps)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    @property
    def reference(self) -> TeacherReference:
        """Statistics of the teacher's images, as `start` has written them."""
        return TeacherReference(**json.loads((self.out / "samples" / "teacher.json").read_text(encoding="utf-8")))

    def claim(self) -> AbstractContextManager[object]:
        """Locks the folder for this run, for as long as what is returned is held: see `claim` below."""
        return claim(self.out, self.config)

    def start(self, teacher: Model, *, after_step: int) -> list[dict[str, Any]]:
        """Cuts the log back to the step that training resumes from, and draws the teacher's grid once.

        Returns the log's entries.
        """
        self.checkpoints.mkdir(exist_ok=True)
        kept = [entry for entry in read_log(self.out) if entry["step"] <= after_step]
        write_text(self.out / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in kept))
        if not self.every.grid:
            return kept
        try:
            known = len(self.reference.mean) == teacher.latent_shape[0]
        except (OSError, ValueError, TypeError, RuntimeError):  # none yet, or damaged
            known = False
        if not known:
            self._measure_teacher(teacher)
        return kept

    def _measure_teacher(self, teacher: Model) -> None:
        """Draws the teacher's grid and records statistics of its images."""
        texts, seeds = self._grid()
        set_role(teacher.unet, "teacher")
        latents, drawn = [], []
        with progress(f"teacher's images, {self.teacher_steps} steps", len(texts), unit="images") as bar:
            scale = guidance_scale_of(teacher, None)
            for part in teacher_latents(teacher, texts, seeds, steps=self.teacher_steps, guidance=scale, batch=8):
                latents.append(part)
                drawn.append(teacher.decode(part))
                bar.advance(len(part))
        self._save_grid("teacher.png", torch.cat(drawn))
        reference = TeacherReference.of(torch.cat(latents).unflatten(0, (GRID_SEEDS, -1)))
        write_json(self.out / "samples" / "teacher.json", dataclasses.asdict(reference))

    def log(self, step: int, values: Mapping[str, float | None], before: list[dict[str, Any]]) -> None:
        """Appends an entry to log.jsonl and to those `before` it; reports new alarms."""
        entry: dict[str, Any] = {"step": step}
        entry |= {k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}
        raised = alarms([*before, entry])
        if raised:
            entry["alarms"] = [alarm.name for alarm in raised]
        new = [alarm for alarm in raised if not before or alarm.name not in before[-1].get("alarms", ())]
        for alarm in new:
            info(f"\nalarm: {alarm.name} at step {step}: {alarm.meaning} (docs/distilling.md: when an alarm rings)")
        if torch.cuda.is_available():
            entry["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        entry["time"] = round(time.time(), 1)
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        before.append(entry)

    def curves(self, log: list[dict[str, Any]]) -> None:
        """Draws the log's entries."""
        draw_curves(log, self.out / "curves.png")

    def draw(self, student: Model) -> list[Tensor]:
        """The latents of the student's sample grid."""
        return list(student_latents(student, *self._grid(), batch=8))

    def grids(
        self, step: int, teacher: Model, latents: list[Tensor], views: Mapping[str, Tensor], reference: TeacherReference
    ) -> dict[str, float]:
        """Writes the student's sample grid, of `draw`, and the method's views of x0 of the step's own batch, by label.

        Returns the spread of the grid's images, as shares of the teacher's.
        """
        self._save_grid(f"step-{step:06d}.png", torch.cat([teacher.decode(part) for part in latents]))
        rows = [list(teacher.decode(view[:8].float())) for view in views.values()]
        images.save_png(self.out / "samples" / f"x0-{step:06d}.png", images.image_grid(rows, row_labels=list(views)))
        return reference.compare_spreads(torch.cat(latents).unflatten(0, (GRID_SEEDS, -1)))

    def export(
        self, teacher: Model, unet: UNet2DConditionModel, *, trained: UNet2DConditionModel, init: Model | None
    ) -> None:
        """Writes `student/` with `unet`, and of a LoRA student, within `trained`, `student-lora/` too."""
        about = about_student(self.config, dataclasses.asdict(self.recipe), teacher, init)
        scheduler = Sampling(**self.config["sampling"]).scheduler(teacher.scheduler, self.recipe.t_init)
        if self.recipe.student_rank:
            export_lora(self.out / "student-lora", teacher, trained, "student", about=about, scheduler=scheduler)
        export_student(self.student, teacher, unet, about=about, scheduler=scheduler)

    def _grid(self) -> tuple[list[str], list[int]]:
        """Prompts and seeds of the sample grids: a column a prompt, a row a seed."""
        chosen = self.config["grid_prompts"]
        return chosen * GRID_SEEDS, [seed for seed in range(1, GRID_SEEDS + 1) for _ in chosen]

    def _save_grid(self, name: str, drawn: Tensor) -> None:
        chosen = self.config["grid_prompts"]
        rows = [list(row) for row in drawn.split(len(chosen))]
        labels = [f"seed {seed}" for seed in range(1, GRID_SEEDS + 1)]
        images.save_png(self.out / "samples" / name, images.image_grid(rows, row_labels=labels, column_labels=chosen))


def claim(out: Path, config: dict[str, Any]) -> AbstractContextManager[object]:
    """Locks a folder for what `config` says, for as long as what is returned is held; writes it to config.json.

    SbrushError if the folder holds something else or another configuration, is in use, or cannot be written.
    """
    shown = printable(out)
    file = out / "config.json"
    check_folder(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK):
            raise PermissionError(13, "Permission denied")
        with ExitStack() as held:
            held.enter_context(hold(out / LOCK, wait=False))
            if not file.is_file():
                write_json(file, config)
            before = read_config(out)
            check_same(before, config, out)
            if before.get("extended_by", []) != config.get("extended_by", []):
                write_json(file, config)
            return held.pop_all()
    except Timeout as taken:
        left = f"; if there is none, remove {printable(taken.lock_file)}" if taken.lock_file.endswith(SOFT) else ""
        raise SbrushError(
            f"another run is using {shown}", f"wait for it, or name another folder with --out{left}", code=2
        ) from None
    except OSError as problem:
        raise SbrushError(
            f"cannot write to {shown}: {problem.strerror}",
            "make room there or change its permissions, or name another folder with --out",
        ) from None


def _loggable(value: object) -> bool:
    named = isinstance(value, list) and all(isinstance(name, str) for name in value)  # alarms
    return named or value is None or (isinstance(value, int | float) and abs(value) < 1e15)


def read_log(out: Path) -> list[dict[str, Any]]:
    """The entries of a run's log.jsonl; lines that are none, such as one cut short by a kill, are left out."""
    file, entries = out / "log.jsonl", []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int) and all(map(_loggable, entry.values())):
            entries.append(entry)
    return entries

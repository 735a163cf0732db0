"""A training run's folder: what was asked, what happened, how it looks, what came out.

config.json             everything that decides the result; the same command resumes, a changed one is refused
log.jsonl               one line every few steps, see METRICS
samples/step-000200.png the student's pictures, same prompts and seeds each time; samples/teacher.png beside them
samples/x0-000200.png   one batch: student x0, the teacher's and the LoRA teacher's guess of it from x_t
checkpoints/            the newest two states (checkpoint.py)
student/                the result, a folder for diffusers
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sbrush
from sbrush import pictures
from sbrush.console import SbrushError, printable, progress
from sbrush.files import write_json, write_text
from sbrush.prompts import Prompts
from sbrush.recipes import Recipe
from sbrush.sample import scale_for, student_pictures, teacher_pictures
from sbrush.weights import Model, export_student, one_step_scheduler

FORMAT = 1
METRICS = ("gap", "student_loss", "lora_loss", "x0_mean", "x0_std", "student_grad", "lora_grad")
SHEET_PROMPTS, SHEET_SEEDS = 8, 3
NOT_COMPARED = ("version",)  # keys of config.json that may change between parts of one run


@dataclasses.dataclass(frozen=True)
class Intervals:
    """How often a run is written down, in steps."""

    log: int = 10
    sheet: int = 200
    checkpoint: int = 200


@dataclasses.dataclass(frozen=True)
class Run:
    """The folder `out` of one run."""

    out: Path
    config: dict[str, Any]
    recipe: Recipe
    every: Intervals = Intervals()
    teacher_steps: int = 25

    @property
    def checkpoints(self) -> Path:
        return self.out / "checkpoints"

    @property
    def student(self) -> Path:
        return self.out / "student"

    @property
    def complete(self) -> bool:
        """Whether the run has its student; an export is whole or not there at all."""
        return (self.student / "model_index.json").is_file()

    def claim(self) -> None:
        """Makes the folder this run's own.

        SbrushError if the folder holds something else, another configuration, or cannot be written.
        """
        shown = printable(self.out)
        file = self.out / "config.json"
        try:
            if self.out.exists() and not self.out.is_dir():
                raise SbrushError(f"{shown} is a file", "name a folder with --out", code=2)
            if self.out.is_dir() and not file.is_file() and any(self.out.iterdir()):
                raise SbrushError(f"{shown} is not empty and no run of sbrush", "name a new folder with --out", code=2)
            self.out.mkdir(parents=True, exist_ok=True)
            if not os.access(self.out, os.W_OK):
                raise PermissionError(13, "Permission denied")
            if not file.is_file():
                write_json(file, self.config)
        except OSError as problem:
            raise SbrushError(
                f"cannot write to {shown}: {problem.strerror}", "name another folder with --out"
            ) from None
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
            changed = differences(before, self.config)
        except (ValueError, AttributeError):
            raise SbrushError(f"{shown}/config.json is damaged", "name a new folder with --out") from None
        if changed:
            raise SbrushError(
                f"{shown} holds a run with another configuration: {'; '.join(changed)}",
                "give the same options to resume it, or another --out to start a new run",
                code=2,
            )

    def begin(self, teacher: Model, *, after_step: int) -> None:
        """Cuts the log back to the step that training goes on from, and draws the teacher's sheet once."""
        log = self.out / "log.jsonl"
        if log.is_file():
            lines = [line for line in log.read_text(encoding="utf-8").splitlines() if _step_of(line) <= after_step]
            write_text(log, "".join(line + "\n" for line in lines))
        if not (self.out / "samples" / "teacher.png").is_file():
            texts, seeds = self._sheet()
            unet = teacher.unet
            unet.disable_adapters()
            parts = []
            with progress(f"teacher's pictures, {self.teacher_steps} steps", len(texts), unit="pictures") as bar:
                scale = scale_for(teacher, None)
                for part in teacher_pictures(teacher, texts, seeds, steps=self.teacher_steps, guidance=scale, batch=8):
                    parts.append(part)
                    bar.advance(len(part))
            unet.enable_adapters()
            self._save_sheet("teacher.png", torch.cat(parts))

    def log(self, step: int, means: dict[str, float], rate: float) -> str:
        """Appends a line to log.jsonl; the note that progress shows."""
        entry = {"step": step, **{k: round(v, 6) for k, v in means.items()}, "pictures_per_second": round(rate, 2)}
        if torch.cuda.is_available():
            entry["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        entry["time"] = round(time.time(), 1)
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        return (
            f"{rate:.3g} pictures/s, gap {means['gap']:.3g}, student loss {means['student_loss']:.3g}, "
            f"LoRA loss {means['lora_loss']:.3g}, x0 {means['x0_mean']:+.2f} ± {means['x0_std']:.2f}"
        )

    def sheets(self, step: int, teacher: Model, unet: nn.Module, result: dict[str, Tensor]) -> None:
        """Draws the student's contact sheet, and the three views of x0 of the step's own batch."""
        texts, seeds = self._sheet()
        cut = one_step_scheduler(teacher, self.recipe.t_init)
        student = dataclasses.replace(
            teacher, unet=unet, about={"reparameterised": self.recipe.reparameterised}, scheduler=cut
        )
        self._save_sheet(f"step-{step:06d}.png", torch.cat(list(student_pictures(student, texts, seeds))))
        views = {"student x0": "x0", "teacher x0": "teacher_x0", "LoRA x0": "lora_x0"}
        rows = [list(teacher.decode(result[name][:8].float())) for name in views.values()]
        pictures.save_png(self.out / "samples" / f"x0-{step:06d}.png", pictures.sheet(rows, row_labels=list(views)))

    def export(self, teacher: Model, unet: nn.Module) -> None:
        """Writes `student/`."""
        about = {
            "version": sbrush.__version__,
            "teacher": self.config["teacher"],
            "reparameterised": self.recipe.reparameterised,
            "recipe": dataclasses.asdict(self.recipe),
            "seed": self.config["seed"],
            "prompts": self.config["prompts"],
        }
        about |= {key: teacher.about[key] for key in ("world", "license") if key in teacher.about}
        export_student(self.student, teacher, unet, about=about, card=model_card(about), t_init=self.recipe.t_init)  # type: ignore[arg-type]

    def _sheet(self) -> tuple[list[str], list[int]]:
        """Prompts and seeds of the contact sheets: a column a prompt, a row a seed."""
        chosen = self.config["sheet_prompts"]
        return chosen * SHEET_SEEDS, [seed for seed in range(1, SHEET_SEEDS + 1) for _ in chosen]

    def _save_sheet(self, name: str, drawn: Tensor) -> None:
        chosen = self.config["sheet_prompts"]
        rows = [list(row) for row in drawn.split(len(chosen))]
        labels = [f"seed {seed}" for seed in range(1, SHEET_SEEDS + 1)]
        pictures.save_png(self.out / "samples" / name, pictures.sheet(rows, row_labels=labels, column_labels=chosen))


def make_config(
    recipe: Recipe,
    prompts: Prompts,
    *,
    teacher: str | None,
    teacher_sha256: str,
    init: str | None,
    init_sha256: str | None,
    seed: int,
    bf16: bool,
) -> dict[str, Any]:
    """What config.json holds."""
    spread = [prompts.texts[i * len(prompts) // SHEET_PROMPTS] for i in range(min(SHEET_PROMPTS, len(prompts)))]
    return {
        "format": FORMAT,
        "version": sbrush.__version__,
        "teacher": teacher or "stickers (built in)",
        "teacher_sha256": teacher_sha256,
        "init": init,
        "init_sha256": init_sha256,
        "prompts": {"source": Path(prompts.source).name, "sha256": prompts.sha256, "count": len(prompts)},
        "seed": seed,
        "bf16": bf16,
        "recipe": dataclasses.asdict(recipe),
        "sheet_prompts": spread,
    }


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """What has changed between two configurations: "recipe.batch was 16, now 8"."""
    changed = []
    for key in dict.fromkeys([*before, *now]):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changed += differences(old, new, f"{prefix}{key}.")
        elif old != new and key not in NOT_COMPARED:
            changed.append(f"{prefix}{key} was {printable(json.dumps(old))}, now {printable(json.dumps(new))}")
    return changed


def model_card(about: dict[str, Any]) -> str:
    """The student's README.md: front matter that the Hub reads, a snippet that runs, how it was made."""
    licence = about.get("license", "the teacher's: not stated in its folder")
    recipe = "\n".join(f"| {key} | {value} |" for key, value in about["recipe"].items())
    teacher = _plain(about["teacher"])
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
tags: [one-step, distillation, swiftbrush, sbrush]
license: {json.dumps(about.get("license", "other"))}
base_model: {json.dumps(teacher)}
---

# A one-step student of {teacher}

Distilled with [SwiftBrush](https://arxiv.org/abs/2312.05239) (Variational Score Distillation) by sbrush
{about["version"]}, from {about["prompts"]["count"]} prompts and no pictures. Licence of the teacher: {_plain(licence)}.
A safety checker, if the teacher came with one, is not part of this folder.

```python
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("path/to/this/folder")
pipe("a cat", num_inference_steps=1, guidance_scale=1).images[0].save("cat.png")
```

One step and no guidance: the scheduler in this folder is made for that. The same picture:
`sbrush sample "a cat" --student path/to/this/folder`.

## Figures

None are recorded here. `sbrush eval --student path/to/this/folder` measures them and names its protocol.

## How it was made

| setting | value |
|---|---|
| seed | {about["seed"]} |
| prompts, SHA-256 | {about["prompts"]["sha256"]} |
{recipe}
"""


def _plain(text: str) -> str:
    """Text that Markdown and YAML take for text."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>#|" else c for c in printable(text))


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line cut short by a kill is dropped

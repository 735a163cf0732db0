"""`sbrush eval`: a student, its teacher at many steps and at one, and the truth, measured side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sbrush.console import info, printable
from sbrush.evaluate.report import Report
from sbrush.evaluate.stickers import Candidate, evaluate_stickers, pairs
from sbrush.models.load import digest, load_student, load_teacher
from sbrush.models.model import Model
from sbrush.models.tokenizers import truncated_prompts
from sbrush.sampling.generation import describe_steps, guidance_scale_of, student_images, teacher_images
from sbrush.stickers.judge import Judge


def evaluate(
    *,
    student: str | None,
    teacher: str | None,
    n: int,
    per_caption: int,
    steps: int,
    guidance: float | None,
    report: Path,
    fresh: bool,
    batch: int,
    device: str,
    dtype: torch.dtype,
    teacher_config: str | None = None,
    start_timestep: int | None = None,
) -> Report:
    """Measures and writes the HTML report; the teacher's figures are remembered, the student's measured each time."""
    one = load_student(student, start_timestep=start_timestep, device=device, dtype=dtype)
    many = load_teacher(teacher, config=teacher_config, device=device, dtype=dtype)
    scale = guidance_scale_of(many, guidance)
    info(f"student {printable(one.name)}, teacher {printable(many.name)} at guidance {scale:g}, {n} held-out pairs")
    candidates = [
        student_candidate(f"student, {describe_steps(one)}", one, batch=batch),
        teacher_candidate(many, steps, scale, batch=batch),
        teacher_candidate(many, 1, scale, batch=batch),
    ]
    result = evaluate_stickers(candidates, Judge.load(device=device), n=n, per_caption=per_caption, fresh=fresh)
    result.protocol["truncated_prompts"] = f"{truncated_prompts(one, [c.text for c, _ in pairs(n)])}"
    result.write_html(report)
    return result


def student_candidate(name: str, model: Model, *, batch: int = 64) -> Candidate:
    """A student to be measured; nothing of it is remembered, for students change."""

    def images(prompts: Sequence[str], seeds: Sequence[int]) -> Iterator[Tensor]:
        return student_images(model, prompts, seeds, batch=batch)

    return Candidate(name, images, steps=1)


def teacher_candidate(model: Model, steps: int, guidance: float, *, batch: int = 64) -> Candidate:
    """A teacher in so many steps at a guidance scale; its figures are remembered."""

    def images(prompts: Sequence[str], seeds: Sequence[int]) -> Iterator[Tensor]:
        return teacher_images(model, prompts, seeds, steps=steps, guidance=guidance, batch=batch)

    name = f"teacher, {steps} step{'s' if steps > 1 else ''}"
    key = f"{digest(model)} {model.unet.dtype} {model.device.type}"
    return Candidate(name, images, steps=steps, guidance=guidance, cache_key=key)

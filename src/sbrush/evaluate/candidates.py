"""`sbrush eval`: a student, its teacher at many steps and at one, and the truth, measured side by side."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sbrush.console import SbrushError, printable, say
from sbrush.evaluate.report import Report
from sbrush.evaluate.stickers import Candidate, evaluate_stickers
from sbrush.sample import scale_for, student_pictures, teacher_pictures
from sbrush.stickers.judge import Judge
from sbrush.weights import Model, digest, load_student, load_teacher


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
) -> Report:
    """Measures and writes the HTML report; the teacher's figures are remembered, the student's measured each time."""
    if report.is_dir() or not os.access(report.absolute().parent, os.W_OK):
        raise SbrushError(f"cannot write {printable(report)}", "choose another --report", code=2)
    one, many = load_student(student, device=device, dtype=dtype), load_teacher(teacher, device=device, dtype=dtype)
    scale = scale_for(many, guidance)
    say(f"student {printable(one.name)}, teacher {printable(many.name)} at guidance {scale:g}, {n} held-out pairs")

    def by_student(prompts: Sequence[str], seeds: Sequence[int]) -> Iterator[Tensor]:
        return student_pictures(one, prompts, seeds, batch=batch)

    key = f"{digest(many)} {dtype} {torch.device(device).type}"
    candidates = [
        Candidate("student, 1 step", by_student, steps=1),
        _teacher(many, steps, scale, batch, key),
        _teacher(many, 1, scale, batch, key),
    ]
    result = evaluate_stickers(candidates, Judge.load(device=device), n=n, per_caption=per_caption, fresh=fresh)
    result.write_html(report)
    return result


def _teacher(model: Model, steps: int, guidance: float, batch: int, key: str) -> Candidate:
    def pictures(prompts: Sequence[str], seeds: Sequence[int]) -> Iterator[Tensor]:
        return teacher_pictures(model, prompts, seeds, steps=steps, guidance=guidance, batch=batch)

    name = f"teacher, {steps} step{'s' if steps > 1 else ''}"
    return Candidate(name, pictures, steps=steps, guidance=guidance, cache_key=key)

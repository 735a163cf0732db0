"""Who draws: a student, and beside it its teacher for comparison. What a drawn image says of where it comes from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

import sbrush
from sbrush.console import SbrushError, count, info
from sbrush.sampling.generation import Drawer, guidance_scale_of, student_images, teacher_images

if TYPE_CHECKING:  # not needed by a student that draws without diffusers
    from sbrush.models.model import Model
    from sbrush.sampling.control import Steering
    from sbrush.sampling.editing import Edit
    from sbrush.sampling.negative_request import Negative

NEGATIVE = ("negative", "negative_method", "negative_scale")


@dataclass(frozen=True)
class Comparison:
    """A teacher whose images stand beside the student's, in `steps` DDIM steps."""

    teacher: Model
    steps: int
    guidance: float

    @classmethod
    def load(
        cls,
        student: Model,
        teacher: str | None,
        *,
        config: str | None = None,
        steps: int = 25,
        guidance: float | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Comparison:
        """With `teacher`, as load_teacher takes it, else with the one that the student names.

        It gets the student's LoRAs. `guidance` None is the teacher's own. SbrushError if the teacher cannot be had.
        """
        from sbrush.models.load import load_teacher
        from sbrush.models.places import teacher_of

        source = teacher or teacher_of(student)
        try:
            loras = [lora.request for lora in student.loras]
            model = load_teacher(source, config=config, loras=loras, device=str(student.device), dtype=dtype)
        except SbrushError as problem:
            if teacher is None:
                problem.hint = f"the student names that teacher; --teacher MODEL takes another. {problem.hint}"
            raise
        return cls(model, steps, guidance_scale_of(model, guidance))

    def with_negative(self, negative: Negative | None) -> Comparison:
        """The same, its guidance taking a negative prompt; a note if it is not guided."""
        if negative and self.guidance == 1:
            info("note: the teacher draws without guidance, and so without the negative prompt")
        from sbrush.sampling.guidance import teacher_with_negative

        return replace(self, teacher=teacher_with_negative(self.teacher, negative))


@dataclass(frozen=True)
class Artist:
    """A student, and with `compare` its teacher. `precision`: the number format of the networks, "float32" ...

    `steps`: the student's; None: as many as it was trained for. `edit`: the image that it starts from. `steering`: what
    steers both.
    """

    student: Drawer
    precision: str
    compare: Comparison | None = None
    start_timestep: int | None = None
    steps: int | None = None
    edit: Edit | None = None
    steering: Steering | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of those who draw, for a grid."""
        student = f"student, {count(self.taken, 'step')}"
        return (student, f"teacher, {count(self.compare.steps, 'step')}") if self.compare else (student,)

    @cached_property
    def taken(self) -> int:
        """How many steps the student takes."""
        return len(self.student.rungs(self.steps))

    @cached_property
    def drawn_by(self) -> dict[str, Any]:
        """What an image depends on besides its prompt and its seed; None for what does not apply."""
        compare = self.compare
        return {
            "weights": self.student.fingerprint,
            "precision": self.precision,
            "runtime": self.student.runtime,
            "start_timestep": self.start_timestep,
            "steps": self.taken,
            "loras": [lora.about for lora in self.student.loras] or None,
            "vae": self.student.decoder.about if self.student.decoder else None,
            **(self.edit.drawn_by if self.edit else {"image": None, "strength": None, "mask": None}),
            **(self.student.negative.drawn_by if self.student.negative else dict.fromkeys(NEGATIVE)),
            "control": self.steering.drawn_by if self.steering else None,
            "teacher_weights": compare.teacher.fingerprint if compare else None,
            "teacher_steps": compare.steps if compare else None,
            "teacher_guidance": compare.guidance if compare else None,
        }

    def altered(self, *, steps: int | None, negative: Negative | None) -> Artist:
        """The same student in other steps, or away from another negative prompt; its weights are not hashed again.

        SbrushError if it does not take so many steps, in so few does not start from its image, or takes no such
        negative prompt.
        """
        student = self.student
        if negative or student.negative:
            if student.runtime is not None:
                raise SbrushError("a negative prompt needs torch", "start with --runtime torch", code=2)
            from sbrush.sampling.guidance import with_negative

            student = with_negative(replace(cast("Model", student), negative=None), negative)
        if self.edit:
            from sbrush.sampling.editing import check_edit

            check_edit(student, steps)
        other = replace(self, student=student, steps=steps)
        away = student.negative.drawn_by if student.negative else dict.fromkeys(NEGATIVE)
        other.__dict__["drawn_by"] = self.drawn_by | away | {"steps": other.taken}
        return other

    def record(self, prompt: str, seed: int | str, **more: object) -> dict[str, Any]:
        """What an image's file says of how it was drawn."""
        height, width = self.student.image_size
        guidance = 1 if self.student.guidance_input is None else self.student.guidance_input
        about = {
            "prompt": prompt, "seed": seed, "steps": self.taken, "guidance": guidance, "sampler": self._sampler,
            "size": f"{width}x{height}", "model": self.student.name, "version": sbrush.__version__,
        }  # fmt: skip
        return about | {key: value for key, value in self.drawn_by.items() if value is not None} | more

    @property
    def _sampler(self) -> str:
        return f"sbrush, {self.student.sampler_name}"

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], *, batch: int) -> Iterator[tuple[Tensor, ...]]:
        """The student's image, uint8 [3, H, W], of each prompt with its seed; with a teacher, its image behind it."""
        control = self.steering.images if self.steering else None
        drawn = [
            student_images(self.student, prompts, seeds, steps=self.steps, edit=self.edit, control=control, batch=batch)
        ]
        if compare := self.compare:
            drawn.append(
                teacher_images(
                    compare.teacher,
                    prompts,
                    seeds,
                    steps=compare.steps,
                    guidance=compare.guidance,
                    control=control,
                    batch=batch,
                )
            )
        for batches in zip(*drawn, strict=True):
            yield from zip(*batches, strict=True)

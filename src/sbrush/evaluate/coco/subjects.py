"""Which models a request measures on COCO, one after another: a teacher, students, or a sweep over one of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sbrush.device import Arithmetic
from sbrush.evaluate.coco.measurement import Subject
from sbrush.evaluate.coco.protocols import Protocol
from sbrush.evaluate.request import CocoRequest
from sbrush.models.load import digest, load_student, load_teacher
from sbrush.models.load_vae import with_vae
from sbrush.models.model import Model
from sbrush.models.places import locate_student
from sbrush.sampling.generation import describe_steps, guidance_scale_of, student_images, teacher_images
from sbrush.sampling.guidance import teacher_with_negative, with_negative
from sbrush.storage import checkpoint


def locate_students(request: CocoRequest) -> list[str]:
    """The students of a sweep, or none. A folder of checkpoints stands for them all, oldest first.

    SbrushError if one of them is not there: better before the first is measured than after.
    """
    names = list[str]()
    if request.sweep is not None and request.models.teacher is None:
        for name in request.sweep.split(","):
            found = checkpoint.paths(Path(name).expanduser())
            names += [str(path) for path in reversed(found)] or [name]
    for name in names:
        locate_student(name)
    return names


@dataclass(frozen=True)
class Generator:
    """Loads the models that a request names, each when its turn comes, and generates their images."""

    request: CocoRequest
    protocol: Protocol
    device: str
    arithmetic: Arithmetic

    def subjects(self, students: Sequence[str]) -> Iterator[Subject]:
        """The teacher at its guidance scales; or `students`, or else the one student of the request."""
        models = self.request.models
        if models.teacher is None:
            names: Sequence[str | None] = students or [models.student]
            for name in names:
                yield self._student(name)
        elif self.request.sweep is None:
            yield self._teacher(models.teacher_guidance)
        else:
            for scale in self.request.scales:
                yield self._teacher(scale)

    def _student(self, name: str | None) -> Subject:
        start, steps = self.request.models.start_timestep, self.request.models.steps
        loras = self.request.models.loras
        one = load_student(name, start_timestep=start, loras=loras, device=self.device, dtype=self.arithmetic.dtype)
        one = with_negative(with_vae(one, self.request.models.vae), self.request.models.negative)
        scale = 1 if one.guidance_input is None else one.guidance_input
        about = {"kind": "student", "sha256": digest(one), "steps": len(one.rungs(steps)), "guidance": scale}
        about |= {"start_timestep": one.start_timestep, "noise_scale": one.noise_scale}
        about |= (one.negative.drawn_by if one.negative else {}) | _loras(one)
        about |= {"vae": one.decoder.about} if one.decoder else {}

        def images(texts: list[str], seeds: list[int]) -> Iterator[Tensor]:
            drawn = student_images(one, texts, seeds, steps=steps, batch=self._batch, truncate=self._truncate)
            return self.arithmetic.each(drawn, self.device)

        return Subject(
            f"{one.name}, {describe_steps(one, steps)}",
            about | self._how,
            images,
            truncated=one.truncated_prompts,
        )

    def _teacher(self, guidance: float | None) -> Subject:
        models = self.request.models
        many = load_teacher(
            models.teacher,
            config=models.teacher_config,
            loras=models.loras,
            device=self.device,
            dtype=self.arithmetic.dtype,
        )
        many = teacher_with_negative(many, models.negative)
        steps, scale = models.teacher_steps, guidance_scale_of(many, guidance)
        about = {"kind": "teacher", "sha256": digest(many), "steps": steps, "guidance": scale}
        about |= ({"negative": many.null_prompt} if many.null_prompt else {}) | _loras(many)

        def images(texts: list[str], seeds: list[int]) -> Iterator[Tensor]:
            drawn = teacher_images(
                many, texts, seeds, steps=steps, guidance=scale, batch=self._batch, truncate=self._truncate
            )
            return self.arithmetic.each(drawn, self.device)

        name = f"{many.name}, {steps} steps, guidance {scale:g}"
        return Subject(name, about | self._how, images, truncated=many.truncated_prompts)

    @property
    def _batch(self) -> int:
        return self.request.execution.batch

    @property
    def _truncate(self) -> bool:
        return self.protocol.cast == "truncate"

    @property
    def _how(self) -> dict[str, Any]:
        """What an image depends on besides its model; the batch by rounding alone."""
        return {"precision": str(self.arithmetic), "batch": self._batch, "cast": self.protocol.cast}


def _loras(model: Model) -> dict[str, Any]:
    """What a manifest says of a model's LoRAs, if it has any."""
    return {"loras": [lora.about for lora in model.loras]} if model.loras else {}

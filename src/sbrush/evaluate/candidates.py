"""`sbrush eval` on the built-in world: a student, its teacher at many steps and at one, and real images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from sbrush.console import count, info, printable
from sbrush.device import Arithmetic, pick_arithmetic, pick_device
from sbrush.evaluate.report import Report
from sbrush.evaluate.request import StickersRequest
from sbrush.evaluate.stickers import Candidate, evaluate_stickers, pairs
from sbrush.models.load import digest, load_student, load_teacher
from sbrush.models.load_vae import with_vae
from sbrush.models.model import Model
from sbrush.sampling.generation import describe_steps, guidance_scale_of, student_images, teacher_images
from sbrush.sampling.guidance import teacher_with_negative, with_negative
from sbrush.stickers.judge import Judge

FLOAT32 = Arithmetic()


def evaluate(request: StickersRequest) -> Report:
    """Measures and writes the report. The teacher's metrics are cached, the student's measured each time."""
    models, batch = request.models, request.execution.batch
    device = pick_device(request.execution.device)
    arithmetic = pick_arithmetic(request.execution.precision, device, "eval")
    dtype = arithmetic.dtype
    one = load_student(
        models.student, start_timestep=models.start_timestep, loras=models.loras, device=device, dtype=dtype
    )
    many = load_teacher(models.teacher, config=models.teacher_config, loras=models.loras, device=device, dtype=dtype)
    one = with_vae(one, models.vae)
    one, many = with_negative(one, models.negative), teacher_with_negative(many, models.negative)
    scale = guidance_scale_of(many, models.teacher_guidance)
    info(
        f"student {printable(one.name)}, teacher {printable(many.name)} at guidance {scale:g}, "
        f"{request.limit} held-out pairs, {request.diversity} images of each of diversity's captions"
    )
    candidates = [
        student_candidate(
            f"student, {describe_steps(one, models.steps)}", one, models.steps, batch=batch, arithmetic=arithmetic
        ),
        teacher_candidate(many, models.teacher_steps, scale, batch=batch, arithmetic=arithmetic),
        teacher_candidate(many, 1, scale, batch=batch, arithmetic=arithmetic),
    ]
    result = evaluate_stickers(
        candidates, Judge.load(device=device), n=request.limit, per_caption=request.diversity, fresh=request.fresh
    )
    texts = [caption.text for caption, _ in pairs(request.limit)]
    if one.loras:
        result.protocol["loras"] = describe_loras(one)
    if one.decoder:
        result.protocol["vae"] = f"{one.decoder.name} (sha256 {one.decoder.sha256}) decodes the student's images"
    result.protocol["truncated_prompts"] = f"{one.truncated_prompts(texts)}"
    if one.negative:
        result.protocol.update({name: f"{value}" for name, value in one.negative.drawn_by.items()})
    result.write(request.report)
    return result


def describe_loras(model: Model) -> str:
    """A model's LoRAs in words, for a report: "blueprint (weight 0.8, sha256 0123456789abcdef)"."""
    return ", ".join("{name} (weight {weight:g}, sha256 {sha256})".format(**lora.about) for lora in model.loras)


def student_candidate(
    name: str, model: Model, steps: int | None = None, *, batch: int = 64, arithmetic: Arithmetic = FLOAT32
) -> Candidate:
    """A student to be measured in `steps` steps (None: as it was trained); nothing is cached, for students change."""

    def images(prompts: Sequence[str], seeds: Sequence[int]) -> Iterator[Tensor]:
        return arithmetic.each(student_images(model, prompts, seeds, steps=steps, batch=batch), model.device.type)

    return Candidate(name, images, steps=len(model.rungs(steps)))


def teacher_candidate(
    model: Model, steps: int, guidance: float, *, batch: int = 64, arithmetic: Arithmetic = FLOAT32
) -> Candidate:
    """A teacher in so many steps at a guidance scale; its metrics are cached."""

    def images(prompts: Sequence[str], seeds: Sequence[int]) -> Iterator[Tensor]:
        drawn = teacher_images(model, prompts, seeds, steps=steps, guidance=guidance, batch=batch)
        return arithmetic.each(drawn, model.device.type)

    name = f"teacher, {count(steps, 'step')}"
    key = f"{digest(model)} {arithmetic} {model.device.type}"
    if model.null_prompt:
        key += f" away from {model.null_prompt}"
    return Candidate(name, images, steps=steps, guidance=guidance, cache_key=key)

"""Student to images in one step or a few; the teacher's many steps for comparison."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from sbrush.console import SbrushError, count, printable
from sbrush.core import Conditioning, Denoiser, NoiseSchedule, Prediction, guide, student_input, student_x0, with_null
from sbrush.noise import image_noise, step_noises

if TYPE_CHECKING:  # a student whose networks are ONNX graphs draws without diffusers
    from diffusers import DDIMScheduler

    from sbrush.models.lora_request import AddedLora
    from sbrush.models.model import Model
    from sbrush.models.negative_attention import NegativePrompt
    from sbrush.models.vae_source import Decoder
    from sbrush.sampling.editing import Edit


class Drawer(Protocol):
    """What drawing asks of a student: models.model.Model and onnx.model.OnnxModel are such."""

    name: str
    about: dict[str, Any]
    noise_scale: float
    start_timestep: int | None

    @property
    def runtime(self) -> str | None: ...
    @property
    def latent_shape(self) -> tuple[int, int, int]: ...
    @property
    def image_size(self) -> tuple[int, int]: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def schedule(self) -> NoiseSchedule: ...
    @property
    def prediction(self) -> Prediction: ...
    @property
    def fresh_noise(self) -> bool: ...
    @property
    def sampler_name(self) -> str: ...
    @property
    def guidance_input(self) -> float | None: ...
    @property
    def negative(self) -> NegativePrompt | None: ...
    @property
    def loras(self) -> tuple[AddedLora, ...]: ...
    @property
    def decoder(self) -> Decoder | None: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def longest_prompt(self) -> int: ...
    @property
    def step_choices(self) -> tuple[int, ...]: ...
    def truncated_prompts(self, texts: Sequence[str]) -> int: ...
    def rungs(self, steps: int | None = None) -> tuple[int, ...]: ...
    def encode(self, texts: Sequence[str]) -> Conditioning: ...
    def denoise(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor: ...
    def encode_images(self, images: Tensor) -> Tensor: ...
    def decode(self, x0: Tensor, *, truncate: bool = False) -> Tensor: ...


class Overflow(SbrushError):
    """Latents or images that are not finite: there is no image of them."""

    def __init__(self, model: Drawer) -> None:
        super().__init__(
            f"{printable(model.name)} draws no image: its numbers overflow",
            "try --precision float32; if that does not help, its weights are damaged",
        )


def student_images(
    student: Drawer,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int | None = None,
    edit: Edit | None = None,
    control: Tensor | None = None,
    batch: int = 32,
    truncate: bool = False,
) -> Iterator[Tensor]:
    """One image for each pair of prompt and seed, in order, as uint8 [b, 3, H, W] on the CPU.

    An image depends on its prompt and seed alone, and on what shares its batch only by rounding. `steps`: of the
    student; None: as many as it was trained for. `edit`: an image to start from. `control`: images for the
    student's ControlNets, float32 [P, N, 3, H, W] in 0 .. 1, P being 1 or the prompts. `truncate`: see Model.decode.
    Raises Overflow, or SbrushError if the student does not take so many steps.
    """
    latents = student_latents(student, prompts, seeds, steps=steps, edit=edit, control=control, batch=batch)
    images = _decoded(student, latents, truncate)
    return map(edit.compose, images) if edit else images


@torch.inference_mode()
def student_latents(
    student: Drawer,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int | None = None,
    edit: Edit | None = None,
    control: Tensor | None = None,
    batch: int = 32,
) -> Iterator[Tensor]:
    """The same before decoding: x0, float32 [b, C, H, W] on the student's device."""
    reparameterised = student.about.get("reparameterised", True)
    rungs, schedule, prediction = student.rungs(steps), student.schedule, student.prediction
    fresh = len(rungs) - 1 if student.fresh_noise else 0
    entry = edit.entry(rungs) if edit else 0
    controls = _controls(student, control, len(prompts), batch)
    for (some_prompts, some_seeds), steering in zip(_batches(prompts, seeds, batch), controls, strict=True):
        cond = _embed(student, some_prompts) | steering
        noises = [noise.to(student.device) for noise in step_noises(some_seeds, student.latent_shape, 1 + fresh)]
        z, known = student.noise_scale * noises[0], None
        if edit:
            z, known = edit.start(student, noises[entry if fresh else 0], rungs[entry])
        later = noises[1 + entry :] if fresh else None
        x = student_input(student.denoise, z, later, rungs[entry:], cond, schedule, prediction, known)
        t = schedule.start(len(z), rungs[-1])
        output = student.denoise(x, t, cond)
        yield student_x0(output, x, t, schedule, prediction, reparameterised=reparameterised)


def teacher_images(
    teacher: Model,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float,
    control: Tensor | None = None,
    batch: int = 32,
    truncate: bool = False,
) -> Iterator[Tensor]:
    """The same from a teacher, in `steps` DDIM steps from T on with classifier-free guidance."""
    latents = teacher_latents(teacher, prompts, seeds, steps=steps, guidance=guidance, control=control, batch=batch)
    return _decoded(teacher, latents, truncate)


@torch.inference_mode()
def teacher_latents(
    teacher: Model,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float,
    control: Tensor | None = None,
    batch: int = 32,
) -> Iterator[Tensor]:
    """The same before decoding: x0, float32 [b, C, H, W] on the teacher's device."""
    null = teacher.null()
    controls = _controls(teacher, control, len(prompts), batch)
    for (some_prompts, some_seeds), steering in zip(_batches(prompts, seeds, batch), controls, strict=True):
        x = image_noise(some_seeds, teacher.latent_shape).to(teacher.device)
        cond = _embed(teacher, some_prompts) | steering
        yield ddim(teacher.denoise, teacher.scheduler, x, cond, null | steering, steps=steps, guidance=guidance)


@torch.no_grad()
def ddim(
    denoise: Denoiser,
    scheduler: DDIMScheduler,
    z: Tensor,
    cond: Conditioning,
    null: Conditioning,
    *,
    steps: int,
    guidance: float,
) -> Tensor:
    """The teacher's image of noise z [B, C, H, W]: from T on in `steps` steps of DDIM, guided. Float32, like z."""
    from sbrush.models.schedule import timesteps_of

    scheduler, x = type(scheduler).from_config(scheduler.config), z.float()
    for step in timesteps_of(scheduler, steps):
        t = torch.full((len(x),), int(step), device=x.device)  # nothing waits for that, as a copy to a GPU would
        if guidance == 1:
            output = denoise(x, t, cond)
        else:
            both = denoise(torch.cat([x, x]), torch.cat([t, t]), with_null(cond, null))
            cond_output, null_output = both.float().chunk(2)
            output = guide(cond_output, null_output, guidance)  # eps and v are both linear in it
        x = scheduler.step(output.float(), int(step), x).prev_sample
    return x


def guidance_scale_of(teacher: Model, guidance: float | None) -> float:
    """The guidance scale asked for, else the one that the teacher's folder names, else Stable Diffusion's own 7.5."""
    from sbrush.models.model import GUIDANCE

    return guidance if guidance is not None else float(teacher.about.get("guidance", GUIDANCE))


def describe_steps(student: Drawer, steps: int | None = None) -> str:
    """How many steps a student takes, as reports say it."""
    taken = count(len(student.rungs(steps)), "step")
    return taken if student.start_timestep is None else f"{taken} at t = {student.start_timestep}"


def _decoded(model: Drawer, latents: Iterator[Tensor], truncate: bool) -> Iterator[Tensor]:
    """The latents' images; Overflow if a latent, or what the decoder makes of it, is not finite."""
    for x0 in latents:
        if not x0.isfinite().all():
            raise Overflow(model)
        try:
            images = model.decode(x0, truncate=truncate)
        except FloatingPointError as problem:
            raise Overflow(model) from problem
        yield images


def _batches(prompts: Sequence[str], seeds: Sequence[int], size: int) -> Iterator[tuple[Sequence[str], Sequence[int]]]:
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts for {len(seeds)} seeds")
    for start in range(0, len(prompts), size):
        yield prompts[start : start + size], seeds[start : start + size]


def _controls(model: Drawer, control: Tensor | None, images: int, size: int) -> Iterator[Conditioning]:
    """For each batch, what its conditioning has besides the prompts: "control", if there are control images."""
    for start in range(0, images, size):
        if control is None:
            yield {}
            continue
        some = min(size, images - start)
        own = control if len(control) == 1 else control[start : start + some]
        yield {"control": own.to(model.device).expand(some, -1, -1, -1, -1)}


def _embed(model: Drawer, prompts: Sequence[str]) -> Conditioning:
    """The conditioning of each prompt, each distinct one encoded once."""
    distinct = list(dict.fromkeys(prompts))
    place = {prompt: i for i, prompt in enumerate(distinct)}
    places = [place[prompt] for prompt in prompts]
    return {name: value[places] for name, value in model.encode(distinct).items()}

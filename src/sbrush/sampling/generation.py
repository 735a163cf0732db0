"""Student to images in one step; the teacher's many steps for comparison."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from PIL import Image
from torch import Tensor

import sbrush
from sbrush.console import SbrushError, info, printable, progress
from sbrush.core import Conditioning, Denoiser, guide, student_x0, with_null
from sbrush.models.load import load_student, load_teacher
from sbrush.models.model import Model
from sbrush.noise import image_noise
from sbrush.sampling.images import image_grid, save_png, to_image
from sbrush.stickers.world import unknown_words


def student_images(
    student: Model, prompts: Sequence[str], seeds: Sequence[int], *, batch: int = 32
) -> Iterator[Tensor]:
    """One image for each pair of prompt and seed, in order, as uint8 [b, 3, H, W] on the CPU.

    A image depends on its prompt and seed alone, not on what shares its batch (but for rounding).
    """
    return _decoded(student, student_latents(student, prompts, seeds, batch=batch))


@torch.inference_mode()
def student_latents(
    student: Model, prompts: Sequence[str], seeds: Sequence[int], *, batch: int = 32
) -> Iterator[Tensor]:
    """The same before decoding: x0, float32 [b, C, H, W] on the student's device."""
    reparameterised = student.about.get("reparameterised", True)
    for some_prompts, some_seeds in _batches(prompts, seeds, batch):
        z = student.noise_scale * image_noise(some_seeds, student.latent_shape).to(student.device)
        t = student.schedule.start(len(z), student.start_timestep)
        output = student.denoise(z, t, _embed(student, some_prompts))
        yield student_x0(output, z, t, student.schedule, student.prediction, reparameterised=reparameterised)


def teacher_images(
    teacher: Model, prompts: Sequence[str], seeds: Sequence[int], *, steps: int, guidance: float, batch: int = 32
) -> Iterator[Tensor]:
    """The same from a teacher, in `steps` DDIM steps from T on with classifier-free guidance."""
    latents = teacher_latents(teacher, prompts, seeds, steps=steps, guidance=guidance, batch=batch)
    return _decoded(teacher, latents)


@torch.inference_mode()
def teacher_latents(
    teacher: Model, prompts: Sequence[str], seeds: Sequence[int], *, steps: int, guidance: float, batch: int = 32
) -> Iterator[Tensor]:
    """The same before decoding: x0, float32 [b, C, H, W] on the teacher's device."""
    null = teacher.null()
    for some_prompts, some_seeds in _batches(prompts, seeds, batch):
        x = image_noise(some_seeds, teacher.latent_shape).to(teacher.device)
        cond = _embed(teacher, some_prompts)
        yield ddim(teacher.denoise, teacher.scheduler, x, cond, null, steps=steps, guidance=guidance)


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
    scheduler, x = DDIMScheduler.from_config(scheduler.config), z.float()
    scheduler.set_timesteps(steps)
    for step in scheduler.timesteps:
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
    return guidance if guidance is not None else float(teacher.about.get("guidance", 7.5))


def describe_steps(student: Model) -> str:
    """What a student takes, for reports."""
    return "1 step" if student.start_timestep is None else f"1 step at t = {student.start_timestep}"


def sample_to_files(
    prompts: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    *,
    student: str | None,
    teacher: str | None,
    compare: bool,
    steps: int,
    guidance: float | None,
    metadata: bool,
    batch: int,
    device: str,
    dtype: torch.dtype,
    teacher_config: str | None = None,
    start_timestep: int | None = None,
) -> list[Path]:
    """Draws every prompt with every seed and writes the images; the paths written.

    `out` with a suffix is one PNG: the image itself, or a grid with a row a prompt and a column a seed. Otherwise it
    is a folder that gets a PNG for each image. With `compare` an image has the teacher's on its right.
    """
    _check_target(out)
    model = load_student(student, start_timestep=start_timestep, device=device, dtype=dtype)
    if strange := sorted({word for prompt in prompts for word in unknown_words(prompt)}):
        if model.about.get("world") == "stickers":
            info(f"note: the built-in world has never seen: {printable(', '.join(strange))}")
    pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
    texts, numbers = [p for p, _ in pairs], [s for _, s in pairs]
    drawn = _gather("drawing", student_images(model, texts, numbers, batch=batch), len(pairs))
    if compare:
        other = load_teacher(teacher, config=teacher_config, device=device, dtype=dtype)
        theirs = teacher_images(
            other, texts, numbers, steps=steps, guidance=guidance_scale_of(other, guidance), batch=batch
        )
        beside = _gather(f"the teacher, {steps} steps", theirs, len(pairs))
    about = [
        {
            "prompt": prompt, "seed": seed, "steps": 1, "guidance": 1, "sampler": "SwiftBrush one step",
            "size": f"{drawn.shape[-1]}x{drawn.shape[-2]}", "model": model.name, "version": sbrush.__version__,
        }
        | ({"start_timestep": start_timestep} if start_timestep is not None else {})
        for prompt, seed in pairs
    ]  # fmt: skip

    def image(i: int) -> Image.Image:
        if compare:
            return image_grid([[drawn[i], beside[i]]], column_labels=["student, 1 step", f"teacher, {steps} steps"])
        return to_image(drawn[i])

    if not out.suffix:
        names = [out / f"{seed}-{_slug(prompt)}.png" for prompt, seed in pairs]
        names = [n.with_stem(f"{n.stem}-{i}") if n in names[:i] else n for i, n in enumerate(names)]
        for i, name in enumerate(names):
            save_png(name, image(i), about[i] if metadata else None)
        return names
    if len(pairs) == 1:
        save_png(out, image(0), about[0] if metadata else None)
        return [out]
    rows, labels = [list(row) for row in drawn.split(len(seeds))], list(prompts)
    if compare:
        rows = [row for one, two in zip(rows, beside.split(len(seeds)), strict=True) for row in (one, list(two))]
        labels = [text for prompt in prompts for text in (prompt, f"  teacher, {steps} steps")]
    whole: dict[str, Any] = about[0] | {"seed": " ".join(map(str, seeds)), "prompt": "\n".join(prompts), "grid": True}
    columns = [f"seed {seed}" for seed in seeds]
    save_png(out, image_grid(rows, row_labels=labels, column_labels=columns), whole if metadata else None)
    return [out]


def _decoded(model: Model, latents: Iterator[Tensor]) -> Iterator[Tensor]:
    """The latents' images; SbrushError if a latent is not finite, of which no image follows."""
    for x0 in latents:
        if not x0.isfinite().all():
            raise SbrushError(
                f"{printable(model.name)} draws what is no image: its numbers overflow",
                "try --dtype float32; if that does not help its weights are damaged",
            )
        yield model.decode(x0)


def _gather(what: str, batches: Iterator[Tensor], total: int) -> Tensor:
    parts = []
    with progress(what, total, unit="images") as bar:
        for part in batches:
            parts.append(part)
            bar.advance(len(part))
    return torch.cat(parts)


def _check_target(out: Path) -> None:
    """SbrushError, before any work is done, if nothing can be written there."""
    if out.suffix and out.suffix.lower() != ".png":
        raise SbrushError(f"cannot write {printable(out.name)}: images are PNG", "name it something.png", code=2)
    if (out.suffix and out.is_dir()) or (not out.suffix and out.is_file()):
        raise SbrushError(f"{printable(out)} is in the way", "-o takes a .png file, or a folder without a dot", code=2)
    folder = out.parent if out.suffix else out
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as problem:
        raise SbrushError(f"cannot write to {printable(folder)}: {problem.strerror}", "choose another -o") from None


def _slug(text: str) -> str:
    """The start of a prompt as part of a file name."""
    return re.sub(r"[^\w]+", "-", text.lower()).strip("-")[:60] or "prompt"


def _batches(prompts: Sequence[str], seeds: Sequence[int], size: int) -> Iterator[tuple[Sequence[str], Sequence[int]]]:
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts for {len(seeds)} seeds")
    for start in range(0, len(prompts), size):
        yield prompts[start : start + size], seeds[start : start + size]


def _embed(model: Model, prompts: Sequence[str]) -> Conditioning:
    """What the UNet is told, each distinct prompt encoded once."""
    distinct = list(dict.fromkeys(prompts))
    place = {prompt: i for i, prompt in enumerate(distinct)}
    places = [place[prompt] for prompt in prompts]
    return {name: value[places] for name, value in model.encode(distinct).items()}

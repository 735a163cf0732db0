"""What a run needs, estimated beforehand: parameters, memory, UNet forwards, FLOPs, disk. `sbrush distill --dry-run`

The networks are built with shapes and no numbers, and one training step's heaviest part is played through with them:
every tensor that it would hold is counted, and so is every multiplication. Nothing is loaded, nothing computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from sbrush.console import count as counted
from sbrush.models.control import ControlNet
from sbrush.models.load import load_shapes
from sbrush.models.load_control import control_shapes
from sbrush.models.model import Model
from sbrush.training.accounting import Held, conditioning_shapes, kernels
from sbrush.training.alignment import Alignment
from sbrush.training.images import latent_bytes
from sbrush.training.methods import METHODS, Machine
from sbrush.training.recipes import Recipe
from sbrush.training.request import AlignmentRequest, ExecutionOptions
from sbrush.training.text_cache import row_bytes

GIB = 2**30
DRAWN = 8  # images at once, in a grid and in validation


@dataclass(frozen=True)
class Cost:
    """What a run needs. Memory is that of one process, in bytes, without what torch and the driver keep."""

    parameters: dict[str, int]
    memory: dict[str, int]  # on the device, by what it is for
    host_memory: dict[str, int]  # off it, if it is no CPU
    flops: float  # of one UNet forward for one image
    forwards: float  # UNet forwards an image takes, a backward counted as two
    checkpoint: int  # bytes on disk
    text_cache: int = 0  # bytes on disk
    latents: int = 0  # likewise, of the images to learn from
    before: float = 0  # FLOPs before the first step: the teacher's own images, to learn from
    alignment_flops: float = 0  # an image, of the clamped CLIP loss

    @property
    def peak(self) -> int:
        """Bytes on the device when most is held."""
        return sum(self.memory.values())

    def total(self, recipe: Recipe) -> float:
        """FLOPs of the whole training, the images that it learns from included."""
        return self.before + recipe.steps * recipe.batch * (self.forwards * self.flops + self.alignment_flops)

    def lines(self, recipe: Recipe, device: str, *, keep: int = 2) -> list[str]:
        """The cost as people read it; `keep`: how many checkpoints stay."""
        images, each = recipe.steps * recipe.batch, self.forwards * self.flops + self.alignment_flops
        made = f", {self.before / 1e15:.3g} of them before the first, for the teacher's images" if self.before else ""
        clip = f" and {self.alignment_flops / 1e12:.3g} for the CLIP loss" if self.alignment_flops else ""
        return [
            "",
            *(f"{name:56} {count / 1e6:10.2f} M parameters" for name, count in self.parameters.items()),
            "",
            *(f"{name:56} {size / GIB:10.3f} GiB" for name, size in self.memory.items() if size),
            f"{'expected peak, without what torch and the driver keep':56} {self.peak / GIB:10.3f} GiB",
            *(
                f"{name + ', in host memory':56} {size / GIB:10.3f} GiB"
                for name, size in self.host_memory.items()
                if size
            ),
            f"{f'disk for checkpoints, {keep + 1} while one is written':56} "
            f"{(keep + 1) * self.checkpoint / GIB:10.3f} GiB",
            *([f"{'disk for text embeddings':56} {self.text_cache / GIB:10.3f} GiB"] if self.text_cache else ()),
            *([f"{'disk for latents of images':56} {self.latents / GIB:10.3f} GiB"] if self.latents else ()),
            "",
            f"{self.forwards:g} UNet forwards of {self.flops / 1e12:.3g} TFLOP an image{clip}: {each / 1e12:.3g} TFLOP",
            f"{counted(recipe.steps, 'step')} of {recipe.batch}: {counted(images, 'image')}, "
            + _time(self.total(recipe), device, made),
        ]


def _time(flops: float, device: str, made: str = "") -> str:
    """FLOPs, what some of them are for, and their hours.

    Hours are derived for a GPU alone: small networks are far from a CPU's rate of matrix products.
    """
    hours = "its speed on this CPU shows after ten steps"
    if device.startswith("cuda"):
        hours = f"{flops / 3600e14:.3g} hours at 100 TFLOP/s (an H200 sustained 200, docs/results.md)"
    return f"{flops / 1e15:.3g} PFLOP{made}; {hours}"


def together(trainings: Sequence[tuple[Recipe, Cost]], device: str) -> list[str]:
    """What trainings one after another need, and the merging of their two students, which are full ones by then."""
    students, total = 4 * trainings[0][1].parameters["UNet"], sum(cost.total(recipe) for recipe, cost in trainings)
    return [
        "",
        f"{f'all {len(trainings)} trainings, one after another: expected peak':56} "
        f"{max(cost.peak for _, cost in trainings) / GIB:10.3f} GiB",
        f"{'two students while they are merged, in host memory':56} {2 * students / GIB:10.3f} GiB",
        f"all {len(trainings)} trainings: {_time(total, device)}",
    ]


def smaller(recipe: Recipe, execution: ExecutionOptions) -> str:
    """The options that would make a run smaller and are not in use yet, those that cost least first."""
    options = {
        "--ema-on-cpu": not execution.ema_on_cpu and recipe.ema > 0 and not recipe.student_rank,
        f"--micro-batches {min(4, recipe.batch)}": execution.micro_batches == 1 and recipe.batch > 1,
        "--checkpointing": not execution.checkpointing,
        "--adam-8bit": recipe.optimizer != "adam8bit" and not recipe.student_rank,
        "--student-lora 256": not recipe.student_rank,
        "a smaller --batch": recipe.batch > 1,
    }
    return "these make it smaller: " + ", ".join(option for option, useful in options.items() if useful)


@dataclass(frozen=True)
class Monitoring:
    """What a run draws and scores beside training."""

    grids: bool = True  # sample grids
    validation: int = 0  # parameters of the CLIP model that validates; 0: none


@dataclass(frozen=True)
class Prepared:
    """What a run makes of its own besides: before its first step, kept on disk, or at each step."""

    prompts: int = 0  # whose text embeddings are kept, which takes the text encoder off the device
    images: int = 0  # to learn from, whose latents are kept
    generated: bool = False  # those images are the teacher's own
    control: str | None = None  # a ControlNet, for whose control images a student draws


def estimate(
    source: str | None,
    recipe: Recipe,
    execution: ExecutionOptions,
    machine: Machine = Machine(),
    *,
    config: str | None = None,
    alignment: AlignmentRequest = AlignmentRequest(),
    prepared: Prepared = Prepared(),
    monitoring: Monitoring = Monitoring(),
) -> Cost:
    """The cost of a run with this teacher; SbrushError if the teacher cannot be had. No weights are read.

    With `execution.shard` the processes of `machine` share the student, its gradients, moments and average.
    """
    teacher = load_shapes(source, config=config)
    if prepared.control:
        teacher = replace(teacher, controls=(ControlNet(control_shapes(prepared.control, teacher)),))
    clip = Alignment.shapes(teacher, alignment) if recipe.clip_weight else None
    half_precision = machine.bf16 and machine.device.startswith("cuda")
    with torch.device("meta"):
        step = METHODS[recipe.method].rehearse(recipe, teacher, execution, machine, clip)
        working = step.working
        if monitoring.grids or monitoring.validation:
            others = torch.bfloat16 if half_precision else torch.float32
            working = max(working, _decoding(teacher, nn.Module.to(teacher.vae, others)))
    count = {name: sum(p.numel() for p in network.parameters()) for name, network in _named(teacher).items()}
    count |= step.helpers | {"student, trained": step.student}
    owners = machine.world if execution.shard else 1
    parked = bool(prepared.prompts) and machine.device.startswith("cuda")
    half = 2 if half_precision else 4
    # autocast's, for as long as a step's forward lasts
    copies = 2 * step.student if machine.bf16 and not recipe.student_rank else 0
    working += copies  # its gradients are float32, and were counted as its activations are: in bfloat16
    moments = 2 if recipe.optimizer == "adam8bit" else 8
    average = 4 * step.student if recipe.ema else 0
    share = max(1, recipe.batch // machine.world // execution.micro_batches)
    memory = {
        "teacher's UNet, frozen": (2 if machine.bf16 else 4) * count["UNet"],
        "text encoder and autoencoder, frozen": half * (count["VAE"] + (0 if parked else count["text encoder"])),
        "CLIP model and tiny VAE, frozen": 4 * sum(p.numel() for p in clip.own_parameters()) if clip else 0,
        "CLIP model that validates, float32": 4 * monitoring.validation,
        **step.frozen,
        "student's weights, float32": 4 * step.student // owners,
        "student's weights, a gathered block": 4 * step.largest_block,
        "student's weights, bfloat16 copy": copies,
        "student's Adam": moments * step.student // owners,
        "student's average": 0 if execution.ema_on_cpu else average // owners,
        **{f"{name}: weights, Adam": (4 + moments) * trained for name, trained in step.helpers.items()},
        f"gradients and activations, {counted(share, 'image')} at once": working,
    }
    # What is on its way to the average takes as much again.
    host = {"student's average": 2 * average // owners if execution.ema_on_cpu else 0}
    host["text encoder"] = half * count["text encoder"] if parked else 0
    state = (4 + moments) * (step.student + sum(step.helpers.values())) + average + step.kept
    cache = prepared.prompts * row_bytes(conditioning_shapes(teacher, 1))
    forwards = recipe.image_steps * (1 if recipe.image_guidance == 1 else 2) if prepared.generated else 0
    return Cost(
        count, memory, host, step.flops, step.forwards, state, cache,
        latents=prepared.images * latent_bytes(teacher.latent_shape), before=prepared.images * forwards * step.flops,
        alignment_flops=step.alignment_flops,
    )  # fmt: skip


def _named(model: Model) -> dict[str, nn.Module]:
    encoders = nn.ModuleList([encoder for _, encoder in model.text_parts])
    return {"UNet": model.unet, "text encoder": encoders, "VAE": model.vae}


def _decoding(teacher: Model, vae: Any) -> int:
    """The most bytes held at once while images for a sample grid are decoded."""
    held = Held([vae])
    with held, torch.no_grad(), kernels(autocast=False):
        vae.decode(
            torch.zeros(min(DRAWN, teacher.decoded_at_once), *teacher.latent_shape, dtype=vae.dtype)
        ).sample.float()
    return held.most

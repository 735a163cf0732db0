"""What the training loop asks of a distillation method, and nothing else.

A method is a file beside this one, a subclass of Method, and a line in METHODS (`methods/__init__.py`). Checkpoints,
health, sample grids, validation, the exported folder and the cost estimate all go through this interface.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from sbrush.console import SbrushError
from sbrush.models.ladder import Sampling
from sbrush.models.model import Model
from sbrush.prompts import ShuffledPrompts
from sbrush.storage.checkpoint import Checkpoint
from sbrush.training.alignment import Alignment
from sbrush.training.recipes import Recipe
from sbrush.training.request import ExecutionOptions

if TYPE_CHECKING:  # which knows networks
    from sbrush.training.methods.holding import Held


@dataclass(frozen=True)
class Machine:
    """What a cost estimate is for: one process of `world`."""

    device: str = "cpu"
    bf16: bool = False  # matrix products in bfloat16
    world: int = 1  # processes, which share a batch


@dataclass(frozen=True)
class Rehearsal:
    """One training step played through on shapes without numbers. Bytes are those of one process."""

    student: int  # trained parameters
    helpers: dict[str, int]  # other trained parameters, by name: each has weights and Adam's moments in float32
    working: int  # most bytes of gradients and activations held at once, for one micro-batch
    flops: float  # of one UNet forward for one image
    forwards: float  # UNet forwards for each image of a batch, a backward counted as two
    alignment_flops: float = 0.0  # of the clamped CLIP loss, for one image
    frozen: dict[str, int] = field(default_factory=dict)  # further bytes that stay on the device, by what they are
    kept: int = 0  # bytes of further networks in a checkpoint
    largest_block: int = 0  # parameters of the student's largest block, which FSDP gathers at once


class Method(ABC):
    """A distillation method: what a training step does, and what is kept of it."""

    metrics: ClassVar[tuple[str, ...]]
    """Scalars that `step` returns and log.jsonl records; among them "skipped", 1 if the update was not finite."""
    views: ClassVar[dict[str, str]]
    """Rows of samples/x0-*.png: label -> key of what `step` returns, latents [B, C, H, W]."""

    from_images: ClassVar[bool] = False
    """Whether it learns from images: then it is made with `images`, a training.images.TrainingImages."""
    steerable: ClassVar[bool] = False
    """Whether it trains with the teacher's ControlNets, if the teacher has any."""
    unused: ClassVar[tuple[str, ...]] = ()
    """Settings of a recipe that it does not look at, and which a run may therefore not change."""
    extendable: ClassVar[bool] = True
    """Whether a complete run can go on with more steps."""

    student: nn.Module
    teacher: Model
    trained: dict[str, nn.Parameter]

    def hold(self, held: Held) -> None:
        """Holds samples of other prompts to what a student drew of them before, by a method that has such a setting."""
        raise ValueError("this method has no setting hold")

    @abstractmethod
    def step(self, step: int, prompts: ShuffledPrompts) -> dict[str, Tensor]:
        """One update of everything that is trained; `step` counts from 1. Metrics stay on the device.

        Besides `metrics` the result holds "x0" [B, C, H, W], this process's student latents, and what `views` names.
        """

    @abstractmethod
    def state(self) -> dict[str, dict[str, Tensor]]:
        """Everything that training changes, as named parts of a checkpoint; called on all processes if sharded."""

    @abstractmethod
    def load(self, saved: Checkpoint) -> None:
        """Restores what `state` gave. SbrushError if it does not belong to these networks."""

    @abstractmethod
    def average(self) -> AbstractContextManager[Model]:
        """The student as it would be exported now, as a model, for as long as the context lasts."""

    @abstractmethod
    def exported(self) -> UNet2DConditionModel:
        """That student as a plain UNet in float32; call it within `average`."""

    @abstractmethod
    def summary(self, entry: Mapping[str, float | None]) -> str:
        """A log entry in a few words, for the progress line."""

    @classmethod
    @abstractmethod
    def sampling(cls, recipe: Recipe) -> Sampling:
        """How the student is to be sampled: decides the scheduler that is exported with it."""

    @classmethod
    @abstractmethod
    def check(cls, recipe: Recipe, teacher: Model) -> None:
        """SbrushError if a recipe does not go with a teacher, of which shapes suffice."""

    @classmethod
    @abstractmethod
    def rehearse(
        cls, recipe: Recipe, teacher: Model, execution: ExecutionOptions, machine: Machine, alignment: Alignment | None
    ) -> Rehearsal:
        """What a step costs, played through on a teacher's shapes; called with the meta device as default."""


def split_batch(recipe: Recipe, execution: ExecutionOptions, process: int, world: int) -> list[range]:
    """The micro-batches of one process: sample indices of the global batch. SbrushError if they do not divide it."""
    for whole, what in ((recipe.batch, "a batch"), (recipe.pairs, "pairs"), (recipe.hold, "hold")):
        if whole % world:
            raise SbrushError(
                f"{what} of {whole} cannot be shared by {world} processes", f"choose a multiple of {world}", code=2
            )
    local = recipe.batch // world
    if recipe.hold // world % execution.micro_batches:
        raise SbrushError(
            f"{recipe.hold // world} held samples a process cannot be split into {execution.micro_batches} "
            "micro-batches",
            f"choose --micro-batches that divides {recipe.hold // world}",
            code=2,
        )
    if local % execution.micro_batches:
        raise SbrushError(
            f"{local} samples a process cannot be split into {execution.micro_batches} micro-batches",
            f"choose --micro-batches that divides {local}",
            code=2,
        )
    size, first = local // execution.micro_batches, process * local
    return [range(first + i * size, first + (i + 1) * size) for i in range(execution.micro_batches)]


def progress_line(entry: Mapping[str, float | None], **figures: str) -> str:
    """A log entry in a few words: images/s, `figures` as label=key of the entry, the latents' mean and deviation."""
    if None in (entry["x0_mean"], *(entry[key] for key in figures.values())):
        return f"no finite step of the last ones; {entry['skipped']} skipped"
    said = "".join(f"{label.replace('_', ' ')} {entry[key]:.3g}, " for label, key in figures.items())
    return f"{entry['images_per_second']:.3g} images/s, {said}x0 {entry['x0_mean']:+.2f} ± {entry['x0_std']:.2f}" + (
        f", {entry['skipped']} skipped" if entry["skipped"] else ""
    )

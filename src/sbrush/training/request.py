"""What a run is asked for, before anything is loaded: names and defaults in one place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sbrush.training.recipes import Recipe

if TYPE_CHECKING:
    from sbrush.prompts import Prompts


@dataclass(frozen=True)
class ExecutionOptions:
    """How a step is executed: speed and memory. Apart from rounding, nothing here changes the student."""

    micro_batches: int = 1  # that a process's share of a batch is split into: less memory, more time
    checkpointing: bool = False  # of gradients: activations are computed again in the backward
    ema_on_cpu: bool = False
    shard: bool = False  # FSDP2: a full student's weights, gradients, moments and average are split among processes
    compile: str | None = None  # the networks' forwards and backwards, by this backend of torch.compile


@dataclass(frozen=True)
class Intervals:
    """How often a run is recorded, in training steps."""

    log: int = 10
    grid: int = 200  # between sample grids; 0: none, nor the alarms that need the teacher's images
    checkpoint: int | None = None  # None: every 200, less often where saving takes long, see loop.CheckpointTimer
    validate: int = 0  # between CLIP scores of the student; 0: none
    keep: int = 2  # how many of the newest checkpoints stay


@dataclass(frozen=True)
class AlignmentRequest:
    """The CLIP model of the clamped CLIP loss, for a recipe that has it; see alignment.Alignment.load."""

    clip_weights: Path | None = None
    clip_model: str = "ViT-B-32"
    tiny_vae: Path | None = None


@dataclass(frozen=True)
class PhotosRequest:
    """A subject's photos and its class's images, for the method dreambooth; see photos.py."""

    files: tuple[Path, ...]
    rows: int  # so many images at the beginning are the photos in turn; the student draws the others
    student: str | None  # as load_student takes it
    move: bool = False  # whether photos with a plain background are moved and zoomed, see moving.py


@dataclass(frozen=True)
class ImagesRequest:
    """Images for a recipe that learns from them; by default the teacher makes its own. See images.py."""

    folder: Path | None = None  # of images with captions, which are then the run's prompts
    column: str | None = None  # of a table of captions in it
    drawn: bool = False  # by the built-in world
    cache: Path | None = None  # where their latents are kept; None: in the run's folder
    photos: PhotosRequest | None = None


@dataclass(frozen=True)
class ControlTraining:
    """A ControlNet of the teacher that a student is prepared for; see methods/steering.py."""

    model: str  # as load_control takes it
    prep: str  # what makes its control images: a key of preprocess.PREPROCESSORS
    scale: float = 1.0


@dataclass(frozen=True)
class HoldRequest:
    """Prompts whose images are to stay those of a student as it is; see methods/holding.py."""

    student: str | None  # as load_student takes it
    prompts: Prompts


@dataclass(frozen=True)
class ValidationRequest:
    """What the student is validated on; see validation.Validation.load."""

    prompts: Prompts | None = None  # None: the run's own
    clip: Path | None = None


@dataclass(frozen=True)
class RunRequest:
    """A training run as the command line resolves it."""

    recipe: Recipe
    prompts: Prompts
    out: Path
    teacher: str | None = None  # None: the built-in one
    teacher_config: str | None = None  # for a teacher that is a single file, see load_teacher
    init: str | None = None  # the student to start from; None: the teacher's weights
    seed: int = 0
    extend: int = 0  # steps to add to a run that is complete in `out`
    device: str = "cpu"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    every: Intervals = field(default_factory=Intervals)
    execution: ExecutionOptions = field(default_factory=ExecutionOptions)
    alignment: AlignmentRequest = field(default_factory=AlignmentRequest)
    images: ImagesRequest = field(default_factory=ImagesRequest)
    validation: ValidationRequest = field(default_factory=ValidationRequest)
    trackers: Sequence[str] = ()
    control: ControlTraining | None = None
    hold: HoldRequest | None = None
    text_cache: Path | None = None  # a folder for text embeddings, see text_cache.py

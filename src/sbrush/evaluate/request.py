"""What `sbrush eval` is asked for: the command line turns its flags into these. The defaults are defined here only.

Nothing is imported here, for `sbrush --help` reads it too. What cannot work is refused by check.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from sbrush.console import SbrushError, printable

if TYPE_CHECKING:
    from sbrush.evaluate.coco.gallery import Gallery
    from sbrush.models.lora_request import LoraRequest
    from sbrush.prompts.texts import Texts
    from sbrush.sampling.negative_request import Negative

PER_CAPTION = 100  # images of each open caption, at most, unless asked for


@dataclass(frozen=True)
class Models:
    """Which student, and which teacher in how many steps. None: the built-in ones."""

    student: str | None = None  # folder, a run's --out, or Hub id
    steps: int | None = None  # the student's; None: as many as it was trained for
    start_timestep: int | None = None  # where the student starts; None: its schedule's end
    teacher: str | None = None  # folder, Hub id or .safetensors
    teacher_config: str | None = None  # of a .safetensors teacher
    teacher_steps: int = 25
    teacher_guidance: float | None = None  # None: the scale that its folder names, else 7.5
    negative: Negative | None = None  # the student's, and in its guidance the teacher's
    loras: tuple[LoraRequest, ...] = ()  # of student and teacher
    vae: str | None = None  # what decodes the student's images; None: its own


@dataclass(frozen=True)
class Execution:
    """Where and how the networks compute."""

    device: str = "auto"
    precision: str = "auto"
    batch: int = 64  # images at once


@dataclass(frozen=True)
class StickersRequest:
    """The built-in world: a student, its teacher and real images side by side."""

    models: Models = Models()
    limit: int = 1000  # captions
    per_caption: int | None = None  # images of each of diversity's captions; None: a tenth of `limit`, at most 100
    fresh: bool = False  # measure the teacher again, whatever is cached
    report: Path = Path("report.html")
    execution: Execution = Execution()

    @property
    def diversity(self) -> int:
        """Images of each of diversity's ten captions, so that by default they are no more than `limit` together."""
        return min(PER_CAPTION, self.limit // 10) if self.per_caption is None else self.per_caption


@dataclass(frozen=True)
class CocoData:
    """Captions, real images, and the protocol by which both sides are compared."""

    root: Path = Path("coco")  # holds annotations/captions_val2014.json and val2014/
    protocol: str = "swiftbrush"  # of coco.protocols
    captions: Path | None = None  # another list than the protocol's
    column: str | None = None  # of a table of captions; None: prompt, caption or text
    limit: int | None = None  # captions; None: the protocol's 30,000
    seed: int = 0
    max_unreadable: int = 0  # images that may be left out
    download: bool = False  # fetch COCO and the metrics' weights if they are missing


@dataclass(frozen=True)
class MetricWeights:
    """The networks that measure. None: the standard ones in their libraries' caches."""

    inception: Path | None = None
    clip: Path | None = None
    clip_score: bool = True
    hps: Path | None = None
    hps_version: str | None = None


@dataclass(frozen=True)
class CocoOutput:
    """What is written, and where."""

    report: Path = Path("report.html")
    work: Path | None = None  # features so far; None: the user's cache
    images: Path | None = None  # where generated images are kept; None: nowhere


@dataclass(frozen=True)
class CocoRequest:
    """COCO-30K: a student, a teacher, a folder of images, or a sweep over several students or guidance scales."""

    models: Models = Models()
    images: Path | None = None  # a folder of images that another tool made
    sweep: str | None = None  # guidance scales of the teacher, or students, with commas between
    data: CocoData = CocoData()
    weights: MetricWeights = MetricWeights()
    output: CocoOutput = CocoOutput()
    execution: Execution = Execution()

    @cached_property
    def listed(self) -> Texts | None:
        """The captions of `data.captions`, read once: a pipe gives them once. SbrushError if they are none."""
        from sbrush.sampling.image_folder import read_captions

        return read_captions(self.data.captions, self.data.column) if self.data.captions else None

    @cached_property
    def gallery(self) -> Gallery | None:
        """The folder of images, with the captions that are given or lie beside them. SbrushError if they do not fit."""
        from sbrush.evaluate.coco.gallery import Gallery

        return Gallery.read(self.images, self.listed, self.data.column) if self.images else None

    @property
    def scales(self) -> list[float]:
        """The guidance scales of a teacher's sweep. SbrushError if they are none."""
        try:
            scales = [float(text) for text in (self.sweep or "").split(",")]
        except ValueError:
            scales = [-1.0]
        if not all(0 <= scale < 1000 for scale in scales):
            raise SbrushError(
                f"--sweep {printable(self.sweep)} is no list of guidance scales", "--sweep 1,2,4.5,7.5", code=2
            )
        return scales

"""Clean images for the methods that learn from them: their latents on disk, made once, read as a step needs them.

They come from one of three places:

    a folder                the images of `--images DIR`, each with its own caption
    the teacher             its own images of the prompts, in a few dozen steps: nothing but prompts is needed
    the built-in world      stickers that are drawn to the prompts, `--images stickers`

or, for `sbrush personalize`, from a few photos and the student: photos.py.

Latents are kept in half precision: 32 KiB for an image of Stable Diffusion.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from sbrush.console import SbrushError, count, info, printable
from sbrush.device import send
from sbrush.models.load import digest, load_student
from sbrush.models.model import Model
from sbrush.prompts import Prompts
from sbrush.sampling.generation import teacher_latents
from sbrush.sampling.image_folder import ImageFolder
from sbrush.sampling.open_image import UnreadableImage, open_image
from sbrush.sampling.prefetch import prefetch
from sbrush.stickers.draw import draw
from sbrush.stickers.world import parse_caption, random_sticker, stream
from sbrush.storage.files import check_room, size_text
from sbrush.storage.shards import Shards
from sbrush.training.photos import PhotoSource
from sbrush.training.recipes import Recipe
from sbrush.training.request import ImagesRequest

BATCH = 32  # images at once; divides shards.BLOCK
SEEDS = 1_000_000_000  # from here on those of the teacher's images, which are nobody's who samples or measures


class Source(Protocol):
    """Where images come from."""

    @property
    def key(self) -> str:
        """All that they depend on."""

    @property
    def about(self) -> dict[str, Any]:
        """What a run's config.json says of them."""

    def latents(self, batches: Sequence[range]) -> Iterator[Tensor]:
        """The latents of each batch of rows, [b, C, H, W]."""


@dataclass(frozen=True)
class FolderSource:
    """The images of a folder: cut to the teacher's proportions around their centre, resized with Lanczos."""

    images: ImageFolder
    teacher: Model
    sha256: str  # of the files' bytes

    @property
    def about(self) -> dict[str, Any]:
        return {"source": "a folder", "sha256": self.sha256, "count": len(self.images.files)}

    @property
    def key(self) -> str:
        return f"{self.sha256} {self.teacher.image_size} {digest(self.teacher)}"

    def latents(self, batches: Sequence[range]) -> Iterator[Tensor]:
        files = self.images.files
        for opened in prefetch(self._open, ([files[row] for row in rows] for rows in batches)):
            yield self.teacher.encode_images(torch.stack(opened))

    def _open(self, file: Path) -> Tensor:
        """An image file as uint8 [3, H, W]; SbrushError if it cannot be read."""
        height, width = self.teacher.image_size
        try:
            image = open_image(file)
        except UnreadableImage as why:
            raise SbrushError(
                f"{printable(file)} is {printable(why)}",
                "fetch it again, or move it and its caption elsewhere; the same command goes on",
            ) from why
        return pil_to_tensor(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS))


@dataclass(frozen=True)
class TeacherSource:
    """The teacher's own images of the prompts, one after another."""

    teacher: Model
    prompts: Sequence[str]  # of each row
    recipe: Recipe
    autocast: Callable[[], Any]
    precision: str  # that this is

    @property
    def about(self) -> dict[str, Any]:
        return {"source": "the teacher", "sha256": None, "count": len(self.prompts)}

    @property
    def key(self) -> str:
        steps, scale = self.recipe.image_steps, self.recipe.image_guidance
        return f"{digest(self.teacher)} {_hash(self.prompts)} {steps} {scale} {self.precision}"

    def latents(self, batches: Sequence[range]) -> Iterator[Tensor]:
        for rows in batches:
            texts, seeds = [self.prompts[row] for row in rows], [SEEDS + row for row in rows]
            steps, scale = self.recipe.image_steps, self.recipe.image_guidance
            with self.autocast():  # not longer: what is done with the latents is none of it
                made = list(teacher_latents(self.teacher, texts, seeds, steps=steps, guidance=scale, batch=len(rows)))
            yield from made


@dataclass(frozen=True)
class DrawnSource:
    """Stickers, each drawn so that its prompt is true of it."""

    teacher: Model
    prompts: Sequence[str]  # of each row

    def __post_init__(self) -> None:
        if self.teacher.about.get("world") != "stickers":
            raise SbrushError(
                "--images stickers draws for the built-in teacher, and this is another",
                "--images FOLDER, or leave it out: the teacher then makes the images itself",
                code=2,
            )
        for text in self.prompts:
            if parse_caption(text) is None:
                raise SbrushError(
                    f"--images stickers cannot draw {printable(text)}",
                    "prompts/stickers.txt holds all that it can; or leave it out: the teacher then makes the images",
                    code=2,
                )

    @property
    def about(self) -> dict[str, Any]:
        return {"source": "stickers", "sha256": None, "count": len(self.prompts)}

    @property
    def key(self) -> str:
        return f"stickers {digest(self.teacher)} {_hash(self.prompts)}"

    def latents(self, batches: Sequence[range]) -> Iterator[Tensor]:
        for rows in batches:
            yield self.teacher.encode_images(torch.stack([self._draw(row) for row in rows]))

    def _draw(self, row: int) -> Tensor:
        return pil_to_tensor(draw(random_sticker(stream("training images", row), parse_caption(self.prompts[row]))))


class TrainingImages:
    """Latents of clean images, a row for each. `prompts`: that of each row; `places`: where the run's list has it."""

    def __init__(self, folder: Path, source: Source, prompts: Prompts, places: Sequence[int], shape: Sequence[int]):
        self.source, self.prompts, self.places = source, prompts, places
        self._folder, self._shape = folder, tuple(shape)

    @classmethod
    def plan(cls, request: ImagesRequest, recipe: Recipe, prompts: Prompts, teacher: Model, accelerator: Accelerator,
             out: Path) -> TrainingImages:  # fmt: skip
        """The images of a run, none of which need be there yet. SbrushError if they cannot be had.

        With a folder, `prompts` are its captions.
        """
        cache = request.cache or out / "latents"
        places = rows_of(len(prompts), recipe.images) if request.folder is None else range(len(prompts))
        chosen = replace(prompts, texts=tuple(prompts.texts[place] for place in places))
        source: Source
        if request.folder is not None:
            images = ImageFolder.read(request.folder, column=request.column)
            # Nothing is written to a run's folder before the run holds it: see `fill`.
            source = FolderSource(images, teacher, images.digest(len(images.files), cache, remember=False))
        elif request.photos:
            student = load_student(request.photos.student)
            photos = request.photos
            source = PhotoSource(photos.files, photos.rows, chosen.texts, teacher, student, photos.move)
        elif request.drawn:
            source = DrawnSource(teacher, chosen.texts)
        else:
            precision = accelerator.mixed_precision
            source = TeacherSource(teacher, chosen.texts, recipe, accelerator.autocast, precision)
        return cls(cache, source, chosen, places, teacher.latent_shape)

    @cached_property
    def shards(self) -> Shards:
        """The rows, under a key of all that they depend on."""
        folder = self._folder / hashlib.sha256(self.source.key.encode()).hexdigest()[:16]
        return Shards(folder, len(self.prompts), elsewhere="--image-cache")

    def fill(self, teacher: Model, accelerator: Accelerator) -> None:
        """Makes what is missing, split among all processes; logs its size and checks that there is room for it.

        SbrushError if there is none, or if an image cannot be read or made.
        """
        if accelerator.is_main_process and (missing := self.shards.missing):
            size = missing * latent_bytes(self._shape)
            self.shards.folder.mkdir(parents=True, exist_ok=True)
            what = f"{count(missing, 'image')} to learn from, of {self.source.about['source']}"
            info(f"{what}: {size_text(size)} of latents in {printable(self.shards.folder)}")
            check_room(self.shards.folder, size, "the images' latents", "make room, or choose another --image-cache")
            if isinstance(self.source, FolderSource):
                images = self.source.images
                images.remember(len(images.files), self._folder, self.source.sha256)
        accelerator.wait_for_everyone()
        for network in teacher.networks:
            network.to(accelerator.device)
        here = {"process": accelerator.process_index, "processes": accelerator.num_processes}
        self.shards.fill("preparing images", self._rows, **here)
        accelerator.wait_for_everyone()

    def latents(self, rows: Sequence[int], device: torch.device) -> Tensor:
        """The latents of some rows, float32 [b, C, H, W]."""
        return send(self.shards.take(rows)["latents"].float(), device)

    def _rows(self, blocks: Sequence[range]) -> Iterator[dict[str, Tensor]]:
        batches = [block[first : first + BATCH] for block in blocks for first in range(0, len(block), BATCH)]
        for latents in self.source.latents(batches):
            halved = latents.half().cpu().contiguous()  # a VAE's may be channels-last
            if not halved.isfinite().all():
                raise SbrushError(
                    "the latents of an image to learn from are not finite", "try --precision float32, or other images"
                )
            yield {"latents": halved}


def rows_of(prompts: int, images: int) -> Sequence[int]:
    """The place of each image's prompt: `images` spread evenly over the list, or round and round; 0: one for each."""
    if images == 0:
        return range(prompts)
    return [row * prompts // images if images <= prompts else row % prompts for row in range(images)]


def latent_bytes(shape: Sequence[int]) -> int:
    """What a row takes on disk."""
    return 2 * torch.Size(shape).numel()


def _hash(texts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()

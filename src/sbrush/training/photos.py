"""A subject's photos: found and checked before anything is loaded, then latents beside images of its class.

Rows of the images to learn from are the photos in turn, then the student's own images of other prompts, one step each:
DreamBooth's prior preservation (arXiv 2208.12242), at the price of a forward an image.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from sbrush.models.load import digest
from sbrush.models.model import Model
from sbrush.sampling.generation import student_latents
from sbrush.training.moving import moved
from sbrush.training.photo_files import open_photo

SEEDS = 2_000_000_000  # from here on those of the student's images, which are nobody's who samples or measures


@dataclass(frozen=True)
class PhotoSource:
    """The photos, cut to the teacher's proportions around their centre and resized with Lanczos, and the prior images.

    `rows`: so many rows at the beginning are photos; `prompts`: of each row. With `move` each is another (moving.py).
    """

    files: Sequence[Path]
    rows: int
    prompts: Sequence[str]
    teacher: Model
    student: Model
    move: bool = False  # to other sizes and places, where a background is plain

    @property
    def about(self) -> dict[str, Any]:
        return {
            "source": "photos", "sha256": digest_of(self.files), "count": len(self.files),
            "moved": self.move, "prior": len(self.prompts) - self.rows, "prior_sha256": digest(self.student),
        }  # fmt: skip

    @property
    def key(self) -> str:
        texts = hashlib.sha256("\n".join(self.prompts).encode()).hexdigest()
        return f"{digest_of(self.files)} {digest(self.student)} {digest(self.teacher)} {self.rows} {self.move} {texts}"

    def latents(self, batches: Sequence[range]) -> Iterator[Tensor]:
        self.student.unet.to(self.teacher.device)
        for rows in batches:
            photos = [self._photo(row) for row in rows if row < self.rows]
            prior = [row for row in rows if row >= self.rows]
            parts = [self.teacher.encode_images(torch.stack(photos))] if photos else []
            if prior:
                texts, seeds = [self.prompts[row] for row in prior], [SEEDS + row for row in prior]
                parts += list(student_latents(self.student, texts, seeds))
            yield torch.cat([part.to(self.teacher.device) for part in parts])

    def _photo(self, row: int) -> Tensor:
        """A row's photo as uint8 [3, H, W]; SbrushError if it cannot be read."""
        height, width = self.teacher.image_size
        image = open_photo(self.files[row % len(self.files)])
        photo = pil_to_tensor(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS))
        return moved(photo, random.Random(f"photo {row}")) if self.move else photo


def digest_of(files: Sequence[Path]) -> str:
    """SHA-256 over the photos' bytes, in their order."""
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()

"""COCO-30K under a named protocol: which captions, which real images, and what both sides go through.

    captions    `images` order of captions_val2014.json; of each image its first annotation in file order
    reference   every image of val2014 that the file names (40,504), not 30,000 of them
    both sides  centre-crop to a square by the shorter edge, Pillow's Lanczos to 256, uint8; RGB, no turning by EXIF
                (an odd pixel is cut at the far end, as SiD-LSG does; torchvision rounds half of them to the near one)
    features    Inception pool3, after the protocol's resizing to 299; CLIP score on the same 256 pixels

COCO's own layout is read as it is: ROOT/annotations/captions_val2014.json and ROOT/val2014/*.jpg.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sbrush.console import SbrushError, info, printable
from sbrush.evaluate.coco.download import SOURCE
from sbrush.evaluate.coco.prefetch import ahead
from sbrush.metrics.clip import PREFIX, ClipScorer
from sbrush.metrics.inception import Inception, Resize, clean_resize
from sbrush.metrics.precision_recall import NEIGHBOURS
from sbrush.sampling.images import to_image

SIDE = 256
BATCH = 64  # images looked at at once; a shard has a whole number of them


@dataclass(frozen=True)
class Protocol:
    """What must be equal for two figures to be comparable."""

    name: str
    images: int
    captions: str | None  # None: the list is in a file of its own
    resize: Resize  # from 256 to Inception's 299
    prefix: str = PREFIX
    both_sides: str = (
        f"RGB, not turned by EXIF; centre square by the shorter edge, Lanczos to {SIDE}, uint8 by rounding"
    )
    reference: str = "all of val2014 that the annotation file names"
    inception: str = "pool3 of the network of 2015-12-05"
    neighbours: int = NEIGHBOURS  # of precision and recall

    def key(self) -> list[object]:
        """All that an image's features depend on."""
        return [1, SIDE, self.resize, self.prefix]


FIRST = "the first annotation of each of the first images"
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("swiftbrush", 30_000, FIRST, "clean"),
        Protocol("gigagan", 30_000, None, "clean"),  # DMD2, SiD-LSG: GigaGAN's own list of 30,000
        Protocol("torchmetrics", 30_000, FIRST, "antialias"),  # torchmetrics' FID as it is since 1.8
        Protocol("torch-fidelity", 30_000, FIRST, "tensorflow"),  # as the first FID code resized
    )
}


@dataclass(frozen=True)
class Coco:
    """COCO's validation set: a caption and a file for each image, in the annotation file's order."""

    captions: list[str]
    files: list[Path]

    @classmethod
    def read(cls, root: Path) -> Coco:
        """The set in COCO's own layout. SbrushError if something of it is missing or damaged."""
        annotations, folder = root / "annotations" / "captions_val2014.json", root / "val2014"
        for part in (annotations, folder):
            if not part.exists():
                raise SbrushError(
                    f"COCO is not there: no {printable(part)}",
                    f"--download fetches it; or unpack into --coco-root {SOURCE}",
                    code=2,
                )
        try:
            content = json.loads(annotations.read_text(encoding="utf-8"))
            first: dict[int, str] = {}
            for annotation in content["annotations"]:
                first.setdefault(annotation["image_id"], str(annotation["caption"]).strip())
            images = [image for image in content["images"] if image["id"] in first]
            names = [str(image["file_name"]) for image in images]
            captions = [first[image["id"]] for image in images]
        except (ValueError, KeyError, TypeError, RecursionError, OSError) as problem:
            raise SbrushError(
                f"{printable(annotations)} is damaged ({type(problem).__name__})",
                f"remove it and fetch it again: --download, or {SOURCE}",
            ) from problem
        if strange := next((name for name in names if Path(name).name != name), None):
            raise SbrushError(f"{printable(annotations)} names {printable(strange)}", "it must name files of val2014/")
        return cls(captions, [folder / name for name in names])


def read_captions(file: Path) -> list[str]:
    """A caption a line, UTF-8; SbrushError if the file is none, or has an empty line: the next would be another's."""
    try:
        lines = file.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as problem:
        raise SbrushError(f"cannot read {printable(file)} as UTF-8 text", "one caption a line", code=2) from problem
    captions = [line.strip() for line in lines]
    if "" in captions:
        raise SbrushError(
            f"line {captions.index('') + 1} of {printable(file)} is empty", "line i is the caption of image i", code=2
        )
    return captions


def hash_of(lines: Iterable[object]) -> str:
    """SHA-256 of a list, an item a line."""
    whole = hashlib.sha256()
    for line in lines:
        whole.update(f"{line}\n".encode())
    return whole.hexdigest()


def square(image: Image.Image, side: int = SIDE) -> Tensor:
    """The protocol's crop and resize: any mode and size to uint8 [3, side, side]."""
    image = image.convert("RGB")
    edge = min(image.size)
    left, top = (image.width - edge) // 2, (image.height - edge) // 2
    image = image.crop((left, top, left + edge, top + edge))
    if edge != side:
        image = image.resize((side, side), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class Ready(NamedTuple):
    """A image as the networks take it."""

    inception: Tensor  # uint8 [3, 256, 256], or float32 [3, 299, 299] where the protocol resizes on the CPU
    clip: Tensor | None  # float32 [3, side, side]
    hps: Tensor | None  # likewise, of the image as it came


class FeatureExtractor:
    """Images in, what the protocol keeps of them out: a row for each, and no image stays."""

    def __init__(
        self, protocol: Protocol, inception: Inception, clip: ClipScorer | None, hps: ClipScorer | None = None
    ) -> None:
        self.protocol, self.inception, self.clip, self.hps = protocol, inception, clip, hps

    def prepare(self, image: Image.Image, *, scored: bool) -> Ready:
        """All that is done to an image before a network sees it; for CLIP too if it is `scored`. Any thread may."""
        pixels = square(image)
        features = clean_resize(pixels) if self.protocol.resize == "clean" else pixels
        whole = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) if scored and self.hps else pixels
        return Ready(
            features,
            self.clip.prepare(pixels) if scored and self.clip else None,
            self.hps.prepare(whole) if scored and self.hps else None,
        )

    def extract(self, images: Sequence[Ready], captions: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Features [B, 2048] of images, and with captions their CLIP and HPS scores [B]; float32."""
        rows = {"features": self.inception.features(torch.stack([p.inception for p in images]), self.protocol.resize)}
        seen = [p.clip for p in images if p.clip is not None]
        if captions is not None and self.clip:
            rows["clip"] = self.clip.scores(torch.stack(seen), captions, self.protocol.prefix)
        liked = [p.hps for p in images if p.hps is not None]
        if captions is not None and self.hps:
            rows["hps"] = 100 * self.hps.scores(torch.stack(liked), captions, "")
        return rows

    def made(
        self,
        batches: Iterable[Tensor],
        captions: Sequence[str],
        keep: Callable[[int, Image.Image], None] = lambda place, image: None,
    ) -> Iterator[dict[str, Tensor]]:
        """Rows of images that a model makes, uint8 [b, 3, H, W] in the captions' order.

        A batch is made while those before it are prepared on other threads; networks on a GPU wait for neither. There
        `keep` is handed each image and its caption's place, before its row is yielded.
        """
        first, places = 0, count()

        def ready(made: tuple[Tensor, int]) -> Ready:
            image = to_image(made[0])
            keep(made[1], image)
            return self.prepare(image, scored=True)

        for images in ahead(ready, (zip(batch, places, strict=False) for batch in batches)):
            yield self.extract(images, captions[first : first + len(images)])
            first += len(images)

    def read(
        self, files: Sequence[Path], bad: Bad, captions: Sequence[str] | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """Rows of image files, decoded and prepared while those before them are looked at. A bad one's are NaN."""
        gray = self.prepare(Image.new("RGB", (SIDE, SIDE), (128, 128, 128)), scored=captions is not None)
        starts = range(0, len(files), BATCH)
        opened = ahead(lambda f: self._open(f, scored=captions is not None), (files[s : s + BATCH] for s in starts))
        for start, images in zip(starts, opened, strict=True):
            for file, image in zip(files[start : start + BATCH], images, strict=True):
                if image is None:
                    bad.note(file)
            rows = self.extract(
                [image or gray for image in images],
                captions[start : start + BATCH] if captions is not None else None,
            )
            wrong = torch.tensor([image is None for image in images])
            yield {
                name: value.masked_fill(wrong.view(-1, *[1] * (value.dim() - 1)), torch.nan)
                for name, value in rows.items()
            }

    def _open(self, file: Path, *, scored: bool) -> Ready | None:
        """A file's image, prepared; None if it cannot be read whole."""
        try:
            with Image.open(file) as image:
                return self.prepare(image, scored=scored)
        except Exception:  # Pillow's decoders raise what they like on damaged files
            return None


class Bad:
    """Images that cannot be read: each is named; more than `most` end the work."""

    def __init__(self, most: int) -> None:
        self.most, self.count = most, 0

    def note(self, file: Path) -> None:
        """One more. SbrushError if it is one too many."""
        self.count += 1
        info(f"note: {printable(file)} is {'no image' if file.is_file() else 'missing'}")
        if self.count > self.most:
            raise SbrushError(
                f"{printable(file)} is {'no image' if file.is_file() else 'missing'}",
                f"fetch it again, or go on without such files: --max-bad {self.most + 1} or more",
            )

"""One measurement on COCO: features of a subject's images, and the metrics they give. benchmark.py does several.

Generate, prepare, extract, forget: features and scores stay, on disk, in shards under a key of all that they depend on.
So the same command goes on where it was stopped, and the reference is extracted once. An image's noise depends on
its caption's number and the seed alone: torch.Generator().manual_seed(seed * 1,000,000 + number).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor

from sbrush.console import SbrushError, info, printable
from sbrush.console import count as counted
from sbrush.evaluate.cache import PACKAGES, versions
from sbrush.evaluate.coco.features import FeatureExtractor, UnreadableImages
from sbrush.evaluate.coco.protocols import SIDE, Coco
from sbrush.evaluate.coco.published import Measured
from sbrush.metrics.conventions import NEIGHBOURS
from sbrush.metrics.fid import INTERVAL, fid, fid_error
from sbrush.metrics.kid import kid
from sbrush.metrics.precision_recall import precision_recall
from sbrush.sampling.image_folder import hash_of
from sbrush.sampling.images import save_png, to_image
from sbrush.sampling.open_image import UnreadableImage, open_image
from sbrush.storage.shards import Shards

SHOWN, WORST = 24, 12  # images of the first captions, and of the lowest CLIP scores, that the report shows
FOR_FILES = ("torch", "torch-fidelity", "numpy", "pillow")  # the packages that Inception's features of a file depend on
FEWEST = 100  # images from which on the jackknife gives an interval

Shown = dict[str, list[tuple[str, Image.Image]]]
"""For each heading, images with the caption that stands under each."""


@dataclass(frozen=True)
class Subject:
    """What is measured: a name, all that its images depend on, and the images of captions with seeds."""

    name: str
    key: dict[str, Any]
    images: Callable[[list[str], list[int]], Iterator[Tensor]] | None  # None: they are files
    files: list[Path] = field(default_factory=list)
    truncated: Callable[[list[str]], int] | None = None  # how many captions are cut off; None: they are files


@dataclass(frozen=True)
class Workspace:
    """Where a measurement is made."""

    folder: Path  # of shards
    save_images: Path | None  # None: generated images are not kept
    device: str


@dataclass(frozen=True)
class Measurement:
    """What is the same for every subject: reference, captions, the networks that measure, who works on it."""

    coco: Coco
    captions: list[str]
    extractor: FeatureExtractor
    seed: int
    unreadable: UnreadableImages
    workspace: Workspace
    process_group: PartialState

    @cached_property
    def listing(self) -> list[str]:
        """The reference's files as far as they are known without reading them, on any machine: names and sizes."""
        return [f"{f.name} {f.stat().st_size if f.is_file() else 'missing'}" for f in self.coco.files]

    @cached_property
    def reference(self) -> Tensor:
        """Features of the real images, [N, 2048]; a row of NaN for each that cannot be read."""
        files = self.coco.files
        times = [f.stat().st_mtime_ns if f.is_file() else None for f in files]  # a file that was mended is another
        key = [*self._tools(FOR_FILES), hash_of(self.listing), hash_of(times)]
        return self._filled(
            "reference",
            key,
            len(files),
            lambda blocks: self.extractor.extract_files(_at(files, blocks), self.unreadable),
        )["features"]

    def measure(self, subject: Subject) -> tuple[Measured, Shown]:
        """A subject's metrics, and images to show, captions below, by heading; meant for the main process alone."""
        first_images: dict[int, Image.Image] = {}
        rows = self.extract(subject, first_images)
        valid_real, valid = (~x.isnan().any(dim=1) for x in (self.reference, rows["features"]))
        counts = self._count(subject, valid_real, valid)
        if subject.truncated is not None:
            counts["truncated_prompts"] = subject.truncated(self.captions)
        info("measuring ...")
        # Not a copy of 8 KiB an image where all are valid.
        real, fake = (x if ok.all() else x[ok] for x, ok in ((self.reference, valid_real), (rows["features"], valid)))
        device = self.workspace.device
        precision, recall = precision_recall(real.to(device), fake.to(device))
        mean, spread = kid(real, fake)
        error = fid_error(real, fake) if len(fake) >= FEWEST else None
        metrics = {
            "fid": fid(real, fake),
            "fid_standard_error": error,
            "fid_interval": None if error is None else INTERVAL * error,
            "kid": mean,
            "kid_spread": spread,
            "clip_score": rows["clip"][valid].mean().item() if "clip" in rows else None,
            "hps": rows["hps"][valid].mean().item() if "hps" in rows else None,
            "precision": precision,
            "recall": recall,
        }
        scores = rows["clip"].masked_fill(~valid, torch.inf) if "clip" in rows else None
        return Measured(subject.name, metrics, subject.key, counts), self._show(subject, first_images, scores)

    def extract(self, subject: Subject, first_images: dict[int, Image.Image] | None = None) -> dict[str, Tensor]:
        """Features and scores of a subject's images, by name, [captions, ...]; the very first go into `first_images`.

        All processes call this together, in the same order.
        """
        first_images = {} if first_images is None else first_images
        len(self.reference)  # its turn comes first

        def batches(blocks: Sequence[range]) -> Iterable[dict[str, Tensor]]:
            texts, numbers = _at(self.captions, blocks), _at(range(len(self.captions)), blocks)

            def keep(place: int, image: Image.Image) -> None:
                if self.workspace.save_images is not None:
                    _save(self.workspace.save_images, numbers[place], image)
                if numbers[place] < SHOWN:
                    first_images[numbers[place]] = image

            if subject.images is None:
                return self.extractor.extract_files(_at(subject.files, blocks), self.unreadable, texts)
            return self.extractor.extract_generated(self._generate(subject, blocks), texts, keep)

        scorers = [f"{one.name} {one.digest}" if one else None for one in (self.extractor.clip, self.extractor.hps)]
        key = [*self._tools(), self.extractor.protocol.prefix, *scorers, subject.key, self.seed, hash_of(self.captions)]

        def kept(block: range) -> bool:
            folder = self.workspace.save_images
            return folder is None or all((folder / _file(i)).is_file() for i in block)

        return self._filled("images", key, len(self.captions), batches, what=subject.name, done=kept)

    def _tools(self, packages: Sequence[str] = PACKAGES) -> list[Any]:
        """What every row depends on: protocol, weights, the kind of device, and the packages that have a part in it."""
        kind = self.workspace.device.split(":")[0]
        return [*self.extractor.protocol.feature_key(), self.extractor.inception.digest, kind, versions(packages)]

    def _count(self, subject: Subject, valid_real: Tensor, valid: Tensor) -> dict[str, int]:
        """How many images there are on both sides. SbrushError if too many of them could not be read."""
        wrong = [file for file, ok in zip(self.coco.files, valid_real, strict=True) if not ok]
        wrong += [subject.files[i] for i in (~valid).nonzero().flatten().tolist()]
        count = {"images": int(valid.sum()), "reference_images": int(valid_real.sum()), "unreadable_images": len(wrong)}
        if len(wrong) > self.unreadable.most or min(count["images"], count["reference_images"]) <= NEIGHBOURS:
            what = (
                f"{printable(wrong[0])} and {counted(len(wrong) - 1, 'other')}"
                if len(wrong) > 1
                else printable(wrong[0])
            )
            raise SbrushError(f"{what} could not be read", "fetch them again, or see --max-unreadable")
        return count

    def _show(self, subject: Subject, first_images: dict[int, Image.Image], scores: Tensor | None) -> Shown:
        """The images of the first captions, and those of the lowest CLIP `scores`, generated again where need be."""
        first = range(min(SHOWN, len(self.captions)))
        if all(i in first_images for i in first):
            drawn = [first_images[i] for i in first]
        else:
            drawn = self._generate_again(subject, first)
        shown = {"the first captions": [(self.captions[i], image) for i, image in zip(first, drawn, strict=True)]}
        if scores is not None:
            worst = scores.argsort()[:WORST].tolist()
            labels = [f"{scores[i]:.3f} {self.captions[i]}" for i in worst]
            shown["the lowest CLIP scores"] = list(zip(labels, self._generate_again(subject, worst), strict=True))
        return shown

    def _filled(
        self,
        kind: str,
        key: list[Any],
        total: int,
        batches: Callable[[Sequence[range]], Iterable[dict[str, Tensor]]],
        what: str = "reference",
        done: Callable[[range], bool] = lambda block: True,
    ) -> dict[str, Tensor]:
        """The rows of a folder of shards that all processes fill together."""
        name = f"coco-{kind}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]}"
        shards = Shards(self.workspace.folder / name, total)
        shards.fill(
            what,
            batches,
            process=self.process_group.process_index,
            processes=self.process_group.num_processes,
            done=done,
        )
        self.process_group.wait_for_everyone()
        return shards.rows()

    def _generate(self, subject: Subject, blocks: Sequence[range]) -> Iterator[Tensor]:
        """A model's images of blocks of captions, uint8 [b, 3, H, W]."""
        assert subject.images is not None
        for block in blocks:
            yield from subject.images([self.captions[i] for i in block], [self._seed(i) for i in block])

    def _generate_again(self, subject: Subject, numbers: Iterable[int]) -> list[Image.Image]:
        """Some of the images, by number."""
        numbers = list(numbers)
        if subject.images is None:
            return [_open(subject.files[i]) for i in numbers]
        drawn = subject.images([self.captions[i] for i in numbers], [self._seed(i) for i in numbers])
        return [to_image(image) for batch in drawn for image in batch]

    def _seed(self, number: int) -> int:
        return self.seed * 1_000_000 + number


def _at(items: Sequence[Any], blocks: Sequence[range]) -> list[Any]:
    return [items[i] for i in chain.from_iterable(blocks)]


def _open(file: Path) -> Image.Image:
    """A file's image; gray in the place of one that cannot be read, which has been named."""
    try:
        return open_image(file)
    except UnreadableImage:
        return Image.new("RGB", (SIDE, SIDE), (128, 128, 128))


def _file(number: int) -> str:
    return f"{number:05d}.png"


def _save(folder: Path, number: int, image: Image.Image) -> None:
    try:
        save_png(folder / _file(number), image)
    except OSError as problem:
        raise SbrushError(
            f"cannot write to {printable(folder)}: {problem.strerror}", "--save-images elsewhere"
        ) from problem

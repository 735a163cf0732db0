"""One measurement on COCO: a subject's images looked at, and what figures they give. benchmark.py does several.

Generate, prepare, look, forget: features and scores stay, on disk, in shards under a key of all that they depend on. So
the same command goes on where it was stopped, and the reference is looked at once. A image's noise depends on
its caption's number and the seed alone: torch.Generator().manual_seed(seed * 1,000,000 + number).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor

from sbrush.console import SbrushError, info, printable
from sbrush.evaluate.coco.protocols import SIDE, Bad, Coco, FeatureExtractor, hash_of
from sbrush.evaluate.coco.published import Measured
from sbrush.metrics.fid import fid, fid_error
from sbrush.metrics.kid import kid
from sbrush.metrics.precision_recall import NEIGHBOURS, precision_recall
from sbrush.sampling.images import save_png, to_image
from sbrush.storage.shards import Shards

SHOWN = 24


@dataclass(frozen=True)
class Subject:
    """What is measured: a name, all that its images depend on, and the images of captions with seeds."""

    name: str
    key: dict[str, Any]
    images: Callable[[list[str], list[int]], Iterator[Tensor]] | None  # None: they are files
    files: list[Path] = field(default_factory=list)
    truncated: Callable[[list[str]], int] | None = None  # how many captions are cut off; None: they are files


@dataclass(frozen=True)
class Measurement:
    """What is the same for every subject: reference, captions, the networks that look, who works on it."""

    coco: Coco
    texts: list[str]
    extractor: FeatureExtractor
    folder: Path  # of shards
    seed: int
    max_bad: int
    save_images: Path | None
    device: str
    process_group: PartialState
    bad: Bad = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "bad", Bad(self.max_bad))

    @cached_property
    def listed(self) -> list[str]:
        """The reference's files as far as can be told without reading them, on any machine: names and sizes."""
        return [f"{f.name} {f.stat().st_size if f.is_file() else 'missing'}" for f in self.coco.files]

    @cached_property
    def reference(self) -> Tensor:
        """Features of the real images, [N, 2048]; a row of NaN for each that cannot be read."""
        files = self.coco.files
        times = [f.stat().st_mtime_ns if f.is_file() else None for f in files]  # a file that was mended is another
        key = [*self._rules, hash_of(self.listed), hash_of(times)]
        return self._filled(
            "reference", key, len(files), lambda blocks: self.extractor.read(_at(files, blocks), self.bad)
        )["features"]

    def of(self, subject: Subject) -> tuple[Measured, dict[str, list[tuple[str, Image.Image]]]]:
        """A subject's figures, and images to show, captions below, by heading; meant for the main process alone."""
        shown: dict[int, Image.Image] = {}
        rows = self.extract(subject, shown)
        good_real, good = (~x.isnan().any(dim=1) for x in (self.reference, rows["features"]))
        wrong = [file for file, ok in zip(self.coco.files, good_real, strict=True) if not ok]
        wrong += [subject.files[i] for i in (~good).nonzero().flatten().tolist()]
        bad, most = len(wrong), min(int(good_real.sum()), int(good.sum()))
        if bad > self.max_bad or most <= NEIGHBOURS:
            what = f"{printable(wrong[0])} and {bad - 1} others" if bad > 1 else printable(wrong[0])
            raise SbrushError(f"{what} could not be read", "fetch them again, or see --max-bad")
        info("measuring ...")
        # Not a copy of 8 KiB an image where none is bad.
        r, f = (x if ok.all() else x[ok] for x, ok in ((self.reference, good_real), (rows["features"], good)))
        precision, recall = precision_recall(r.to(self.device), f.to(self.device))
        mean, spread = kid(r, f)
        figures = {
            "fid": fid(r, f), "fid_standard_error": fid_error(r, f) if len(f) >= 100 else None,
            "kid": mean, "kid_spread": spread,
            "clip_score": rows["clip"][good].mean().item() if "clip" in rows else None,
            "hps": rows["hps"][good].mean().item() if "hps" in rows else None,
            "precision": precision, "recall": recall,
        }  # fmt: skip
        counts = {"images": int(good.sum()), "reference_images": int(good_real.sum()), "bad_images": bad}
        if subject.truncated is not None:
            counts["truncated_prompts"] = subject.truncated(self.texts)
        measured = Measured(subject.name, figures, subject.key, counts)
        first = range(min(SHOWN, len(self.texts)))
        drawn = [shown[i] for i in first] if all(i in shown for i in first) else self._again(subject, first)
        images = {"the first captions": [(self.texts[i], image) for i, image in zip(first, drawn, strict=True)]}
        if "clip" in rows:
            scores = rows["clip"].masked_fill(~good, torch.inf)
            worst = scores.argsort()[:12].tolist()
            told = [f"{scores[i]:.3f} {self.texts[i]}" for i in worst]
            images["the lowest CLIP scores"] = list(zip(told, self._again(subject, worst), strict=True))
        return measured, images

    def extract(self, subject: Subject, shown: dict[int, Image.Image] | None = None) -> dict[str, Tensor]:
        """What was seen of a subject's images, by name, [captions, ...]; the very first ones go into `shown`.

        All processes call this together, in the same order.
        """
        shown = {} if shown is None else shown
        len(self.reference)  # its turn comes first

        def batches(blocks: Sequence[range]) -> Iterable[dict[str, Tensor]]:
            texts, numbers = _at(self.texts, blocks), _at(range(len(self.texts)), blocks)

            def keep(place: int, image: Image.Image) -> None:
                if self.save_images is not None:
                    _save(self.save_images, numbers[place], image)
                if numbers[place] < SHOWN:
                    shown[numbers[place]] = image

            if subject.images is None:
                return self.extractor.read(_at(subject.files, blocks), self.bad, texts)
            return self.extractor.made(self._drawn(subject, blocks), texts, keep)

        scorers = [f"{one.name} {one.digest}" if one else None for one in (self.extractor.clip, self.extractor.hps)]
        key = [*self._rules, *scorers, subject.key, self.seed, hash_of(self.texts)]

        def kept(block: range) -> bool:
            folder = self.save_images
            return folder is None or all((folder / _file(i)).is_file() for i in block)

        return self._filled("images", key, len(self.texts), batches, what=subject.name, done=kept)

    @property
    def _rules(self) -> list[Any]:
        """What every row depends on: protocol, weights, and what decodes, resizes and multiplies."""
        tools = [version(package) for package in ("torch", "pillow", "open_clip_torch")]
        return [*self.extractor.protocol.key(), self.extractor.inception.digest, self.device.split(":")[0], *tools]

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
        shards = Shards(self.folder / name, total)
        shards.fill(
            what,
            batches,
            process=self.process_group.process_index,
            processes=self.process_group.num_processes,
            done=done,
        )
        self.process_group.wait_for_everyone()
        return shards.rows()

    def _drawn(self, subject: Subject, blocks: Sequence[range]) -> Iterator[Tensor]:
        """A model's images of blocks of captions, uint8 [b, 3, H, W]."""
        assert subject.images is not None
        for block in blocks:
            yield from subject.images([self.texts[i] for i in block], [self._seed(i) for i in block])

    def _again(self, subject: Subject, numbers: Iterable[int]) -> list[Image.Image]:
        """Some of the images, by number."""
        numbers = list(numbers)
        if subject.images is None:
            return [_opened(subject.files[i]) for i in numbers]
        drawn = subject.images([self.texts[i] for i in numbers], [self._seed(i) for i in numbers])
        return [to_image(image) for batch in drawn for image in batch]

    def _seed(self, number: int) -> int:
        return self.seed * 1_000_000 + number


def _at(items: Sequence[Any], blocks: Sequence[range]) -> list[Any]:
    return [items[i] for i in chain.from_iterable(blocks)]


def _opened(file: Path) -> Image.Image:
    """A file's image; gray in the place of one that cannot be read, which has been said."""
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except Exception:  # as in coco.FeatureExtractor
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

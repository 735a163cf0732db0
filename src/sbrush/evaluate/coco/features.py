"""Images in, what a protocol keeps of them out: Inception's features, CLIP and HPS scores. No image stays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sbrush.console import SbrushError, info, printable
from sbrush.evaluate.coco.protocols import SIDE, Crop, Protocol
from sbrush.metrics.clip import ClipScorer
from sbrush.metrics.inception import Inception, clean_resize
from sbrush.sampling.images import to_image
from sbrush.sampling.open_image import UnreadableImage, open_image
from sbrush.sampling.prefetch import prefetch

BATCH = 64  # images that the networks take at once; a shard has a whole number of them


def square(image: Image.Image, crop: Crop, side: int = SIDE) -> Tensor:
    """The protocol's crop and resize: any mode and size to uint8 [3, side, side]."""
    image = image.convert("RGB")
    edge = min(image.size)
    left, top = (_margin(length - edge, crop) for length in image.size)
    image = image.crop((left, top, left + edge, top + edge))
    if edge != side:
        image = image.resize((side, side), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _margin(spare: int, crop: Crop) -> int:
    """How many of `spare` pixels are cut before the square; Python's round, like torchvision's, takes half to even."""
    return round(spare / 2) if crop == "half to even" else spare // 2


class Prepared(NamedTuple):
    """An image as the networks take it."""

    inception: Tensor  # uint8 [3, 256, 256], or float32 [3, 299, 299] where the protocol resizes on the CPU
    clip: Tensor | None  # float32 [3, side, side]
    hps: Tensor | None  # likewise, of the image as it came


class FeatureExtractor:
    """Images in, what the protocol keeps of them out: a row for each, and no image stays."""

    def __init__(
        self, protocol: Protocol, inception: Inception, clip: ClipScorer | None, hps: ClipScorer | None = None
    ) -> None:
        self.protocol, self.inception, self.clip, self.hps = protocol, inception, clip, hps

    def prepare(self, image: Image.Image, *, scored: bool) -> Prepared:
        """All that is done to an image before a network sees it; for CLIP too if it is `scored`. Any thread may."""
        pixels = square(image, self.protocol.crop)
        features = clean_resize(pixels) if self.protocol.resize == "clean" else pixels
        whole = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) if scored and self.hps else pixels
        return Prepared(
            features,
            self.clip.prepare(pixels) if scored and self.clip else None,
            self.hps.prepare(whole) if scored and self.hps else None,
        )

    def extract(self, images: Sequence[Prepared], captions: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Features [B, 2048] of images, and with captions their CLIP and HPS scores [B]; float32."""
        rows = {"features": self.inception.features(torch.stack([p.inception for p in images]), self.protocol.resize)}
        for_clip = [p.clip for p in images if p.clip is not None]
        if captions is not None and self.clip:
            rows["clip"] = self.clip.scores(torch.stack(for_clip), captions, self.protocol.prefix)
        for_hps = [p.hps for p in images if p.hps is not None]
        if captions is not None and self.hps:
            rows["hps"] = 100 * self.hps.scores(torch.stack(for_hps), captions, "")
        return rows

    def extract_generated(
        self,
        batches: Iterable[Tensor],
        captions: Sequence[str],
        keep: Callable[[int, Image.Image], None] = lambda place, image: None,
    ) -> Iterator[dict[str, Tensor]]:
        """Rows of images that a model generates, uint8 [b, 3, H, W] in the captions' order.

        While a batch is generated, other threads prepare those before it; networks on a GPU wait for neither. There
        `keep` is handed each image and its caption's place, before its row is yielded.
        """
        first, places = 0, count()

        def prepare(generated: tuple[Tensor, int]) -> Prepared:
            image = to_image(generated[0])
            keep(generated[1], image)
            return self.prepare(image, scored=True)

        for images in prefetch(prepare, (zip(batch, places, strict=False) for batch in batches)):
            yield self.extract(images, captions[first : first + len(images)])
            first += len(images)

    def extract_files(
        self, files: Sequence[Path], unreadable: UnreadableImages, captions: Sequence[str] | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """Rows of image files, decoded and prepared ahead of the networks. Those of an unreadable one are NaN."""
        gray = self.prepare(Image.new("RGB", (SIDE, SIDE), (128, 128, 128)), scored=captions is not None)
        starts = range(0, len(files), BATCH)
        opened = prefetch(lambda f: self._open(f, scored=captions is not None), (files[s : s + BATCH] for s in starts))
        for start, images in zip(starts, opened, strict=True):
            for file, image in zip(files[start : start + BATCH], images, strict=True):
                if isinstance(image, UnreadableImage):
                    unreadable.note(file, image)
            rows = self.extract(
                [gray if isinstance(image, UnreadableImage) else image for image in images],
                captions[start : start + BATCH] if captions is not None else None,
            )
            wrong = torch.tensor([isinstance(image, UnreadableImage) for image in images])
            yield {
                name: value.masked_fill(wrong.view(-1, *[1] * (value.dim() - 1)), torch.nan)
                for name, value in rows.items()
            }

    def _open(self, file: Path, *, scored: bool) -> Prepared | UnreadableImage:
        """A file's image, prepared; the reason if it cannot be read."""
        try:
            return self.prepare(open_image(file), scored=scored)
        except UnreadableImage as why:
            return why


class UnreadableImages:
    """Images that cannot be read: each is named, and more than `most` end the work."""

    def __init__(self, most: int) -> None:
        self.most, self.count = most, 0

    def note(self, file: Path, why: UnreadableImage) -> None:
        """One more. SbrushError if it is one too many."""
        self.count += 1
        problem = f"{printable(file)} is {printable(why)}"
        info(f"note: {problem}")
        if self.count > self.most:
            raise SbrushError(
                problem, f"fetch it again, or go on without such files: --max-unreadable {self.most + 1} or more"
            )

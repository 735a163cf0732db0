"""Diversity: are all images of "a cat" red and centred?

For each of ten captions that leave much out, many images are judged. Of what the caption leaves out, colour,
background and size have an entropy; place has a spread. Each is divided by real images' own, the same measure on as
many real images of the caption, so that 1 is right and 0 is collapse. A ratio may exceed 1 a little, by chance or
because a model makes combinations which real images withhold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

import torch
from torch import Tensor

from sbrush.stickers.judge import foreground
from sbrush.stickers.world import ATTRIBUTES, IMAGE_SIZE, Caption

CAPTIONS = (
    Caption(kind="cat"),
    Caption(kind="mushroom"),
    Caption(colour="purple"),
    Caption(kind="car", colour="red"),
    Caption(kind="house", size="big"),
    Caption(kind="flower", background="night"),
    Caption(kind="bird", colour="teal", size="small"),
    Caption(kind="star", background="mint", size="small"),
    Caption(kind="dog", background="peach", size="big"),
    Caption(kind="fish", colour="blue", background="cream"),
)
ENTROPIES = ("colour", "background", "size")
ASPECTS = (*ENTROPIES, "position")

Variety = dict[str, float]
"""Of one caption's images: the entropy in nats of each of ENTROPIES that it leaves out, and "position" in pixels."""


def centroids(images: Tensor) -> Tensor:
    """Where the stickers are: the mean x and y of the foreground's pixels, the image's middle where there is none.

    uint8 [B, 3, 64, 64] to float32 [B, 2], in pixels of 0 to 64.
    """
    _, mask = foreground(images)
    weight = mask.float()
    at = torch.arange(IMAGE_SIZE) + 0.5
    total = weight.sum(dim=(1, 2))
    centre = torch.stack([weight.sum(dim=1) @ at, weight.sum(dim=2) @ at], dim=1) / total.clamp(min=1)[:, None]
    return torch.where(total[:, None] > 0, centre, IMAGE_SIZE / 2)


def variety(caption: Caption, judged: Mapping[str, Tensor], places: Tensor) -> Variety:
    """The variety of one caption's images.

    `judged`: what each shows, as indices into ATTRIBUTES' values, int64 [B]; `places`: their centroids, [B, 2].
    """
    found = {name: entropy(judged[name], len(ATTRIBUTES[name])) for name in ENTROPIES if getattr(caption, name) is None}
    return found | {"position": spread(places)}


def varieties(captions: Sequence[Caption], judged: Mapping[str, Tensor], places: Tensor) -> list[Variety]:
    """The variety of each caption's images, which come in equal numbers, those of the first caption first."""
    if not captions or len(places) % len(captions):
        raise ValueError(f"{len(places)} images are not equally many of {len(captions)} captions")
    each = len(places) // len(captions)
    rows = [slice(i * each, (i + 1) * each) for i in range(len(captions))]
    return [
        variety(caption, {name: labels[r] for name, labels in judged.items()}, places[r])
        for caption, r in zip(captions, rows, strict=True)
    ]


def shares(model: Sequence[Variety], real: Sequence[Variety]) -> dict[str, float | None]:
    """For each of ASPECTS, the mean over the captions that leave it open of the model's variety over real images'.

    "mean" is the mean of these. None where real images have no variety to compare with.
    """
    found: dict[str, float | None] = {}
    for aspect in ASPECTS:
        ratios = [m[aspect] / r[aspect] for m, r in zip(model, real, strict=True) if r.get(aspect, 0) > 0]
        found[aspect] = fmean(ratios) if ratios else None
    known = [share for share in found.values() if share is not None]
    return found | {"mean": fmean(known) if known else None}


def entropy(labels: Tensor, choices: int) -> float:
    """Entropy in nats of labels int64 [B] in 0 .. choices - 1: 0 if all are the same, log(choices) if evenly mixed."""
    p = torch.bincount(labels, minlength=choices).double() / max(1, len(labels))
    nats: float = torch.special.entr(p).sum().item()
    return nats


def spread(places: Tensor) -> float:
    """Standard deviation of centroids [B, 2] in pixels: the root of both directions' variances together."""
    pixels: float = places.double().var(dim=0, correction=0).sum().sqrt().item()
    return pixels

"""Attribute accuracy: how often a judge sees in an image what its caption names.

Only what a caption names counts: any colour is right for "a cat". Captions that name a combination of kind and colour
which no training has shown are counted apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from sbrush.stickers.world import ATTRIBUTES, Caption


@dataclass(frozen=True)
class Accuracy:
    """Of each attribute the share of images, 0 to 1, that show it as named, and the number of captions that name it.

    The share is None where no caption does.
    """

    share: dict[str, float | None]
    named: dict[str, int]


def attribute_accuracy(captions: Sequence[Caption], judged: Mapping[str, Tensor]) -> dict[str, float]:
    """The shares of `accuracy` on all captions together; attributes that none of them names are left out."""
    return {name: share for name, share in accuracy(captions, judged).share.items() if share is not None}


def accuracy(captions: Sequence[Caption], judged: Mapping[str, Tensor], *, held_out: bool | None = None) -> Accuracy:
    """Accuracy on the captions of held-out combinations (True), on the others (False) or on all (None).

    `judged`: for each attribute, what each image shows, as indices into its values in ATTRIBUTES, int64
    [len(captions)]. Raises ValueError if the lengths differ.
    """
    share: dict[str, float | None] = {}
    named: dict[str, int] = {}
    for name, values in ATTRIBUTES.items():
        seen = judged[name].tolist()
        hits = [
            values[index] == wanted
            for caption, index in zip(captions, seen, strict=True)
            if held_out in (None, caption.held_out) and (wanted := getattr(caption, name)) is not None
        ]
        named[name] = len(hits)
        share[name] = sum(hits) / len(hits) if hits else None
    return Accuracy(share, named)

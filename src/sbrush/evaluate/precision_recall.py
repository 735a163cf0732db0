"""Improved precision and recall (Kynkaanniemi et al., arXiv 1904.06991).

Each set of features stands for a region: the union of balls around its points, each reaching to the k-th nearest other
point of the same set. Precision is the share of a model's pictures within the real region; recall the share of real
pictures within the model's.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEIGHBOURS = 3
CHUNK = 500  # rows of the distance matrix held at once


def precision_recall(real: Tensor, fake: Tensor, *, k: int = NEIGHBOURS, chunk: int = CHUNK) -> tuple[float, float]:
    """Precision and recall, each 0 to 1, of features float [N, width] and [M, width].

    Raises ValueError unless both sets have more than `k` points.
    """
    return coverage(real, fake, k=k, chunk=chunk), coverage(fake, real, k=k, chunk=chunk)


def coverage(region: Tensor, points: Tensor, *, k: int = NEIGHBOURS, chunk: int = CHUNK) -> float:
    """The share of `points` [M, width] within the region that `region` [N, width] spans, edge included."""
    reach = radii(region, k=k, chunk=chunk)
    inside = sum(int((_distances(part, region) <= reach).any(dim=1).sum()) for part in points.split(chunk))
    return inside / len(points)


def radii(features: Tensor, *, k: int = NEIGHBOURS, chunk: int = CHUNK) -> Tensor:
    """Each point's distance to its k-th nearest other point: [N, width] to [N]."""
    if len(features) <= k:
        raise ValueError(f"{len(features)} pictures are too few: their {k} nearest others are asked for")
    found = []
    for first in range(0, len(features), chunk):
        distances = _distances(features[first : first + chunk], features)
        distances[torch.arange(len(distances)), torch.arange(first, first + len(distances))] = torch.inf  # not itself
        found.append(distances.kthvalue(k, dim=1).values)
    return torch.cat(found)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """[A, width] and [B, width] to [A, B], without the shortcut by dot products: equal points are at 0 exactly."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")

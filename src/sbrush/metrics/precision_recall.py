"""Improved precision and recall (Kynkaanniemi et al., arXiv 1904.06991).

Each set of features stands for a region: the union of balls around its points, each reaching to the k-th nearest other
point of the same set. Precision is the share of a model's images within the real region; recall the share of real
images within the model's.

All distances among N + M points of a width are 2 width (N + M)^2 FLOP: 2 10^13 for COCO-30K beside all of val2014. They
are taken as matrix products, |a|^2 + |b|^2 - 2ab, whose rounding has a bound; what is nearer to a decision than that is
computed again in float64, from the differences. So each decision is as if all had been, equal points included.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sbrush.console import Progress, progress
from sbrush.metrics.conventions import NEIGHBOURS

CHUNK = 500  # rows of the distance matrix held at once
COLUMNS = 4096  # of them computed at once
PAIRS = 1 << 13  # differences held at once


def precision_recall(real: Tensor, fake: Tensor, *, k: int = NEIGHBOURS, chunk: int = CHUNK) -> tuple[float, float]:
    """Precision and recall, each 0 to 1, of features float [N, width] and [M, width] on one device.

    Raises ValueError unless both sets have more than `k` points.
    """
    with progress("precision and recall", 2 * (len(real) + len(fake)), unit="rows") as bar:
        precision = coverage(real, fake, k=k, chunk=chunk, bar=bar)
        return precision, coverage(fake, real, k=k, chunk=chunk, bar=bar)


def coverage(
    region: Tensor, points: Tensor, *, k: int = NEIGHBOURS, chunk: int = CHUNK, bar: Progress | None = None
) -> float:
    """The share of `points` [M, width] within the region that `region` [N, width] spans, edge included."""
    reach, inside, screen = radii(region, k=k, chunk=chunk, bar=bar), 0, Screen(region)
    squares = reach.square()
    for part in points.split(chunk):
        approximate, error = screen.squares(part)
        margin = approximate.sub_(squares)
        found = (margin < -error).any(dim=1)
        close = ~(margin.abs() > error) & ~found[:, None]  # so written that what is no number is close
        rows, columns = close.nonzero(as_tuple=True)
        found[rows[distances(part, region, rows, columns) <= reach[columns]]] = True
        inside += int(found.sum())
        if bar:
            bar.advance(len(part))
    return inside / len(points)


def radii(features: Tensor, *, k: int = NEIGHBOURS, chunk: int = CHUNK, bar: Progress | None = None) -> Tensor:
    """Each point's distance to its k-th nearest other point: [N, width] to float64 [N]."""
    if len(features) <= k:
        raise ValueError(f"{len(features)} images are too few: their {k} nearest others are asked for")
    found, screen = [], Screen(features)
    for first in range(0, len(features), chunk):
        part = features[first : first + chunk]
        own = torch.arange(len(part), device=part.device)
        approximate, error = screen.squares(part)
        approximate[own, own + first] = torch.inf  # not itself
        near = ~(approximate > approximate.kthvalue(k, dim=1, keepdim=True).values + 2 * error)
        near[own, own + first] = False
        rows, columns = near.nonzero(as_tuple=True)
        count = near.sum(dim=1)
        place = torch.arange(len(rows), device=rows.device) - (count.cumsum(0) - count)[rows]
        exact = torch.full((len(part), int(count.max())), torch.inf, dtype=torch.float64, device=part.device)
        exact[rows, place] = distances(part, features, rows, columns)
        found.append(exact.kthvalue(k, dim=1).values)
        if bar:
            bar.advance(len(part))
    return torch.cat(found)


def distances(a: Tensor, b: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Those between a[rows] and b[columns], from the differences: float64 [P]. Equal points are at 0 exactly."""
    parts = [
        (a[i].double() - b[j].double()).square().sum(dim=1).sqrt()
        for i, j in zip(rows.split(PAIRS), columns.split(PAIRS), strict=True)
    ]
    return torch.cat(parts)


class Screen:
    """Squared distances to all of a set of points [N, width], quick and nearly right."""

    def __init__(self, points: Tensor) -> None:
        # Less than float32 in products (TensorFloat-32, if someone asks torch for it) would break the bound.
        exact = torch.get_float32_matmul_precision() == "highest" and points.dtype != torch.float64
        self._dtype = torch.float32 if exact else torch.float64
        self._points = points  # and no centred copy of them: 8 KiB an image
        self._middle = points.mean(dim=0, dtype=torch.float64).to(self._dtype)
        self._norms = torch.cat([self._centred(part)[1] for part in points.split(COLUMNS)])
        self._largest = self._norms.max()

    def squares(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """[A, width] to squared distances [A, N], and how far wrong those of a row can be at most: [A, 1]."""
        points, norms = self._centred(a)
        approximate = norms.new_empty(len(points), len(self._points))
        for part, others, theirs in zip(
            approximate.split(COLUMNS, dim=1), self._points.split(COLUMNS), self._norms.split(COLUMNS), strict=True
        ):
            part.copy_(torch.addmm(theirs[None], points, self._centred(others)[0].T, alpha=-2))
        approximate.add_(norms[:, None])
        share = (a.shape[1] + 16) * torch.finfo(self._dtype).eps  # of the products' sums twice what theory allows
        return approximate, share * (norms[:, None] + self._largest)

    def _centred(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """The points about the set's middle, where numbers are small and so their rounding is; squared norms."""
        centred = points.to(self._dtype) - self._middle
        return centred, torch.linalg.vector_norm(centred, dim=1).square()

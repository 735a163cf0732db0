"""Frechet distance between two sets of images' features (FID, arXiv 1706.08500), through torchmetrics.

    |mu_r - mu_f|^2 + tr(C_r + C_f - 2 (C_r C_f)^(1/2))

It falls with the number of images even if nothing else changes: compare FIDs of as many images only.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

CHUNK = 1000  # rows held in float64 at once
GROUPS = 10  # of the jackknife
INTERVAL = 2.262157  # standard errors to either side for 95 %: Student's t with GROUPS - 1 degrees of freedom


class FID:
    """FID of features that come in any batches, in any order: update, then compute; the result is the same."""

    def __init__(self, width: int) -> None:
        """`width`: numbers in an image's features."""
        self._metric = FrechetInceptionDistance(feature=_Identity(width), sync_on_compute=False)

    def update(self, features: Tensor, *, real: bool) -> None:
        """Takes the features of more images, float [B, width], to the real side or to the model's."""
        for part in features.split(CHUNK) if len(features) else ():
            self._metric.update(part.double(), real=real)

    def compute(self) -> float:
        """The distance so far, 0 or more; each side needs two images at least, else RuntimeError."""
        distance: float = self._metric.compute().item()
        return max(0.0, distance)


def fid(real: Tensor, fake: Tensor) -> float:
    """FID of two sets of features: float [N, width] and [M, width], N and M at least 2."""
    metric = FID(real.shape[1])
    metric.update(real, real=True)
    metric.update(fake, real=False)
    return metric.compute()


def fid_error(real: Tensor, fake: Tensor, *, groups: int = GROUPS) -> float:
    """FID's standard error from the choice of the model's images, by the delete-a-group jackknife.

    A plain bootstrap is biased upward: it repeats images. Here each of `groups` interleaved groups is left out once;
    the FIDs on the rest are all alike biased by their number, which the variance does not see.

    tr (C_r C_f)^(1/2) is taken from the symmetric C_r^(1/2) C_f C_r^(1/2), which has the same eigenvalues: on
    Inception's 2,048 features that takes a third of the time, and the real side's products are added up once.
    """
    centre = real.double().mean(dim=0)
    mean_real, cov_real = _moments(*_sums(real, centre))
    values, vectors = torch.linalg.eigh(cov_real)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    found, (n, total, products) = [], _sums(fake, centre)
    for group in range(groups):
        rows, part, squares = _sums(fake[group::groups], centre)  # left out
        mean, cov = _moments(n - rows, total - part, products - squares)
        cross = torch.linalg.eigvalsh(root @ cov @ root).clamp(min=0).sqrt().sum()
        found.append((mean_real - mean).square().sum() + cov_real.trace() + cov.trace() - 2 * cross)
    distances = torch.stack(found)
    return float(((groups - 1) / groups * (distances - distances.mean()).square().sum()).sqrt())


def _sums(features: Tensor, centre: Tensor) -> tuple[int, Tensor, Tensor]:
    """How many rows; the sum of what they are off `centre`, [width]; of its products, [width, width]; float64."""
    total, products = torch.zeros_like(centre), torch.zeros(len(centre), len(centre)).to(centre)
    for part in features.split(CHUNK):
        off = part.double() - centre
        total, products = total + off.sum(dim=0), products.addmm_(off.T, off)
    return len(features), total, products


def _moments(n: int, total: Tensor, products: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (off the centre) and covariance of what was summed up."""
    mean = total / n
    return mean, (products - n * mean.outer(mean)) / (n - 1)


class _Identity(nn.Module):
    """In the place of Inception: features come in ready."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features

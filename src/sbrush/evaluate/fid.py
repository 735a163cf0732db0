"""Frechet distance between two sets of pictures' features (FID, arXiv 1706.08500), through torchmetrics.

    |mu_r - mu_f|^2 + tr(C_r + C_f - 2 (C_r C_f)^(1/2))

It falls with the number of pictures even if nothing else changes: compare figures at equal N only, and beside a floor.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

CHUNK = 1000  # rows held in float64 at once


class FID:
    """FID of features that come in any batches, in any order: update, then compute; the result is the same."""

    def __init__(self, width: int) -> None:
        """`width`: numbers in a picture's features."""
        self._metric = FrechetInceptionDistance(feature=_AsTheyAre(width), sync_on_compute=False)

    def update(self, features: Tensor, *, real: bool) -> None:
        """Takes the features of more pictures, float [B, width], to the real side or to the model's."""
        for part in features.split(CHUNK) if len(features) else ():
            self._metric.update(part.double(), real=real)

    def compute(self) -> float:
        """The distance so far, 0 or more; each side needs two pictures at least, else RuntimeError."""
        distance: float = self._metric.compute().item()
        return max(0.0, distance)


def fid(real: Tensor, fake: Tensor) -> float:
    """FID of two sets of features: float [N, width] and [M, width], N and M at least 2."""
    metric = FID(real.shape[1])
    metric.update(real, real=True)
    metric.update(fake, real=False)
    return metric.compute()


def fid_error(real: Tensor, fake: Tensor, *, groups: int = 10) -> float:
    """FID's standard error from the choice of the model's pictures, by the delete-a-group jackknife.

    A plain bootstrap is biased upward: it repeats pictures. Here each of `groups` interleaved groups is left out once;
    the FIDs on the rest are all alike biased by their number, which the variance does not see.
    """
    kept = [torch.arange(len(fake)) % groups != group for group in range(groups)]
    found = torch.tensor([fid(real, fake[rows]) for rows in kept])
    return float(((groups - 1) / groups * (found - found.mean()).square().sum()).sqrt())


class _AsTheyAre(nn.Module):
    """In the place of Inception: the features come in ready."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features

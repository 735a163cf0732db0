"""Kernel Inception Distance (arXiv 1801.01401): the unbiased squared MMD under the kernel (x.y / width + 1)^3.

Unbiased, so it may be negative: where two sets cannot be told apart at this number of images, it lies around zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sbrush.noise import generator


def kid(real: Tensor, fake: Tensor, *, subsets: int = 100, size: int = 1000) -> tuple[float, float]:
    """Mean and standard deviation over subsets, of features float [N, width] and [M, width].

    Subsets are drawn without replacement, always the same ones; `size` falls to the smaller side's.
    """
    size, draw = min(size, len(real), len(fake)), generator("kid")
    found = []
    for _ in range(subsets):
        x = real[torch.randperm(len(real), generator=draw)[:size]].double()
        y = fake[torch.randperm(len(fake), generator=draw)[:size]].double()
        found.append(mmd(x, y))
    values = torch.stack(found)
    return values.mean().item(), values.std().item()


def mmd(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased squared MMD of two sets of m points each, [m, width]."""
    m = len(x)
    xx, yy, xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (m * (m - 1))
    return within - 2 * xy.mean()

"""How well an image follows the outline that was asked for: chamfer distance and intersection over union."""

from __future__ import annotations

import torch
from torch import Tensor


def chamfer_distance(asked: Tensor, drawn: Tensor) -> Tensor:
    """The mean distance between two images' lines, in pixels: bool [B, H, W] both, to float32 [B].

    From each pixel of one to the nearest of the other, the mean over its pixels; of both directions the mean. Lines
    against none are as far apart as the image is wide and high; none against none are 0.
    """
    return torch.stack([_distance(*pair) for pair in zip(asked, drawn, strict=True)])


def intersection_over_union(asked: Tensor, drawn: Tensor) -> Tensor:
    """Of areas, bool [B, H, W] both: float32 [B], 0 to 1; two empty ones are 1."""
    both, either = (asked & drawn).sum(dim=(1, 2)), (asked | drawn).sum(dim=(1, 2))
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def _distance(asked: Tensor, drawn: Tensor) -> Tensor:
    one, other = asked.nonzero().float(), drawn.nonzero().float()
    if not len(one) or not len(other):
        far = torch.tensor(asked.shape).float().norm()
        return far if len(one) or len(other) else torch.zeros(())
    apart = torch.cdist(one, other, compute_mode="donot_use_mm_for_euclid_dist")
    return (apart.amin(dim=1).mean() + apart.amin(dim=0).mean()) / 2

"""Images to control images, by pure functions of tensors: what a ControlNet is shown.

`outline` is the built-in world's: the edge of the one thing on a plain background. `canny` is Canny's edge detector as
OpenCV computes it, so that it fits the ControlNets that were trained with it. Both return white lines on black.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

LOW, HIGH = 100, 200  # Canny's thresholds, as the published ControlNets' examples have them
TURN = 13573  # tan(22.5 degrees) 2^15, as OpenCV compares a gradient's direction in whole numbers


def silhouette(images: Tensor) -> Tensor:
    """The thing that stands on a plain background, holes filled: uint8 [B, 3, H, W] to bool [B, 1, H, W].

    The background's colour is the median of the image's frame. A pixel differs from it if its distance is half of
    white's, which a sticker's border is, or 64 levels. The thing is all that the background does not reach from the
    frame.
    """
    pixels = images.float()
    frame = torch.cat([pixels[..., 0, :], pixels[..., -1, :], pixels[..., 0], pixels[..., -1]], dim=-1)
    background = frame.median(dim=-1).values[..., None, None]
    limit = ((255 - background).pow(2).sum(dim=1, keepdim=True).sqrt() / 2).clamp(16, 64)
    differs = (pixels - background).pow(2).sum(dim=1, keepdim=True).sqrt() > limit
    reached = ~differs
    reached[..., 1:-1, 1:-1] = False
    return ~_flood(reached, ~differs)


def outline(images: Tensor) -> Tensor:
    """The edge of each image's silhouette, a pixel wide and inside it: uint8 [B, 3, H, W], 255 on 0, to the same."""
    inside = silhouette(images)
    around = pad(inside, (1, 1, 1, 1)).logical_not()
    edge = inside & (around[..., :-2, 1:-1] | around[..., 2:, 1:-1] | around[..., 1:-1, :-2] | around[..., 1:-1, 2:])
    return _lines(edge)


def canny(images: Tensor, *, low: int = LOW, high: int = HIGH) -> Tensor:
    """Canny's edges: uint8 [B, 3, H, W] to the same, 255 on 0, to the pixel those of OpenCV's Canny(image, low, high).

    Sobel gradients of the channel where |dx| + |dy| is largest; of them the ridges; of these the chains that are
    somewhere above `high` and nowhere below `low`.
    """
    dx, dy, size = _gradient(images)
    ridge = _is_ridge(dx, dy, size) & (size > low)
    return _lines(_flood(ridge & (size > high), ridge, diagonal=True))


PREPROCESSORS: dict[str, Callable[[Tensor], Tensor]] = {"canny": canny, "outline": outline, "none": lambda x: x}
"""`--control-prep` -> what makes a control image, uint8 [B, 3, H, W], of an image of the same size."""


def _gradient(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dy and |dx| + |dy| of the channel where that is largest: int32 [B, 1, H, W] each."""
    sobel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=images.device)
    batch, channels, height, width = images.shape
    each = pad(images.float(), (1, 1, 1, 1), mode="replicate").reshape(batch * channels, 1, height + 2, width + 2)
    both = conv2d(each, torch.stack([sobel, sobel.T])[:, None]).reshape(batch, channels, 2, height, width).int()
    size = both.abs().sum(dim=2, keepdim=True)
    best = size.argmax(dim=1, keepdim=True)
    dx, dy = both.gather(1, best.expand(-1, -1, 2, -1, -1))[:, 0].split(1, dim=1)
    return dx, dy, size.gather(1, best)[:, 0]


def _is_ridge(dx: Tensor, dy: Tensor, size: Tensor) -> Tensor:
    """Whether a pixel's gradient is the largest across the edge, by the four directions: bool [B, 1, H, W]."""
    wide = pad(size, (1, 1, 1, 1))
    height, width = size.shape[-2:]

    def beside(down: int, right: int) -> Tensor:
        return wide[..., 1 + down : 1 + down + height, 1 + right : 1 + right + width]

    x, y = dx.abs().long(), dy.abs().long() << 15
    flat, steep = y < x * TURN, y > x * TURN + (x << 16)
    along = (size > beside(0, -1)) & (size >= beside(0, 1))
    across = (size > beside(-1, 0)) & (size >= beside(1, 0))
    falling = (size > beside(-1, -1)) & (size > beside(1, 1))
    rising = (size > beside(-1, 1)) & (size > beside(1, -1))
    slanted = torch.where((dx ^ dy) < 0, rising, falling)
    return torch.where(flat, along, torch.where(steep, across, slanted))


def _flood(start: Tensor, within: Tensor, *, diagonal: bool = False) -> Tensor:
    """What can be reached from `start` without leaving `within`, bool [B, 1, H, W] both, the first in the second."""
    reached = start & within
    while True:
        grown = _grow(reached, -2)
        grown = (_grow(grown, -1) if diagonal else grown | _grow(reached, -1)) & within
        if torch.equal(grown, reached):
            return reached
        reached = grown


def _grow(mask: Tensor, dim: int) -> Tensor:
    """A bool mask and its neighbours on both sides along a dimension."""
    grown, last = mask.clone(), mask.shape[dim] - 1
    grown.narrow(dim, 1, last).logical_or_(mask.narrow(dim, 0, last))
    grown.narrow(dim, 0, last).logical_or_(mask.narrow(dim, 1, last))
    return grown


def _lines(edge: Tensor) -> Tensor:
    return edge.to(torch.uint8).mul(255).expand(-1, 3, -1, -1)

"""Few photos made many: of a subject before a plain background, in other sizes and other places of the frame.

Six photos are six sizes and six places, each on a background of its own: a network learns these by heart, and draws the
subject big on mint because it was big there. A photo whose edge is not of one colour stays as it is, for what is beyond
its edge is not known.
"""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor

PLAIN = 40.0  # RGB distance from the edge's median colour, beyond which a pixel is the subject's
EVEN = 0.95  # share of the edge that is of that colour, if the background is plain
FILLS = (0.42, 0.66)  # share of the frame's shorter side that the subject's longer side takes
MARGIN = 0.03  # of the frame, left free around it


def moved(photo: Tensor, draw: random.Random) -> Tensor:
    """A photo, uint8 [3, H, W], with its subject in another size and place; itself if its background is not plain."""
    height, width = photo.shape[1:]
    box = subject_box(photo)
    if box is None:
        return photo
    left, top, right, bottom = box
    side = min(height, width)
    scale = draw.uniform(*FILLS) * side / max(right - left, bottom - top)
    place = []
    for low, high, length in ((left, right, width), (top, bottom, height)):
        extent, margin = scale * (high - low), MARGIN * side
        spare = max(0.0, length - extent - 2 * margin)
        place.append((length - extent - spare) / 2 + spare * draw.random() - scale * low)  # of the photo's own corner
    colour = _edge(photo).median(dim=1).values[:, None, None]
    return (_placed(photo - colour, scale, place[0], place[1]) + colour).round().clamp(0, 255).to(torch.uint8)


def subject_box(photo: Tensor) -> tuple[int, int, int, int] | None:
    """Left, top, right and bottom of what is before a plain background; None if there is none, or nothing before it."""
    x, edge = photo.float(), _edge(photo)
    colour = edge.median(dim=1).values
    if ((edge - colour[:, None]).norm(dim=0) < PLAIN).float().mean() < EVEN:
        return None
    rows, columns = ((x - colour[:, None, None]).norm(dim=0) > PLAIN).nonzero(as_tuple=True)
    if not len(rows):
        return None
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def _edge(photo: Tensor) -> Tensor:
    """The outermost pixels, float32 [3, E]."""
    x = photo.float()
    return torch.cat([x[:, 0], x[:, -1], x[:, :, 0], x[:, :, -1]], dim=1)


def _placed(photo: Tensor, scale: float, left: float, top: float) -> Tensor:
    """A photo float32 [3, H, W] scaled, its corner at (left, top) in pixels; zero beyond its edge."""
    height, width = photo.shape[1:]
    x, y = torch.arange(width) + 0.5, torch.arange(height) + 0.5
    across, down = ((x - left) / scale) / width * 2 - 1, ((y - top) / scale) / height * 2 - 1
    grid = torch.stack([across.expand(height, width), down[:, None].expand(height, width)], dim=-1)
    small = photo[None]
    if scale < 1:  # averaged first, for a sample of fewer pixels would miss some
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        small = F.interpolate(small, size, mode="bilinear", antialias=True)
    return F.grid_sample(small, grid[None], mode="bicubic", padding_mode="zeros", align_corners=False)[0]

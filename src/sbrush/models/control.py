"""ControlNets beside a UNet: what they add to its layers, given an image that says where things are.

A ControlNet (arXiv 2302.05543) is a copy of the UNet's encoder, trained beside the frozen teacher. It sees what the
UNet sees, at the UNet's own timestep, and the control image; what it returns is added to the encoder's outputs on their
way to the decoder. Of several, the sums are added, each times its scale, as diffusers' pipelines do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diffusers import ControlNetModel
from torch import Tensor

from sbrush.core import Conditioning


@dataclass(frozen=True)
class ControlNet:
    """A ControlNet in memory, and the scale of what it adds: 0 nothing, 1 as it was trained.

    `prep`: what makes its control images, where a training makes them itself: a key of preprocess.PREPROCESSORS.
    """

    network: ControlNetModel
    scale: float = 1.0
    prep: str = "none"


def residuals(
    controls: Sequence[ControlNet],
    x_t: Tensor,
    t: Tensor,
    conditioning: Conditioning,
    added: dict[str, Tensor] | None = None,
) -> dict[str, Any]:
    """What ControlNets add to a UNet at (x_t, t), as diffusers' UNets take it; {} without "control" in `conditioning`.

    "control" [B, N, 3, H, W] holds an image in 0 .. 1 for each of the N `controls`. `added`: what a UNet of Stable
    Diffusion XL is told besides.
    """
    if "control" not in conditioning:
        return {}
    down: list[Tensor] = []
    mid: Any = None
    for control, image in zip(controls, conditioning["control"].unbind(1), strict=True):
        own, own_mid = control.network(
            x_t, t, conditioning["tokens"], controlnet_cond=image, conditioning_scale=control.scale,
            added_cond_kwargs=added, return_dict=False,
        )  # fmt: skip
        down = [a + b for a, b in zip(down, own, strict=True)] if down else list(own)
        mid = own_mid if mid is None else mid + own_mid
    return {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": mid}

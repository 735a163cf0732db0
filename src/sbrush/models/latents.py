"""Latents and images: how a VAE's configuration scales its latents, and pixels as whole numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def to_images(pixels: Tensor, *, truncate: bool = False) -> Tensor:
    """A decoder's output, -1 .. 1, [B, 3, H, W], as uint8: rounded as diffusers rounds, or cut to whole numbers."""
    if truncate:
        return ((pixels + 1) * 127.5).clamp(0, 255).to(torch.uint8)
    return (pixels / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)


def for_encoder(vae: Any, latents: Tensor) -> Tensor:
    """A VAE's latents at the UNet's scale: the inverse of for_decoder."""
    scale: float = vae.config.scaling_factor
    if (statistics := _statistics(vae, latents)) is None:
        return latents * scale
    mean, std = statistics
    return (latents - mean) * scale / std


def for_decoder(vae: Any, x0: Tensor) -> Tensor:
    """Latents of the UNet's scale, [B, C, H, W], as a VAE's decoder takes them: x0 / scale, or x0 std / scale + mean.

    The mean and standard deviation of each channel are the VAE's latents_mean and latents_std, if it has them.
    """
    scale: float = vae.config.scaling_factor
    if (statistics := _statistics(vae, x0)) is None:
        return x0 / scale
    mean, std = statistics
    return x0 * std / scale + mean


def _statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor] | None:
    """A VAE's latents_mean and latents_std, [1, C, 1, 1] each; None if it has none."""
    means, deviations = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))
    if means is None or deviations is None:
        return None
    mean, std = (like.new_tensor(numbers).view(1, -1, 1, 1) for numbers in (means, deviations))
    return mean, std

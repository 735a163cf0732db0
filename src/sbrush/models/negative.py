"""Negative prompts inside cross-attention: what a student of one or a few steps takes in place of guidance.

Like core.py this imports only torch, and its functions are pure. Classifier-free guidance calls the UNet a second time
and moves its output away from the negative prompt's; one step has no later one to mend what that breaks. Here each
cross-attention attends to the negative prompt's tokens with the same queries and moves away from what it finds.

    code        symbol   shape       meaning
    positive    Z+       [B, N, D]   what N image tokens find in the prompt, all heads side by side, before to_out
    negative    Z-       [B, N, D]   what the same queries find in the negative prompt, by the same projections
    scale       phi, a   number      how far Z goes from Z-: NAG's phi, NASA's a; 0 changes nothing
    limit       tau      number      how much longer than Z+ a token's Z may get (NAG)
    blend       a        number      share of the guided Z beside Z+ (NAG)

NASA with a is (1 - a) times NAG with phi = a / (1 - a), blend 1 and no limit: the same direction, scaled down.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

NegativeMethod = Literal["nag", "nasa"]
"""Normalized Attention Guidance (arXiv 2505.21179) and Negative-Away Steer Attention (arXiv 2412.02687)."""


def nasa(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Z = Z+ - a Z- (NASA, arXiv 2412.02687). [B, N, D], `negative` may be a batch of one."""
    return positive - scale * negative


def nag(positive: Tensor, negative: Tensor, scale: float, limit: float, blend: float) -> Tensor:
    """Z = a Zh + (1 - a) Z+ (NAG, arXiv 2505.21179). [B, N, D], `negative` may be a batch of one.

        Zt = Z+ + phi (Z+ - Z-),    R = |Zt|_1 / |Z+|_1 of each token,    Zh = Zt min(R, tau) / R

    `limit`: tau, 1 or more. At `scale` 0 the result is Z+ to the bit: it is written Z+ + a (Zh - Z+).
    """
    guided = positive + scale * (positive - negative)
    # Means stand for the sums of the norms: their ratio is the same, and float16 holds them.
    before, after = (z.abs().mean(dim=-1, keepdim=True) for z in (positive, guided))
    shrink = (limit * before / after.clamp(min=torch.finfo(after.dtype).tiny)).clamp(max=1)  # min(R, tau) / R
    return positive + blend * (guided * shrink - positive)


@dataclass(frozen=True)
class NegativeGuidance:
    """A method with its numbers, see above. `limit` and `blend` are NAG's alone."""

    method: NegativeMethod
    scale: float
    limit: float = 2.5
    blend: float = 0.375

    def __call__(self, positive: Tensor, negative: Tensor) -> Tensor:
        """Z, of Z+ and Z-, each [B, N, D]."""
        if self.method == "nasa":
            return nasa(positive, negative, self.scale)
        return nag(positive, negative, self.scale, self.limit, self.blend)

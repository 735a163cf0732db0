"""The least time that work can take on a device: what it computes and moves, over the rates measured on that device."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sbrush.training.methods.rehearsal import forwards
from sbrush.training.recipes import Recipe

REPEATS = 6


@dataclass(frozen=True)
class Rates:
    """What a device does at most: the best of several tries, of nothing but that."""

    matrix: float  # FLOP/s of square matrix products
    copy: float  # bytes/s of a large copy, read and written both counted

    @classmethod
    def measure(cls, device: str, dtype: torch.dtype) -> Rates:
        """Of a device, of matrices of `dtype`: takes about a second."""
        return cls(matrix_rate(device, dtype), copy_rate(device))


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of square matrix products."""
    side = 8192 if device.startswith("cuda") else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / min(seconds(lambda: a @ b, device) for _ in range(REPEATS))


def copy_rate(device: str) -> float:
    """Bytes/s that a copy much larger than any cache reads and writes."""
    a = torch.ones(2**28 if device.startswith("cuda") else 2**26, device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / min(seconds(lambda: b.copy_(a), device) for _ in range(REPEATS))


def seconds(work: Callable[[], Any], device: str) -> float:
    """How long work takes, to the end of what it started on the device."""
    start = time.perf_counter()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


@dataclass(frozen=True)
class Roofline:
    """Seconds of one training step: matrix products, and the moving of bytes that no product hides."""

    compute: float
    moving: float

    @classmethod
    def of_step(cls, recipe: Recipe, flops: float, *, trained: int, lora: int, bf16: bool, rates: Rates) -> Roofline:
        """`flops`: of one UNet forward for one image (a backward is two, see rehearsal.forwards); parameters counted.

        Moved for every trained parameter, in float32: Adam reads it, its gradient and two moments and writes three of
        them (28 bytes), the gradient's norm reads the gradient (4); for the student's the average reads two and writes
        one (12), and bfloat16's copy of a full student reads one and writes a half (6).
        """
        student = 28 + 4 + (12 if recipe.ema else 0) + (6 if bf16 and not recipe.student_rank else 0)
        moved = student * trained + (28 + 4) * recipe.lora_updates * lora
        return cls(recipe.batch * forwards(recipe) * flops / rates.matrix, moved / rates.copy)

    @property
    def seconds(self) -> float:
        """Of both, one after the other."""
        return self.compute + self.moving

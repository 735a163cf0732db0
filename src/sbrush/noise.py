"""Random numbers that depend on what they are for and on nothing else.

A image's noise comes from its seed alone; a training sample's from (seed, step, place in the global batch). So a run
can be resumed, or spread over another number of processes, without changing what any sample sees.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable

import torch
from torch import Tensor

from sbrush.device import send


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator whose stream is fixed by the key."""
    return torch.Generator().manual_seed(_number(*key))


def _number(*key: int | str) -> int:
    """63 bits fixed by the key."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


def image_noise(seeds: Iterable[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal [seeds, *shape]; what diffusers draws from torch.Generator().manual_seed(seed)."""
    return step_noises(seeds, shape, 1)[0]


def step_noises(seeds: Iterable[int], shape: tuple[int, ...], steps: int) -> list[Tensor]:
    """The noise of each of `steps` sampling steps, standard normal [seeds, *shape]: image_noise, then what follows it.

    That of a step depends on the seed and the step alone. diffusers' LCMScheduler draws the same from one generator
    for each image.
    """
    draws = [torch.Generator().manual_seed(seed) for seed in seeds]
    return [torch.stack([torch.randn(shape, generator=draw) for draw in draws]) for _ in range(steps)]


class StepNoise:
    """The random numbers of one training step, for the samples `indices` of its global batch."""

    def __init__(self, seed: int, step: int, indices: Iterable[int], device: torch.device) -> None:
        self._draws = [generator(seed, step, index) for index in indices]
        self._whole = random.Random(_number(seed, step, "batch"))
        self._device = device

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """Standard normal [B, *shape]."""
        return send(torch.stack([torch.randn(shape, generator=g) for g in self._draws]), self._device)

    def timesteps(self, low: int, high: int) -> Tensor:
        """Uniform over low .. high, both included: int64 [B]."""
        some = [torch.randint(low, high + 1, (), generator=g) for g in self._draws]
        return send(torch.stack(some), self._device)

    def uniforms(self, low: float, high: float) -> Tensor:
        """One draw from low .. high for each sample: float32 [B]."""
        some = [low + (high - low) * torch.rand((), generator=g) for g in self._draws]
        return send(torch.stack(some), self._device)

    def uniform(self, low: float, high: float) -> float:
        """One draw from low .. high for the whole global batch."""
        return low + (high - low) * self._whole.random()

    def index(self, count: int) -> int:
        """One draw from 0 .. count - 1 for the whole global batch."""
        return self._whole.randrange(count)

    def chance(self, probability: float) -> bool:
        """One draw for the whole global batch."""
        return self._whole.random() < probability

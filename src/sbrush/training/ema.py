"""An exponential moving average of parameters, kept in float32, with a ramp for short runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor


class EMA:
    """theta_ema <- d theta_ema + (1 - d) theta after every step, with d = min(decay, (1 + step) / (10 + step)).

    The ramp lets short runs forget where they started: at a constant 0.9999, 2,000 steps keep 82 % of the start.
    Without decay the average is the parameters themselves, and takes no memory.

    Kept away from the parameters' device it moves on a thread of its own, during the next step: what it needs of them
    goes through a pinned copy, without anyone waiting for that. Whoever asks for the average waits for its last move.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float, *, device: torch.device | None = None) -> None:
        """`device`: the CPU, if the average is kept there, away; by default it is where the parameters are."""
        self.decay, self._parameters = decay, dict(parameters) if decay else {}
        self._tensors = {
            name: p.detach().to(device or p.device, torch.float32, copy=True) for name, p in self._parameters.items()
        }
        self._copies = _pinned(list(self._parameters.values())) if device and self._parameters else None
        self._worker = ThreadPoolExecutor(1, "average")
        self._moving: Future[None] | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The average by name, none without decay."""
        if self._moving:
            self._moving.result()
            self._moving = None
        return self._tensors

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the average towards the parameters; `step` counts from 1."""
        if not self.tensors:
            return
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, now = list(self.tensors.values()), [p.detach() for p in self._parameters.values()]
        if self._copies is None:
            torch._foreach_lerp_(averages, now, 1 - decay)
            return
        for copy, parameter in zip(self._copies, now, strict=True):
            copy.copy_(parameter, non_blocking=True)
        arrived = torch.cuda.Event() if now[0].is_cuda else None
        if arrived:
            arrived.record()
        self._moving = self._worker.submit(_move, averages, self._copies, 1 - decay, arrived)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """The parameters hold the average for as long as the context lasts, then themselves again, bit for bit.

        The two change places, one by one, so that no third copy is needed.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._parameters.items():
            own = parameter.detach().clone()
            parameter.copy_(self.tensors[name])
            self.tensors[name].copy_(own)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts back a saved average."""
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])


def _pinned(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Room for a copy of each parameter, in one piece of host memory that a GPU writes to by itself."""
    sizes = [p.numel() for p in parameters]
    piece = torch.empty(sum(sizes), pin_memory=parameters[0].is_cuda)
    return [part.as_strided(p.shape, p.stride()) for part, p in zip(piece.split(sizes), parameters, strict=True)]


@torch.no_grad()
def _move(averages: list[Tensor], copies: list[Tensor], share: float, arrived: torch.cuda.Event | None) -> None:
    if arrived:
        arrived.synchronize()
    torch._foreach_lerp_(averages, copies, share)

"""A whole student as a LoRA for its teacher: each layer's change W_student - W_teacher, approximated at a low rank.

The best approximation of rank r is that of the r largest singular values (Eckart and Young 1936): with the eigenvectors
U of D D^T, D of shape [out, in k k], it is D ~ U_r (U_r^T D). What it leaves out is measured, after rounding to the
numbers that are written, layer by layer and over the whole UNet.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sbrush.console import SbrushError, count, info, printable, progress
from sbrush.models.model import Model
from sbrush.models.unet import BLOCKS


class Layer(NamedTuple):
    """One layer of the LoRA. `left` and `size`: the squared norms of what it leaves out, and of the change."""

    down: Tensor  # [r, in] or [r, in, k, k]
    up: Tensor  # [out, r] or [out, r, 1, 1]
    left: float
    size: float


@dataclass(frozen=True)
class Lora:
    """`tensors` by diffusers' names, and the relative errors |D - LoRA| / |D| of the change D that it leaves.

    `rank`: the highest of its layers. `layers`: by name, the error of each. `covered`: over the layers that it changes;
    `whole`: over all of the UNet, with the biases, norms and outer layers that no LoRA here changes.
    """

    tensors: dict[str, Tensor]
    rank: int
    layers: dict[str, float]
    covered: float
    whole: float

    @property
    def about(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "rank": self.rank, "relative_error": self.covered, "relative_error_of_whole_unet": self.whole,
            "layers": self.layers,
        }  # fmt: skip


class Change:
    """What the student's parameters differ by from the teacher's, computed when it is asked for: it is as large."""

    def __init__(self, student: nn.Module, teacher: nn.Module, shown: str) -> None:
        self._ours, self._theirs = dict(student.named_parameters()), dict(teacher.named_parameters())
        if {name: p.shape for name, p in self._ours.items()} != {name: p.shape for name, p in self._theirs.items()}:
            raise SbrushError(
                f"{shown} is of another architecture than its teacher: no LoRA makes one of the other",
                "--to single-file or --to diffusers",
                code=2,
            )

    def of(self, name: str) -> Tensor:
        """A parameter's change, float64."""
        return self._ours[name].detach().double() - self._theirs[name].detach().double()

    def matrix(self, layer: str) -> Tensor:
        """The change of a layer's weight as a matrix [out, in k k]."""
        return self.of(f"{layer}.weight").flatten(1)

    def shape(self, layer: str) -> torch.Size:
        """That of a layer's weight."""
        return self._ours[f"{layer}.weight"].shape

    def rank(self, layer: str) -> int:
        """The highest that the change of a layer's weight can have."""
        shape = self.shape(layer)
        return min(shape[0], shape[1:].numel())

    def energy(self, layers: Container[str]) -> tuple[float, float]:
        """The squared norms of the change of everything, and of all but the weights of `layers`."""
        sizes = {name: float(self.of(name).square().sum()) for name in self._ours}
        others = sum(value for name, value in sizes.items() if name.removesuffix(".weight") not in layers)
        return sum(sizes.values()), others


def decompose(
    student: Model, teacher: Model, *, rank: int | None, error: float, dtype: torch.dtype = torch.float32
) -> Lora:
    """The change from teacher to student as a LoRA of `rank`, or of the lowest rank that leaves at most `error`.

    SbrushError if the two are of different architectures, if they do not differ, or if no layer has that rank.
    """
    change = Change(student.unet, teacher.unet, printable(student.name))
    layers = lora_layers(student.unet)
    ranks = {name: change.rank(name) for name in layers}
    if rank is not None and rank > max(ranks.values()):
        raise SbrushError(
            f"--rank {rank} is beyond every layer: the largest has rank {max(ranks.values())}",
            f"take at most {max(ranks.values())}; 4 to 128 is usual",
            code=2,
        )
    if not any(change.of(f"{name}.weight").any() for name in layers):
        raise SbrushError(
            "the student does not differ from its teacher in any layer that a LoRA changes",
            "check --teacher: is it the student itself?",
            code=2,
        )
    if rank is None:
        rank = _lowest_rank(change, layers, error)
    short = sum(rank > own for own in ranks.values())
    if short:
        info(f"note: {count(short, 'layer')} of {len(ranks)} have a rank below {rank}: their change is kept whole")
    made: dict[str, Layer] = {}
    with progress("decomposing", len(layers), unit="layers") as bar:
        for name in layers:
            made[name] = _cut(change.matrix(name), min(rank, ranks[name]), change.shape(name), dtype)
            bar.advance()
    return _measured(made, change, rank)


def lora_layers(unet: nn.Module) -> list[str]:
    """The layers that a LoRA changes here: those that sd-scripts, ComfyUI and diffusers all know, see unet.py."""
    kinds = (nn.Linear, nn.Conv2d)
    return [name for name, module in unet.named_modules() if isinstance(module, kinds) and name.startswith(BLOCKS)]


def _gram(matrix: Tensor) -> Tensor:
    """D D^T or D^T D, whichever is smaller: its eigenvalues are D's squared singular values."""
    return matrix.T @ matrix if matrix.shape[0] > matrix.shape[1] else matrix @ matrix.T


def _lowest_rank(change: Change, layers: Sequence[str], error: float) -> int:
    """The lowest rank, the same for all layers, that leaves at most `error` of the change."""
    left = torch.zeros(max(map(change.rank, layers)) + 1, dtype=torch.float64)
    with progress("finding the rank", len(layers), unit="layers") as bar:
        for name in layers:
            energies = torch.linalg.eigvalsh(_gram(change.matrix(name))).clamp(min=0)  # rising
            behind = energies.cumsum(0).flip(0)  # what rank 0, 1, 2 ... leaves
            left[: len(behind)] += behind
            bar.advance()
    return max(1, int((left <= error**2 * left[0]).nonzero()[0]))


def _cut(matrix: Tensor, rank: int, shape: torch.Size, dtype: torch.dtype) -> Layer:
    """The best LoRA of this rank, both its halves of one size, as far as `dtype` can hold it."""
    first = torch.linalg.eigh(_gram(matrix)).eigenvectors[:, -rank:]
    tall = matrix.shape[0] > matrix.shape[1]
    up, down = (matrix @ first, first.T) if tall else (first, first.T @ matrix)
    scale = (up.norm(dim=0) / down.norm(dim=1).clamp(min=1e-30)).sqrt().clamp(min=1e-15)
    up, down = (up / scale).to(dtype), (down * scale[:, None]).to(dtype)
    left = float((matrix - up.double() @ down.double()).square().sum())
    down = down.unflatten(1, shape[1:])
    up = up[:, :, None, None] if len(shape) == 4 else up
    return Layer(down.contiguous(), up.contiguous(), left, float(matrix.square().sum()))


def _measured(made: Mapping[str, Layer], change: Change, rank: int) -> Lora:
    """The LoRA with the errors that it leaves."""
    tensors: dict[str, Tensor] = {}
    for name, layer in made.items():
        tensors[f"unet.{name}.lora_A.weight"], tensors[f"unet.{name}.lora_B.weight"] = layer.down, layer.up
    left, size = sum(layer.left for layer in made.values()), sum(layer.size for layer in made.values())
    everything, others = change.energy(made)
    errors = {name: (layer.left / layer.size) ** 0.5 if layer.size else 0.0 for name, layer in made.items()}
    whole = ((left + others) / everything) ** 0.5
    return Lora(tensors, rank, errors, (left / size) ** 0.5, whole)

"""FSDP2: a large student's weights, gradients, moments and average, sharded among processes.

Asked for by accelerate's own configuration (`accelerate config`, "FSDP"). The teacher stays whole on each device: it is
frozen, in bfloat16 it takes a tenth of what a student takes in training, and its LoRA is small. So accelerate runs
plain data parallelism, and the student is sharded here, block by block, by torch's fully_shard.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from sbrush.models.unet import blocks_of


def asked_for() -> bool:
    """Whether accelerate's configuration asks for FSDP; removes it, so that accelerate runs data parallelism."""
    return os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")


def shard(unet: UNet2DConditionModel, accelerator: Accelerator) -> None:
    """Shards a UNet's parameters among all processes, in place: they become DTensors, float32 as before.

    A block's weights are gathered on a device only while that block runs.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for block in blocks_of(unet):
        fully_shard(block, mesh=mesh)
    fully_shard(unet, mesh=mesh)


def held(parameters: Iterable[Tensor]) -> float:
    """The share of parameters that this process holds."""
    pairs = [(p.to_local().numel() if isinstance(p, DTensor) else p.numel(), p.numel()) for p in parameters]
    return sum(mine for mine, _ in pairs) / sum(all_ for _, all_ in pairs)


def gather(tensor: Tensor) -> Tensor:
    """The whole tensor. If it is sharded, all processes must call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def put(tensor: Tensor, value: Tensor) -> None:
    """Copies a whole tensor's values into one that may be sharded."""
    if isinstance(tensor, DTensor):
        value = distribute_tensor(value.to(tensor.device, tensor.dtype), tensor.device_mesh, tensor.placements)
    tensor.copy_(value)

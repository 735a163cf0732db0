"""accelerate, set up for a run; its environment variables decide nothing that config.json does not record."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    TorchDynamoPlugin,
)

from sbrush.console import SbrushError, info, printable

ENGINES = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
# What `accelerate config` and `accelerate launch` set: variable, values that change nothing, what to use in its place.
REFUSED = (
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", ("1",), "--micro-batches splits a batch, --batch sets its size"),
    ("ACCELERATE_DYNAMO_BACKEND", ("no",), "--compile compiles the networks"),
    ("ACCELERATE_USE_PARALLELISM_CONFIG", ("false", "0", "no"), "sbrush runs data-parallel, or under FSDP"),
)


def make_accelerator(device: str, mixed_precision: str, options: dict[str, Any]) -> Accelerator:
    """accelerate's, on this device. `mixed_precision`: "bf16" or "no"; `options`: where trackers write.

    SbrushError if accelerate's configuration asks for what sbrush does not run under, or would change the student.
    """
    _check_environment(device, mixed_precision)
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    # A process that hangs, a machine that has gone: given up after a time that no export of a large student takes.
    patience = InitProcessGroupKwargs(timeout=timedelta(minutes=30))
    # Gradients lie in the buckets that processes exchange: without, a student's are there twice.
    buckets = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    made = Accelerator(
        cpu=device == "cpu", mixed_precision=mixed_precision, kwargs_handlers=[patience, buckets],
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        dynamo_plugin=TorchDynamoPlugin(backend="no"), **options,
    )  # fmt: skip
    if (kind := made.distributed_type) in ENGINES:
        raise SbrushError(
            f"sbrush does not run under {kind.value}",
            "choose FSDP or plain data parallelism in `accelerate config`; these make a run smaller as well: "
            "--student-lora 256, --adam-8bit, --ema-on-cpu, --checkpointing, --micro-batches",
            code=2,
        )
    return made


def _check_environment(device: str, mixed_precision: str) -> None:
    for name, harmless, instead in REFUSED:
        value = os.environ.get(name, harmless[0])
        if value.lower() not in harmless:
            raise SbrushError(f"{name}={printable(value)} would change the run", f"unset it: {instead}", code=2)
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1", "yes")
    forced = os.environ.get("ACCELERATE_TORCH_DEVICE", "cpu" if on_cpu else device)
    if forced.split(":")[0] != device.split(":")[0]:
        raise SbrushError(
            f"accelerate's configuration asks for {printable(forced)}, this run for {device}",
            f"give --device {forced.split(':')[0]}, or change `accelerate config`",
            code=2,
        )
    configured = os.environ.get("ACCELERATE_MIXED_PRECISION", mixed_precision)
    if configured != mixed_precision:
        info(
            f"note: accelerate's mixed_precision {printable(configured)} is not used; --precision decides: "
            f"{'bfloat16' if mixed_precision == 'bf16' else 'float32'}"
        )

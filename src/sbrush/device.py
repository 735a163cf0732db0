"""Where the work runs and in which number format."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from datetime import timedelta
from typing import Literal

import torch
from accelerate import PartialState
from torch import Tensor

from sbrush.console import SbrushError

Precision = Literal["auto", "float32", "bfloat16"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str = "auto", *, present: bool = True) -> str:
    """ "cuda" where there is one, else "cpu"; a device asked for by name must exist (SbrushError).

    Without `present` it need not: a run may be planned for a card that another machine has.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise SbrushError(f"no such device: {name}", "devices are cpu, cuda, cuda:1, ...", code=2) from None
    if kind not in ("cpu", "cuda"):
        raise SbrushError(f"sbrush does not run on {kind}", "use --device cpu or --device cuda", code=2)
    if kind == "cuda" and present and not torch.cuda.is_available():
        raise SbrushError("no CUDA device on this machine", "leave --device out, or use --device cpu", code=2)
    return name


def launched() -> tuple[int, int]:
    """This process's number, and how many torchrun or accelerate started together, before they have met."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on another device, without waiting for what that is at: for CUDA by way of pinned memory."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """Convolutions in float32 are float32 within: cuDNN would round their factors to ten bits (TF32) by default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@contextmanager
def quick_products(device: torch.device) -> Iterator[None]:
    """On CUDA products of float32 matrices take their factors' first ten bits (TF32): several times as fast."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.set_float32_matmul_precision(before)


def pick_dtype(name: str, device: str) -> torch.dtype:
    """The networks' dtype for sampling: "auto" is bfloat16 on CUDA and float32 on CPU."""
    if name == "auto":
        return torch.bfloat16 if device.startswith("cuda") else torch.float32
    if name not in DTYPES:
        raise SbrushError(f"no such dtype: {name}", f"dtypes are auto, {', '.join(DTYPES)}", code=2)
    return DTYPES[name]


def trains_in_bf16(precision: Precision, device: str) -> bool:
    """Whether training multiplies matrices in bfloat16: "auto" does where the hardware does so natively.

    A card that is only planned with is taken for one that does.
    """
    if precision != "auto":
        return precision == "bfloat16"
    if device.startswith("cuda"):
        return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    return has_cpu_bf16()


def has_cpu_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices itself (AVX512-BF16 or AMX); without, bfloat16 is slower."""
    asks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(ask() for ask in asks if ask)


@contextmanager
def process_group(device: str) -> Iterator[PartialState]:
    """The processes that torchrun or accelerate started together, one if none did; only the main one logs.

    They wait for each other as long as it takes. SbrushError if one of them ends before its time.
    """
    state = PartialState(cpu=device == "cpu", timeout=timedelta(days=7))
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        with nullcontext() if state.is_main_process else redirect_stderr(nowhere):
            try:
                yield state
            except RuntimeError as problem:
                if state.num_processes == 1 or not is_disconnected(problem):
                    raise
                raise SbrushError(
                    "another process has ended or cannot be reached",
                    "what was done so far is kept: the same command resumes, with any number of processes",
                ) from problem


def is_disconnected(problem: RuntimeError) -> bool:
    """Whether processes have lost contact: gloo reports that only in its message."""
    return isinstance(problem, torch.distributed.DistError) or "gloo" in str(problem) or "NCCL" in str(problem)

"""Where the work runs and in which number format."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from torch import Tensor

from sbrush.console import SbrushError

if TYPE_CHECKING:
    from accelerate import PartialState

T = TypeVar("T")

Precision = Literal["auto", "float32", "bfloat16"]
Purpose = Literal["sample", "eval"]
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
    """On CUDA, float32 products take their factors' first ten bits (TF32): several times as fast.

    This holds for matrices and for convolutions; both settings are put back at the end.
    """
    if device.type != "cuda":
        yield
        return
    matrices, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matrices)
        torch.backends.cudnn.allow_tf32 = convolutions


@dataclass(frozen=True)
class Arithmetic:
    """How networks that draw images compute: their number format, and whether float32 products may be TF32.

    `tf32` matters on CUDA alone. Without it float32 is float32 throughout, in convolutions too.
    """

    dtype: torch.dtype = torch.float32
    tf32: bool = False

    def __str__(self) -> str:
        return str(self.dtype).removeprefix("torch.") + (" with TF32 products" if self.tf32 else "")

    def context(self, device: str) -> AbstractContextManager[None]:
        """While this lasts float32 products on `device` are as `tf32` says."""
        return quick_products(torch.device(device)) if self.tf32 else exact_convolutions()

    def each(self, items: Iterable[T], device: str) -> Iterator[T]:
        """The items, each computed in `context`; between two of them the settings are as they were.

        A `with` around the loop would hold for whatever the caller does with an item, and metrics are exact.
        """
        source = iter(items)
        while True:
            with self.context(device):
                try:
                    item = next(source)
                except StopIteration:
                    return
            yield item


def pick_arithmetic(name: str, device: str, purpose: Purpose) -> Arithmetic:
    """The arithmetic for `--precision NAME`: see pick_dtype. Only `eval`'s "auto" on CUDA allows TF32 products."""
    tf32 = name == "auto" and purpose == "eval" and device.startswith("cuda")
    return Arithmetic(pick_dtype(name, device, purpose), tf32)


def pick_dtype(name: str, device: str, purpose: Purpose) -> torch.dtype:
    """The networks' dtype for `--precision NAME`; SbrushError for an unknown name.

    "auto" is float32 on the CPU. On CUDA it is float32 for `eval` (with TF32 products, see pick_arithmetic) and float16
    for `sample`. Measured on an H200 with a UNet of SD 2.1's size: at T an epsilon student multiplies its UNet's error
    by sigma / alpha = 14.6, a v student by 1. The UNet's relative error, and the milliseconds an image takes:

        float32 with TF32    .0007     31      in x0 of an epsilon student    .010
        float16              .0017     21                                     .025
        bfloat16             .0146     21                                     .21
    """
    if name == "auto":
        return torch.float16 if purpose == "sample" and device.startswith("cuda") else torch.float32
    if name not in DTYPES:
        raise SbrushError(f"no such precision: {name}", f"precisions are auto, {', '.join(DTYPES)}", code=2)
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
    from accelerate import PartialState  # which takes a second to import, and drawing does not need it

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

"""A CUDA device that is not there: shapes, dtypes, devices and autocast's rules as on a real one, no numbers.

torch's FakeTensor knows which kernel would run where. So a training step that would end on a GPU with "expected all
tensors to be on the same device" ends here too, and whoever makes the host wait for the device is named. What this
cannot do is a backward (the engine wants a device), and to be fast.
"""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from sbrush.models.unet import set_role
from sbrush.training.methods.vsd import VSD

SENDERS = ("noise", "training.health", "training.text_cache", "metrics.clip", "models.model", "models.sdxl")


@contextmanager
def fake_cuda() -> Iterator[Accelerator]:
    """While this lasts there is a GPU that multiplies bfloat16; accelerate's object for it."""
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(allow_non_fake_inputs=True):
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
        patch.setattr(nn.Module, "_apply", _apply)
        for name in SENDERS:  # pinned memory takes a driver
            patch.setattr(importlib.import_module(f"sbrush.{name}"), "send", lambda x, to: x.to(to, non_blocking=True))
        for kind in (AcceleratorState, PartialState):  # one for the whole process, other tests' too
            patch.setattr(kind, "_shared_state", {})
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        for kind in (AcceleratorState, PartialState):
            kind._shared_state["device"] = torch.device("cuda", 0)
        yield accelerator


def without_engine(distiller: VSD) -> VSD:
    """The same, whose backward only makes gradients of the right shapes."""

    def backward(loss: Tensor, role: Any) -> None:
        assert loss.requires_grad and loss.device.type == "cuda" and loss.dtype == torch.float32
        set_role(distiller.student if role == "student" else distiller.teacher.unet, role)
        for parameter in (distiller.trained if role == "student" else distiller.lora).values():
            parameter.grad = torch.empty_like(parameter)

    distiller._backward = backward  # type: ignore[method-assign]
    return distiller


class Waits(TorchDispatchMode):
    """Where the host waits for the device while this lasts: copies that are not told not to, values that are read."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = function._schema.name.split("::")[1]  # type: ignore[attr-defined]
        tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        on_device = any(x.device.type == "cuda" for x in tensors)
        if on_device and name in ("_local_scalar_dense", "nonzero", "equal"):
            self._note(name)
        result = function(*args, **kwargs)
        if name in ("_to_copy", "copy_"):
            there, here = result.device.type, tensors[-1].device.type
            told = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
            if there != here and not told:
                self._note(f"{name} of {list(result.shape)} from {here} to {there}")
        return result

    def _note(self, what: str) -> None:
        own = [frame for frame in traceback.extract_stack() if "/sbrush/" in frame.filename]
        self.found.append(f"{what}, {own[-1].name}: {own[-1].line}" if own else what)


def _apply(self: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """nn.Module's own changes what a parameter holds, which a fake one does not let it: these change places."""
    for child in self.children():
        child._apply(function)
    for name, parameter in self._parameters.items():
        if parameter is None:
            continue
        with torch.no_grad():
            new = function(parameter)
        if (new.dtype, new.device, new.stride()) != (parameter.dtype, parameter.device, parameter.stride()):
            self._parameters[name] = nn.Parameter(new.detach(), parameter.requires_grad)
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = function(buffer)
    return self

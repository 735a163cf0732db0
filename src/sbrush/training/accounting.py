"""Counting what a computation holds and multiplies, played through on the meta device: shapes without numbers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from sbrush.core import Conditioning
from sbrush.models.model import Model

PRODUCTS, NORMS = ("linear", "conv2d"), ("group_norm", "layer_norm")


def conditioning_shapes(teacher: Model, batch: int) -> Conditioning:
    """The conditioning of so many prompts, with shapes and no numbers."""
    width = sum(encoder.config.hidden_size for _, encoder in teacher.text_parts)
    shapes = {"tokens": torch.zeros(batch, teacher.text_parts[0][0].model_max_length, width, device="meta")}
    if len(teacher.text_parts) > 1:
        shapes["pooled"] = torch.zeros(batch, teacher.text_parts[-1][1].config.projection_dim, device="meta")
    if teacher.controls:
        shapes["control"] = torch.zeros(batch, len(teacher.controls), 3, *teacher.image_size, device="meta")
    return shapes


class _Flash(torch.autograd.Function):
    """What fused attention holds: its inputs, its output and a number for each query, but no attention map."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


@contextmanager
def kernels(*, autocast: bool) -> Iterator[None]:
    """While this lasts, networks without numbers hold what a device's own kernels hold.

    torch would write attention maps out for them. And CUDA's `autocast`, which it knows on the device alone, takes
    norms in float32, and what goes into products in the products' own format.
    """
    own = {name: getattr(F, name) for name in ("scaled_dot_product_attention", *NORMS, *PRODUCTS)}

    def taking(dtype: torch.dtype, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def cast(x: Any) -> Any:
            return x.to(dtype) if isinstance(x, Tensor) else x

        return lambda *args, **kwargs: function(*map(cast, args), **{name: cast(x) for name, x in kwargs.items()})

    def attend(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        return _Flash.apply(query, key, value)

    F.scaled_dot_product_attention = taking(torch.bfloat16, attend) if autocast else attend
    if autocast:
        for name in NORMS:
            setattr(F, name, taking(torch.float32, own[name]))
        for name in PRODUCTS:
            setattr(F, name, taking(torch.bfloat16, own[name]))
    try:
        yield
    finally:
        for name, function in own.items():
            setattr(F, name, function)


class Held(TorchDispatchMode):
    """Counts the bytes of all storages that come into being, for as long as they are held."""

    def __init__(self, known: list[nn.Module]) -> None:
        super().__init__()
        tensors = [t for module in known for t in (*module.parameters(), *module.buffers())]
        self._known = {t.untyped_storage()._cdata for t in tensors}
        self.now = self.most = 0

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._meet(value.untyped_storage())
        return result

    def _meet(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.most = max(self.most, self.now)

        def gone() -> None:
            self._known.discard(key)
            self.now -= size

        weakref.finalize(storage, gone)

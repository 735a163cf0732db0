"""Adam over named parameters: made, stepped, and its state as tensors and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sbrush.console import SbrushError
from sbrush.training.sharding import gather, put

Kind = Literal["adam", "adam8bit"]


def make_adam(parameters: Iterable[nn.Parameter], *, kind: Kind, lr: float, beta2: float) -> torch.optim.Optimizer:
    """Adam without weight decay, beta1 0.9: torch's fused one, or bitsandbytes' with moments of 8 bits.

    SbrushError if bitsandbytes is not installed.
    """
    if kind == "adam":
        return torch.optim.Adam(parameters, lr=lr, betas=(0.9, beta2), fused=True)
    try:
        from bitsandbytes.optim import Adam8bit
    except ImportError as problem:
        raise SbrushError(
            "the 8-bit Adam needs bitsandbytes, which is not installed", "pip install 'sbrush[adam8bit]'", code=2
        ) from problem
    return Adam8bit(parameters, lr=lr, betas=(0.9, beta2))


def clip_and_step(optimizer: torch.optim.Optimizer, clip: float) -> Tensor:
    """Clips the gradients' norm and steps; the norm before clipping. If that is not finite nothing is changed.

    torch's Adam decides so on the device, without anyone waiting for it; the 8-bit one has no such switch.
    """
    norm = gather(nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip))
    if isinstance(optimizer, torch.optim.Adam):
        # Mixed precision's own switch: the fused step does nothing where it is one.
        optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
        optimizer.step()
    elif norm.isfinite():
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def state_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimiser's state as flat tensors, "parameter index.key": what `restore` takes back."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        f"{i}.{k}": torch.as_tensor(v) for i, p in enumerate(parameters) for k, v in optimizer.state.get(p, {}).items()
    }


@torch.no_grad()
def restore(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Puts back what `state_of` took; the parameter groups keep the optimiser's own settings.

    ValueError if that is no state of such an optimiser over these parameters: of all of them, or of none.
    """
    if not tensors:
        optimizer.state.clear()
        return
    empty = _empty_state(optimizer)
    shapes = {f"{i}.{k}": v.shape for i, entry in enumerate(empty.values()) for k, v in entry.items()}
    if shapes != {name: tensor.shape for name, tensor in tensors.items()}:
        raise ValueError("not the state of such an optimiser over these parameters")
    if not all(v.isfinite().all() for v in tensors.values()):
        raise ValueError("values that are no numbers")
    for i, (parameter, entry) in enumerate(empty.items()):
        # Fused Adam walks memory: moments must be laid out as their parameter is, which `entry` is.
        for k, v in entry.items():
            put(v, tensors[f"{i}.{k}"])
        state: dict[str, Any] = entry
        if not isinstance(optimizer, torch.optim.Adam):
            state["step"] = int(state["step"])
        optimizer.state[parameter] = state


def _empty_state(optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, dict[str, Tensor]]:
    """The state of each parameter as it would be after a first step, its values not yet set."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if isinstance(optimizer, torch.optim.Adam):
        fused = optimizer.defaults["fused"]
        return {
            p: {
                "step": torch.zeros((), device=p.device if fused else "cpu"),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
            for p in parameters
        }
    optimizer.state.clear()
    for group, settings in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(settings["params"]):
            optimizer.init_state(settings, parameter, group, index)  # type: ignore[attr-defined]
    return {p: {k: torch.as_tensor(v).clone() for k, v in optimizer.state[p].items()} for p in parameters}

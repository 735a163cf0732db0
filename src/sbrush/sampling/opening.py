"""Which student draws, and with which library: onnxruntime where its graphs are at hand, else torch.

onnxruntime opens the built-in student in a second, torch with diffusers and transformers in eight. The images are the
same but for rounding, so that which of them drew an image is part of its record.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch

from sbrush.console import SbrushError, printable
from sbrush.models.lora_request import LoraRequest
from sbrush.onnx.model import find
from sbrush.sampling.generation import Drawer

Runtime = Literal["auto", "onnx", "torch"]


def open_student(
    source: str | None = None,
    *,
    start_timestep: int | None = None,
    loras: tuple[LoraRequest, ...] = (),
    vae: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    runtime: Runtime = "auto",
) -> Drawer:
    """A student, ready to draw; see models.load.load_student.

    `vae`: the VAE that decodes in place of its own, see load_vae.with_vae. `runtime`: "onnx" is onnxruntime, on the CPU
    in float32, "torch" is torch, "auto" the first that can. SbrushError if there is no such student or VAE, or no
    graphs of it for "onnx".
    """
    if runtime not in get_args(Runtime):
        raise SbrushError(f"no such runtime: {printable(runtime)}", "runtimes are auto, onnx and torch", code=2)
    plain = start_timestep is None and not loras and device == "cpu" and dtype == torch.float32
    if runtime != "torch" and plain and (found := find(source, vae)):
        return found
    if runtime == "onnx":
        only = "it runs on the CPU in float32, from the scheduler's own start, without LoRAs"
        why = ("there are no ONNX graphs of it with that VAE" if vae else "it has no ONNX graphs") if plain else only
        raise SbrushError(
            f"onnxruntime cannot draw with {printable(source or 'this student')}: {why}",
            "sbrush export STUDENT --to onnx -o FOLDER, or --runtime torch",
            code=2,
        )
    from sbrush.models.load import load_student
    from sbrush.models.load_vae import with_vae

    return with_vae(load_student(source, start_timestep=start_timestep, loras=loras, device=device, dtype=dtype), vae)

"""A student in one .safetensors by Stable Diffusion's original names, as ComfyUI and A1111 load it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sbrush.console import SbrushError, printable, progress
from sbrush.models.comfyui import WORKFLOW, obstacle, workflow
from sbrush.models.export import cast
from sbrush.models.format_cards import single_file_card
from sbrush.models.model import Model
from sbrush.models.original import (
    TEXT,
    XL_TEXT,
    Original,
    clip_entries,
    open_clip_entries,
    unet_entries,
    vae_entries,
)
from sbrush.models.single_file import published_name
from sbrush.storage.files import write_json, write_text
from sbrush.storage.tensors import save_tensors

# ComfyUI and diffusers take files so marked for ones that predict v, on a schedule that ends in pure noise.
V, ZERO_SNR = "v_pred", "ztsnr"
OPEN_CLIP = "gelu"  # the activation of open_clip's text encoders, where OpenAI's have "quick_gelu"


def write_single_file(student: Model, folder: Path, file: str, dtype: torch.dtype) -> None:
    """Writes the student to `file` in a folder; its card, scheduler and workflow for ComfyUI beside it.

    SbrushError if the student has a part that the original layout has no name for; OSError.
    """
    save_tensors(folder / file, single_file_tensors(student, dtype), {"format": "pt", "modelspec.title": folder.name})
    (folder / "scheduler").mkdir()
    write_text(folder / "scheduler" / "scheduler_config.json", student.sampler.to_json_string())
    if obstacle(student) is None:
        write_json(folder / WORKFLOW, workflow(student, checkpoint=file))
    write_text(folder / "README.md", single_file_card(student, file))


def single_file_tensors(student: Model, dtype: torch.dtype) -> dict[str, Tensor]:
    """A student's tensors by the names of the original layout."""
    parts = {part: getattr(student, part) for part in student.parts if hasattr(getattr(student, part), "state_dict")}
    tensors: dict[str, Tensor] = {}
    with progress("converting", len(parts), unit="parts") as bar:
        for part, network in parts.items():
            own = {published_name(part, name): value for name, value in network.state_dict().items()}
            try:
                entries = _entries(student, part, list(own))
            except (ValueError, KeyError) as problem:
                raise SbrushError(
                    f"{printable(student.name)} cannot be a single file: {printable(problem)}",
                    "--to diffusers keeps it whole",
                    code=2,
                ) from problem
            for entry in entries:
                packed = cast(entry.name, entry.pack(own.__getitem__), dtype)
                # Copies: files hold no tensor that shares its numbers with another.
                tensors[entry.name] = packed.contiguous().clone() if dtype == torch.float32 else packed.contiguous()
            bar.advance()
    if student.prediction == "v_prediction":
        tensors[V] = torch.zeros(0)
        if student.scheduler.config.rescale_betas_zero_snr:
            tensors[ZERO_SNR] = torch.zeros(0)
    return tensors


def _entries(student: Model, part: str, names: list[str]) -> list[Original]:
    """The table of a part. ValueError or KeyError if it has a tensor without a name in the original layout."""
    if part == "unet":
        return unet_entries(names)
    if part == "vae":
        return vae_entries(names)
    home = XL_TEXT[part] if "text_encoder_2" in student.parts else TEXT
    # SDXL's second is always open_clip's; where there is one alone, it is what its activation says.
    as_open_clip = part == "text_encoder_2" or (home == TEXT and student.text_encoder.config.hidden_act == OPEN_CLIP)
    return open_clip_entries(names, home) if as_open_clip else clip_entries(names, home)

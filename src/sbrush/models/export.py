"""Students out. A student folder is a teacher's folder with a scheduler of its own, a model card and `sbrush.json`:

StableDiffusionPipeline.from_pretrained(folder)(prompt, num_inference_steps=1, guidance_scale=1)
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import SchedulerMixin, UNet2DConditionModel
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from sbrush.console import SbrushError, printable
from sbrush.models.card import model_card
from sbrush.models.comfyui import WORKFLOW, obstacle, workflow
from sbrush.models.format_cards import lora_card
from sbrush.models.load import FORMAT
from sbrush.models.model import Model
from sbrush.models.parts import part_files, read_json, refuse_pointer
from sbrush.models.single_file import published_name
from sbrush.models.unet import Role
from sbrush.storage.files import atomic_folder, atomic_write, write_json, write_text
from sbrush.storage.tensors import save_tensors

# As safetensors' headers call number formats.
STORED = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
INDEX = ".safetensors.index.json"  # which of several files holds which tensor


def check_exportable(teacher: Model) -> None:
    """SbrushError if a file that a student of this teacher would be made of cannot be read now.

    What is trained is exported at its end, of copies of the teacher's other parts: they are looked at before.
    """
    for _, file in _copied(teacher):
        try:
            refuse_pointer(file)
            if file.suffix == ".safetensors":
                with safe_open(file, "pt") as opened:
                    opened.keys()
            elif file.name == "config.json" or file.name.endswith(INDEX):
                read_json(file)
        except (OSError, ValueError, SafetensorError) as problem:
            raise SbrushError(
                f"cannot read {printable(file)}, which a student of this teacher would be made of: "
                f"{printable(problem.strerror if isinstance(problem, OSError) and problem.strerror else problem)}",
                "fetch the file again, or make it readable: a student's folder gets a copy of it",
            ) from problem


def export_lora(
    folder: Path,
    teacher: Model,
    unet: UNet2DConditionModel,
    role: Role,
    *,
    about: dict[str, Any],
    scheduler: SchedulerMixin,
) -> None:
    """Writes a role's LoRA twice, its scale inside it: as diffusers' load_lora_weights takes it, and as ComfyUI does.

    ComfyUI and sd-scripts know attention layers by kohya's names alone, lora_unet_..._to_q.lora_down.weight. What the
    LoRA needs besides is written too: its scheduler, a model card, a workflow for ComfyUI.
    """
    from peft.tuners.lora import LoraLayer

    tensors: dict[str, Tensor] = {}
    for name, module in unet.named_modules():
        if isinstance(module, LoraLayer) and role in module.r:
            tensors[f"unet.{name}.lora_A.weight"] = module.lora_A[role].weight.detach().cpu().contiguous()
            scaled = module.lora_B[role].weight.detach() * module.scaling[role]
            tensors[f"unet.{name}.lora_B.weight"] = scaled.cpu().contiguous()
    student = teacher.as_student(scheduler, about)
    write_lora(folder, student, tensors, lora_card(student))


def write_lora(folder: Path, student: Model, tensors: Mapping[str, Tensor], card: str) -> None:
    """Writes a LoRA's tensors, named as diffusers and PEFT do, and all that export_lora says besides."""
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    for name, content in {
        "pytorch_lora_weights": tensors,
        "comfyui": convert_state_dict_to_kohya(dict(tensors)),
    }.items():
        with atomic_write(folder / f"{name}.safetensors") as partial:
            save_tensors(partial, content, {"format": "pt"})
    write_text(folder / "scheduler" / "scheduler_config.json", student.sampler.to_json_string())
    if obstacle(student) is None:
        write_json(folder / WORKFLOW, workflow(student, lora=True))
    write_text(folder / "README.md", card)


def export_student(
    folder: Path,
    teacher: Model,
    unet: UNet2DConditionModel,
    *,
    about: dict[str, Any],
    scheduler: SchedulerMixin,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes a student folder, complete or not at all; an older one at the same place is replaced.

    `about`: what sbrush.json and the model card say of it, see about_student. `scheduler`: the one that takes its
    step or steps, see ladder.Sampling. `dtype`: what the files hold; the UNet is converted in place. OSError as any
    writing may raise it.
    """
    # All of its parts lie in one folder now, which the card asks for.
    student = replace(teacher.as_student(scheduler, about), folders=dict.fromkeys(teacher.folders, folder))
    for name, parameter in unet.named_parameters():
        parameter.data = cast(name, parameter.data, dtype)
    with atomic_folder(folder) as partial:
        copy_parts(teacher, partial, dtype)
        # Always one file: ComfyUI loads no other, and SDXL's would become two.
        unet.save_pretrained(partial / "unet", max_shard_size="100GB")
        scheduler.save_pretrained(partial / "scheduler")
        write_json(partial / "model_index.json", teacher.student_index(type(scheduler).__name__))
        write_json(partial / "sbrush.json", {"format": FORMAT, **about})
        if obstacle(student) is None:
            write_json(partial / WORKFLOW, workflow(student))
        write_text(partial / "README.md", model_card(student))


def copy_parts(teacher: Model, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Copies every part of a model but its UNet and its scheduler into a folder, as `dtype`, see _copy."""
    for part, file in _copied(teacher):
        (folder / part).mkdir(exist_ok=True)
        _copy(part, file, folder / part / file.name, dtype)


def _copied(teacher: Model) -> Iterator[tuple[str, Path]]:
    """The files of a teacher that its students get copies of, each with its part."""
    for part in teacher.parts:
        if part not in ("unet", "scheduler"):
            for file in part_files(teacher.folders[part], part):
                yield part, file


def _copy(part: str, file: Path, target: Path, dtype: torch.dtype) -> None:
    """Copies a file of a part; its tensors get the number format of the UNet, and their published names.

    Plain diffusers would otherwise load the UNet in one number format and the text encoder in another, and fail. And
    by other names than the published ones ComfyUI and transformers 4 load no text encoder, with a warning at most.
    transformers takes the format that a config.json states unless it is asked for one, diffusers float32: so float32
    is stated, whatever the files hold.
    """
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as opened:
            kinds = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}
        others = set(STORED.values()) - {STORED[dtype]}
        if others & set(kinds.values()) or any(published_name(part, name) != name for name in kinds):
            tensors = {
                published_name(part, name): cast(name, t, dtype) if t.is_floating_point() else t
                for name, t in load_file(file).items()
            }
            save_tensors(target, tensors, {"format": "pt"})
            return
    elif file.name == "config.json":
        config = read_json(file)
        if stated := {"dtype", "torch_dtype"} & config.keys():
            write_json(target, config | dict.fromkeys(stated, "float32"))
            return
    elif file.name.endswith(INDEX):
        index = read_json(file)
        places = {published_name(part, name): place for name, place in index["weight_map"].items()}
        write_json(target, index | {"weight_map": places})
        return
    shutil.copyfile(file, target)


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in another number format. SbrushError if a value is beyond that format's range."""
    converted = tensor.to(dtype)
    if dtype == torch.float16 and not converted.isfinite().all():
        raise SbrushError(
            f"{printable(name)} holds values that float16 does not have (beyond 65,504)", "--precision bfloat16"
        )
    return converted

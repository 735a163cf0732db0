"""Students out. A student folder is a teacher's folder with a scheduler of its own, a model card and `sbrush.json`:

StableDiffusionPipeline.from_pretrained(folder)(prompt, num_inference_steps=1, guidance_scale=1)
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffusers import SchedulerMixin, UNet2DConditionModel
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from sbrush.console import SbrushError, printable
from sbrush.models.card import lora_card, model_card
from sbrush.models.comfyui import WORKFLOW, obstacle, workflow
from sbrush.models.load import FORMAT
from sbrush.models.model import Model
from sbrush.models.parts import part_files, read_json, refuse_pointer
from sbrush.models.single_file import published_name
from sbrush.models.unet import Role
from sbrush.storage.files import atomic_folder, atomic_write, write_json, write_text
from sbrush.storage.tensors import save_tensors

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

    student = teacher.as_student(scheduler, about)
    tensors: dict[str, Tensor] = {}
    for name, module in unet.named_modules():
        if isinstance(module, LoraLayer) and role in module.r:
            tensors[f"unet.{name}.lora_A.weight"] = module.lora_A[role].weight.detach().cpu().contiguous()
            scaled = module.lora_B[role].weight.detach() * module.scaling[role]
            tensors[f"unet.{name}.lora_B.weight"] = scaled.cpu().contiguous()
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    for name, content in {"pytorch_lora_weights": tensors, "comfyui": convert_state_dict_to_kohya(tensors)}.items():
        with atomic_write(folder / f"{name}.safetensors") as partial:
            save_tensors(partial, content, {"format": "pt"})
    write_text(folder / "scheduler" / "scheduler_config.json", scheduler.to_json_string())
    if obstacle(student) is None:
        write_json(folder / WORKFLOW, workflow(student, lora=True))
    write_text(folder / "README.md", lora_card(student))


def export_student(
    folder: Path,
    teacher: Model,
    unet: UNet2DConditionModel,
    *,
    about: dict[str, Any],
    scheduler: SchedulerMixin,
) -> None:
    """Writes a student folder, complete or not at all; an older one at the same place is replaced.

    `about`: what sbrush.json and the model card say of it, see about_student. `scheduler`: the one that takes its
    step or steps, see ladder.Sampling. OSError as any writing may raise it.
    """
    student = teacher.as_student(scheduler, about)
    with atomic_folder(folder) as partial:
        for part, file in _copied(teacher):
            (partial / part).mkdir(exist_ok=True)
            _copy(part, file, partial / part / file.name)
        # Always one file: ComfyUI loads no other, and SDXL's would become two.
        unet.save_pretrained(partial / "unet", max_shard_size="100GB")
        scheduler.save_pretrained(partial / "scheduler")
        write_json(partial / "model_index.json", teacher.student_index(type(scheduler).__name__))
        write_json(partial / "sbrush.json", {"format": FORMAT, **about})
        if obstacle(student) is None:
            write_json(partial / WORKFLOW, workflow(student))
        write_text(partial / "README.md", model_card(student))


def _copied(teacher: Model) -> Iterator[tuple[str, Path]]:
    """The files of a teacher that its students get copies of, each with its part."""
    for part in teacher.parts:
        if part not in ("unet", "scheduler"):
            for file in part_files(teacher.folders[part], part):
                yield part, file


def _copy(part: str, file: Path, target: Path) -> None:
    """Copies a file of a part; half precision becomes float32, as the student is, tensors get their published names.

    Plain diffusers would otherwise load the UNet in one number format and the text encoder in another, and fail. And
    by other names than the published ones ComfyUI and transformers 4 load no text encoder, with a warning at most.
    """
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as opened:
            kinds = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}
        if {"F16", "BF16"} & set(kinds.values()) or any(published_name(part, name) != name for name in kinds):
            tensors = {
                published_name(part, name): t.float() if t.is_floating_point() else t
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

"""Students out. A student folder is a teacher's folder with a one-step scheduler, a model card and `sbrush.json`:

StableDiffusionPipeline.from_pretrained(folder)(prompt, num_inference_steps=1, guidance_scale=1)
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sbrush.models.load import FORMAT
from sbrush.models.model import Model
from sbrush.models.parts import part_files, read_json
from sbrush.models.schedule import one_step_scheduler
from sbrush.models.unet import Role
from sbrush.storage.files import atomic_folder, atomic_write, write_json, write_text


def export_lora(folder: Path, unet: UNet2DConditionModel, role: Role, *, card: str) -> None:
    """Writes a role's LoRA twice, its scale inside it: as diffusers' load_lora_weights takes it, and as ComfyUI does.

    ComfyUI knows attention layers by kohya's names alone, lora_unet_..._to_q.lora_down.weight.
    """
    from peft.tuners.lora import LoraLayer

    tensors: dict[str, Tensor] = {}
    for name, module in unet.named_modules():
        if isinstance(module, LoraLayer) and role in module.r:
            tensors[f"unet.{name}.lora_A.weight"] = module.lora_A[role].weight.detach().cpu().contiguous()
            scaled = module.lora_B[role].weight.detach() * module.scaling[role]
            tensors[f"unet.{name}.lora_B.weight"] = scaled.cpu().contiguous()
    folder.mkdir(exist_ok=True)
    for name, content in {"pytorch_lora_weights": tensors, "comfyui": convert_state_dict_to_kohya(tensors)}.items():
        with atomic_write(folder / f"{name}.safetensors") as partial:
            save_file(content, partial, metadata={"format": "pt"})
    write_text(folder / "README.md", card)


def export_student(
    folder: Path,
    teacher: Model,
    unet: UNet2DConditionModel,
    *,
    about: dict[str, Any],
    card: str,
    t_init: int | None = None,
) -> None:
    """Writes a student folder, complete or not at all; an older one at the same place is replaced.

    `t_init`: the timestep at which the student takes its noise for x_t; None is T.
    """
    with atomic_folder(folder) as partial:
        for part in teacher.parts:
            if part in ("unet", "scheduler"):
                continue
            (partial / part).mkdir()
            for file in part_files(teacher.folders[part], part):
                _copy_in_float32(file, partial / part / file.name)
        unet.save_pretrained(partial / "unet")
        one_step_scheduler(teacher.scheduler, t_init).save_pretrained(partial / "scheduler")
        write_json(partial / "model_index.json", teacher.student_index())
        write_json(partial / "sbrush.json", {"format": FORMAT, **about})
        write_text(partial / "README.md", card)


def _copy_in_float32(file: Path, target: Path) -> None:
    """Copies a file of a part; weights in half precision become float32, as the student's are.

    Plain diffusers would otherwise load the UNet in one number format and the text encoder in another, and fail.
    """
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as opened:
            kinds = {opened.get_slice(name).get_dtype() for name in opened.keys()}
        if kinds & {"F16", "BF16"}:
            widened = {name: t.float() if t.is_floating_point() else t for name, t in load_file(file).items()}
            save_file(widened, target, metadata={"format": "pt"})
            return
    if file.name == "config.json" and (stated := {"dtype", "torch_dtype"} & (config := read_json(file)).keys()):
        write_json(target, config | dict.fromkeys(stated, "float32"))
        return
    shutil.copyfile(file, target)

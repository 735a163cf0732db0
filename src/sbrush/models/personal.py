"""What personalising leaves behind: a LoRA of the subject, the teacher with it, the student with it, and the result.

Large files are linked where the file system can, for each is written once and never changed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sbrush
from sbrush.console import SbrushError, printable
from sbrush.models.card import STATED
from sbrush.models.export import copy_parts, export_student
from sbrush.models.load import FORMAT, load_student
from sbrush.models.lora_request import USUAL, LoraRequest
from sbrush.models.model import Model
from sbrush.models.parts import read_json
from sbrush.storage.files import atomic_folder, write_json, write_text

KEPT = ("world", "guidance", *STATED)  # of the teacher's sbrush.json


def write_lora(folder: Path, trained: Path, about: Mapping[str, Any]) -> None:
    """A LoRA of the teacher, of the folder `trained` (student-lora/ of a run), for diffusers and for ComfyUI."""
    with atomic_folder(folder) as partial:
        for name in (USUAL, "comfyui.safetensors"):
            link(trained / name, partial / name)
        write_json(partial / "sbrush-personal.json", dict(about))
        write_text(
            partial / "README.md",
            f"# {printable(about['token'])}\n\nA LoRA of {printable(about['teacher'])}, trained on "
            f"{about['photos']['count']} photos by sbrush {sbrush.__version__} (DreamBooth). Prompts call its subject "
            f"`{printable(about['token'])}`.\n\n`{USUAL}` is for diffusers and for `sbrush sample --lora`, of students "
            "of that teacher too; `comfyui.safetensors` for ComfyUI and sd-scripts.\n",
        )


def write_teacher(folder: Path, teacher: Model, unet: Path, about: Mapping[str, Any]) -> None:
    """The teacher with another UNet, of the folder `unet`: a folder that diffusers and load_teacher read."""
    with atomic_folder(folder) as partial:
        copy_parts(teacher, partial)
        (partial / "unet").mkdir()
        for file in sorted(unet.iterdir()):
            link(file, partial / "unet" / file.name)
        teacher.scheduler.save_pretrained(partial / "scheduler")
        write_json(partial / "model_index.json", teacher.student_index())
        kept = {key: teacher.about[key] for key in KEPT if key in teacher.about}
        write_json(partial / "sbrush.json", {"format": FORMAT, **kept, "personal": dict(about)})
        write_text(
            partial / "README.md",
            f"# {printable(about['teacher'])} with a new subject\n\nDreamBooth taught it "
            f"`{printable(about['token'])}` from {about['photos']['count']} photos (sbrush {sbrush.__version__}). It "
            "draws in the many steps of the teacher that it was.\n",
        )


def write_lora_student(folder: Path, student: str | None, lora: Path, about: Mapping[str, Any]) -> None:
    """A student with the LoRA of its teacher in its weights, as it is. SbrushError if it is no student of sbrush."""
    model = load_student(student, loras=[LoraRequest(str(lora))])
    if "recipe" not in model.about:
        raise SbrushError(
            f"{printable(model.name)} says nothing of how it was made: it has no sbrush.json",
            f"sbrush sample --lora {printable(lora)} draws with it; to go on training, give a student of sbrush's own",
            code=2,
        )
    own = {key: value for key, value in model.about.items() if key != "format"}
    own |= {"version": sbrush.__version__, "personal": dict(about)}
    export_student(folder, model, model.unet, about=own, scheduler=model.sampler)


def write_result(folder: Path, made: Path, about: Mapping[str, Any]) -> None:
    """The student in the folder `made` under its last name; its sbrush.json and card name the subject."""
    with atomic_folder(folder) as partial:
        shutil.copytree(made, partial, dirs_exist_ok=True, copy_function=link)
        for name in ("sbrush.json", "README.md"):
            (partial / name).unlink()  # a link: the run's own stays as it is
        write_json(partial / "sbrush.json", {**read_json(made / "sbrush.json"), "personal": dict(about)})
        card = (made / "README.md").read_text(encoding="utf-8")
        subject = f"- It has learned a subject, which prompts call `{printable(about['token'])}`, from "
        write_text(
            partial / "README.md",
            card.replace("\n- Licence", f"\n{subject}{about['photos']['count']} photos.\n- Licence", 1),
        )


def is_of(folder: Path, about: Mapping[str, Any], name: str = "sbrush.json") -> bool:
    """Whether a folder is there, and was written for this subject."""
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and dict(about) in (found, found.get("personal"))


def link(file: Path | str, target: Path | str) -> None:
    """A second name for a file, or a copy of it where the file system has none."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)

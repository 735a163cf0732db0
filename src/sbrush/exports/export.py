"""`sbrush export`: a student into a folder or repository for another program, completely or not at all."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sbrush.console import info
from sbrush.exports.hub import check_hub, example_images, upload
from sbrush.exports.lora import Lora, decompose
from sbrush.exports.request import ERROR, ExportRequest, Format
from sbrush.exports.single_file import write_single_file
from sbrush.models.export import export_student, write_lora
from sbrush.models.format_cards import lora_card, onnx_card
from sbrush.models.load import load_student, load_teacher
from sbrush.models.model import Model
from sbrush.models.places import check_recorded, teacher_of
from sbrush.onnx.export import check_onnx, export_onnx
from sbrush.storage.files import atomic_folder, check_room, size_text, write_text

MADE_HERE = "export students that sbrush distill has written"


@dataclass(frozen=True)
class Exported:
    """Where an export lies, its files with their sizes in bytes, and what is to be known of it besides."""

    place: str
    files: dict[str, int]
    about: dict[str, Any] = field(default_factory=dict)


def export(request: ExportRequest) -> Exported:
    """Writes a student in the format that is asked for. SbrushError if it cannot be; OSError as any writing may.

    A folder is complete or not there: it is written aside, then renamed.
    """
    if request.format is Format.onnx:
        check_onnx()
    if request.format is Format.hub:
        check_hub(request.out)
    student = load_student(request.student)
    check_recorded(student, MADE_HERE)
    lora = _lora(student, request) if request.format is Format.lora else None
    if request.format is Format.hub:
        return _to_hub(student, request)
    folder = request.folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    size = _size(student, request, lora)
    check_room(folder.parent, size, "the export", "make room there, or name another folder")
    info(f"writing about {size_text(size)} ...")
    with atomic_folder(folder) as partial:
        _write(student, request, lora, partial)
        files = _files(partial)
    return Exported(str(folder), files, lora.about if lora else {})


def _write(student: Model, request: ExportRequest, lora: Lora | None, folder: Path) -> None:
    """Fills an empty folder."""
    dtype = getattr(torch, request.stored)
    match request.format:
        case Format.single_file:
            write_single_file(student, folder, f"{request.folder.name}.safetensors", dtype)
        case Format.onnx:
            export_onnx(student, folder)
            write_text(folder / "README.md", onnx_card(student))
        case Format.lora:
            assert lora is not None
            write_lora(folder, student, lora.tensors, lora_card(student, measured=_measured(lora)))
        case _:
            about = {key: value for key, value in student.about.items() if key != "format"}
            export_student(folder, student, student.unet, about=about, scheduler=student.sampler, dtype=dtype)


def _lora(student: Model, request: ExportRequest) -> Lora:
    """The student's LoRA; what it leaves out is told."""
    named = request.teacher or teacher_of(student)
    config = request.teacher_config if request.teacher else student.about.get("teacher_config")
    teacher = load_teacher(named, config=config)
    error = ERROR if request.error is None else request.error
    made = decompose(student, teacher, rank=request.rank, error=error, dtype=getattr(torch, request.stored))
    worst = max(made.layers, key=made.layers.__getitem__)
    info(
        f"rank {made.rank} leaves {made.covered:.1%} of the change in the layers that it covers, "
        f"at most {made.layers[worst]:.1%} ({worst}), and {made.whole:.1%} of the change in the whole UNet"
    )
    return made


def _measured(lora: Lora) -> str:
    """What a LoRA's card says of its error."""
    return (
        f"- Its rank is {lora.rank}. Of the student's change from its teacher it leaves out {lora.covered:.1%} in the\n"
        f"  layers that it covers, and {lora.whole:.1%} over the whole UNet, biases, norms and outer layers included\n"
        "  (Frobenius norm of what is left, divided by that of the change).\n"
    )


def _to_hub(student: Model, request: ExportRequest) -> Exported:
    """Writes a diffusers folder with examples aside, and uploads it."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="sbrush-") as aside:
        folder = Path(aside) / "student"
        check_room(folder.parent, _size(student, request, None), "the upload", "TMPDIR names another place")
        images = example_images(student)
        folder.mkdir()
        _write(student, request, None, folder)
        return Exported(upload(folder, images, request.out, private=request.private), _files(folder))


def _size(student: Model, request: ExportRequest, lora: Lora | None) -> int:
    """Bytes that an export takes, about."""
    width = torch.finfo(getattr(torch, request.stored)).bits // 8
    if lora:
        return 2 * sum(tensor.numel() for tensor in lora.tensors.values()) * width
    return sum(p.numel() for network in student.networks for p in network.parameters()) * width


def _files(folder: Path) -> dict[str, int]:
    return {str(f.relative_to(folder)): f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file()}

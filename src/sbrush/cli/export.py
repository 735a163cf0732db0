"""`sbrush export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sbrush import console
from sbrush.cli.flags import JsonFlag, check_student, teacher_config_option, teacher_option
from sbrush.console import info, printable
from sbrush.exports.request import ERROR, ExportRequest, Format, Numbers
from sbrush.storage.files import size_text

LORA, HUB = "LoRA", "Hugging Face Hub"
EXAMPLE = "Example: sbrush export runs/sd21 --to single-file -o fast-cats"


def export(
    student: Annotated[
        str,
        typer.Argument(
            help="Student: its folder, the --out of its run, one of the run's checkpoints, or a Hub id; stickers: the "
            "built-in one.",
            metavar="STUDENT",
            callback=check_student,
        ),
    ],
    to: Annotated[
        Format,
        typer.Option(
            "--to",
            help="Format. single-file: one .safetensors, for ComfyUI and A1111. lora: the student as a LoRA of its "
            "teacher. onnx: ONNX graphs, for onnxruntime. diffusers: a diffusers folder in half precision. hub: the "
            "same folder, uploaded to the Hugging Face Hub.",
        ),
    ],
    out: Annotated[
        str,
        typer.Option(
            "-o",
            "--out",
            help="Folder for the export, which must be new or empty. With --to hub: the repository, OWNER/NAME.",
            metavar="FOLDER|OWNER/NAME",
        ),
    ],
    precision: Annotated[
        Numbers | None,
        typer.Option(
            help="Number format of the exported weights. Default: float16, but float32 for onnx.",
            show_default=False,
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            help="Rank of the LoRA. Default: the lowest with an error of at most --max-error.",
            min=1,
            rich_help_panel=LORA,
        ),
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(
            help="Share of the difference between student and teacher that the LoRA may leave out in the layers that "
            f"it covers, 0 to 1: |difference - LoRA| / |difference|. It sets the rank. Default: {ERROR}.",
            min=0,
            max=1,
            show_default=False,
            rich_help_panel=LORA,
        ),
    ] = None,
    teacher: Annotated[str | None, teacher_option(LORA, default="the one in the student's sbrush.json")] = None,
    teacher_config: Annotated[str | None, teacher_config_option(LORA)] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private.", rich_help_panel=HUB)
    ] = False,
    json_: JsonFlag = False,
) -> None:
    """Write a student for another program: ComfyUI, A1111, diffusers, onnxruntime.

    Each export has a README.md that says how to sample with it there. If
    ComfyUI's own nodes can draw with it, there is also a workflow to drop on
    ComfyUI's window. A failed export leaves nothing behind. Nothing is uploaded
    without --to hub.
    """
    request = ExportRequest(
        student, to, out, numbers=precision, rank=rank, error=max_error, teacher=teacher,
        teacher_config=teacher_config, private=private,
    )  # fmt: skip
    request.check()
    info("loading torch and the student ...")
    from sbrush.exports.export import export as write_export

    made = write_export(request)
    info(f"{to.value}, {request.stored.value}: {size_text(sum(made.files.values()))} in {len(made.files)} files")
    info(f"next: {_next(request)}")
    if json_:
        facts = {"format": to.value, "precision": request.stored.value, "path": made.place, "files": made.files}
        console.out_json(facts | made.about)
    else:
        console.out(Path(made.place) if to is not Format.hub else made.place)


def _next(request: ExportRequest) -> str:
    """What to do with an export."""
    place = printable(request.folder)
    match request.format:
        case Format.single_file:
            return f"cp {place}/{printable(request.folder.name)}.safetensors ComfyUI/models/checkpoints/"
        case Format.lora:
            return f"cp {place}/comfyui.safetensors ComfyUI/models/loras/student.safetensors"
        case Format.hub:
            return f'sbrush sample "a cat" --student {printable(request.out)}'
        case _:
            return f'sbrush sample "a cat" --student {place}'

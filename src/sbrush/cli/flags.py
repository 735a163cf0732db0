"""The flags that several commands have, and the checks of them that need no torch."""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import StrEnum
from typing import Annotated

import typer
from typer.models import OptionInfo

from sbrush.console import SbrushError, printable
from sbrush.models.source import check_source
from sbrush.models.vae_source import local_vae

MACHINE, REPORT, ELSEWHERE = (
    "Device and speed",
    "Output",
    "Students that other programs have trained",
)  # panels of --help


class Runtime(StrEnum):
    """The choices of --runtime; see sampling.opening."""

    auto = "auto"
    onnx = "onnx"
    torch = "torch"


class Precision(StrEnum):
    """Number formats of networks that draw."""

    auto = "auto"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


def check_student(source: str | None) -> str | None:
    """The same; SbrushError if there is no such student."""
    if source is not None:
        check_source(source)
    return source


def check_vae(source: str | None) -> str | None:
    """The same; SbrushError if there is no such VAE."""
    if source is not None:
        local_vae(source)
    return source


def check_teacher(source: str | None) -> str | None:
    """The same; SbrushError if there is no such teacher."""
    if source is not None:
        check_source(source, single_file=True)
    return source


def check_device(name: str) -> str:
    """The same; SbrushError if no machine has such a device, or sbrush does not run on it."""
    if re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", name):
        return name
    if re.fullmatch(r"(mps|xpu|hpu|npu|xla|hip|mtia|vulkan)(:\d+)?", name):
        raise SbrushError(f"sbrush does not run on {name}", "use --device cpu or --device cuda", code=2)
    raise SbrushError(f"no such device: {printable(name)}", "devices are auto, cpu, cuda, cuda:1, ...", code=2)


def teacher_option(panel: str | None = None, *, default: str = "the built-in teacher") -> OptionInfo:
    """--teacher, in a panel of a command's --help."""
    text = (
        "Teacher: a folder in diffusers' format, a Hub id, or a .safetensors file with a whole Stable Diffusion model. "
        f"Default: {default}."
    )
    return _option("--teacher", text, panel, metavar="MODEL", callback=check_teacher)


def teacher_config_option(panel: str | None = None) -> OptionInfo:
    """--teacher-config, in a panel of a command's --help."""
    text = (
        "Folder or Hub id that a .safetensors teacher takes its configuration and tokenizer from. Default: the model "
        "that its tensors' shapes tell. Set it offline, or for a fine-tune with another configuration."
    )
    return _option("--teacher-config", text, panel, metavar="MODEL", callback=check_student)


def _option(
    name: str, text: str, panel: str | None, *, metavar: str, callback: Callable[[str | None], str | None]
) -> OptionInfo:
    option: OptionInfo = typer.Option(name, help=text, rich_help_panel=panel, metavar=metavar, callback=callback)
    return option


DeviceFlag = Annotated[
    str,
    typer.Option(
        "--device",
        help="Where to compute: auto, cpu, cuda or cuda:1. auto is the first CUDA card, else the CPU.",
        metavar="DEVICE",
        callback=check_device,
        rich_help_panel=MACHINE,
    ),
]
PrecisionFlag = Annotated[
    Precision,
    typer.Option(
        "--precision",
        help="Number format of the networks. auto is float32 on the CPU and float16 on CUDA, or float32 there too if "
        "float16 overflows. bfloat16 is as fast as float16, and its error 9 times as large.",
        rich_help_panel=MACHINE,
    ),
]
StudentFlag = Annotated[
    str | None,
    typer.Option(
        "--student",
        help="Student: its folder, the --out folder of its run, one of the run's checkpoints, or a Hub id. "
        "Default: the built-in student, stickers. stickers-few is built in too, and takes up to 4 steps.",
        metavar="MODEL",
        callback=check_student,
    ),
]
StepsFlag = Annotated[
    int | None,
    typer.Option(
        "--steps",
        help="Steps in which the student draws an image: 1, or up to as many as it can take. Default: as many as it "
        "was trained for, which --student-steps of sbrush distill sets.",
        min=1,
        max=1000,
        show_default=False,
    ),
]
StartFlag = Annotated[
    int | None,
    typer.Option(
        "--start-timestep",
        help="Timestep at which the student takes unit noise for x_t, 1 to 999. Default: as its scheduler says. Set "
        "399 for DMD2's students.",
        min=1,
        rich_help_panel=ELSEWHERE,
    ),
]
RuntimeFlag = Annotated[
    Runtime,
    typer.Option(
        "--runtime",
        help="Library that draws: onnx is onnxruntime, on the CPU in float32 and quick to start; torch is torch. auto "
        "takes onnx for the built-in world's students and for those that were exported to it.",
        rich_help_panel=MACHINE,
    ),
]
LoraFlag = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        help="LoRA made for the student's teacher (diffusers', PEFT's or kohya's layout): a .safetensors, a folder, "
        "a Hub id (OWNER/NAME or OWNER/NAME/FILE), or blueprint, which comes with sbrush. A weight may follow, -10 to "
        "10, by default 1. Give it again for more. A teacher beside the student gets the same.",
        metavar="LORA[:WEIGHT]",
        show_default=False,
    ),
]
VaeFlag = Annotated[
    str | None,
    typer.Option(
        "--vae",
        help="VAE that decodes the student's images: tiny, quick and a little less exact (TAESD, or the built-in "
        "world's own), a folder of diffusers' AutoencoderTiny or AutoencoderKL, or a Hub id. A teacher beside the "
        "student keeps its own. Default: the student's own.",
        metavar="VAE",
        callback=check_vae,
        show_default=False,
    ),
]
TeacherFlag = Annotated[str | None, teacher_option()]
TeacherConfigFlag = Annotated[str | None, teacher_config_option()]
ColumnFlag = Annotated[
    str | None,
    typer.Option(
        "--column",
        help="Column of a table of prompts or captions, or key of JSON objects. Default: prompt, caption or text, in "
        "any case.",
        metavar="NAME",
    ),
]
JsonFlag = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON on stdout, for other programs.", rich_help_panel=REPORT)
]

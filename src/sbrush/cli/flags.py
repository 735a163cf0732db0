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
    "Students from other projects",
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
        "For a .safetensors teacher only: folder or Hub id of the model whose configuration and tokenizer it has. "
        "Default: SD 1.5 or SDXL base from the Hub, by the tensors' shapes. Set it for SD 2.x, offline, or if the "
        "configuration is another one."
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
        help="Where to compute: auto, cpu, cuda or cuda:1. auto is the first CUDA GPU, else the CPU.",
        metavar="DEVICE",
        callback=check_device,
        rich_help_panel=MACHINE,
    ),
]
PrecisionFlag = Annotated[
    Precision,
    typer.Option(
        "--precision",
        help="Number format of the networks. auto is float32 on the CPU. On CUDA it is float16, or float32 if float16 "
        "overflows. bfloat16 is as fast as float16, but its error is 9 times as large.",
        rich_help_panel=MACHINE,
    ),
]
StudentFlag = Annotated[
    str | None,
    typer.Option(
        "--student",
        help="Student: its folder, the --out folder of its run, one of the run's checkpoints, or a Hub id. "
        "Default: stickers, the built-in one-step student. stickers-few is built in too; it draws in 1 to 4 steps.",
        metavar="MODEL",
        callback=check_student,
    ),
]
StepsFlag = Annotated[
    int | None,
    typer.Option(
        "--steps",
        help="Steps in which the student draws an image. Default: as many as it was trained for (--student-steps of "
        "sbrush distill). Most few-step students can also take fewer; a one-step student takes 1.",
        min=1,
        max=1000,
        show_default=False,
    ),
]
StartFlag = Annotated[
    int | None,
    typer.Option(
        "--start-timestep",
        help="Timestep at which the student starts from unit noise, 1 to 999. Default: that of its scheduler. Set 399 "
        "for DMD2's students, whose scheduler does not say it.",
        min=1,
        rich_help_panel=ELSEWHERE,
    ),
]
RuntimeFlag = Annotated[
    Runtime,
    typer.Option(
        "--runtime",
        help="Library that draws. onnx: onnxruntime, which starts faster but runs on the CPU in float32 only. torch: "
        "torch and diffusers. auto: onnx for the built-in students and for those that were exported to ONNX, if no "
        "other flag needs torch; else torch.",
        rich_help_panel=MACHINE,
    ),
]
LoraFlag = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        help="LoRA that was trained for the student's teacher (diffusers', PEFT's or kohya's layout): a .safetensors "
        "file, a folder, a Hub id (OWNER/NAME or OWNER/NAME/FILE), or blueprint, which comes with sbrush. WEIGHT is "
        "-10 to 10, by default 1. May be repeated. A teacher that is compared with the student gets the same LoRAs.",
        metavar="LORA[:WEIGHT]",
        show_default=False,
    ),
]
VaeFlag = Annotated[
    str | None,
    typer.Option(
        "--vae",
        help="VAE that decodes the student's images. tiny: TAESD, or for the built-in student a tiny VAE of its own; "
        "faster, and a little less exact. Or a folder or Hub id of diffusers' AutoencoderTiny or AutoencoderKL. A "
        "teacher that is compared with the student keeps its own. Default: the student's own.",
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
        help="Column of the table, or key of the JSON objects, that holds the prompts or captions. Default: prompt, "
        "caption or text, in upper or lower case.",
        metavar="NAME",
    ),
]
JsonFlag = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON on stdout, for other programs.", rich_help_panel=REPORT)
]

"""`sbrush sample`."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sbrush import console
from sbrush.cli.control import (
    ControlFlag,
    ControlImageFlag,
    ControlPrepFlag,
    ControlScaleFlag,
    read_control_flags,
)
from sbrush.cli.flags import (
    MACHINE,
    REPORT,
    ColumnFlag,
    DeviceFlag,
    JsonFlag,
    LoraFlag,
    Precision,
    PrecisionFlag,
    Runtime,
    RuntimeFlag,
    StartFlag,
    StepsFlag,
    StudentFlag,
    VaeFlag,
    teacher_config_option,
    teacher_option,
)
from sbrush.cli.interactive import check_interactive, check_single, start_session
from sbrush.cli.negative import (
    GuidanceFlag,
    NegativeFlag,
    NegativeMethodFlag,
    NegativeScaleFlag,
    read_negative_flags,
)
from sbrush.console import Interrupted, SbrushError, info, is_text, printable
from sbrush.models.lora_request import parse_loras
from sbrush.sampling.seeds import parse_seeds
from sbrush.sampling.targets import Images, Target, find_records

if TYPE_CHECKING:
    from sbrush.sampling.edit_request import EditRequest

COMPARE = "Comparison with the teacher"
EDIT = "Starting from an image (few-step students)"
STRENGTH = 0.6
FIRST = "a small red cat"  # by which an interactive session's student is tried, unless there is a prompt
EXAMPLE = 'Example: sbrush sample "a small red cat" "a big blue fish" --seed 1-8 -o animals.png'
OF_STUDENT = ("student", "start_timestep", "steps", "lora", "vae", "negative", "negative_method", "negative_scale")
KEPT = {  # by the next command: the flags of this one that it is to have too
    "eval": OF_STUDENT,
    "sample": (
        *OF_STUDENT, "guidance", "image", "strength", "mask", "control", "control_image", "control_scale",
        "control_prep",
    ),
}  # fmt: skip
FOR_COMPARISON = ("teacher", "teacher_config", "teacher_steps", "teacher_guidance")


def sample(
    context: typer.Context,
    prompts: Annotated[
        list[str] | None, typer.Argument(help="One or more prompts, each in quotes.", metavar="PROMPT...")
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--out",
            help="Where the images go. A .png file: the image, or a grid of all images; an existing file is replaced. "
            "Another name: a folder with a file per image; the same command resumes there. -: one PNG on stdout. "
            "Default: out.png, or out-2.png and so on if that exists.",
            metavar="FILE|FOLDER|-",
        ),
    ] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            help="File of further prompts: text with one prompt per line, CSV, TSV or JSON, or - for the standard "
            "input.",
            metavar="FILE|-",
        ),
    ] = None,
    column: ColumnFlag = None,
    seed: Annotated[
        str,
        typer.Option(
            help="One or more seeds: 7, 1-8 or 1,5,9-12. Each prompt is drawn with each seed. The same prompt and seed "
            "give the same image.",
            metavar="SEEDS",
        ),
    ] = "0",
    student: StudentFlag = None,
    steps: StepsFlag = None,
    lora: LoraFlag = None,
    vae: VaeFlag = None,
    image: Annotated[
        Path | None,
        typer.Option(
            help="Image to start from, such as a photo or a sketch. It is cropped to its middle and scaled to the "
            "student's size. Needs a student of several steps.",
            metavar="FILE",
            rich_help_panel=EDIT,
        ),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            help="How much of --image is redrawn, above 0 and up to 1. 1 is the student's first step; it starts at the "
            f"step that is nearest. Default: {STRENGTH}.",
            rich_help_panel=EDIT,
        ),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(
            help="Gray image of the same size as --image: white where that is redrawn, black where it is kept.",
            metavar="FILE",
            rich_help_panel=EDIT,
        ),
    ] = None,
    control: ControlFlag = None,
    control_image: ControlImageFlag = None,
    control_scale: ControlScaleFlag = None,
    control_prep: ControlPrepFlag = None,
    interactive: Annotated[
        bool,
        typer.Option(
            "--interactive",
            help="Type prompts one after the other in the terminal, with the student kept in memory. /help there lists "
            "the commands.",
        ),
    ] = False,
    negative: NegativeFlag = None,
    negative_method: NegativeMethodFlag = None,
    negative_scale: NegativeScaleFlag = None,
    guidance: GuidanceFlag = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Also draw each image with the teacher, in --teacher-steps, and put it beside the student's.",
            rich_help_panel=COMPARE,
        ),
    ] = False,
    teacher: Annotated[str | None, teacher_option(COMPARE, default="the one in the student's sbrush.json")] = None,
    teacher_config: Annotated[str | None, teacher_config_option(COMPARE)] = None,
    teacher_steps: Annotated[
        int,
        typer.Option(
            help="Steps of the teacher's sampler, DDIM. More than 50 are seldom better.",
            min=1,
            max=1000,
            rich_help_panel=COMPARE,
        ),
    ] = 25,
    teacher_guidance: Annotated[
        float | None,
        typer.Option(
            help="Guidance scale of the teacher; 1 is none. Default: the value in its folder, else 7.5.",
            min=0,
            rich_help_panel=COMPARE,
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Draw all images again, including those that the folder already has, and replace their files.",
            rich_help_panel=REPORT,
        ),
    ] = False,
    metadata: Annotated[
        bool,
        typer.Option(
            " /--no-metadata",
            help="Leave prompt, seed and model out of the PNG files. By default they are in the metadata, in a form "
            "that other programs read.",
            show_default=False,
            rich_help_panel=REPORT,
        ),
    ] = True,
    json_: JsonFlag = False,
    start_timestep: StartFlag = None,
    batch: Annotated[
        int,
        typer.Option(
            help="Number of images drawn at once. Lower it if memory runs out; the images stay the same.",
            min=1,
            rich_help_panel=MACHINE,
        ),
    ] = 32,
    device: DeviceFlag = "auto",
    precision: PrecisionFlag = Precision.auto,
    runtime: RuntimeFlag = Runtime.auto,
) -> None:
    """Draw images with a student, in one step or, with a few-step student, in several.

    Prints the path of each image as soon as it is written.
    """
    if interactive:
        check_interactive(context)
    texts = _read_prompts(prompts or ([FIRST] if interactive else []), prompts_file, column)
    seeds = parse_seeds(seed)
    images = Images(texts, list(dict.fromkeys(seeds)))
    if len(images.seeds) < len(seeds):
        info("note: a seed that is given twice is drawn once")
    _check_comparison(context, compare)
    loras = parse_loras(lora)
    edit = _read_edit(image, strength, mask, compare=compare)
    away = read_negative_flags(negative, negative_method, negative_scale)
    controls = read_control_flags(control, control_image, control_scale, control_prep)
    needing = {"--image": edit, "--compare": compare, "--control": controls, "--negative": away}
    _check_runtime(runtime, needing | {"--guidance": guidance is not None})
    target = Target.parse(out)
    if interactive:
        check_single(texts, target, seeds)
    _check_stdout(target, json_)
    target.check(len(images), compare=compare)
    if target.folder and target.path and not overwrite:
        find_records(images, target.path, metadata=metadata)
    info("loading torch and the student ...")
    from sbrush.device import pick_device, pick_dtype
    from sbrush.sampling.files import SampleRequest, sample_to_files

    where = pick_device(device)
    request = SampleRequest(
        images, target, student=student, steps=steps, start_timestep=start_timestep, loras=loras, vae=vae,
        edit=edit, controls=controls, negative=away, guidance=guidance, compare=compare, teacher=teacher,
        teacher_config=teacher_config, teacher_steps=teacher_steps, teacher_guidance=teacher_guidance,
        metadata=metadata, overwrite=overwrite, batch=batch, device=where,
        dtype=pick_dtype(precision.value, where, "sample"), runtime=runtime.value,
    )  # fmt: skip
    if interactive:
        start_session(request, texts[0] if prompts else None)
        return
    listed: list[dict[str, Any]] = []
    written = 0
    try:
        for saved in sample_to_files(request):
            written += 1
            if json_:
                listed.append({"path": str(saved.path), "prompt": saved.prompt, "seed": saved.seed})
            elif target.folder:
                console.out(saved.path)
    except KeyboardInterrupt:
        if target.folder and written:
            raise Interrupted(f"stopped: {written} of {len(images)} images are written") from None
        raise
    if json_:
        console.out_json(listed)
    elif target.path and not target.folder:
        console.out(target.path)
    if target.path:
        info(_next(context, texts, compare=compare))


def _read_prompts(prompts: list[str], file: Path | None, column: str | None) -> list[str]:
    """The prompts of the command line and of a file; SbrushError if there is none, or one is no text."""
    example = 'sbrush sample "a small red cat"'
    if not prompts and file is None:
        raise SbrushError("no prompt", f"{example}, or --prompts FILE", code=2)
    if column is not None and file is None:
        raise SbrushError(
            "--column is of a table of prompts, and there is none", "--prompts FILE, or leave it out", code=2
        )
    texts = []
    for prompt in prompts:
        if not prompt.strip():
            raise SbrushError("an empty prompt", example, code=2)
        try:
            # A terminal's bytes that are not of the locale's encoding; they may be UTF-8 all the same.
            texts.append(prompt if is_text(prompt) else os.fsencode(prompt).decode("utf-8"))
        except UnicodeError:
            raise SbrushError(
                f"the prompt {printable(prompt)} is not UTF-8 text",
                "set the terminal to UTF-8, or write the prompt to a UTF-8 file and give --prompts FILE",
                code=2,
            ) from None
    if file is not None:
        from sbrush.prompts import read_prompts

        read = read_prompts(file, column)
        info(read.describe())
        texts += read.texts
    return texts


def _check_comparison(context: typer.Context, compare: bool) -> None:
    """SbrushError if a flag is given that says how to compare, and nothing is compared."""
    given = (name for name in FOR_COMPARISON if str(context.get_parameter_source(name)).endswith("COMMANDLINE"))
    if not compare and (useless := next(given, None)):
        raise SbrushError(
            f"--{useless.replace('_', '-')} is for the teacher, and nothing is compared with one",
            "add --compare, or leave it out: it does not change the student's image",
            code=2,
        )


def _read_edit(image: Path | None, strength: float | None, mask: Path | None, *, compare: bool) -> EditRequest | None:
    """The image to start from, if there is one; SbrushError if it is none, or its flags contradict each other."""
    if image is None:
        if strength is not None or mask is not None:
            flag = "--mask" if strength is None else "--strength"
            raise SbrushError(f"{flag} is for an image to start from", "add --image FILE, or leave it out", code=2)
        return None
    if compare:
        raise SbrushError("--compare draws without an image to start from", "leave out --compare or --image", code=2)
    from sbrush.sampling.edit_request import EditRequest

    return EditRequest.read(image, STRENGTH if strength is None else strength, mask)


def _check_runtime(runtime: Runtime, asked: Mapping[str, object]) -> None:
    """SbrushError if onnxruntime is to draw what only torch can: flags by name, those that are given being true."""
    if runtime is Runtime.onnx and (flag := next((flag for flag, value in asked.items() if value), None)):
        raise SbrushError(f"{flag} needs torch", "leave out --runtime onnx", code=2)


def _check_stdout(target: Target, json_: bool) -> None:
    """SbrushError if stdout is to take an image and cannot."""
    if target.path is not None:
        return
    if json_:
        raise SbrushError("--json and -o - both want stdout", "leave out one of them", code=2)
    if sys.stdout is not None and sys.stdout.isatty():
        raise SbrushError(
            "a terminal cannot show a PNG", 'redirect stdout: sbrush sample "a cat" -o - > cat.png', code=2
        )


def _next(context: typer.Context, texts: list[str], *, compare: bool) -> str:
    """What to try next: the same student with the same of KEPT, as far as that command has them."""
    command = ["sbrush", "eval"] if compare or len(texts) > 1 else ["sbrush", "sample", texts[0], "--seed", "1-8"]
    for name in KEPT[command[1]]:
        value, flag = context.params[name], f"--{name.replace('_', '-')}"
        if str(context.get_parameter_source(name)).endswith("COMMANDLINE"):
            for one in value if isinstance(value, list | tuple) else [value]:
                command += [flag, f"{one}"]
    if command[1] == "sample" and context.params["image"] is None:
        command.append("--compare")
    return f"next: {printable(shlex.join(command))}"

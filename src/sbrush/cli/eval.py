"""`sbrush eval`, on the built-in world and on COCO-30K."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from sbrush import console
from sbrush.cli.flags import (
    MACHINE,
    REPORT,
    DeviceFlag,
    JsonFlag,
    Precision,
    PrecisionFlag,
    StartFlag,
    StudentFlag,
    TeacherConfigFlag,
    TeacherFlag,
)
from sbrush.console import SbrushError, info, printable

COCO = "COCO-30K"


# Flags that mean nothing elsewhere are refused there, and not passed over.
FOR_COCO = (
    "coco_root", "protocol", "images", "sweep", "captions", "seed", "inception", "clip_weights", "clip_score",
    "hps_weights", "hps_version", "download", "max_bad", "max_fid", "work", "save_images",
)  # fmt: skip
NOT_FOR_COCO = ("diversity", "fresh")
FOR_A_TEACHER = ("steps", "guidance", "teacher_config")  # on COCO; on the built-in world there always is one


class Protocol(StrEnum):
    """On COCO-30K; evaluate/coco.py has them."""

    swiftbrush = "swiftbrush"
    gigagan = "gigagan"
    torchmetrics = "torchmetrics"
    torch_fidelity = "torch-fidelity"


class HpsVersion(StrEnum):
    """Their figures do not compare."""

    v2_0 = "2.0"
    v2_1 = "2.1"


def evaluate(
    context: typer.Context,
    student: StudentFlag = None,
    start_timestep: StartFlag = None,
    teacher: TeacherFlag = None,
    teacher_config: TeacherConfigFlag = None,
    limit: Annotated[
        int | None, typer.Option(help="Captions. Default: 5,000; with --coco-30k 30,000.", min=4, max=50_000)
    ] = None,
    coco_30k: Annotated[
        bool, typer.Option("--coco-30k", help="Measure on COCO instead of the built-in world.", rich_help_panel=COCO)
    ] = False,
    coco_root: Annotated[
        Path, typer.Option(help="Holds annotations/captions_val2014.json, val2014/.", rich_help_panel=COCO)
    ] = Path("coco"),
    protocol: Annotated[
        Protocol, typer.Option(help="Which figures it compares with.", rich_help_panel=COCO)
    ] = Protocol.swiftbrush,
    images: Annotated[
        Path | None,
        typer.Option(help="Measure this folder's images, with the captions beside them.", rich_help_panel=COCO),
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(help="A,B,C: guidance scales of --teacher, or students; FID-CLIP plot.", rich_help_panel=COCO),
    ] = None,
    captions: Annotated[Path | None, typer.Option(help="Another list, one a line.", rich_help_panel=COCO)] = None,
    seed: Annotated[int, typer.Option(help="Of the images.", min=0, max=10**12, rich_help_panel=COCO)] = 0,
    inception: Annotated[Path | None, typer.Option(help="Inception's weights.", rich_help_panel=COCO)] = None,
    clip_weights: Annotated[
        Path | None, typer.Option(help="ViT-g-14's weights, or an open_clip folder.", rich_help_panel=COCO)
    ] = None,
    clip_score: Annotated[bool, typer.Option(" /--no-clip-score", help="Leave it out.", rich_help_panel=COCO)] = True,
    hps_weights: Annotated[
        Path | None, typer.Option(help="HPS v2's ViT-H-14, to score with it too.", rich_help_panel=COCO)
    ] = None,
    hps_version: Annotated[HpsVersion | None, typer.Option(help="Of --hps-weights.", rich_help_panel=COCO)] = None,
    download: Annotated[
        bool,
        typer.Option(
            "--download", help="Fetch COCO and the metrics' weights if they are missing.", rich_help_panel=COCO
        ),
    ] = False,
    max_bad: Annotated[int, typer.Option(help="Unreadable images to pass over.", min=0, rich_help_panel=COCO)] = 0,
    max_fid: Annotated[
        float | None, typer.Option(help="Exit with 1 if FID is above, for CI.", min=0, rich_help_panel=COCO)
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="Features so far. Default: the user's cache.", rich_help_panel=COCO)
    ] = None,
    save_images: Annotated[Path | None, typer.Option(help="Keep the images there.", rich_help_panel=COCO)] = None,
    diversity: Annotated[int, typer.Option(help="Images for each of the ten open captions.", min=10)] = 100,
    steps: Annotated[int, typer.Option(help="The teacher's, for comparison.", min=1, max=1000)] = 25,
    guidance: Annotated[
        float | None, typer.Option(help="The teacher's. Default: the one it was chosen at.", min=0)
    ] = None,
    report: Annotated[Path, typer.Option(help="Table and images as one HTML file.", rich_help_panel=REPORT)] = Path(
        "report.html"
    ),
    json_: JsonFlag = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure the teacher again, whatever is cached.")] = False,
    batch: Annotated[int, typer.Option(help="Images at once.", min=1, rich_help_panel=MACHINE)] = 64,
    device: DeviceFlag = "auto",
    precision: PrecisionFlag = Precision.auto,
) -> None:
    """Measure a student, its teacher and the truth: FID, CLIP score, accuracy, diversity."""
    from sbrush.device import pick_device, pick_dtype

    _check_given(context, coco=coco_30k, teacher=teacher is not None, sweep=sweep is not None, clip_score=clip_score)
    where = pick_device(device)
    if report.is_dir() or not os.access(report.absolute().parent, os.W_OK):
        raise SbrushError(f"cannot write {printable(report)}", "choose another --report", code=2)
    result: Any
    if coco_30k:
        from sbrush.evaluate.coco.benchmark import benchmark

        result = benchmark(
            root=coco_root, protocol=protocol.value, student=student, start_timestep=start_timestep, teacher=teacher,
            teacher_config=teacher_config, images=images, sweep=sweep, captions=captions, n=limit, steps=steps,
            guidance=guidance, seed=seed, inception=inception, clip_weights=clip_weights, clip_score=clip_score,
            hps_weights=hps_weights, hps_version=hps_version.value if hps_version else None, download=download,
            max_bad=max_bad, work=work, save_images=save_images, report=report, batch=batch, device=where,
            dtype=pick_dtype(precision.value, where),
        )  # fmt: skip
        if result is None:  # another process has it
            return
        _print_result(result, report, json_, next_=f"open {printable(report)}")
        best = min(point.figures["fid"] for point in result.points)
        if max_fid is not None and best > max_fid:
            raise SbrushError(f"FID {best:.2f} is above {max_fid:g}", f"see {printable(report)}")
        return
    limit = limit or 5000
    if limit < 100:
        raise SbrushError(f"{limit} captions are too few", "--limit 100 or more", code=2)
    from sbrush.evaluate.candidates import evaluate as measure

    result = measure(
        student=student, teacher=teacher, n=limit, per_caption=diversity, steps=steps, guidance=guidance,
        report=report, fresh=fresh, batch=batch, device=where, dtype=pick_dtype(precision.value, where),
        teacher_config=teacher_config, start_timestep=start_timestep,
    )  # fmt: skip
    sample = 'sbrush sample "a cat" --seed 1-8 --compare'
    _print_result(result, report, json_, next_=f"open {printable(report)}, or {sample}")


def _check_given(context: typer.Context, *, coco: bool, teacher: bool, sweep: bool, clip_score: bool) -> None:
    """SbrushError if a flag was given that would change nothing."""
    given = [name for name in context.params if str(context.get_parameter_source(name)).endswith("COMMANDLINE")]

    def refuse(names: tuple[str, ...], why: str, hint: str) -> None:
        if useless := next((name for name in given if name in names), None):
            no = "no-" if useless == "clip_score" else ""
            raise SbrushError(f"--{no}{useless.replace('_', '-')} {why}", hint, code=2)

    if not coco:
        refuse(FOR_COCO, "is for COCO", "add --coco-30k, or leave it out")
        return
    refuse(NOT_FOR_COCO, "is for the built-in world", "leave it out, or --coco-30k")
    if not teacher:
        refuse(FOR_A_TEACHER, "is a teacher's, and none is measured", "leave it out, or name it: --teacher ID")
    if sweep:
        refuse(("guidance",), "is what --sweep goes through", "leave out one of them")
    if not clip_score:
        refuse(("clip_weights",), "is for the CLIP score", "leave it out, or --no-clip-score")


def _print_result(result: Any, report: Path, as_json: bool, *, next_: str) -> None:
    """The end of both kinds of evaluation."""
    if as_json:
        console.out_json(result.json())
    else:
        console.out(result.table())
        info(f"next: {next_}")
        console.out(report)

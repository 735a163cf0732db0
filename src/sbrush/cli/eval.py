"""`sbrush eval`, on the built-in world and on COCO-30K."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from sbrush import console
from sbrush.cli.flags import (
    MACHINE,
    REPORT,
    ColumnFlag,
    DeviceFlag,
    JsonFlag,
    LoraFlag,
    Precision,
    StartFlag,
    StepsFlag,
    StudentFlag,
    VaeFlag,
    teacher_config_option,
    teacher_option,
)
from sbrush.cli.negative import NegativeFlag, NegativeMethodFlag, NegativeScaleFlag, read_negative_flags
from sbrush.console import SbrushError, info, printable
from sbrush.evaluate.request import (
    CocoData,
    CocoOutput,
    CocoRequest,
    Execution,
    MetricWeights,
    Models,
    StickersRequest,
)
from sbrush.models.lora_request import parse_loras

TEACHER, WORLD = "The teacher", "Built-in world only"
COCO, COCO_METRICS = "COCO-30K: captions and images", "COCO-30K: metrics"
EXAMPLE = "Example: sbrush eval --student runs/stickers --limit 200 --report runs/stickers/report.html"

# Flags that mean nothing elsewhere are refused there, and not passed over.
FOR_COCO = (
    "coco_root", "protocol", "images", "sweep", "captions", "column", "seed", "inception", "clip_weights", "clip_score",
    "hps_weights", "hps_version", "download", "max_unreadable", "max_fid", "work", "save_images",
)  # fmt: skip
NOT_FOR_COCO = ("diversity", "fresh")
FOR_A_TEACHER = (
    "teacher_steps",
    "teacher_guidance",
    "teacher_config",
)  # on COCO


class Protocol(StrEnum):
    """Those of evaluate/coco/protocols.py."""

    swiftbrush = "swiftbrush"
    gigagan = "gigagan"
    dmd2 = "dmd2"
    torchmetrics = "torchmetrics"
    torch_fidelity = "torch-fidelity"


DEFAULT_PROTOCOL = Protocol(CocoData.protocol)


class HpsVersion(StrEnum):
    """Scores of the two do not compare."""

    v2_0 = "2.0"
    v2_1 = "2.1"


def evaluate(
    context: typer.Context,
    student: StudentFlag = None,
    steps: StepsFlag = None,
    start_timestep: StartFlag = None,
    negative: NegativeFlag = None,
    negative_method: NegativeMethodFlag = None,
    negative_scale: NegativeScaleFlag = None,
    lora: LoraFlag = None,
    vae: VaeFlag = None,
    limit: Annotated[
        int | None,
        typer.Option(
            help="Number of captions to measure on: 100 to 50,000, by default 1,000. With --coco-30k: 4 or more, by "
            "default the protocol's 30,000. FID falls as this number grows: compare only FIDs of the same number."
        ),
    ] = None,
    coco_30k: Annotated[
        bool,
        typer.Option(
            "--coco-30k",
            help="Measure on MS-COCO's captions and photographs, the usual benchmark for distilled Stable Diffusion, "
            "instead of on the built-in world. See the COCO-30K flags below.",
        ),
    ] = False,
    teacher: Annotated[
        str | None,
        teacher_option(
            TEACHER,
            default="the built-in teacher. With --coco-30k there is no default, and the teacher is measured instead of "
            "a student",
        ),
    ] = None,
    teacher_config: Annotated[str | None, teacher_config_option(TEACHER)] = None,
    teacher_steps: Annotated[
        int,
        typer.Option(help="Number of DDIM steps that the teacher takes.", min=1, max=1000, rich_help_panel=TEACHER),
    ] = Models.teacher_steps,
    teacher_guidance: Annotated[
        float | None,
        typer.Option(
            help="Guidance scale of the teacher; 1 is none. Default: the value in its folder, else 7.5.",
            min=0,
            rich_help_panel=TEACHER,
        ),
    ] = None,
    diversity: Annotated[
        int | None,
        typer.Option(
            help="Number of images from which diversity is measured, for each of ten captions that leave attributes "
            "open, such as 'a cat'. More images measure it more exactly and take longer. Default: a tenth of --limit, "
            "at most 100.",
            min=2,
            max=100_000,
            rich_help_panel=WORLD,
        ),
    ] = None,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh",
            help="Measure the teacher again, even if its metrics are cached or, for the built-in teacher, come with "
            "sbrush. The student is measured every time.",
            rich_help_panel=WORLD,
        ),
    ] = StickersRequest.fresh,
    coco_root: Annotated[
        Path,
        typer.Option(
            help="Folder of COCO, with annotations/captions_val2014.json and val2014/ as its archives unpack.",
            rich_help_panel=COCO,
        ),
    ] = CocoData.root,
    download: Annotated[
        bool,
        typer.Option(
            "--download",
            help="Download what is missing: COCO into --coco-root (6.9 GB), Inception (91 MB) and CLIP (5.5 GB) into "
            "their libraries' caches. A stopped download is resumed.",
            rich_help_panel=COCO,
        ),
    ] = CocoData.download,
    protocol: Annotated[
        Protocol,
        typer.Option(
            help="Rules of the measurement; your figures compare only with published ones under the same rules. "
            "swiftbrush: SwiftBrush and v2 (which captions gave SwiftBrush's 16.67 is not known). gigagan: GigaGAN and "
            "SiD-LSG. dmd2: DMD2. Both gigagan and dmd2 need --captions. torchmetrics, torch-fidelity: those "
            "libraries' FID, which no paper reports.",
            rich_help_panel=COCO,
        ),
    ] = DEFAULT_PROTOCOL,
    captions: Annotated[
        Path | None,
        typer.Option(
            help="File of captions to use instead of the first annotation of each COCO image: text with one caption "
            "per line, CSV, TSV or JSON, or - for the standard input.",
            rich_help_panel=COCO,
        ),
    ] = None,
    column: ColumnFlag = None,
    images: Annotated[
        Path | None,
        typer.Option(
            help="Folder of images from another tool, to be measured instead of a model. Their captions are found by "
            "COCO's file names, by caption numbers from 0 in the file names, or in files beside them: captions.txt, "
            "captions.csv, metadata.jsonl or a text file for each image.",
            rich_help_panel=COCO,
        ),
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(
            help="Measure several points and plot FID against CLIP score. Takes guidance scales of --teacher, such as "
            "1,2,4.5,7.5, or students separated by commas, or a run's checkpoints folder.",
            rich_help_panel=COCO,
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            help="Seed of the generated images. Caption number i gets the seed 1,000,000 times this, plus i.",
            min=0,
            max=10**12,
            rich_help_panel=COCO,
        ),
    ] = CocoData.seed,
    save_images: Annotated[
        Path | None,
        typer.Option(
            help="Folder in which to keep the generated images, as PNGs named by their captions' numbers. Default: "
            "they are not kept.",
            rich_help_panel=COCO,
        ),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the features and scores so far (8 KiB per image), from which the same command resumes. "
            "Default: a folder in your cache.",
            rich_help_panel=COCO,
        ),
    ] = None,
    max_unreadable: Annotated[
        int,
        typer.Option(
            help="Number of damaged or missing image files that may be left out. With more, the command fails.",
            min=0,
            rich_help_panel=COCO,
        ),
    ] = CocoData.max_unreadable,
    inception: Annotated[
        Path | None,
        typer.Option(
            help="File of Inception's weights for FID, .pth or .safetensors. Default: the one in torch's cache; "
            "--download puts it there.",
            rich_help_panel=COCO_METRICS,
        ),
    ] = None,
    clip_weights: Annotated[
        Path | None,
        typer.Option(
            help="Weights for the CLIP score: open_clip's ViT-g-14 as a file, or a folder in open_clip's layout. "
            "Default: those in the Hub's cache; --download puts them there.",
            rich_help_panel=COCO_METRICS,
        ),
    ] = None,
    clip_score: Annotated[
        bool,
        typer.Option(
            " /--no-clip-score",
            help="Leave out the CLIP score, which needs 5.5 GB of weights.",
            show_default=False,
            rich_help_panel=COCO_METRICS,
        ),
    ] = MetricWeights.clip_score,
    hps_weights: Annotated[
        Path | None,
        typer.Option(
            help="File of HPS v2's weights (ViT-H-14), to measure a human preference score too. Needs --hps-version.",
            rich_help_panel=COCO_METRICS,
        ),
    ] = None,
    hps_version: Annotated[
        HpsVersion | None,
        typer.Option(
            help="Version of the weights in --hps-weights. Scores of the two versions do not compare.",
            rich_help_panel=COCO_METRICS,
        ),
    ] = None,
    max_fid: Annotated[
        float | None,
        typer.Option(
            help="For CI: end with exit code 1 if the FID is above this. Of several FIDs, the lowest counts.",
            min=0,
            rich_help_panel=COCO_METRICS,
        ),
    ] = None,
    report: Annotated[
        Path,
        typer.Option(
            help="HTML file for table, protocol and images. A JSON file with the same numbers is written beside it.",
            rich_help_panel=REPORT,
        ),
    ] = StickersRequest.report,
    json_: JsonFlag = False,
    batch: Annotated[
        int,
        typer.Option(help="Number of images drawn at once; fewer take less memory.", min=1, rich_help_panel=MACHINE),
    ] = Execution.batch,
    device: DeviceFlag = "auto",
    precision: Annotated[
        Precision,
        typer.Option(
            "--precision",
            help="Number format of the networks that draw. auto: float32, on CUDA with TF32 products, as DMD2 does. "
            "float32: without TF32, and on CUDA 4 times as slow. float16 and bfloat16: a third less time than auto, "
            "and slightly different images.",
            rich_help_panel=MACHINE,
        ),
    ] = Precision.auto,
) -> None:
    """Measure a student, its teacher and real images: FID, CLIP score, accuracy, diversity.

    Without --coco-30k, it measures on the built-in world.
    """
    _check_given(context, coco=coco_30k, teacher=teacher is not None, sweep=sweep is not None, clip_score=clip_score)
    away = read_negative_flags(negative, negative_method, negative_scale)
    loras = parse_loras(lora)
    models = Models(
        student, steps, start_timestep, teacher, teacher_config, teacher_steps, teacher_guidance, away, loras, vae
    )
    execution = Execution(device, precision.value, batch)
    if coco_30k:
        version = hps_version.value if hps_version else None
        coco = CocoRequest(
            models,
            images,
            sweep,
            CocoData(coco_root, protocol.value, captions, column, limit, seed, max_unreadable, download),
            MetricWeights(inception, clip_weights, clip_score, hps_weights, version),
            CocoOutput(report, work, save_images),
            execution,
        )
        _measure_coco(coco, as_json=json_, max_fid=max_fid)
        return
    count = StickersRequest.limit if limit is None else limit
    _measure_stickers(StickersRequest(models, count, diversity, fresh, report, execution), as_json=json_)


def _measure_stickers(request: StickersRequest, *, as_json: bool) -> None:
    from sbrush.evaluate.check import check

    check(request)  # before torch is imported
    info("loading torch and the models ...")
    from sbrush.evaluate.candidates import evaluate as measure

    sample = 'sbrush sample "a cat" --seed 1-8 --compare'
    _print_result(measure(request), request.report, as_json, next_=f"open {printable(request.report)}, or {sample}")


def _measure_coco(request: CocoRequest, *, as_json: bool, max_fid: float | None) -> None:
    from sbrush.evaluate.check import check

    check(request)
    info("loading torch and the models ...")
    from sbrush.evaluate.coco.benchmark import benchmark

    result, report = benchmark(request), request.output.report
    if result is None:  # another process has it
        return
    _print_result(result, report, as_json, next_=f"open {printable(report)}")
    best = min(fid for point in result.points if (fid := point.metrics["fid"]) is not None)
    if max_fid is not None and best > max_fid:
        raise SbrushError(f"FID {best:.2f} is above {max_fid:g}", f"see {printable(report)}")


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
        refuse(("teacher_guidance",), "is what --sweep goes through", "leave out one of them")
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

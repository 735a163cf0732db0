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

TEACHER, WORLD = "The teacher beside the student", "Built-in world alone"
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
            help="Number of captions to measure on: 100 to 50,000, by default 1,000. With --coco-30k 4 or more, by "
            "default the protocol's 30,000. FID falls as it grows: compare FIDs of the same number only."
        ),
    ] = None,
    coco_30k: Annotated[
        bool,
        typer.Option(
            "--coco-30k",
            help="Measure on MS-COCO's captions and photographs, the benchmark of Stable Diffusion's students, in "
            "place of the built-in world. See the COCO-30K flags below.",
        ),
    ] = False,
    teacher: Annotated[
        str | None,
        teacher_option(TEACHER, default="the built-in teacher; with --coco-30k none, one in place of a student"),
    ] = None,
    teacher_config: Annotated[str | None, teacher_config_option(TEACHER)] = None,
    teacher_steps: Annotated[
        int,
        typer.Option(help="Number of DDIM steps that the teacher takes.", min=1, max=1000, rich_help_panel=TEACHER),
    ] = Models.teacher_steps,
    teacher_guidance: Annotated[
        float | None,
        typer.Option(
            help="Guidance scale of the teacher; 1 is none. Default: the one that its folder names, else 7.5.",
            min=0,
            rich_help_panel=TEACHER,
        ),
    ] = None,
    diversity: Annotated[
        int | None,
        typer.Option(
            help="Number of images of each of ten open captions, such as 'a cat', whose variety is measured. Default: "
            "a tenth of --limit, at most 100. More makes diversity more exact, and the run longer.",
            min=2,
            max=100_000,
            rich_help_panel=WORLD,
        ),
    ] = None,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh",
            help="Measure the teacher again, though its metrics are cached (or come with sbrush, for the built-in "
            "teacher). The student is measured every time.",
            rich_help_panel=WORLD,
        ),
    ] = StickersRequest.fresh,
    coco_root: Annotated[
        Path,
        typer.Option(
            help="Folder with annotations/captions_val2014.json and val2014/, as COCO's archives unpack.",
            rich_help_panel=COCO,
        ),
    ] = CocoData.root,
    download: Annotated[
        bool,
        typer.Option(
            "--download",
            help="Fetch what is missing: COCO into --coco-root (6.9 GB), Inception (91 MB) and CLIP (5.5 GB) into "
            "their libraries' caches. Goes on where it was stopped.",
            rich_help_panel=COCO,
        ),
    ] = CocoData.download,
    protocol: Annotated[
        Protocol,
        typer.Option(
            help="Rules to measure by, and so which published figures compare. swiftbrush: SwiftBrush's and v2's, "
            "though which captions gave SwiftBrush's 16.67 is not known. gigagan: GigaGAN's and SiD-LSG's. dmd2: "
            "DMD2's. These two need --captions. torchmetrics, torch-fidelity: those libraries' FID, no paper's.",
            rich_help_panel=COCO,
        ),
    ] = DEFAULT_PROTOCOL,
    captions: Annotated[
        Path | None,
        typer.Option(
            help="Captions in place of the first annotation of each COCO image: text with one a line, a CSV, TSV or "
            "JSON file, or - for the standard input.",
            rich_help_panel=COCO,
        ),
    ] = None,
    column: ColumnFlag = None,
    images: Annotated[
        Path | None,
        typer.Option(
            help="Folder of images that another tool generated, to be measured in place of a model: with their "
            "captions' numbers from 0 on anywhere in their names, with COCO's own names, or with captions.txt, "
            "captions.csv, metadata.jsonl or a text for each image beside them.",
            rich_help_panel=COCO,
        ),
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(
            help="Several measurements and a plot of FID against CLIP score: guidance scales of --teacher, such as "
            "1,2,4.5,7.5; or students, or a run's checkpoints folder, with commas between.",
            rich_help_panel=COCO,
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            help="Seed of the generated images: caption number i gets 1,000,000 times it, plus i.",
            min=0,
            max=10**12,
            rich_help_panel=COCO,
        ),
    ] = CocoData.seed,
    save_images: Annotated[
        Path | None,
        typer.Option(
            help="Folder to keep the generated images in, as PNGs named by their captions' numbers. Default: none.",
            rich_help_panel=COCO,
        ),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(
            help="Folder for features and scores so far (8 KiB an image), from which the same command goes on. "
            "Default: the user's cache.",
            rich_help_panel=COCO,
        ),
    ] = None,
    max_unreadable: Annotated[
        int,
        typer.Option(
            help="Number of damaged or missing image files that may be left out; one more ends the command.",
            min=0,
            rich_help_panel=COCO,
        ),
    ] = CocoData.max_unreadable,
    inception: Annotated[
        Path | None,
        typer.Option(
            help="File of Inception's weights for FID, .pth or .safetensors. Default: torch's cache, see --download.",
            rich_help_panel=COCO_METRICS,
        ),
    ] = None,
    clip_weights: Annotated[
        Path | None,
        typer.Option(
            help="Weights for the CLIP score: open_clip's ViT-g-14 as a file, or a folder in open_clip's layout. "
            "Default: the Hub's cache, see --download.",
            rich_help_panel=COCO_METRICS,
        ),
    ] = None,
    clip_score: Annotated[
        bool,
        typer.Option(
            " /--no-clip-score",
            help="Leave the CLIP score out: no need for its 5.5 GB of weights.",
            show_default=False,
            rich_help_panel=COCO_METRICS,
        ),
    ] = MetricWeights.clip_score,
    hps_weights: Annotated[
        Path | None,
        typer.Option(
            help="File of HPS v2's ViT-H-14, to score human preference too; --hps-version says which it is.",
            rich_help_panel=COCO_METRICS,
        ),
    ] = None,
    hps_version: Annotated[
        HpsVersion | None,
        typer.Option(help="Version of --hps-weights. Scores of the two do not compare.", rich_help_panel=COCO_METRICS),
    ] = None,
    max_fid: Annotated[
        float | None,
        typer.Option(
            help="Largest FID that counts as success: exit code 1 if the best one is above, for CI.",
            min=0,
            rich_help_panel=COCO_METRICS,
        ),
    ] = None,
    report: Annotated[
        Path,
        typer.Option(
            help="HTML file for table, protocol and images; the same numbers as JSON go beside it.",
            rich_help_panel=REPORT,
        ),
    ] = StickersRequest.report,
    json_: JsonFlag = False,
    batch: Annotated[
        int,
        typer.Option(
            help="Number of images generated at once; fewer take less memory.", min=1, rich_help_panel=MACHINE
        ),
    ] = Execution.batch,
    device: DeviceFlag = "auto",
    precision: Annotated[
        Precision,
        typer.Option(
            "--precision",
            help="Number format of the networks that generate. auto: float32, on CUDA with TF32 products, as DMD2 "
            "measures. float32 is exact, and on CUDA 4 times as slow; float16 and bfloat16 take a third less time, and "
            "change images a little.",
            rich_help_panel=MACHINE,
        ),
    ] = Precision.auto,
) -> None:
    """Measure a student, its teacher and real images: FID, CLIP score, accuracy, diversity."""
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

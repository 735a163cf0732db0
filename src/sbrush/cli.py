"""Every flag, and nothing else: each command checks its cheap inputs, then hands over to the module of its own name.

Nothing heavy is imported at module level: `sbrush --help` answers in the time that typer takes.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import traceback
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, cast

import typer

import sbrush
from sbrush import console
from sbrush.console import SbrushError, printable, say
from sbrush.recipes import RECIPES, Recipe
from sbrush.seeds import parse_seeds

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="One-step text-to-image students by Variational Score Distillation (SwiftBrush).",
    epilog="Exit codes: 0 done, 1 could not be done, 2 asked for something impossible, 130 interrupted.",
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeName = StrEnum("RecipeName", {name: name for name in RECIPES})  # type: ignore[misc]


class Precision(StrEnum):
    """Of matrix products in training."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class Protocol(StrEnum):
    """On COCO-30K; evaluate/coco.py has them."""

    swiftbrush = "swiftbrush"
    gigagan = "gigagan"
    torchmetrics = "torchmetrics"


class Dtype(StrEnum):
    """Of the networks in sampling."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


COCO = "COCO-30K"
MACHINE, MEMORY, ABLATIONS = "Machine", "Less memory", "The paper's ablations"
OVERRIDES, REPORT = "Instead of the recipe's", "Output"
DeviceFlag = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1 ...", rich_help_panel=MACHINE)]
DtypeFlag = Annotated[Dtype, typer.Option("--dtype", help="Of the networks; x0 is float32.", rich_help_panel=MACHINE)]
StudentFlag = Annotated[
    str | None, typer.Option("--student", help="Folder, a run's --out, or Hub id. Default: shipped.")
]
TeacherFlag = Annotated[
    str | None, typer.Option("--teacher", help="Folder, Hub id or .safetensors. Default: built in.")
]
TeacherConfigFlag = Annotated[
    str | None,
    typer.Option("--teacher-config", help="For a .safetensors teacher: folder or Hub id with its configuration."),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.", rich_help_panel=REPORT)]


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        console.out(f"sbrush {sbrush.__version__}")
        raise typer.Exit()


@app.command()
def distill(
    prompts: Annotated[Path, typer.Argument(help="UTF-8 text, one prompt a line.")],
    teacher: TeacherFlag = None,
    teacher_config: TeacherConfigFlag = None,
    init: Annotated[str | None, typer.Option(help="Start from this student instead of the teacher's weights.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder. Default: runs/PROMPTS. The same command resumes.")
    ] = None,
    recipe: Annotated[
        RecipeName | None,
        typer.Option(help="Row of hyper-parameters. Default: stickers for the built-in teacher, else swiftbrush."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the run.", min=0)] = 0,
    extend: Annotated[int, typer.Option(help="Steps to add to the complete run in --out; 0: none.", min=0)] = 0,
    steps: Annotated[int | None, typer.Option(help="Student updates.", min=1, rich_help_panel=OVERRIDES)] = None,
    batch: Annotated[int | None, typer.Option(help="Samples an update.", min=1, rich_help_panel=OVERRIDES)] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.", min=0, rich_help_panel=OVERRIDES)] = None,
    student_lr: Annotated[float | None, typer.Option(help="Learning rate.", min=0, rich_help_panel=OVERRIDES)] = None,
    lora_lr: Annotated[float | None, typer.Option(help="Learning rate.", min=0, rich_help_panel=OVERRIDES)] = None,
    lora_updates: Annotated[
        int | None, typer.Option(help="LoRA-teacher updates a student update.", min=1, rich_help_panel=OVERRIDES)
    ] = None,
    student_lora: Annotated[
        int | None,
        typer.Option(help="Rank of a LoRA that is the student, for small cards.", min=1, rich_help_panel=OVERRIDES),
    ] = None,
    t_init: Annotated[
        int | None, typer.Option(help="The student's timestep, below T.", min=1, rich_help_panel=OVERRIDES)
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any setting: --set lora_rank=128 --set t_init=null.", rich_help_panel=OVERRIDES),
    ] = None,
    lora_teacher: Annotated[
        bool, typer.Option(" /--no-lora-teacher", help="Score Distillation Sampling.", rich_help_panel=ABLATIONS)
    ] = True,
    reparameterisation: Annotated[
        bool, typer.Option(" /--no-reparameterisation", help="The UNet's output is x0.", rich_help_panel=ABLATIONS)
    ] = True,
    log_every: Annotated[int, typer.Option(help="Steps.", min=1, rich_help_panel=REPORT)] = 10,
    sheet_every: Annotated[
        int, typer.Option(help="Steps between contact sheets; 0: none.", min=0, rich_help_panel=REPORT)
    ] = 200,
    checkpoint_every: Annotated[int, typer.Option(help="Steps.", min=1, rich_help_panel=REPORT)] = 200,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the recipes, and what this run would take; train nothing.")
    ] = False,
    device: DeviceFlag = "auto",
    precision: Annotated[Precision, typer.Option(help="Of matrix products.", rich_help_panel=MACHINE)] = Precision.auto,
    micro_batches: Annotated[
        int, typer.Option(help="Parts that a process takes its batch in.", min=1, rich_help_panel=MEMORY)
    ] = 1,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Compute activations twice, keep few.", rich_help_panel=MEMORY)
    ] = False,
    ema_on_cpu: Annotated[bool, typer.Option("--ema-on-cpu", help="Off: --set ema=0.", rich_help_panel=MEMORY)] = False,
    adam_8bit: Annotated[bool, typer.Option("--adam-8bit", help="Needs bitsandbytes.", rich_help_panel=MEMORY)] = False,
) -> None:
    """Distil a teacher into a one-step student, from prompts alone."""
    chosen = RECIPES[recipe.value if recipe else "stickers" if teacher is None else "swiftbrush"]
    given: dict[str, Any] = {
        "steps": steps, "batch": batch, "guidance": guidance, "student_lr": student_lr, "lora_lr": lora_lr,
        "lora_updates": lora_updates, "student_rank": student_lora, "t_init": t_init,
        "reparameterised": reparameterisation, "optimizer": "adam8bit" if adam_8bit else None,
    }  # fmt: skip
    if guidance is not None:
        chosen = chosen.with_settings(guidance_to=None)
    if not lora_teacher:
        chosen = chosen.with_settings(gap="sds", shared_forward=False)
    chosen = chosen.with_settings(**{name: value for name, value in given.items() if value is not None})
    chosen = chosen.but_for(set_ or ())
    if not prompts.is_file():  # before torch is imported
        _no_prompts(prompts)
    say("loading torch and the models ...")
    from sbrush.device import pick_device
    from sbrush.distill import distill as train
    from sbrush.distill import prepare
    from sbrush.distiller import Fit
    from sbrush.prompts import read_prompts
    from sbrush.run import Intervals

    texts = read_prompts(prompts)
    fit = Fit(micro_batches=micro_batches, checkpointing=checkpointing, ema_on_cpu=ema_on_cpu)
    if dry_run:
        from sbrush.cost import estimate
        from sbrush.device import trains_in_bf16

        where = pick_device(device)
        bf16 = trains_in_bf16(cast("Any", precision.value), where)
        _print_recipes(chosen)
        facts = {
            "teacher": teacher or "stickers (built in)",
            "prompts": texts.describe(),
            "seed": seed,
            "bfloat16": bf16,
        }
        for name, value in facts.items():
            console.out(f"{name}: {printable(value)}")
        for line in estimate(teacher, chosen, fit, config=teacher_config, bf16=bf16, device=where).lines(chosen):
            console.out(line)
        return
    plan = prepare(
        chosen, texts, out=out or Path("runs") / prompts.stem, teacher=teacher, init=init, seed=seed,
        device=pick_device(device), precision=cast("Any", precision.value),
        every=Intervals(log=log_every, sheet=sheet_every, checkpoint=checkpoint_every), extend=extend,
        fit=fit, teacher_config=teacher_config,
    )  # fmt: skip
    shown = printable(plan.run.out)
    if not train(plan):
        if plan.main_process:
            say(f"stopped; the same command goes on:\n  {_same_command()}")
        raise typer.Exit(130)
    if plan.main_process:
        sheets = f"pictures: {shown}/samples   " if sheet_every else ""
        say(f'{sheets}curves: {shown}/curves.png   next: sbrush sample "a cat" --student {shown}')
        console.out(plan.run.student)


@app.command()
def sample(
    prompts: Annotated[list[str] | None, typer.Argument(help="One or more prompts.", metavar="PROMPT...")] = None,
    out: Annotated[
        Path, typer.Option("-o", "--out", help="A .png (several pictures: a grid), or a folder (a file each).")
    ] = Path("out.png"),
    prompts_file: Annotated[Path | None, typer.Option("--prompts", help="File with one prompt a line.")] = None,
    seed: Annotated[str, typer.Option(help="7, 1-8 or 1,5,9-12: one picture a prompt and seed.")] = "0",
    student: StudentFlag = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="The teacher's many steps beside the student's one.")
    ] = False,
    teacher: TeacherFlag = None,
    teacher_config: TeacherConfigFlag = None,
    steps: Annotated[int, typer.Option(help="The teacher's, with --compare.", min=1, max=1000)] = 25,
    guidance: Annotated[float | None, typer.Option(help="The teacher's, with --compare.", min=0)] = None,
    metadata: Annotated[bool, typer.Option(" /--no-metadata", help="Keep prompt and seed out of the PNG.")] = True,
    batch: Annotated[int, typer.Option(help="Pictures at once.", min=1, rich_help_panel=MACHINE)] = 32,
    device: DeviceFlag = "auto",
    dtype: DtypeFlag = Dtype.auto,
) -> None:
    """Draw pictures in one step."""
    if not prompts and prompts_file is None:
        raise SbrushError("no prompt", 'sbrush sample "a small red cat", or --prompts FILE', code=2)
    if prompts_file is not None and not prompts_file.is_file():
        _no_prompts(prompts_file)
    if any(not prompt.strip() for prompt in prompts or ()):
        raise SbrushError("an empty prompt", 'sbrush sample "a small red cat"', code=2)
    seeds = parse_seeds(seed)
    from sbrush.device import pick_device, pick_dtype
    from sbrush.prompts import read_prompts
    from sbrush.sample import sample_to_files

    texts = [*(prompts or ()), *(read_prompts(prompts_file).texts if prompts_file else ())]
    where = pick_device(device)
    paths = sample_to_files(
        texts, seeds, out, student=student, teacher=teacher, compare=compare, steps=steps, guidance=guidance,
        metadata=metadata, batch=batch, device=where, dtype=pick_dtype(dtype.value, where),
        teacher_config=teacher_config,
    )  # fmt: skip
    for path in paths:
        console.out(path)
    if not compare:
        say("next: --seed 1-8 for more, --compare for the teacher's picture beside it")


@app.command("eval")
def evaluate(
    student: StudentFlag = None,
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
        Path | None, typer.Option(help="Measure this folder's pictures, in their numbers' order.", rich_help_panel=COCO)
    ] = None,
    captions: Annotated[Path | None, typer.Option(help="Another list, one a line.", rich_help_panel=COCO)] = None,
    seed: Annotated[int, typer.Option(help="Of the pictures.", min=0, rich_help_panel=COCO)] = 0,
    inception: Annotated[Path | None, typer.Option(help="Inception's weights.", rich_help_panel=COCO)] = None,
    clip_weights: Annotated[
        Path | None, typer.Option(help="ViT-g-14's weights, or an open_clip folder.", rich_help_panel=COCO)
    ] = None,
    clip_score: Annotated[bool, typer.Option(" /--no-clip-score", help="Leave it out.", rich_help_panel=COCO)] = True,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch the metrics' weights if they are missing.", rich_help_panel=COCO)
    ] = False,
    max_bad: Annotated[int, typer.Option(help="Unreadable pictures to pass over.", min=0, rich_help_panel=COCO)] = 0,
    max_fid: Annotated[
        float | None, typer.Option(help="Exit with 1 if FID is above, for CI.", min=0, rich_help_panel=COCO)
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="Features so far. Default: the user's cache.", rich_help_panel=COCO)
    ] = None,
    save_images: Annotated[Path | None, typer.Option(help="Keep the pictures there.", rich_help_panel=COCO)] = None,
    diversity: Annotated[int, typer.Option(help="Pictures for each of the ten open captions.", min=10)] = 100,
    steps: Annotated[int, typer.Option(help="The teacher's, for comparison.", min=1, max=1000)] = 25,
    guidance: Annotated[
        float | None, typer.Option(help="The teacher's. Default: the one it was chosen at.", min=0)
    ] = None,
    report: Annotated[Path, typer.Option(help="Table and pictures as one HTML file.", rich_help_panel=REPORT)] = Path(
        "report.html"
    ),
    json_: JsonFlag = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure the teacher again, whatever is cached.")] = False,
    batch: Annotated[int, typer.Option(help="Pictures at once.", min=1, rich_help_panel=MACHINE)] = 64,
    device: DeviceFlag = "auto",
    dtype: DtypeFlag = Dtype.auto,
) -> None:
    """Measure a student, its teacher and the truth: FID, CLIP score, accuracy, diversity."""
    from sbrush.device import pick_device, pick_dtype

    where = pick_device(device)
    if report.is_dir() or not os.access(report.absolute().parent, os.W_OK):
        raise SbrushError(f"cannot write {printable(report)}", "choose another --report", code=2)
    result: Any
    if coco_30k:
        from sbrush.evaluate.benchmark import benchmark

        result = benchmark(
            root=coco_root, protocol=protocol.value, student=student, teacher=teacher, teacher_config=teacher_config,
            images=images, captions=captions, n=limit, steps=steps, guidance=guidance, seed=seed, inception=inception,
            clip_weights=clip_weights, clip_score=clip_score, download=download, max_bad=max_bad, work=work,
            save_images=save_images, report=report, batch=batch, device=where, dtype=pick_dtype(dtype.value, where),
        )  # fmt: skip
        _print_result(result, report, json_)
        if max_fid is not None and result.figures["fid"] > max_fid:
            raise SbrushError(f"FID {result.figures['fid']:.2f} is above {max_fid:g}", f"see {printable(report)}")
        return
    if any(given is not None for given in (images, captions, inception, clip_weights, work, save_images, max_fid)):
        raise SbrushError("these options are for COCO", "add --coco-30k", code=2)
    limit = limit or 5000
    if limit < 100:
        raise SbrushError(f"{limit} captions are too few", "--limit 100 or more", code=2)
    from sbrush.evaluate.candidates import evaluate as measure

    result = measure(
        student=student, teacher=teacher, n=limit, per_caption=diversity, steps=steps, guidance=guidance,
        report=report, fresh=fresh, batch=batch, device=where, dtype=pick_dtype(dtype.value, where),
        teacher_config=teacher_config,
    )  # fmt: skip
    _print_result(result, report, json_)


def _print_result(result: Any, report: Path, as_json: bool) -> None:
    """The end of both kinds of evaluation."""
    if as_json:
        console.out_json(result.json())
    else:
        console.out(result.table())
        say(f'next: open {printable(report)}, or sbrush sample "a cat" --seed 1-8 --compare')
        console.out(report)


@app.command()
def merge(
    one: Annotated[str, typer.Argument(help="A student: folder, a run's --out, or Hub id.")],
    two: Annotated[str, typer.Argument(help="Another student of the same teacher.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the new student.")],
    share: Annotated[float, typer.Option(help="Of the first.", min=0, max=1)] = 0.5,
) -> None:
    """Merge two students' weights into one student (SwiftBrush v2)."""
    from sbrush.merge import merge as merge_students

    merge_students(one, two, out, share=share)
    say(f'next: sbrush sample "a cat" --student {printable(out)}')
    console.out(out)


def main() -> None:
    """The program: runs a command and turns what it raises into an exit code."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which peft imports if it is there; it talks of kernels
    try:
        code = app(standalone_mode=False) or 0
    except (KeyboardInterrupt, typer.Abort):
        code = _fail("interrupted", "the same command starts again", 130)
    except SbrushError as problem:
        code = _fail(str(problem), problem.hint, problem.code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as problem:
        if hasattr(problem, "format_message"):  # what typer makes of a wrong command line
            context = getattr(problem, "ctx", None)
            command = context.command_path if context else "sbrush"
            code = _fail(problem.format_message(), f"{command} --help lists what there is", 2)
        else:
            said = f"{type(problem).__name__}: {problem}".splitlines()[0]
            code = _fail(said, "this is a bug or an exhausted machine; SBRUSH_DEBUG=1 shows where", 1)
    sys.exit(code)


def _fail(error: str, hint: str, code: int) -> int:
    if os.environ.get("SBRUSH_DEBUG") == "1":
        traceback.print_exc()
    say(f"error: {printable(error)}")
    say(f"hint: {printable(hint)}")
    return code


def _no_prompts(path: Path) -> None:
    what = "is a folder, not a prompt file" if path.is_dir() else "does not exist"
    hint = "a prompt file is UTF-8 text, one prompt a line; prompts/stickers.txt is one"
    raise SbrushError(f"{path} {what}", hint, code=2)


def _same_command() -> str:
    import shlex

    return printable(shlex.join(["sbrush", *sys.argv[1:]]))


def _print_recipes(recipe: Recipe) -> None:
    """The recipes side by side, and this run's beside them."""
    from rich.console import Console
    from rich.table import Table

    table = Table("setting", *RECIPES, "this run", title=None, box=None)
    for field in dataclasses.fields(Recipe):
        table.add_row(
            field.name, *(str(getattr(r, field.name)) for r in RECIPES.values()), str(getattr(recipe, field.name))
        )
    Console(markup=False, highlight=False).print(table)


if __name__ == "__main__":
    main()

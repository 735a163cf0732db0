"""The training step against the baseline and against the roofline, in one run.  `make bench`

The baseline is the official script's structure: four separate score calls (teacher and LoRA teacher, prompt
and empty prompt), autocast over float32 weights, default memory layout, torch's fused attention, nothing compiled. All
train the same networks on the same prompts. On the built-in teacher they take turns, so that a noisy machine slows all;
networks of full size are built and measured one after another, since a card may not hold two.

The roofline: the FLOPs of the forwards that a step must run, each backward as two, over the rate of the matrix products
that the same device does in the same run; and the bytes that Adam and the average must move, over its rate of copies.

    python -m sbrush.benchmarks.training                             the built-in teacher
    python -m sbrush.benchmarks.training --size sd21 --minutes 6     SD 2.1's size, random weights, on a GPU
    python -m sbrush.benchmarks.training --size sd21 --cards         the options for each size of card
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any, ClassVar

import torch
import typer
from accelerate import Accelerator
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor

from sbrush import core
from sbrush.benchmarks import full_size
from sbrush.benchmarks.roofline import Rates, Roofline, seconds
from sbrush.console import info, out, out_json
from sbrush.core import Conditioning
from sbrush.device import pick_device, trains_in_bf16
from sbrush.models.load import load_teacher
from sbrush.prompts import ShuffledPrompts, make_prompts
from sbrush.stickers.world import all_captions
from sbrush.training.cost import GIB, Cost, estimate
from sbrush.training.methods.method import Machine
from sbrush.training.methods.rehearsal import forwards
from sbrush.training.methods.teachers import Teachers
from sbrush.training.methods.vsd import VSD
from sbrush.training.recipes import RECIPES, Recipe
from sbrush.training.request import ExecutionOptions

BASELINE = "baseline: four score calls"


class SeparateTeachers(Teachers):
    """With and without the prompt, each in a forward of its own."""

    def guided(self, x_t: Tensor, t: Tensor, cond: Conditioning, null: Conditioning, scale: float | Tensor) -> Tensor:
        """The guided noise prediction of whoever answers, [b, C, H, W]."""

        def eps(conditioning: Conditioning) -> Tensor:
            output = self.denoise(x_t, t, conditioning)
            return core.to_epsilon(output, x_t, t, self.schedule, self.prediction)

        null = {name: value.expand_as(cond[name]) for name, value in null.items()}
        return core.guide(eps(cond), eps(null), scale)


class BaselineVSD(VSD):
    """The same maths without batched score calls and without a memory layout chosen for speed."""

    asked: ClassVar[type[Teachers]] = SeparateTeachers

    @staticmethod
    def layout(device: str) -> torch.memory_format:
        """torch's default, whatever the device."""
        return torch.contiguous_format

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.teacher.unet.float()
        for unet in (self.student, self.teacher.unet):
            unet.set_attn_processor(AttnProcessor2_0())


@dataclasses.dataclass(frozen=True)
class Contender:
    """A way to take the step."""

    recipe: Recipe
    kind: type[VSD] = VSD
    execution: ExecutionOptions = dataclasses.field(default_factory=ExecutionOptions)


def contenders(batch: int, *, built_in: bool, compiled: bool, student_rank: int = 0) -> dict[str, Contender]:
    """By name; the first is the baseline."""
    paper = dataclasses.replace(RECIPES["swiftbrush"], batch=batch, student_rank=student_rank)
    shared = dataclasses.replace(paper, guide_lora=False, shared_forward=True)
    found = {BASELINE: Contender(paper, BaselineVSD), "sbrush": Contender(paper)}
    found["sbrush, one LoRA forward"] = Contender(shared)
    found["the same, 4 student steps"] = Contender(dataclasses.replace(shared, student_steps=4))
    if built_in:
        found["sbrush, stickers recipe"] = Contender(dataclasses.replace(RECIPES["stickers"], batch=batch))
    if compiled:  # last: compiling takes minutes
        found["sbrush --compile"] = Contender(paper, execution=ExecutionOptions(compile="inductor"))
        found["one LoRA forward, --compile"] = Contender(shared, execution=ExecutionOptions(compile="inductor"))
    return found


def by_card(batch: int) -> dict[str, Contender]:
    """What each size of card takes (docs/distilling.md), with the paper's loss."""
    paper = dataclasses.replace(RECIPES["swiftbrush"], batch=batch)
    lora, adam8 = dataclasses.replace(paper, student_rank=256), dataclasses.replace(paper, optimizer="adam8bit")
    return {
        "12 GB": Contender(lora, execution=ExecutionOptions(checkpointing=True, micro_batches=4)),
        "12 GB, tighter": Contender(
            dataclasses.replace(lora, optimizer="adam8bit"),
            execution=ExecutionOptions(checkpointing=True, micro_batches=8),
        ),
        "16 GB": Contender(adam8, execution=ExecutionOptions(checkpointing=True, micro_batches=4, ema_on_cpu=True)),
        "24 GB": Contender(paper, execution=ExecutionOptions(checkpointing=True, micro_batches=4, ema_on_cpu=True)),
        "40 GB": Contender(paper, execution=ExecutionOptions(micro_batches=4)),
        "80 GB": Contender(paper),
    }


def measure(
    ways: dict[str, Callable[[], Callable[[int], object]]],
    device: str,
    *,
    turns: int,
    steps: int,
    at_once: bool,
    until: float,
    report: Callable[[str, list[float]], None],
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, dict[str, Any]]:
    """Seconds a step of each way, by turn, and the most memory that it held; what there is no time for is left out.

    `ways`: each makes a step of its own, which takes the step's number; the first turn, which warms up, is apart.
    `at_once`: all ways are made first and take turns. `until`: the time, by `clock`, after which no turn starts.
    `report` is called with each way's name and times after each of its turns.
    """
    found: dict[str, dict[str, Any]] = {}
    for group in [list(ways)] if at_once else [[name] for name in ways]:
        if clock() >= until:
            break
        # In a function of its own, so that nothing of one group is still held while the next is built.
        found |= _take_turns(
            {name: ways[name] for name in group}, device, turns=turns, steps=steps, in_time=lambda: clock() < until,
            report=report,
        )  # fmt: skip
        gc.collect()
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
    return {name: row for name, row in found.items() if row["step"]}


def _take_turns(
    ways: dict[str, Callable[[], Callable[[int], object]]],
    device: str,
    *,
    turns: int,
    steps: int,
    in_time: Callable[[], bool],
    report: Callable[[str, list[float]], None],
) -> dict[str, dict[str, Any]]:
    """Seconds a step of ways that take turns, see `measure`; the peak memory of one that is alone."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    made, found = {name: way() for name, way in ways.items()}, dict[str, dict[str, Any]]()
    for turn in range(-1, turns):
        for name, step in made.items():
            if not in_time():
                return found
            first = 1 + (turn + 1) * steps

            def some(step: Callable[[int], object] = step, first: int = first) -> None:
                for number in range(first, first + steps):
                    step(number)

            taken = seconds(some, device) / steps
            if turn < 0:
                found[name] = {"warm_up": taken * steps, "step": []}
                continue
            found[name]["step"].append(taken)
            if device.startswith("cuda") and len(made) == 1:
                found[name]["peak"] = torch.cuda.max_memory_allocated()
            report(name, found[name]["step"])
    return found


def rows(
    measured: dict[str, dict[str, Any]], chosen: dict[str, Contender], costs: dict[str, Cost], bf16: bool, rates: Rates
) -> dict[str, dict[str, Any]]:
    """What is reported of each contender that was measured."""
    found = {}
    for name, row in measured.items():
        recipe, cost = chosen[name].recipe, costs[name]
        roofline = Roofline.of_step(
            recipe, cost.flops, trained=cost.parameters["student, trained"], lora=cost.parameters["LoRA teacher"],
            bf16=bf16, rates=rates,
        )  # fmt: skip
        taken = statistics.median(row["step"])
        ratios = [p / t for p, t in zip(measured.get(BASELINE, {}).get("step", ()), row["step"], strict=False)]
        found[name] = {
            "images_per_second": recipe.batch / taken,
            "forwards_per_image": forwards(recipe),
            "times_baseline": statistics.median(ratios) if ratios else None,
            "matrix_rate_share": roofline.compute / taken,
            "roofline_fraction": roofline.seconds / taken,
            "bytes_add": roofline.moving / roofline.compute,
            "peak_gib": row["peak"] / GIB if "peak" in row else None,
            "expected_peak_gib": cost.peak / GIB,
            "warm_up_seconds": row["warm_up"],
        }
    return found


def main(
    size: Annotated[full_size.Size | None, typer.Option(help="Random weights of this size. Default: built in.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Folder or Hub id, in place of both.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
    batch: Annotated[int, typer.Option(help="Images per training step.", min=1)] = 16,
    student_lora: Annotated[int, typer.Option(help="Rank of a LoRA student; 0: a full copy.", min=0)] = 0,
    only: Annotated[list[str] | None, typer.Option(help="Measure this contender alone; may be repeated.")] = None,
    turns: Annotated[int, typer.Option(help="Turns of each contender.", min=1)] = 5,
    steps: Annotated[int, typer.Option(help="Training steps in a turn.", min=1)] = 3,
    minutes: Annotated[float, typer.Option(help="Minutes after which no turn starts.", min=0)] = 60,
    cards: Annotated[bool, typer.Option(help="Measure the options for each size of card in place of these.")] = False,
    compiled: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Measure torch.compile too. Default: on CUDA.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Images/s of sbrush's training step and of the baseline, and their fraction of the roofline."""
    until = time.monotonic() + 60 * minutes
    where = pick_device(device)
    bf16 = trains_in_bf16("auto", where)
    built_in = size is None and teacher is None
    compiled = where != "cpu" if compiled is None else compiled
    chosen = contenders(batch, built_in=built_in, compiled=compiled, student_rank=student_lora)
    if cards:
        chosen = by_card(batch)
    if only:
        if unknown := set(only) - chosen.keys():
            raise typer.BadParameter(f"{', '.join(unknown)}; there are {', '.join(chosen)}")
        chosen = {name: chosen[name] for name in only}
    prompts = ShuffledPrompts(make_prompts((c.text for c in all_captions()), "stickers"), 0)
    rates = Rates.measure(where, torch.bfloat16 if bf16 else torch.float32)
    name = torch.cuda.get_device_name() if where != "cpu" else f"CPU, {torch.get_num_threads()} threads"
    about = f"{name}, batch {batch}, {'bf16' if bf16 else 'float32'}, torch {torch.__version__}"
    info(f"{about}: matrix products {rates.matrix / 1e12:.3g} TFLOP/s, copies {rates.copy / 1e9:.3g} GB/s")
    with full_size.or_made(teacher, size) as source:
        estimates = {
            (one.recipe, one.execution): estimate(source, one.recipe, one.execution, Machine(where, bf16))
            for one in chosen.values()
        }
        costs = {name: estimates[one.recipe, one.execution] for name, one in chosen.items()}

        def way(one: Contender) -> Callable[[int], object]:
            # One for each: an accelerator holds what it has prepared, whoever else has let go of it.
            accelerator = Accelerator(cpu=where == "cpu", mixed_precision="bf16" if bf16 else "no")
            made = one.kind(load_teacher(source), one.recipe, seed=0, accelerator=accelerator, execution=one.execution)
            return lambda step: made.step(step, prompts)

        measured = measure(
            {name: lambda one=one: way(one) for name, one in chosen.items()},  # type: ignore[misc]
            where, turns=turns, steps=steps, at_once=built_in, until=until,
            report=lambda name, taken: info(f"{name:28} turn {len(taken)}: {batch / taken[-1]:.3g} images/s"),
        )  # fmt: skip
    found = rows(measured, chosen, costs, bf16, rates)
    if json_:
        out_json(
            {
                "device": name, "batch": batch, "bf16": bf16, "torch": torch.__version__,
                "size": size or teacher, "student_lora": student_lora,
                "matrix_tflops": rates.matrix / 1e12, "copy_gb_per_second": rates.copy / 1e9, "rows": found,
            }
        )  # fmt: skip
        return
    out(about)
    out(f"matrix products {rates.matrix / 1e12:.3g} TFLOP/s, copies {rates.copy / 1e9:.3g} GB/s")
    for name, row in found.items():
        times = f"{row['times_baseline']:.2f} x baseline" if row["times_baseline"] else ""
        peak = f"   peak {row['peak_gib']:.1f} GiB (expected {row['expected_peak_gib']:.1f})" if row["peak_gib"] else ""
        out(
            f"{name:28} {row['images_per_second']:8.2f} images/s   {row['forwards_per_image']:g} UNet forwards"
            f"   {100 * row['matrix_rate_share']:.0f} % of the matrix rate,"
            f" {100 * row['roofline_fraction']:.0f} % of the roofline"
            f" (bytes add {100 * row['bytes_add']:.0f} %)   {times}{peak}"
        )
    for name in chosen.keys() - found.keys():
        out(f"{name:28} not measured: out of time")


if __name__ == "__main__":
    typer.run(main)

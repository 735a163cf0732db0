"""The training step against the plain formulation, side by side in one run.  `make bench`

The plain formulation is the official script's structure: four separate score calls (teacher and LoRA teacher, prompt
and empty prompt), autocast over float32 weights, default memory layout, torch's fused attention. Both train the same
networks on the same prompts; they take turns, so that a noisy machine slows both. Printed: pictures/s, UNet forwards a
picture, the ratio.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Annotated

import torch
import typer
from accelerate import Accelerator
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor

from sbrush import core
from sbrush.console import out, out_json
from sbrush.core import Words
from sbrush.device import pick_device, trains_in_bf16
from sbrush.distiller import Distiller
from sbrush.models.load import load_teacher
from sbrush.prompts import ShuffledPrompts, make_prompts
from sbrush.recipes import RECIPES
from sbrush.stickers.world import all_captions

TURNS, STEPS = 5, 3


class PlainDistiller(Distiller):
    """The same maths without batched score calls and without a memory layout chosen for speed."""

    memory_format = torch.contiguous_format

    def _guided(self, x_t: Tensor, t: Tensor, cond: Words, scale: float | Tensor) -> Tensor:
        def eps(words: Words) -> Tensor:
            return core.to_epsilon(self._denoise(x_t, t, words), x_t, t, self.schedule, self.prediction)

        null = {name: value.expand_as(cond[name]) for name, value in self._null.items()}
        return core.guide(eps(cond), eps(null), scale)


def main(
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
    batch: Annotated[int, typer.Option(help="Pictures an update.", min=1)] = 16,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Pictures/s of sbrush's step, of the paper's recipe and the built-in one, and of the plain formulation."""
    where = pick_device(device)
    prompts = ShuffledPrompts(make_prompts((c.text for c in all_captions()), "stickers"), 0)
    paper = dataclasses.replace(RECIPES["swiftbrush"], lora_targets="all", batch=batch)  # as many LoRA layers as ours
    bf16 = "bf16" if trains_in_bf16("auto", where) else "no"
    accelerator = Accelerator(cpu=where == "cpu", mixed_precision=bf16)
    contenders = {
        "plain (four score calls)": PlainDistiller(load_teacher(), paper, seed=0, accelerator=accelerator),
        "sbrush, swiftbrush loss": Distiller(load_teacher(), paper, seed=0, accelerator=accelerator),
        "sbrush, stickers recipe": Distiller(
            load_teacher(), dataclasses.replace(RECIPES["stickers"], batch=batch), seed=0, accelerator=accelerator
        ),
    }
    plain = contenders["plain (four score calls)"]
    plain.teacher.unet.float()
    for unet in (plain.student, plain.teacher.unet):
        unet.set_attn_processor(AttnProcessor2_0())
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(-1, TURNS):  # the first turn warms up
        for name, distiller in contenders.items():
            start = time.perf_counter()
            for step in range(STEPS):
                distiller.step(1 + (turn + 1) * STEPS + step, prompts)
            if where != "cpu":
                torch.cuda.synchronize()
            if turn >= 0:
                times[name].append((time.perf_counter() - start) / STEPS)
    base = times["plain (four score calls)"]
    rows = {
        name: {
            "pictures_per_second": round(batch / statistics.median(taken), 2),
            "forwards_per_picture": distiller.recipe.forwards,
            "times_plain": round(statistics.median(b / t for b, t in zip(base, taken, strict=True)), 2),
        }
        for (name, distiller), taken in zip(contenders.items(), times.values(), strict=True)
    }
    if json_:
        out_json({"device": where, "batch": batch, "bf16": bf16, "torch": torch.__version__, "rows": rows})
        return
    threads = torch.get_num_threads()
    out(f"{where}, batch {batch}, mixed precision {bf16}, torch {torch.__version__}, {threads} threads")
    for name, row in rows.items():
        rate, forwards, ratio = row.values()
        out(f"{name:26} {rate:8.2f} pictures/s   {forwards:g} UNet forwards a picture   {ratio:.2f} x plain")


if __name__ == "__main__":
    typer.run(main)

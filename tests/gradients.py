"""Every gradient that the optimisers see in one step, of each way to take it, written by the first process. Its file is
named for the number of processes; see test_distill.py."""

import dataclasses
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from sbrush.models.load import load_teacher
from sbrush.prompts import ShuffledPrompts, make_prompts
from sbrush.training.methods.vsd import VSD
from sbrush.training.recipes import RECIPES
from sbrush.training.request import ExecutionOptions

PAPER = dataclasses.replace(RECIPES["swiftbrush"], batch=4, lora_rank=4, lora_alpha=4, clip=1e9)
WAYS = {
    "full": (PAPER, ExecutionOptions()),
    "micro-batches": (PAPER, ExecutionOptions(micro_batches=2)),
    "checkpointing": (PAPER, ExecutionOptions(checkpointing=True)),
    "lora": (dataclasses.replace(PAPER, student_rank=3), ExecutionOptions(micro_batches=2)),
    "shared": (dataclasses.replace(PAPER, guide_lora=False, shared_forward=True, lora_updates=2), ExecutionOptions()),
}


def main(teacher: str, out: Path) -> None:
    accelerator, seen = Accelerator(cpu=True), {}
    for way, (recipe, execution) in WAYS.items():
        made = VSD(load_teacher(teacher), recipe, seed=3, accelerator=accelerator, execution=execution)
        torch.manual_seed(1)
        for _, parameter in sorted(made.lora.items()):
            parameter.data.normal_()  # far from the teacher: what is compared is no mere rounding
        for whose, adam in (("student", made.student_optimizer), ("lora", made.lora_optimizer)):

            def note(whose=whose, parameters=tuple(adam.param_groups[0]["params"]), way=way):
                key = f"{way}, {whose} {sum(name.startswith(f'{way}, {whose}') for name in seen)}"
                seen[key] = torch.cat([p.grad.flatten().clone() for p in parameters])

            adam.step = note
        made.step(1, ShuffledPrompts(make_prompts(["a cat", "a dog", "a red fish"], "three"), 3))
    if accelerator.is_main_process:
        save_file(seen, out / f"{accelerator.num_processes}.safetensors")
    accelerator.wait_for_everyone()

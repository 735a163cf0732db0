"""Run by torchrun in two processes: one step is not finite in the second process alone; see test_health.py."""

import dataclasses
import math
import sys

import torch
from accelerate import Accelerator

from sbrush.models.load import load_teacher
from sbrush.prompts import ShuffledPrompts, make_prompts
from sbrush.training.methods.vsd import VSD
from sbrush.training.recipes import RECIPES

accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
recipe = dataclasses.replace(RECIPES["swiftbrush"], batch=4, student_lr=1e-3, lora_rank=4, lora_alpha=4)
distiller = VSD(load_teacher(sys.argv[1]), recipe, seed=3, accelerator=accelerator)
order, step = ShuffledPrompts(make_prompts(["a cat", "a dog"], "two"), 3), 0
distiller.student.conv_out.register_forward_hook(
    lambda module, given, out: out * math.nan if step == 2 and accelerator.process_index == 1 else out
)


def student():
    return torch.cat([p.detach().flatten() for p in distiller.student.parameters()])


seen = []
for step in (1, 2, 3):
    before = student().clone()
    skipped = distiller.step(step, order)["skipped"].item()
    seen.append((skipped, torch.equal(before, student())))
everywhere = accelerator.gather(student()[None])
assert torch.equal(everywhere[0], everywhere[1]) and everywhere.isfinite().all()
print(f"process {accelerator.process_index}: {seen}", flush=True)

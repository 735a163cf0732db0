"""What two training steps at Stable Diffusion's size hold in memory at most, beside what `--dry-run` tells beforehand.

    MALLOC_MMAP_THRESHOLD_=65536 MALLOC_ARENA_MAX=1 python tests/peak.py sd21 FOLDER

Without these variables glibc keeps much of what is freed, and the figure is glibc's. Prints JSON, GiB; Linux, CPU.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from accelerate import Accelerator

from sbrush.benchmarks.full_size import make
from sbrush.models.load import load_teacher
from sbrush.prompts import ShuffledPrompts, make_prompts
from sbrush.training.cost import GIB, estimate
from sbrush.training.methods.vsd import VSD
from sbrush.training.recipes import RECIPES
from sbrush.training.request import ExecutionOptions

RECIPE = dataclasses.replace(RECIPES["swiftbrush"], steps=2, batch=1, student_rank=64)
FIT = ExecutionOptions(checkpointing=True)


def held(kind: str) -> float:
    """GiB of this process: VmRSS now, or VmHWM at most."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[kind].split()[0]) * 1024 / GIB


def main(name: str, folder: Path) -> None:
    teacher = folder if (folder / "model_index.json").exists() else make(name, folder)
    told = estimate(str(teacher), RECIPE, FIT).peak / GIB
    imports = held("VmRSS")
    made = VSD(load_teacher(str(teacher)), RECIPE, seed=0, accelerator=Accelerator(cpu=True), execution=FIT)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of reading float16 files is not training's
    for step in (1, 2):
        made.step(step, ShuffledPrompts(make_prompts(["a cat", "a dog"], "two"), 0))
    print(json.dumps({"told": round(told, 3), "measured": round(held("VmHWM") - imports, 3)}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

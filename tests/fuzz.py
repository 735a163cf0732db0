"""Damages folders that sbrush reads, one file at a time, and looks what it makes of them.  `make fuzz`

Model folders are sampled from; run folders (config.json, log, checkpoints, what the teacher is like) are resumed. The
damage: bytes flipped, files cut, emptied or gone, JSON keys missing, extra or of another kind, tensors missing, of
another shape or of NaN, with the checksum put right so that it looks genuine. What may come of it is a refusal in
one line (SbrushError) or a result that is whole; not another exception, a hang, or half a file.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from conftest import build_tiny_teacher
from sbrush.console import SbrushError
from sbrush.prompts import make_prompts
from sbrush.sampling.files import SampleRequest, sample_to_files
from sbrush.sampling.targets import Images, Target
from sbrush.training.loop import distill
from sbrush.training.plan import prepare
from sbrush.training.recipes import RECIPES
from sbrush.training.request import Intervals, RunRequest

SECONDS = 60  # for one case
ODD = [None, True, -1, 0, 1, 3, 10**9, 1e30, -0.5, float("nan"), "", "x", "../../x", "\x1b[2J", [], [[]], {}, {"a": 1}]
RECIPE = dataclasses.replace(RECIPES["swiftbrush"], batch=2, lora_rank=4, lora_alpha=4, steps=4)


def flip(file, chance):
    data = bytearray(file.read_bytes())
    for _ in range(chance.choice((1, 8, 64))):
        data[chance.randrange(min(len(data), chance.choice((400, len(data)))))] ^= 1 << chance.randrange(8)
    file.write_bytes(data)


def cut(file, chance):
    data = file.read_bytes()
    file.write_bytes(data[: chance.choice((0, 1, len(data) // 2, len(data) - 1))])


def remove(file, chance):
    file.unlink()


def become_a_folder(file, chance):
    file.unlink()
    file.mkdir()


def change_json(file, chance):
    """A key gone, one more, or a value of another kind, at any depth; now and then the whole."""
    data = json.loads(file.read_text(encoding="utf-8").splitlines()[0] if file.suffix == ".jsonl" else file.read_text())
    place = data
    while isinstance(place, dict) and place:
        key = chance.choice(list(place))
        if isinstance(place[key], dict) and place[key] and chance.random() < 0.7:
            place = place[key]
            continue
        what = chance.random()
        if what < 0.3:
            del place[key]
        elif what < 0.4:
            place[f"{key}_too"] = chance.choice(ODD)
        else:
            place[key] = chance.choice(ODD)
        break
    file.write_text(json.dumps(chance.choice(ODD) if chance.random() < 0.05 else data), encoding="utf-8")


def change_tensors(file, chance):
    """A tensor gone, one more, of another shape or dtype, or of values that are no numbers; the checksum is renewed."""
    tensors = load_file(file)
    name = chance.choice(list(tensors))
    tensor = tensors[name]
    what = chance.randrange(6)
    if what == 0:
        del tensors[name]
    elif what == 1:
        tensors["extra.weight"] = torch.zeros(3)
    elif what == 2:
        tensors[name] = torch.zeros([*tensor.shape, 2])
    elif what == 3:
        tensors[name] = torch.zeros(1)
    elif what == 4:
        tensors[name] = torch.full_like(tensor.float(), chance.choice((float("nan"), float("inf"), 1e30)))
    else:
        tensors[name] = torch.zeros(tensor.shape, dtype=torch.int64)
    save_file(tensors, file, metadata={"format": "pt"})
    state = file.with_name("state.json")
    if state.is_file():
        about = json.loads(state.read_text())
        about["sha256"][file.stem] = hashlib.sha256(file.read_bytes()).hexdigest()
        state.write_text(json.dumps(about))


def damage(folder: Path, chance) -> str:
    """Damages one file of the folder; what was done."""
    files = sorted(
        f for f in folder.rglob("*") if f.is_file() and f.suffix in (".json", ".jsonl", ".safetensors", ".txt")
    )
    file = chance.choice(files)
    kinds = [flip, cut, remove, become_a_folder]
    if file.suffix in (".json", ".jsonl"):
        kinds += [change_json] * 8
    if file.suffix == ".safetensors":
        kinds += [change_tensors] * 8
    kind = chance.choice(kinds)
    kind(file, chance)
    return f"{kind.__name__} {file.relative_to(folder)}"


def sample(student: Path, work: Path) -> None:
    out = work / "out.png"
    list(sample_to_files(SampleRequest(Images(["a cat"], [0]), Target(out), student=str(student))))
    with Image.open(out) as image:
        image.load()


def resume(out: Path, teacher: Path) -> None:
    plan = prepare(RunRequest(
        RECIPE, make_prompts(["a cat", "a dog"], "two"), out=out, teacher=str(teacher), seed=3, device="cpu",
        precision="float32", every=Intervals(log=1, grid=4, checkpoint=1),
    ))  # fmt: skip
    plan = dataclasses.replace(plan, run=dataclasses.replace(plan.run, teacher_steps=2))
    assert distill(plan)
    load_file(out / "student" / "unet" / "diffusion_pytorch_model.safetensors")


def no_half_files(folder: Path) -> None:
    left = [str(f) for f in folder.rglob("*partial*")]
    assert not left, f"left behind: {left}"


def fuzz(folder: Path, cases: int, seed: int = 0) -> Counter:
    """Raises on the first case that ends otherwise than it may. How many were refused, and how many did no harm."""
    teacher = build_tiny_teacher(folder / "teacher")
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        resume(folder / "run", teacher)
        shutil.rmtree(folder / "run" / "student")  # killed before it was exported
        shutil.rmtree(folder / "run" / "checkpoints" / "step-000004")
    outcomes: Counter = Counter()
    for case in range(cases):
        chance, work = random.Random(f"{seed} {case}"), folder / f"case-{case}"
        of_a_run = case % 2
        shutil.copytree(folder / "run" if of_a_run else teacher, work / "subject")
        what = damage(work / "subject", chance)
        signal.alarm(SECONDS)
        try:
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
                resume(work / "subject", teacher) if of_a_run else sample(work / "subject", work)
            outcome = "no harm"
        except SbrushError as refusal:
            assert refusal.hint and "\n" not in str(refusal), f"case {case}, {what}: {refusal!r}"
            outcome = "refused"
        except BaseException as problem:
            raise AssertionError(f"case {case}, seed {seed}, {what}: {type(problem).__name__}: {problem}") from problem
        finally:
            signal.alarm(0)
        no_half_files(work)
        outcomes[outcome] += 1
        shutil.rmtree(work)
    return outcomes


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("cases", type=int, nargs="?", default=500)
    arguments.add_argument("--seed", type=int, default=0)
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        result = fuzz(Path(temporary), given.cases, given.seed)
    print(f"{given.cases} damaged folders: " + ", ".join(f"{n} {what}" for what, n in result.items()))
    sys.exit(0)

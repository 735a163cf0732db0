"""Kills a run again and again until it is complete, and compares it with one that nobody disturbed.  `make kill`

A run dies by SIGKILL at a random call of a random function, Python's own and the libraries' included; half of the kills
are aimed at the places that write or move state (checkpoint, average, files, the run's folder, the optimisers' update).
Some die after a random time instead, so that one may fall inside a single write. The same call resumes it. In the end
the student, and the last checkpoint with both optimisers in it, must be the same bit for bit, and the log as well.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from conftest import build_tiny_teacher
from sbrush.prompts import make_prompts
from sbrush.training.loop import distill
from sbrush.training.plan import prepare
from sbrush.training.recipes import RECIPES
from sbrush.training.request import Intervals, RunRequest

STEPS, EVERY = 12, Intervals(log=2, grid=6, checkpoint=3)
RECIPE = dataclasses.replace(
    RECIPES["swiftbrush"], steps=STEPS, batch=2, student_lr=1e-3, lora_lr=1e-2, lora_rank=4, lora_alpha=4, ema=0.9,
    cooldown=0.5,
)  # fmt: skip
PROMPTS = make_prompts(["a cat", "a dog", "a red fish"], "three")
CRITICAL = ("checkpoint.py", "ema.py", "files.py", "run.py", "export.py", "adam.py", "clip_grad.py", "shutil.py")


def run(out: Path, teacher: Path) -> None:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        plan = prepare(RunRequest(
            RECIPE, PROMPTS, out=out, teacher=str(teacher), seed=3, device="cpu", precision="float32",
            every=EVERY,
        ))  # fmt: skip
        distill(dataclasses.replace(plan, run=dataclasses.replace(plan.run, teacher_steps=2)))


def count_calls(work, *, critical: bool, until: int | None = None) -> int:
    """Calls `work` and counts the function calls that it makes; at call number `until` the process kills itself."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        if critical and not frame.f_code.co_filename.endswith(CRITICAL):
            return
        calls += 1
        if calls == until:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls


def in_a_child(work, *, seconds: float | None = None) -> bool:
    """Calls `work` in a forked process, killed after `seconds` if they are given; whether it came to its end."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise AssertionError("a run that was resumed failed")
    return os.WIFEXITED(status)


def state(out: Path) -> tuple[dict, dict, list]:
    """A complete run's student, last state, and logged values that do not hold times."""
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in entry.items() if k not in ("time", "images_per_second")} for entry in log]
    student = load_file(out / "student" / "unet" / "diffusion_pytorch_model.safetensors")
    parts = sorted((out / "checkpoints" / f"step-{STEPS:06d}").glob("*.safetensors"))
    return student, {f"{part.stem}.{k}": v for part in parts for k, v in load_file(part).items()}, kept


def torture(folder: Path, kills: int, seed: int = 0) -> str:
    """Raises AssertionError if a killed run ends otherwise than an undisturbed one. A sentence on what was done."""
    torch.set_num_threads(1)  # a forked process has no other threads to wait for
    teacher, chance = build_tiny_teacher(folder / "teacher"), random.Random(seed)
    report = folder / "calls.json"

    def undisturbed() -> None:
        calls = count_calls(lambda: run(folder / "whole", teacher), critical=False)
        critical = count_calls(lambda: run(folder / "again", teacher), critical=True)
        start = time.monotonic()
        run(folder / "timed", teacher)
        report.write_text(json.dumps([calls, critical, time.monotonic() - start]))

    assert in_a_child(undisturbed)
    calls, critical_calls, seconds = json.loads(report.read_text())
    expected, done, runs, places = state(folder / "whole"), 0, 0, [0, 0, 0]
    while done < kills:
        out, complete = folder / f"killed-{runs}", False
        runs += 1
        while not complete:
            kind = chance.choices((0, 1, 2), (4, 4, 2))[0] if done < kills else 3
            if kind == 2:
                complete = in_a_child(lambda o=out: run(o, teacher), seconds=chance.uniform(0.1, 1) * seconds)
            elif kind == 3:
                complete = in_a_child(lambda o=out: run(o, teacher))
            else:
                at = chance.randint(1, (calls, critical_calls)[kind])
                complete = in_a_child(
                    lambda o=out, at=at, k=kind: count_calls(lambda: run(o, teacher), critical=k == 1, until=at)
                )
            if not complete:
                done, places = done + 1, [n + (i == kind) for i, n in enumerate(places)]
        student, last, log = state(out)
        for theirs, ours in ((expected[0], student), (expected[1], last)):
            assert theirs.keys() == ours.keys()
            unequal = [name for name in theirs if not torch.equal(theirs[name], ours[name])]
            assert not unequal, f"{out.name} differs from the undisturbed run in {unequal[:3]}"
        assert log == expected[2], f"{out.name} has another log"
    where = f"{places[0]} anywhere, {places[1]} where state is written, {places[2]} by the clock"
    return f"{runs} runs, killed {done} times ({where}), ended bit for bit as one that was not disturbed"


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("kills", type=int, nargs="?", default=50)
    arguments.add_argument("--seed", type=int, default=0)
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        print(torture(Path(temporary), given.kills, given.seed))

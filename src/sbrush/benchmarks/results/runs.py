"""Training what the table needs: how many steps a budget buys, and a run folder for each row, budget and seed.

WORK/forwards-1800/ROW/seed-0/                       a run of `sbrush distill`
WORK/forwards-1800/ROW/seed-0.log                    what it said
WORK/forwards-1800/ROW/seed-0.figures/protocol-...   what was measured of its student
WORK/minutes-like-swiftbrush/ROW/...                 the same, for as many minutes as that row takes
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from sbrush.benchmarks.results.rows import Row
from sbrush.console import SbrushError, printable
from sbrush.models.parts import read_json
from sbrush.training.cost import Monitoring, Prepared, estimate
from sbrush.training.methods import METHODS
from sbrush.training.recipes import Recipe
from sbrush.training.request import ExecutionOptions
from sbrush.training.run import read_log

BATCH = 32  # images: the budget counts UNet forwards of so many


@dataclass(frozen=True)
class Budget:
    """What each row may spend: UNet forwards of a batch of BATCH, or, if that is None, seconds of training."""

    name: str  # of its folder
    forwards: float | None = None


@dataclass(frozen=True)
class Job:
    """A student to be trained and measured: a row, a seed, and what it may spend."""

    row: Row
    budget: Budget
    seed: int
    steps: int
    run: Path

    @property
    def figures(self) -> Path:
        """The folder of what is measured of it."""
        return self.run.with_name(f"{self.run.name}.figures")

    @property
    def log(self) -> Path:
        """What its training has said."""
        return self.run.with_name(f"{self.run.name}.log")

    @property
    def trained(self) -> bool:
        """Whether its student is there, of exactly these settings."""
        return (
            all(_is_student_of(self.run / folder, part) for folder, part in self.row.parts(self.steps).items())
            and (self.run / "student" / "sbrush.json").is_file()
        )

    @property
    def share_done(self) -> float:
        """The share of its training that is done, as its logs have it."""
        folders = self.row.parts()
        done = [log[-1]["step"] if (log := read_log(self.run / folder)) else 0 for folder in folders]
        return min(1.0, sum(done) / (len(folders) * self.steps))

    @property
    def seconds(self) -> float:
        """What its training took, by its logs: without loading, exporting and what was lost by a kill.

        The images that it learns from, if any, are taken to cost what as many forwards of its steps do.
        """
        logged = sum(seconds_of(self.run / folder, part.batch) for folder, part in self.row.parts().items())
        return logged * (1 + forwards_before(self.row) / (self.steps * forwards_a_step(self.row)))

    def train(self, prompts: Path, *, threads: int) -> None:
        """Trains it to its end, from where it stopped. SbrushError, which names its log, if that fails."""
        settings = [word for setting in self.row.settings for word in ("--set", setting)]
        distil(
            [
                str(prompts), "--recipe", self.row.recipe, "--out", str(self.run), "--steps", str(self.steps),
                "--seed", str(self.seed), "--grid-every", "0", "--checkpoint-every", "50", *settings,
            ],
            self.log, threads=threads,
        )  # fmt: skip


_running: set[subprocess.Popen[bytes]] = set()


def distil(arguments: Sequence[str], log: Path, *, threads: int = 1) -> None:
    """`sbrush distill ARGUMENTS` as a process of its own, its output in `log`; SbrushError if it fails.

    A Ctrl-C does not reach it: `workers` ends it, so that it is asked once and saves its step.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "sbrush", "distill", *arguments], stdout=output, stderr=output,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)}, start_new_session=True,
        )  # fmt: skip
        _running.add(process)
        try:
            code = process.wait()
        finally:
            _running.discard(process)
    if code:
        raise SbrushError(f"training failed with exit code {code}", f"see {printable(log)}")


@contextmanager
def workers(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads in which trainings run. If this ends by an exception, no other starts, and they save their step."""
    pool = ThreadPoolExecutor(count)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(_running):
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True)


@cache
def forwards(recipe: Recipe) -> float:
    """UNet forwards that a step takes, for an image of its batch, a backward counted as two: as --dry-run has it."""
    return estimate(None, recipe, ExecutionOptions(), monitoring=Monitoring(grids=False)).forwards


def forwards_a_step(row: Row) -> float:
    """UNet forwards of a batch of BATCH that one step of each of a row's trainings takes."""
    return sum(forwards(part) * part.batch / BATCH for part in row.parts().values())


def trains_lora_teacher(row: Row) -> bool:
    """Whether a row's trainings, or one of them, have a LoRA teacher."""
    return any("lora_loss" in METHODS[part.method].metrics and part.gap != "sds" for part in row.parts().values())


def steps_within(row: Row, budget: float) -> int:
    """How many steps of each of a row's trainings a budget of UNet forwards of a batch of BATCH buys: 1 at least."""
    return max(1, round((budget - forwards_before(row)) / forwards_a_step(row)))


def forwards_before(row: Row) -> float:
    """UNet forwards of a batch of BATCH before the first step: of the teacher, whose images some learn from."""
    return sum(_forwards_for_images(part) for part in row.parts().values())


@cache
def _forwards_for_images(recipe: Recipe) -> float:
    if not METHODS[recipe.method].from_images:
        return 0.0
    prepared = Prepared(images=recipe.images, generated=True)
    cost = estimate(None, recipe, ExecutionOptions(), prepared=prepared, monitoring=Monitoring(grids=False))
    return cost.before / cost.flops / BATCH


def seconds_of(run: Path, batch: int) -> float:
    """The seconds of the steps in a run's log, by the rates that it recorded."""
    before, seconds = 0, 0.0
    for entry in read_log(run):
        if rate := entry.get("images_per_second"):
            seconds += (entry["step"] - before) * batch / rate
        before = entry["step"]
    return seconds


def plan(row: Row, budget: Budget, seeds: Iterable[int], work: Path, *, steps: int) -> list[Job]:
    """A row's jobs within a budget that buys so many steps."""
    return [Job(row, budget, seed, steps, work / budget.name / row.name / f"seed-{seed}") for seed in seeds]


def _is_student_of(run: Path, recipe: Recipe) -> bool:
    """Whether a run's student is of such a recipe; a setting that is newer than the student had its default."""
    defaults = {f.name: f.default for f in dataclasses.fields(Recipe) if f.default is not dataclasses.MISSING}
    try:
        made_by = defaults | read_json(run / "student" / "sbrush.json")["recipe"]
        return bool(made_by == dataclasses.asdict(recipe))
    except (OSError, ValueError, KeyError, TypeError):
        return False

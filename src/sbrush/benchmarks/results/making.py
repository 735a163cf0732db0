"""Making the table: every student trained and measured, several at once; what is complete is not made again."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from sbrush.benchmarks.results import runs
from sbrush.benchmarks.results.measuring import Bench
from sbrush.benchmarks.results.rates import Rates
from sbrush.benchmarks.results.rows import BASE, TEACHER, Row
from sbrush.benchmarks.results.runs import Budget, Job
from sbrush.benchmarks.results.summary import Figures, Result
from sbrush.console import Progress, SbrushError, info, progress
from sbrush.storage.files import write_json

ASKED_EVERY = 5.0  # seconds between two looks at how far the trainings have come
ENOUGH = 0.1  # a run whose minutes are so near to those asked for is not made again


@dataclass(frozen=True)
class Request:
    """What the table is to hold, and how it is made."""

    rows: Sequence[Row]
    seeds: int = 3
    budget: float = 1800  # UNet forwards of a batch of 32, for each student
    minutes: float | None = None  # for each student of the second table; None: what the row BASE takes; 0: no second
    pairs: int = 2000
    prompts: Path = Path("prompts/stickers.txt")
    work: Path = Path("runs/results")
    device: str = "cpu"
    at_once: int = 1  # students, each with an equal share of the cores
    threads: int = 1  # of each


@dataclass
class Task:
    """Something to be made, in a thread of its own. `seconds`: expected; `share`: of it that is done."""

    name: str
    make: Callable[[], None]
    seconds: float
    share: Callable[[], float] = lambda: 0.0


@dataclass
class Making:
    """The work that is left, and what went wrong."""

    request: Request
    rates: Rates
    failed: dict[str, SbrushError] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._bench = Bench(self.request.pairs, device=self.request.device, threads=self.request.threads)
        self._images = self.request.pairs + 10 * self._bench.per_caption

    def by_forwards(self) -> list[Job]:
        """A job for each row and seed, each within the budget of UNet forwards."""
        budget = Budget(f"forwards-{self.request.budget:g}", self.request.budget)
        return [job for row in self.request.rows if row.recipe != TEACHER for job in self._plan(row, budget)]

    def by_minutes(self, first: Sequence[Job]) -> list[Job]:
        """The same for equal minutes, at the rate of each row's fastest seed, which other work has disturbed least.

        A row of which none of the `first` jobs is trained is left out.
        """
        minutes = self.request.minutes
        trained = sorted((job for job in first if job.trained and job.seconds), key=lambda job: -job.seconds)
        fastest = {job.row.label: job for job in trained}
        rated = {row.label: fastest[row.label] for row in self.request.rows if row.label in fastest}
        if minutes == 0 or (minutes is None and BASE not in rated):
            return []
        seconds = rated[BASE].seconds if minutes is None else 60 * minutes
        budget = Budget("minutes-like-swiftbrush" if minutes is None else f"minutes-{minutes:g}")
        jobs = []
        for job in rated.values():
            forwards, before = job.steps * runs.forwards_a_step(job.row), runs.forwards_before(job.row)
            forwards = (forwards + before) * seconds / job.seconds - before  # those that are left for steps
            steps = max(1, round(forwards / runs.forwards_a_step(job.row)))
            near = abs(steps / job.steps - 1) <= ENOUGH
            own = [other for other in first if other.row == job.row]
            jobs += own if near else runs.plan(
                job.row, budget, range(self.request.seeds), self.request.work / f"forwards-{self.request.budget:g}",
                steps=steps,
            )  # fmt: skip
        return jobs

    def make(self, jobs: Sequence[Job], *, teacher: Row | None = None) -> None:
        """Trains and measures what is not there yet; seed 0 of every row first. What fails is noted, the rest goes on.

        KeyboardInterrupt and SystemExit stop the trainings after their step, and pass.
        """
        tasks = [self._teacher(steps, teacher) for steps in teacher.draws] if teacher else []
        tasks += [self._real()] if teacher else []
        tasks += [self._student(job) for job in sorted(jobs, key=lambda job: job.seed)]
        tasks = [task for task in tasks if task.share() < 1]
        if not tasks:
            return
        with progress("results", round(sum(task.seconds for task in tasks)), unit="s of work") as bar:
            with runs.workers(self.request.at_once) as pool:
                try:
                    self._follow({pool.submit(task.make): task for task in tasks}, bar)
                except BaseException:
                    self._bench.stopped = True
                    raise

    def results(self, jobs: Sequence[Job]) -> list[Result]:
        """The figures of all complete students, a Result a row; rows without any are left out."""
        found = []
        for row in self.request.rows:
            own = [job for job in jobs if job.row == row and job.trained]
            made = [
                {"seed": j.seed, "seconds": j.seconds, "run": str(j.run), "draws": self._drawn(row, j)} for j in own
            ]
            made = [run for run in made if run["draws"]]
            if made:
                forwards = runs.forwards_before(row) + own[0].steps * runs.forwards_a_step(row)
                found.append(Result(row.label, row.recipe, row.settings, own[0].steps, forwards, made, row.series))
        return found

    def baselines(self, teacher: Row | None) -> list[Result]:
        """The teacher's figures, and real images', which have no seeds."""
        found = []
        drawn = {n: f for n in (teacher.draws if teacher else ()) if (f := _read(self._at("teacher", n)))}
        if drawn:
            found.append(Result("teacher", TEACHER, (), 0, 0.0, [{"seed": None, "seconds": 0.0, "draws": drawn}]))
        if teacher and (real := _read(self._at("real-images", 0))):
            found.append(
                Result("real images", TEACHER, (), 0, 0.0, [{"seed": None, "seconds": 0.0, "draws": {0: real}}])
            )
        return found

    def _plan(self, row: Row, budget: Budget) -> list[Job]:
        steps = runs.steps_within(row, self.request.budget)
        return runs.plan(row, budget, range(self.request.seeds), self.request.work, steps=steps)

    def _student(self, job: Job) -> Task:
        forwards = runs.forwards_before(job.row) + job.steps * runs.forwards_a_step(job.row)
        training = self.rates.training(job.row, forwards)
        drawing = self.rates.drawing(job.row, self._images)

        def make() -> None:
            if not job.trained:
                job.train(self.request.prompts, threads=self.request.threads)
            for steps in job.row.draws:
                file = job.figures / self._bench.key(steps)
                if _read(file) is None:
                    _write(file, self._bench.student(job.run, steps))

        def share() -> float:
            measured = len(self._drawn(job.row, job)) / len(job.row.draws)
            return (training * (1.0 if job.trained else 0.99 * job.share_done) + drawing * measured) / (
                training + drawing
            )

        return Task(f"{job.row.label}, {job.budget.name}, seed {job.seed}", make, training + drawing, share)

    def _teacher(self, steps: int, row: Row) -> Task:
        file = self._at("teacher", steps)
        seconds = self.rates.drawing(Row(row.label, TEACHER, draws=(steps,)), self._images)
        return _once(f"teacher, {steps}", file, partial(self._bench.teacher, steps), seconds)

    def _real(self) -> Task:
        return _once("real images", self._at("real-images", 0), self._bench.real, self._images * self.rates.image)

    def _at(self, name: str, steps: int) -> Path:
        return self.request.work / f"{name}.figures" / self._bench.key(steps)

    def _drawn(self, row: Row, job: Job) -> dict[int, Figures]:
        return {n: f for n in row.draws if (f := _read(job.figures / self._bench.key(n)))}

    def _follow(self, futures: dict[Future[None], Task], bar: Progress) -> None:
        """Shows how far all tasks are until they are done."""
        waiting, shown = set(futures), 0
        while waiting:
            done, waiting = wait(waiting, timeout=ASKED_EVERY)
            for future in [future for future in futures if future in done]:
                problem = future.exception()
                if isinstance(problem, SbrushError):
                    self.failed[futures[future].name] = problem
                    info(f"{futures[future].name}: {problem} ({problem.hint})")
                elif problem:
                    raise problem
            now = sum(t.seconds * (1.0 if f.done() else t.share()) for f, t in futures.items())
            bar.advance(max(0, round(now) - shown), note=f"{len(waiting)} of {len(futures)} left")
            shown = max(shown, round(now))


def _once(name: str, file: Path, measure: Callable[[], Figures], seconds: float) -> Task:
    return Task(name, lambda: _write(file, measure()), seconds, lambda: 0.0 if _read(file) is None else 1.0)


def _read(file: Path) -> dict[str, Any] | None:
    """Figures that were measured before; None if there are none, or a damaged file."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else None
    except (OSError, ValueError):
        return None


def _write(file: Path, figures: Figures) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, figures)

"""The student behind every API: requests that overlap are drawn in one batch, the oldest first."""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from sbrush.console import SbrushError
from sbrush.sampling.artist import Artist
from sbrush.sampling.notes import unknown_words_note
from sbrush.serving.requests import ImageRequest, Settings, Turn

CLIENTS = 4096  # whose latest turn is known
ARTISTS = 64  # settings that are kept ready


class Busy(Exception):
    """As many images wait as may. `seconds`: how long they take, at least 1."""

    def __init__(self, seconds: int) -> None:
        super().__init__("the queue is full")
        self.seconds = seconds


class Replaced(Exception):
    """A newer turn of the same client has taken this one's place."""


class Stopped(Exception):
    """The engine takes no more requests."""


@dataclass(frozen=True)
class Drawn:
    """An image, uint8 [3, H, W], what its file says of how it was drawn, and what its client should know."""

    image: Tensor
    record: dict[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Job:
    """A request that waits or is drawn."""

    request: ImageRequest
    turn: Turn | None
    future: Future[Drawn]


class Engine:
    """Draws on a thread of its own; a context manager that ends when all that waits is drawn.

    `submit` may be called from any thread. Cancelling a future that `submit` gave drops its image if it still waits.

    Args:
        artist: Who draws; without a teacher beside it.
        batch: Images that the networks draw at once, at most.
        waiting: Images that may wait, at most.
        on_batch: Told of each batch: how many images, and the seconds they took.
    """

    def __init__(
        self,
        artist: Artist,
        *,
        batch: int = 32,
        waiting: int = 256,
        on_batch: Callable[[int, float], None] | None = None,
    ) -> None:
        self._artist, self._batch, self._most, self._on_batch = artist, batch, waiting, on_batch
        self._artists = OrderedDict[Settings, Artist]()
        self._jobs: list[Job] = []
        self._turns = OrderedDict[str, int]()
        self._changed = threading.Condition()
        self._stopping = False
        self._rate = 0.0  # seconds an image took lately
        self._thread = threading.Thread(target=self._work, name="sbrush engine", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    @property
    def waiting(self) -> int:
        """How many images wait; those that are being drawn do not count."""
        with self._changed:
            return sum(not job.future.cancelled() for job in self._jobs)

    def submit(self, requests: Sequence[ImageRequest], turn: Turn | None = None) -> list[Future[Drawn]]:
        """A future for each request: all of them wait, or none.

        With a `turn`, what the same client's earlier turns still wait for raises Replaced, and these images take its
        place in the queue. Raises Busy if the queue has no room, Replaced if a later turn was here first, Stopped;
        SbrushError if they are more than may wait at all.
        """
        with self._changed:
            if self._stopping:
                raise Stopped
            waiting = [job for job in self._jobs if not job.future.cancelled()]
            older = self._older(waiting, turn) if turn else []
            kept = [job for job in waiting if job not in older]
            if len(requests) > self._most:  # it would be told to try again for ever
                raise SbrushError(
                    f"{len(requests)} images in one request, and {self._most} may wait here",
                    f"ask for {self._most} at most, or start sbrush serve with a larger --queue",
                    code=2,
                )
            if len(kept) + len(requests) > self._most:
                raise Busy(max(1, math.ceil(len(waiting) * self._rate)))
            if turn:
                self._remember(turn)
            place = waiting.index(older[0]) if older else len(kept)
            jobs = [Job(request, turn, Future()) for request in requests]
            self._jobs = [*kept[:place], *jobs, *kept[place:]]
            self._changed.notify()
        for job in older:
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(Replaced())
        return [job.future for job in jobs]

    def _older(self, waiting: list[Job], turn: Turn) -> list[Job]:
        """The jobs whose place a turn takes; Replaced if it comes too late itself."""
        if turn.number < self._turns.get(turn.client, turn.number):
            raise Replaced
        return [job for job in waiting if job.turn and job.turn.client == turn.client and job.turn != turn]

    def _remember(self, turn: Turn) -> None:
        self._turns[turn.client] = turn.number
        self._turns.move_to_end(turn.client)
        if len(self._turns) > CLIENTS:
            self._turns.popitem(last=False)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._stopping)
                if not self._jobs:
                    return
                jobs = self._take()
            if jobs:
                self._draw(jobs)

    def _take(self) -> list[Job]:
        """The next batch, out of the queue: the oldest job that is still wanted, and those of the same settings."""
        taken: list[Job] = []
        left: list[Job] = []
        for job in self._jobs:
            same = not taken or job.request.settings == taken[0].request.settings
            if not same or len(taken) == self._batch:
                left.append(job)
            elif job.future.set_running_or_notify_cancel():
                taken.append(job)
        self._jobs = left
        return taken

    def _draw(self, jobs: list[Job]) -> None:
        """Draws a batch; if that fails, each image alone, so that nobody's image fails for another's sake."""
        start = time.perf_counter()
        prompts, seeds = [job.request.prompt for job in jobs], [job.request.seed for job in jobs]
        try:
            artist = self._artist_of(jobs[0].request.settings)
            images = [cells[0] for cells in artist.draw(prompts, seeds, batch=len(jobs))]
            records = [artist.record(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
            notes = self._notes(prompts)
        except Exception as problem:
            if len(jobs) == 1:
                jobs[0].future.set_exception(problem)
            else:
                for job in jobs:
                    self._draw([job])
            return
        taken = time.perf_counter() - start
        self._rate = 0.8 * self._rate + 0.2 * taken / len(jobs) if self._rate else taken / len(jobs)
        if self._on_batch:
            self._on_batch(len(jobs), taken)
        for job, image, record, some in zip(jobs, images, records, notes, strict=True):
            job.future.set_result(Drawn(image, record, some))

    def _artist_of(self, settings: Settings) -> Artist:
        """Who draws with these settings. Made on the engine's thread, for what it asks of a scheduler changes that."""
        if settings not in self._artists:
            self._artists[settings] = self._artist.altered(steps=settings.steps, negative=settings.negative)
            if len(self._artists) > ARTISTS:
                self._artists.popitem(last=False)
        self._artists.move_to_end(settings)
        return self._artists[settings]

    def _notes(self, prompts: Sequence[str]) -> list[tuple[str, ...]]:
        """What each prompt's client should know. On the engine's thread: tokenizers are not for two at once."""
        student = self._artist.student
        cut, length = student.truncated_prompts(prompts) > 0, student.longest_prompt
        notes: list[tuple[str, ...]] = []
        for prompt in prompts:
            some = [unknown_words_note(student, [prompt])]
            if cut and student.truncated_prompts([prompt]):
                some.append(f"the prompt is longer than the {length} tokens read; its end is cut off")
            notes.append(tuple(note for note in some if note))
        return notes

"""One model's figures, by `sbrush eval`'s own protocol, with FID's interval and the time that an image takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from sbrush.console import SbrushError
from sbrush.evaluate.candidates import student_candidate, teacher_candidate
from sbrush.evaluate.stickers import (
    PROTOCOL,
    Candidate,
    diversity_pairs,
    extract,
    metrics_of,
    pairs,
    real_images,
    real_reference,
)
from sbrush.metrics.accuracy import attribute_accuracy
from sbrush.metrics.fid import INTERVAL, fid_error
from sbrush.models.load import load_student, load_teacher
from sbrush.sampling.generation import guidance_scale_of
from sbrush.stickers.judge import Judge, pixel_attributes


class Bench:
    """Measures models one at a time on `n` pairs; real images are drawn once, at the first."""

    def __init__(self, n: int, *, device: str, threads: int) -> None:
        self.n, self.per_caption = n, max(2, min(100, n // 20))
        self._device, self._threads, self._lock = device, threads, Lock()
        self._pairs, self._varied = pairs(n), diversity_pairs(self.per_caption)
        self._judge: Judge | None = None
        self.stopped = False  # set from another thread: what is measured now is given up

    def key(self, steps: int) -> str:
        """What a file of figures is called: what they were measured on, and in how many steps the model drew."""
        return f"protocol-{PROTOCOL}-pairs-{self.n}-steps-{steps}.json"

    def student(self, folder: Path, steps: int) -> dict[str, Any]:
        """A student in so many steps."""
        return self._measure(
            lambda: student_candidate(folder.name, load_student(str(folder), device=self._device), steps)
        )

    def teacher(self, steps: int) -> dict[str, Any]:
        """The built-in teacher in so many steps, at its own guidance scale."""

        def candidate() -> Candidate:
            model = load_teacher(device=self._device)
            return teacher_candidate(model, steps, guidance_scale_of(model, None))

        return self._measure(candidate)

    def real(self) -> dict[str, Any]:
        """Other real images, measured like a model's: the best that can be had."""
        caption_of = {seed: caption for caption, seed in (*self._pairs, *self._varied)}

        def images(_: Sequence[str], seeds: Sequence[int]) -> Iterator[Tensor]:
            return real_images("floor", [(caption_of[seed], seed) for seed in seeds])

        return self._measure(lambda: Candidate("real images", images))

    def _measure(self, load: Callable[[], Candidate]) -> dict[str, Any]:
        """The figures of what is loaded. One at a time: two would each take longer, and no rate would hold.

        Nor can two threads load: while transformers builds a network, every thread's tensors are made without numbers.
        """
        with self._lock:
            torch.set_num_threads(self._threads)
            if self._judge is None:
                self._judge = Judge.load(device=self._device)
                self._reference = real_reference(self._pairs, self._varied, self._judge)
            candidate = load()
            captions, clock, by_pixels = [caption for caption, _ in self._pairs], Clock(), list[dict[str, Tensor]]()

            def drawn(some: Sequence[tuple[Any, int]]) -> Iterator[Tensor]:
                for batch in clock.timed(candidate.images([c.text for c, _ in some], [s for _, s in some])):
                    if self.stopped:
                        raise SbrushError("stopped", "the same command goes on")
                    yield batch

            def looked_at(batches: Iterable[Tensor]) -> Iterator[Tensor]:
                for batch in batches:
                    by_pixels.append(pixel_attributes(batch))
                    yield batch

            seen = extract(looked_at(drawn(self._pairs)), self._judge, len(captions))
            various = extract(drawn(self._varied), self._judge)
            metrics = metrics_of(
                candidate.name, (seen, various), captions, self._judge, self._reference,
                steps=candidate.steps, guidance=candidate.guidance,
            )  # fmt: skip
            counted = {name: torch.cat([part[name] for part in by_pixels]) for name in by_pixels[0]}
            right = attribute_accuracy(captions, seen.judged | counted)
            return asdict(metrics) | {
                "fid_interval": INTERVAL * fid_error(self._reference.features, seen.features),
                # Of the judge, by which the clamped CLIP loss trains, these know nothing.
                "by_pixels": {name: right[name] for name in counted if name in right},
                "seconds_an_image": clock.seconds / (len(captions) + len(various.places)),
            }


class Clock:
    """How long it took to draw what has passed by."""

    seconds = 0.0

    def timed(self, batches: Iterator[Tensor]) -> Iterator[Tensor]:
        """The batches, the time until each one comes added up."""
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.seconds += time.perf_counter() - start
            if batch is None:
                return
            yield batch

"""Images prepared on other threads while the networks are busy with those before them."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

BATCHES = 2  # started before their turn: one would do if each took as long as the next


def prefetch(work: Callable[[T], R], batches: Iterable[Iterable[T]]) -> Iterator[list[R]]:
    """`work` of every item, batch by batch and in order, on a thread a core.

    While a batch is taken from `batches` or its results are used, the `BATCHES` before it are worked on, and no more.
    What `batches` or `work` raise is raised here. However this ends, what has not started never starts.
    """
    # torch would give each of these threads as many of its own as there are cores.
    workers = ThreadPoolExecutor(os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,))
    started = deque[list[Future[R]]]()
    try:
        for batch in batches:
            started.append([workers.submit(work, item) for item in batch])
            del batch  # or it would live for as long as the next one is made
            if len(started) > BATCHES:
                yield [future.result() for future in started.popleft()]
        while started:
            yield [future.result() for future in started.popleft()]
    finally:
        workers.shutdown(cancel_futures=True)

"""What a server counts, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
SIZES = (1, 2, 4, 8, 16, 32, 64)


class Counters:
    """One server's counters; nothing in them tells prompts."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.images = Counter("sbrush_images", "Images drawn", registry=registry)
        self.requests = Counter("sbrush_requests", "Answers", ["route", "status"], registry=registry)
        self.request_seconds = Histogram(
            "sbrush_request_seconds", "Time to the answer", ["route"], registry=registry, buckets=SECONDS
        )
        self.batch_size = Histogram("sbrush_batch_size", "Images drawn at once", registry=registry, buckets=SIZES)
        self.batch_seconds = Histogram("sbrush_batch_seconds", "Time of a batch", registry=registry, buckets=SECONDS)
        self.dropped = Counter("sbrush_dropped", "Requests that were not drawn", ["reason"], registry=registry)
        for reason in ("busy", "replaced", "disconnected"):
            self.dropped.labels(reason)
        self._waiting = Gauge("sbrush_waiting", "Images that wait", registry=registry)

    def watch(self, waiting: Callable[[], int]) -> None:
        """Asks `waiting` how many images wait, whenever somebody reads the counters."""
        self._waiting.set_function(waiting)

    def count_batch(self, images: int, seconds: float) -> None:
        """A batch was drawn."""
        self.images.inc(images)
        self.batch_size.observe(images)
        self.batch_seconds.observe(seconds)

    def count_answer(self, route: str, status: int, seconds: float) -> None:
        """A request was answered."""
        self.requests.labels(route, str(status)).inc()
        self.request_seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """All counters in Prometheus's text format."""
        return generate_latest(self.registry)

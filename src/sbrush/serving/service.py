"""What all APIs share: the images of a request are drawn, encoded and counted."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sbrush
from sbrush.console import SbrushError, info, printable
from sbrush.sampling.artist import Artist
from sbrush.sampling.generation import Drawer
from sbrush.sampling.images import encode_png, to_image
from sbrush.sampling.negative_request import Negative
from sbrush.serving.counters import Counters
from sbrush.serving.engine import Busy, Drawn, Engine, Replaced
from sbrush.serving.requests import LONGEST_PROMPT, MOST_IMAGES, ImageRequest, Settings, Turn

QUALITY = 90  # of JPEG and WebP, of 100
NOTE = 300  # characters of a note in a header


@dataclass
class Service:
    """A student and its engine behind every door. `log_prompts`: whether the log tells what is drawn."""

    artist: Artist
    engine: Engine
    counters: Counters
    log_prompts: bool = False
    usual_steps: int = field(init=False)  # as many as the student was trained for

    def __post_init__(self) -> None:
        self.usual_steps = len(self.student.rungs())
        self.counters.watch(lambda: self.engine.waiting)

    @property
    def student(self) -> Drawer:
        return self.artist.student

    @property
    def steps(self) -> tuple[int, ...]:
        """The numbers of steps that the student takes."""
        return self.student.step_choices

    @property
    def takes_negative(self) -> bool:
        """Whether the student can draw away from a negative prompt: torch's attention can, an ONNX graph's cannot."""
        return self.student.runtime is None

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of every image, in pixels."""
        height, width = self.student.image_size
        return width, height

    def about(self) -> dict[str, Any]:
        """What the student can do: the page shows fields for that, and for nothing else."""
        width, height = self.size
        return {
            "student": self.student.name, "version": sbrush.__version__, "width": width, "height": height,
            "steps": list(self.steps), "usual_steps": self.usual_steps, "longest_prompt": LONGEST_PROMPT,
            "most_images": MOST_IMAGES, "device": str(self.student.device), "precision": self.artist.precision,
            "runtime": self.student.runtime or "torch", "negative": self.takes_negative,
            "vae": self.student.decoder.name if self.student.decoder else None,
            "loras": [lora.request.text for lora in self.student.loras],
            "built_in_world": self.student.about.get("world") == "stickers",
        }  # fmt: skip

    def check_settings(self, steps: int | None, negative: str | None = None) -> Settings:
        """Settings of a request; SbrushError if the student does not take so many steps, or a negative prompt."""
        if steps is not None and steps not in self.steps:
            able = str(self.steps[0]) if len(self.steps) == 1 else f"{self.steps[0]} to {self.steps[-1]}"
            raise SbrushError(f"this student does not draw in {steps} steps", f"steps: {able}", code=2)
        away = Negative(negative) if negative and negative.strip() else None
        if away and not self.takes_negative:
            raise SbrushError(
                "this student takes no negative prompt", "start sbrush serve with --runtime torch", code=2
            )
        return Settings(None if steps == self.usual_steps else steps, away)

    async def draw(self, requests: Sequence[ImageRequest], turn: Turn | None = None) -> list[Drawn]:
        """The images, in order. Raises Busy, Replaced, or SbrushError if one cannot be drawn.

        If this is cancelled, what still waits is dropped.
        """
        try:
            futures = [asyncio.wrap_future(future) for future in self.engine.submit(requests, turn)]
            try:
                drawn = await asyncio.gather(*futures)
            finally:
                for future in futures:
                    future.cancel()
        except (Busy, Replaced) as problem:
            self.counters.dropped.labels(type(problem).__name__.lower()).inc()
            raise
        if self.log_prompts:
            for request in requests:
                info(f"drawn: seed {request.seed}, {printable(request.prompt)}")
        return drawn


async def encode(drawn: Drawn, kind: str = "png", quality: int = QUALITY) -> bytes:
    """An image file: a PNG as `sbrush sample` writes it, or a JPEG or WebP, which have no metadata."""
    return await asyncio.to_thread(_encode, drawn, kind, quality)


def _encode(drawn: Drawn, kind: str, quality: int) -> bytes:
    image = to_image(drawn.image)
    if kind == "png":
        return encode_png(image, drawn.record)
    stream = io.BytesIO()
    image.save(stream, format=kind, quality=quality)
    return stream.getvalue()


def note_headers(drawn: Sequence[Drawn], more: Sequence[str] = ()) -> dict[str, str]:
    """Headers that tell the seeds, and in X-Sbrush-Notes a JSON list of what the client should know, if anything."""
    notes = list(dict.fromkeys([*more, *(note for one in drawn for note in one.notes)]))
    headers = {"X-Sbrush-Seeds": ",".join(str(one.record["seed"]) for one in drawn)}
    return headers | ({"X-Sbrush-Notes": json.dumps([note[:NOTE] for note in notes])} if notes else {})

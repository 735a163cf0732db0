"""How long the table takes on this machine, from a UNet forward and a drawn image, each timed for a second or two."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sbrush.benchmarks.results.rows import TEACHER, Row
from sbrush.benchmarks.results.runs import BATCH, trains_lora_teacher
from sbrush.device import trains_in_bf16
from sbrush.models.load import load_teacher
from sbrush.sampling.generation import student_images

# A training step takes so much longer than its forwards, backwards counted as two: text encoder, Adam, average, log.
OVERHEAD = 1.45
LORA_TEACHER = 1.35  # and so much longer again if some go through a LoRA teacher, as measured on two CPU cores
STARTING = 30.0  # seconds that a training takes besides: imports, loading, exporting


@dataclass(frozen=True)
class Rates:
    """Seconds on one of the threads' shares of this machine."""

    forward: float  # of BATCH latents as training computes them, a backward counted as two, all else included
    step: float  # of one image, each step of its drawing
    image: float  # of one image, besides its steps: decoding, judging

    @classmethod
    def measure(cls, *, device: str, threads: int) -> Rates:
        """Times the built-in teacher's UNet and a student's images."""
        torch.set_num_threads(threads)
        model = load_teacher(device=device)
        x, t = torch.randn(BATCH, *model.latent_shape, device=device), torch.full((BATCH,), 500, device=device)
        cond = model.encode(["a cat"] * BATCH)

        @torch.no_grad()
        def forward() -> None:
            model.predict(model.unet, x, t, cond)
            if device.startswith("cuda"):
                torch.cuda.synchronize()

        def drawn() -> None:
            list(student_images(model, ["a cat"] * BATCH, range(BATCH)))

        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=trains_in_bf16("auto", device)):
            trained = _fastest(forward)
        step, image = _fastest(forward) / BATCH, _fastest(drawn) / BATCH
        return cls(OVERHEAD * trained, step, max(image - step, 0.0))

    def drawing(self, row: Row, images: int) -> float:
        """Seconds to draw and measure so many images in each of a row's numbers of steps."""
        forwards = 2 if row.recipe == TEACHER else 1  # guidance takes two
        return images * sum(self.image + forwards * steps * self.step for steps in row.draws)

    def training(self, row: Row, forwards: float) -> float:
        """Seconds of a row's training within a budget of forwards."""
        slower = LORA_TEACHER if trains_lora_teacher(row) else 1.0
        return STARTING + forwards * self.forward * slower


def _fastest(work: Callable[[], None], *, times: int = 4) -> float:
    found = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)

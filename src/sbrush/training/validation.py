"""Validation in mid-run: the average student's CLIP score on fixed prompts, of noise that is always the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from sbrush.console import SbrushError, progress
from sbrush.metrics.clip import MODEL, ClipScorer
from sbrush.models.model import Model
from sbrush.prompts import Prompts
from sbrush.sampling.generation import student_images
from sbrush.stickers.judge import Judge

PROMPTS = 64


class Scorer(Protocol):
    """Scores how well images match their captions."""

    def score(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Cosines: uint8 [B, 3, H, W] and B captions to float32 [B]."""


@dataclass(frozen=True)
class Validation:
    """The prompts, each with its place in the list as seed, and what scores their images."""

    prompts: Sequence[str]
    scorer: Scorer

    @classmethod
    def load(cls, prompts: Prompts, teacher: Model, clip_weights: Path | None, *, device: str) -> Validation:
        """`PROMPTS` of the prompts, spread over the list; the built-in world's judge unless other weights are given.

        For any other teacher the CLIP model is that of `sbrush eval --coco-30k`: see ClipScorer.load.
        """
        count = min(PROMPTS, len(prompts))
        chosen = [prompts.texts[i * len(prompts) // count] for i in range(count)]
        if clip_weights is None and teacher.about.get("world") == "stickers":
            return cls(chosen, Judge.load(device=device))
        try:
            return cls(chosen, ClipScorer.load(clip_weights, device=device))
        except SbrushError as problem:
            problem.hint = f"--validation-clip: {MODEL}'s weights, or a folder of open_clip's; or no --validate-every"
            raise

    @staticmethod
    def parameters(teacher: Model, clip_weights: Path | None) -> int:
        """How many the CLIP model has that `load` would take; no weights are read."""
        if clip_weights is None and teacher.about.get("world") == "stickers":
            return 0  # a judge of a million: not worth a line
        scorer = ClipScorer.shapes(clip_weights, model_name=MODEL)
        return sum(p.numel() for p in scorer.network.parameters())

    def score(self, student: Model, *, batch: int = 8) -> float:
        """The mean CLIP score of one image for each prompt."""
        parts, done = [], 0
        with progress("validating", len(self.prompts), unit="images") as bar:
            for images in student_images(student, self.prompts, range(len(self.prompts)), batch=batch):
                with torch.autocast(student.device.type, enabled=False):  # as `sbrush eval` scores
                    parts.append(self.scorer.score(images, self.prompts[done : done + len(images)]))
                done += len(images)
                bar.advance(len(images))
        return torch.cat(parts).mean().item()

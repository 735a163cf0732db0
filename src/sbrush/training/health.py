"""Is a run healthy? Named alarms over what log.jsonl holds; docs/distilling.md explains each and what to do.

Every measure is a ratio to the teacher on the same images or prompts, so that one set of limits serves any teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sbrush.device import send

GRACE = 100  # steps before the first alarm: a student starts as the teacher's one-step guess, which is no image yet
LASTING = 50  # steps for which a sign must last
METRICS = ("latent_drift", "saturation")  # of every step, see TeacherReference.compare
MOST_SKIPPED = 25  # steps in a row that were not finite; then the run stops


class Alarm(NamedTuple):
    """One sign of trouble: its name, what it means, and when an entry of log.jsonl shows it, given the log's first."""

    name: str
    meaning: str
    shown_by: Callable[[Mapping[str, float], Mapping[str, float]], bool]


ALARMS = (
    Alarm(
        "latent_drift",
        "a channel's mean has moved away from the teacher's by more than its deviation",
        lambda entry, _: entry["latent_drift"] > 1,
    ),
    Alarm(
        "saturation",
        "latents are further out than any of the teacher's",
        lambda entry, _: entry["saturation"] > 0.01,
    ),
    Alarm(
        "score_gap_ratio",
        "teacher and LoRA teacher agree, so the student learns nothing",
        lambda entry, _: entry["score_gap_ratio"] < 0.003,
    ),
    Alarm(
        "lora_divergence",
        "the LoRA teacher predicts the noise on the student's images worse than the teacher does",
        lambda entry, _: entry["lora_divergence"] > 1.5,
    ),
    Alarm(
        "prompt_spread",
        "one seed gives nearly the same image for every prompt, more so than at the start",
        lambda entry, first: entry["prompt_spread"] < min(0.25, first["prompt_spread"]),
    ),
    Alarm(
        "seed_spread",
        "one prompt gives nearly the same image for every seed, more so than at the start",
        lambda entry, first: entry["seed_spread"] < min(0.25, first["seed_spread"]),
    ),
)


def alarms(log: Sequence[Mapping[str, Any]]) -> list[Alarm]:
    """The alarms that the newest entry raises, given the log up to it, from the run's first entry on.

    A sign counts when every entry of the last LASTING steps that measured it shows it, and they reach that far back.
    An entry that did not measure a sign (no such key, or None) does not count.
    """
    if not log or log[-1]["step"] < GRACE:
        return []
    recent = [entry for entry in log if entry["step"] > log[-1]["step"] - LASTING]
    raised = []
    for alarm in ALARMS:
        signs = [sign for entry in recent if (sign := _sign(alarm, entry, log[0])) is not None]
        if _sign(alarm, log[-1], log[0]) and all(signs):
            raised.append(alarm)
    return raised


def _sign(alarm: Alarm, entry: Mapping[str, Any], first: Mapping[str, Any]) -> bool | None:
    try:
        return alarm.shown_by(entry, first)
    except (KeyError, TypeError):
        return None


@dataclass(frozen=True)
class TeacherReference:
    """Statistics of the teacher's own images of the sample grid's prompts, in latents.

    mean, deviation  [C]  of each channel
    furthest         [C]  largest distance from a channel's mean
    prompt_spread    how far images of one seed are from each other, see `spreads`
    seed_spread      how far images of one prompt are from each other
    """

    mean: list[float]
    deviation: list[float]
    furthest: list[float]
    prompt_spread: float
    seed_spread: float

    def __post_init__(self) -> None:
        numbers = torch.tensor([*self.mean, *self.deviation, *self.furthest, self.prompt_spread, self.seed_spread])
        if not len(self.mean) == len(self.deviation) == len(self.furthest) or not numbers.isfinite().all():
            raise ValueError("three lists of one length and two numbers, all finite")

    @classmethod
    def of(cls, latents: Tensor) -> TeacherReference:
        """From the teacher's latents [seeds, prompts, C, H, W]."""
        channels = latents.float().movedim(2, 0).flatten(1)
        mean, deviation = channels.mean(1), channels.std(1)
        furthest = (channels - mean[:, None]).abs().amax(1)
        return cls(mean.tolist(), deviation.tolist(), furthest.tolist(), *spreads(latents))

    def compare(self, x0: Tensor) -> dict[str, Tensor]:
        """A batch of the student's latents [B, C, H, W] beside the teacher's; scalars on the same device.

        latent_drift  largest distance of a channel's mean from the teacher's, in the teacher's deviations
        saturation    share of values further from the mean than any of the teacher's
        """
        mean, deviation, furthest = send(torch.tensor([self.mean, self.deviation, self.furthest]), x0.device)
        channels = x0.float().movedim(1, 0).flatten(1)
        drift = ((channels.mean(1) - mean) / deviation).abs().amax()
        beyond = ((channels - mean[:, None]).abs() > furthest[:, None]).float().mean()
        return {"latent_drift": drift, "saturation": beyond}

    def compare_spreads(self, latents: Tensor) -> dict[str, float]:
        """The student's grid [seeds, prompts, C, H, W] beside the teacher's; without two of a kind, nothing."""
        prompt_spread, seed_spread = spreads(latents)
        shares = {}
        if latents.shape[1] > 1 and self.prompt_spread > 0:
            shares["prompt_spread"] = prompt_spread / self.prompt_spread
        if latents.shape[0] > 1 and self.seed_spread > 0:
            shares["seed_spread"] = seed_spread / self.seed_spread
        return shares


def spreads(latents: Tensor) -> tuple[float, float]:
    """Of latents [seeds, prompts, C, H, W]: the deviation over prompts at one seed, and over seeds at one prompt."""
    latents = latents.float()
    over_prompts, over_seeds = (latents.std(dim, correction=0).mean().item() for dim in (1, 0))
    return over_prompts, over_seeds

"""The table of hyper-parameters. `--recipe NAME` takes a row; `--dry-run` prints it.

name             what it is for                                       what it gave
swiftbrush       the paper's own settings, for SD-size teachers       the paper: COCO-30K FID 16.67, CLIP 0.29
proper-guidance  the same with a random guidance scale (PG-SB of      that paper: SD 2.1, FID 8.91 by its own protocol
                 SNOOPI, arXiv 2412.02687)
dmd              DMD's normaliser and guidance, without its GAN       see docs/recipes.md
lcm              latent consistency distillation (arXiv 2310.04378)   SwiftBrush's paper: one step FID 35.56, CLIP 0.24
guided           Guided Distillation (arXiv 2210.03142): a student    SwiftBrush's paper: one step FID 37.3, CLIP 0.27
                 with a guidance input, then progressive halving
stickers         the built-in teacher on a CPU                        see docs/results.md
stickers-lcm     lcm for the built-in teacher on a CPU, not tuned     see docs/results.md
stickers-guided  guided for the built-in teacher on a CPU, not tuned  see docs/results.md

lcm and guided learn from images: the teacher's own, or --images.

Recipes of several trainings, swiftbrush-v2 and stickers-v2: merged.py. Which one to take: docs/recipes.md.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from types import NoneType
from typing import Any, Literal, get_args, get_type_hints

from sbrush.console import SbrushError, printable


@dataclass(frozen=True)
class Recipe:
    """How a student is trained; every number that a run may want to change."""

    name: str
    gap: Literal["vsd", "dmd", "sds"]  # the score difference: core.vsd_gap, core.dmd_gap, or no LoRA teacher at all
    guidance: float  # classifier-free guidance scale s
    guide_lora: bool  # whether the LoRA teacher's score is guided too (SwiftBrush: yes; DMD: no)
    steps: int  # updates of the student
    batch: int  # samples an update, over all processes
    student_lr: float
    warmup: int  # steps in which student_lr rises from zero, while the LoRA teacher gets to know the student's images
    cooldown: float  # share of the run, its end, in which student_lr falls to zero, so that the LoRA teacher catches up
    lora_lr: float
    lora_rank: int
    lora_alpha: int
    lora_targets: str  # "to_q to_v", "all" linear and convolution layers, or "blocks": those of the UNet's blocks
    lora_updates: int  # per update of the student
    shared_forward: bool  # one forward of the LoRA teacher is its score and its first update's; needs guide_lora off
    lora_weight: Literal["alpha", "v", "min-snr"]  # see core.lora_loss; "alpha" is the paper's
    null_chance: float  # that a LoRA update sees the empty prompt, the whole batch at once
    t_init: int | None  # the timestep at which the student takes its noise for x_t; None: T, as in the paper
    t_low: int  # the scores are compared at t in t_low .. t_high
    t_high: int
    ema: float  # decay of the exported average, reached by a ramp
    beta2: float  # of both Adams; beta1 is 0.9
    clip: float  # gradient norm, above 0
    reparameterised: bool = True  # False: the paper's ablation
    method: str = "vsd"  # what trains the student: a key of training.methods.METHODS
    student_steps: int = 1  # steps in which the student is to draw an image
    lora_lead: int = 0  # steps at the beginning in which the LoRA teacher alone learns, for a student from --init
    tell_rung: bool = False  # whether the LoRA teacher is told which of them its images come from, see methods/vsd.py
    # Of what the steps of a student from --init are held to: the first to its image before, others to the teacher's x0.
    anchor_weight: float = 0.0
    anchor_end: float = 1.0  # share of it that is left, for the first, when student_lr has fallen to zero
    first_share: float | None = None  # of the training steps, those of the first of several; None: as many as any other
    # What the paper has not:
    student_rank: int = 0  # of a LoRA that is the student, on the teacher's own weights; 0: a full copy of them
    lora_lr_end: float = 1.0  # share of lora_lr that is left when student_lr has fallen to zero, on the same line
    guidance_to: float | None = None  # s is drawn for each step from guidance .. guidance_to
    guidance_high: int | None = None  # guidance at timesteps up to this one only (arXiv 2404.07724)
    optimizer: Literal["adam", "adam8bit"] = "adam"  # the latter's moments take a quarter of the memory (bitsandbytes)
    pairs: int = 0  # samples of a batch that are also held to the teacher's own image of their noise: core.pair_loss
    pair_steps: int = 8  # that the teacher takes for it
    pair_guidance: float = 3.0
    pair_share: float = 1.0  # of the run, its beginning, in which there are pairs
    pair_weight: float = 1.0  # of that loss, against the score difference's on one sample
    hold: int = 0  # samples a step, beside the batch, of other prompts, whose images are to stay: methods/holding.py
    hold_weight: float = 16.0  # of core.pair_loss on these
    clip_weight: float = 0.0  # of core.clamped_clip_loss at the start, from which it falls to zero at the last step
    clip_tau: float = 0.35  # the cosine from which on an image fits its prompt well enough
    # Of the methods lcm and guided, whose `guidance` is the scale that the student draws at if not told another:
    w_min: float = 5.0  # the student learns guidance weights w_min .. w_max; w = scale - 1
    w_max: float = 15.0
    images: int = 0  # that the teacher makes to learn from, or the built-in world draws; 0: one for each prompt
    image_steps: int = 25  # that the teacher takes for one
    image_guidance: float = 7.5  # its guidance scale then
    grid_steps: int = 50  # lcm: timesteps that it learns to go between, evenly apart
    huber_c: float = 0.001  # lcm: of the pseudo-Huber loss; 0: squared error
    halve_from: int = 32  # guided: steps of the student before the first halving
    guide_share: float = (
        0.5  # guided: of the run, its beginning, in which it learns guidance; the rest is the halvings'
    )
    snr_weight: Literal["truncated", "plus-one"] = "truncated"  # guided: of the error in x0, see guided.snr_weight

    def __post_init__(self) -> None:
        for name, kind in _kinds().items():
            value = getattr(self, name)
            allowed = get_args(kind) or (kind,)
            numeric = float in allowed and type(value) is int
            if not (value in allowed or type(value) in allowed or (value is None and NoneType in allowed) or numeric):
                raise ValueError(f"{name} cannot be {value!r}")
            if isinstance(value, int | float) and not 0 <= value < math.inf:
                raise ValueError(f"{name} cannot be {value!r}")
        for name in (
            "steps", "batch", "student_steps", "lora_rank", "lora_updates", "pair_steps", "image_steps", "grid_steps",
            "halve_from",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1")
        if self.clip == 0:
            raise ValueError("clip is above 0: it is the length that a gradient is cut to, and 0 would leave none")
        for name in (
            "cooldown", "null_chance", "pair_share", "lora_lr_end", "ema", "beta2", "guide_share", "anchor_end",
            "first_share",
        ):  # fmt: skip
            if (getattr(self, name) or 0) > 1 or (name in ("ema", "beta2") and getattr(self, name) == 1):
                raise ValueError(f"{name} is a share of 1")
        if not 0 <= self.t_low <= self.t_high or (self.t_init is not None and self.t_init < 1) or self.warmup < 0:
            raise ValueError("timesteps and warmup count from 0, t_init from 1, and t_low is at most t_high")
        if self.pairs and self.batch % self.pairs:
            raise ValueError("pairs divides batch")
        if self.student_steps > 1 and self.pairs:
            raise ValueError("pairs tie noise to the image of one step: they go with student_steps=1")
        if self.student_steps > 1 and not self.reparameterised:
            raise ValueError("a student without re-parameterisation takes one step: it has no noise to go on with")
        if self.student_steps == 1:
            for name in ("tell_rung", "anchor_weight", "first_share"):
                if getattr(self, name) != getattr(Recipe, name):
                    raise ValueError(f"{name} is for students of several steps")
        if self.anchor_end < 1 and not self.anchor_weight:
            raise ValueError("anchor_end is what is left of anchor_weight, which is 0")
        if self.lora_lead and (self.gap == "sds" or self.lora_lead >= self.steps):
            raise ValueError("lora_lead needs a LoRA teacher, and leaves steps for the student")
        if self.guidance_to is not None and self.guidance_to < self.guidance:
            raise ValueError("guidance_to is at least guidance")
        if self.w_max < self.w_min:
            raise ValueError("w_max is at least w_min")
        if self.shared_forward and (self.guide_lora or self.gap == "sds"):
            raise ValueError("shared_forward needs a LoRA teacher whose score is not guided")

    def but_for(self, settings: Iterable[str]) -> Recipe:
        """This recipe with settings such as "lora_rank=128" or "t_init=null" in place of its own.

        SbrushError if one is no setting, or not with the others.
        """
        values: dict[str, Any] = {}
        for setting in settings:
            name, _, text = setting.partition("=")
            if name not in _kinds():
                raise SbrushError(f"no setting {printable(name)}", f"NAME=VALUE, of {', '.join(_kinds())}", code=2)
            try:
                values[name] = json.loads(text)
            except (ValueError, RecursionError):
                values[name] = text  # a word, such as dmd
        return self.with_settings(**values)

    def with_settings(self, **values: Any) -> Recipe:
        """This recipe with these fields in place of its own; SbrushError if they do not go together."""
        try:
            return replace(self, **values)
        except ValueError as problem:
            raise SbrushError(
                f"recipe {self.name}: {problem}", "sbrush distill --dry-run shows every setting", code=2
            ) from None

    def student_lr_at(self, step: int) -> float:
        """The student's learning rate in a step, counted from 1."""
        lead = 0 if self.anchor_weight else self.lora_lead  # with an anchor the student learns from the first step on
        risen = max(0, step - lead) / max(1, self.warmup)
        return self.student_lr * min(risen, self._falling(step))

    def lora_lr_at(self, step: int) -> float:
        """The LoRA teacher's learning rate in a step, counted from 1."""
        return self.lora_lr * (self.lora_lr_end + (1 - self.lora_lr_end) * self._falling(step))

    def anchor_weight_at(self, step: int, rung: int) -> float:
        """The weight of the anchor in a step, counted from 1, for a step of the student, counted from 0."""
        left = 1.0 if rung else self.anchor_end + (1 - self.anchor_end) * self._falling(step)
        return self.anchor_weight * left

    def clip_weight_at(self, step: int) -> float:
        """The weight of the clamped CLIP loss in a step, counted from 1."""
        return self.clip_weight * (1 - step / self.steps)

    def _falling(self, step: int) -> float:
        return min(1.0, (self.steps - step + 1) / max(1.0, self.cooldown * self.steps))


@cache
def _kinds() -> dict[str, Any]:
    """The type of each field that a run may set."""
    return {name: kind for name, kind in get_type_hints(Recipe).items() if name != "name"}


# What a method other than VSD does not look at has the paper's values; see Method.unused.
_VSD: dict[str, Any] = {
    "gap": "vsd", "guide_lora": True, "lora_lr": 1e-3, "lora_rank": 64, "lora_alpha": 108, "lora_targets": "to_q to_v",
    "lora_updates": 1, "shared_forward": False, "lora_weight": "alpha", "null_chance": 0.1, "t_init": None, "t_low": 20,
    "t_high": 980,
}  # fmt: skip

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="swiftbrush", gap="vsd", guidance=4.5, guide_lora=True, steps=244_000, batch=16,
            student_lr=1e-6, warmup=0, cooldown=0.0, lora_lr=1e-3, lora_rank=64, lora_alpha=108,
            lora_targets="to_q to_v", lora_updates=1, shared_forward=False, lora_weight="alpha", null_chance=0.1,
            t_init=None, t_low=20, t_high=980, ema=0.9999, beta2=0.999, clip=1.0,
        ),
        Recipe(
            name="proper-guidance", gap="vsd", guidance=0.5, guidance_to=4.0, guide_lora=True, steps=244_000, batch=16,
            student_lr=1e-6, warmup=0, cooldown=0.0, lora_lr=1e-3, lora_rank=64, lora_alpha=108,
            lora_targets="to_q to_v", lora_updates=1, shared_forward=False, lora_weight="alpha", null_chance=0.1,
            t_init=None, t_low=20, t_high=980, ema=0.9999, beta2=0.999, clip=1.0,
        ),
        Recipe(
            name="dmd", gap="dmd", guidance=3.0, guide_lora=False, steps=100_000, batch=16,
            student_lr=1e-5, warmup=0, cooldown=0.0, lora_lr=1e-3, lora_rank=64, lora_alpha=108, lora_targets="all",
            lora_updates=1, shared_forward=False, lora_weight="alpha", null_chance=0.1,
            t_init=None, t_low=20, t_high=980, ema=0.9999, beta2=0.999, clip=1.0,
        ),
        Recipe(
            name="lcm", method="lcm", student_steps=4, guidance=8.5, w_min=5.0, w_max=15.0, steps=1000, batch=12,
            student_lr=1e-6, warmup=0, cooldown=0.0, ema=0.95, beta2=0.999, clip=1.0, **_VSD,
        ),
        Recipe(
            name="guided", method="guided", student_steps=1, guidance=7.5, w_min=0.0, w_max=14.0, steps=30_000,
            batch=16, student_lr=1e-5, warmup=0, cooldown=1.0, ema=0.999, beta2=0.999, clip=1.0, **_VSD,
        ),
        Recipe(
            name="stickers-lcm", method="lcm", student_steps=4, guidance=3.0, w_min=0.0, w_max=4.0, steps=3000,
            batch=32, student_lr=3e-4, warmup=50, cooldown=0.8, ema=0.95, beta2=0.99, clip=1.0, images=2000,
            image_steps=12, image_guidance=3.0, **_VSD,
        ),
        Recipe(
            name="stickers-guided", method="guided", student_steps=1, guidance=3.0, w_min=0.0, w_max=4.0, steps=3000,
            batch=32, student_lr=3e-4, warmup=50, cooldown=0.8, ema=0.99, beta2=0.99, clip=1.0, images=2000,
            image_steps=12, image_guidance=3.0, halve_from=16, guide_share=0.25, **_VSD,
        ),
        Recipe(
            name="stickers", gap="dmd", guidance=1.5, guide_lora=False, steps=3000, batch=32,
            student_lr=1.5e-4, warmup=50, cooldown=0.8, lora_lr=2e-3, lora_rank=64, lora_alpha=64, lora_targets="all",
            lora_updates=1, shared_forward=True, lora_weight="v", null_chance=0.0,
            t_init=625, t_low=200, t_high=980, ema=0.99, beta2=0.99, clip=1.0, lora_lr_end=0.1,
        ),
    )
}  # fmt: skip

"""The student within a checkpoint of a run: what it would be if the run ended there."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch

from sbrush.console import SbrushError, printable
from sbrush.models.card import about_student
from sbrush.models.ladder import Sampling
from sbrush.models.model import Model
from sbrush.models.parts import read_json
from sbrush.models.unet import add_lora, lora_targets, merge_lora, with_guidance_input
from sbrush.storage import checkpoint


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A checkpoint and what its run's config.json says of how it came to be."""

    saved: checkpoint.Checkpoint
    recipe: dict[str, Any]
    sampling: Sampling
    config: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Snapshot:
        """From `OUT/checkpoints/step-N`; SbrushError if it is damaged, or its run's configuration is."""
        shown = printable(folder)
        try:
            config = read_json(folder.parent.parent / "config.json")
            recipe = dict(config["recipe"])
            recipe["steps"] += sum(config.get("extended_by", ()))
            for key, kinds in (("ema", int | float), ("student_rank", int), ("t_init", int | None)):
                if not isinstance(recipe[key], kinds):
                    raise ValueError(f"its {key} cannot be {recipe[key]!r}")
            needed = {"teacher": str, "teacher_sha256": str, "seed": int, "prompts": dict, "sampling": dict}
            for key, kind in needed.items():
                if not isinstance(config[key], kind):
                    raise ValueError(f"its {key} is none")
            if not isinstance(config.get("teacher_config"), str | None):
                raise ValueError("its teacher_config is none")
            return cls(checkpoint.read(folder), recipe, Sampling(**config["sampling"]), config)
        except (OSError, ValueError, KeyError, TypeError) as problem:
            raise SbrushError(
                f"cannot read the checkpoint {shown}: {printable(problem)}",
                "a checkpoint is OUT/checkpoints/step-N of a run, with its config.json in OUT; try the one before",
            ) from problem

    @torch.no_grad()
    def student(self, teacher: Model) -> Model:
        """The average, or the student itself if the recipe has none, in float32 on the CPU; takes the teacher's UNet.

        SbrushError if the checkpoint is not made of this teacher's networks.
        """
        unet, part = teacher.unet, "ema" if self.recipe["ema"] else "student"
        if self.sampling.guidance is not None:
            unet = with_guidance_input(unet)
        tensors = self.saved.part(part)
        trained = dict(unet.named_parameters())
        foreign = SbrushError(
            f"the checkpoint {printable(self.saved.folder)} is not made of its teacher's networks",
            "it was changed by something else; try the one before",
        )
        if rank := self.recipe["student_rank"]:
            unet = copy.deepcopy(unet)
            try:  # methods differ in the layers that they give a LoRA
                trained = add_lora(unet, "student", rank=rank, alpha=2 * rank, targets=lora_targets(tensors), seed=0)
            except SbrushError as problem:
                raise foreign from problem
        if {k: v.shape for k, v in trained.items()} != {k: v.shape for k, v in tensors.items()}:
            raise foreign
        for name, parameter in trained.items():
            parameter.copy_(tensors[name])
        if rank:
            unet = merge_lora(unet, "student", teacher.unet)
        scheduler = self.sampling.scheduler(teacher.scheduler, self.recipe["t_init"])
        about = about_student(self.config, self.recipe, teacher) | {"after_step": self.saved.step}
        return dataclasses.replace(
            teacher.as_student(scheduler, about), unet=unet,
            name=f"{self.saved.folder.parent.parent.name} after step {self.saved.step}",
            sources={"config.json": self.saved.folder.parent.parent / "config.json",
                     f"{part}.safetensors": self.saved.folder / f"{part}.safetensors"},
        )  # fmt: skip

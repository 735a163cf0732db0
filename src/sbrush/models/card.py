"""What a student says of itself: sbrush.json, and README.md as the Hub and people read it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import sbrush
from sbrush.console import printable
from sbrush.models.model import Model
from sbrush.recipes import Recipe


def about_student(config: Mapping[str, Any], recipe: Recipe, teacher: Model) -> dict[str, Any]:
    """What sbrush.json says of a student, `config` being its run's config.json."""
    about = {
        "version": sbrush.__version__,
        "teacher": config["teacher"],
        "reparameterised": recipe.reparameterised,
        "recipe": dataclasses.asdict(recipe),
        "seed": config["seed"],
        "prompts": config["prompts"],
    }
    return about | {key: teacher.about[key] for key in ("world", "license", "safety_checker") if key in teacher.about}


def model_card(about: dict[str, Any]) -> str:
    """The student's README.md: front matter that the Hub reads, a snippet that runs, how it was made."""
    licence = about.get("license", "not stated in its folder")
    checker = "may have had a safety checker"
    if "safety_checker" in about:
        checker = "came with a safety checker" if about["safety_checker"] else "came without a safety checker"
    merged = "".join(f"| merged from | {_plain(json.dumps(part))} |\n" for part in about.get("merged", ()))
    recipe = "\n".join(f"| {key} | {value} |" for key, value in about["recipe"].items())
    teacher = _plain(about["teacher"])
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
tags: [one-step, distillation, swiftbrush, sbrush]
license: {json.dumps(about.get("license", "other"))}
base_model: {json.dumps(teacher)}
---

# A one-step student of {teacher}

Distilled with [SwiftBrush](https://arxiv.org/abs/2312.05239) (Variational Score Distillation) by sbrush
{about["version"]}, from {about["prompts"]["count"]} prompts and no pictures. Licence of the teacher: {_plain(licence)}.
The teacher {checker}; this folder has none.

```python
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("path/to/this/folder")
pipe("a cat", num_inference_steps=1, guidance_scale=1).images[0].save("cat.png")
```

One step and no guidance: the scheduler in this folder is made for that. The same picture:
`sbrush sample "a cat" --student path/to/this/folder`.

## Figures

None are recorded here. `sbrush eval --student path/to/this/folder` measures them and names its protocol.

## How it was made

| setting | value |
|---|---|
| seed | {about["seed"]} |
| prompts, SHA-256 | {about["prompts"]["sha256"]} |
{merged}{recipe}
"""


def _plain(text: str) -> str:
    """Text that Markdown and YAML take for text."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>#|" else c for c in printable(text))

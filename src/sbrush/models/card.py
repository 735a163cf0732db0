"""What a student says of itself: sbrush.json, and README.md as the Hub and people read it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import sbrush
from sbrush.console import printable
from sbrush.models.model import Model

STATED = ("license", "license_name", "license_link", "safety_checker")  # what others say that students must say too


def about_student(
    config: Mapping[str, Any], recipe: Mapping[str, Any], teacher: Model, init: Model | None = None
) -> dict[str, Any]:
    """What sbrush.json says of a student, `config` being its run's config.json and `recipe` the
    settings it was trained with; `init`: the student it began as."""
    about = {
        "version": sbrush.__version__,
        "teacher": config["teacher"],
        **({"teacher_sha256": config["teacher_sha256"]} if "teacher_sha256" in config else {}),
        "reparameterised": recipe["reparameterised"],
        "recipe": dict(recipe),
        "seed": config["seed"],
        "prompts": config["prompts"],
    }
    about |= {key: teacher.about[key] for key in ("world", *STATED) if key in teacher.about}
    if init is not None:
        about["init"] = {"student": config["init"]} | {key: init.about[key] for key in STATED if key in init.about}
    return about


def model_card(about: dict[str, Any]) -> str:
    """The student's README.md: front matter that the Hub reads, a snippet that runs, how it was made."""
    checker = "may have had a safety checker"
    if "safety_checker" in about:
        checker = "came with a safety checker" if about["safety_checker"] else "came without a safety checker"
    parts = [about["init"]] if "init" in about else about.get("merged", [])
    merged = "".join(
        f"| {'began as' if 'init' in about else 'merged from'} | {_plain(json.dumps(p))} |\n" for p in parts
    )
    # One of several licences cannot stand for all: the Hub is told "other", people are told each.
    licences = {_licence(part) for part in (about, *parts)}
    licence = about.get("license", "other") if len(licences) == 1 else "other"
    front = "".join(f"{key}: {json.dumps(about[key])}\n" for key in STATED[1:3] if key in about and len(licences) == 1)
    same = """One step and no guidance: the scheduler in this folder is made for that. The same image:
`sbrush sample "a cat" --student path/to/this/folder`."""
    if not about.get("reparameterised", True):
        same = """This student's output is the image itself (an ablation), which no scheduler of diffusers knows.
`sbrush sample "a cat" --student path/to/this/folder` draws it, the lines above do not."""
    recipe = "\n".join(f"| {key} | {value} |" for key, value in about["recipe"].items())
    teacher = _plain(about["teacher"])
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
tags: [one-step, distillation, swiftbrush, sbrush]
license: {json.dumps(licence)}
{front}base_model: {json.dumps(teacher)}
---

# A one-step student of {teacher}

Distilled with [SwiftBrush](https://arxiv.org/abs/2312.05239) (Variational Score Distillation) by sbrush
{about["version"]}, from {about["prompts"]["count"]} prompts and no images. Licence of what it was made of:
{_plain("; ".join(sorted(licences)))}.
The teacher {checker}; this folder has none.

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("path/to/this/folder")
pipe("a cat", num_inference_steps=1, guidance_scale=1).images[0].save("cat.png")
```

{same}

## Figures

None are recorded here. `sbrush eval --student path/to/this/folder` measures them and names its protocol.

## How it was made

| setting | value |
|---|---|
| seed | {about["seed"]} |
| prompts, SHA-256 | {about["prompts"]["sha256"]} |
{merged}{recipe}
"""


def lora_card(about: dict[str, Any]) -> str:
    """The README.md of a student's LoRA alone: what it is for, and what it does not say by itself."""
    step = "" if about["recipe"].get("t_init") is None else ", with the scheduler of the folder student/ beside it"
    return f"""---
base_model: {json.dumps(_plain(about["teacher"]))}
tags: [one-step, lora, swiftbrush, sbrush]
license: {json.dumps(about.get("license", "other"))}
---

# The LoRA of a one-step student of {_plain(about["teacher"])}

It turns its teacher into the student of the folder `student/`{step}. It works in one step and no other number, so it
needs that folder's one-step scheduler besides: with the teacher's own scheduler it draws noise.

```python
from diffusers import DDIMScheduler, DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("the teacher")
pipe.load_lora_weights("path/to/this/folder", weight_name="pytorch_lora_weights.safetensors")
pipe.scheduler = DDIMScheduler.from_pretrained("path/to/student/scheduler")
pipe("a cat", num_inference_steps=1, guidance_scale=1).images[0].save("cat.png")
```

For ComfyUI: `comfyui.safetensors`, sampler euler, scheduler simple, 1 step, cfg 1. Licence of the teacher:
{_plain(_licence(about))}.
"""


def _licence(about: Mapping[str, Any]) -> str:
    """As people read it."""
    name = about.get("license_name", about.get("license", "not stated in its folder"))
    return f"{name} ({about['license_link']})" if "license_link" in about else str(name)


def _plain(text: str) -> str:
    """Text that Markdown and YAML take for text."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>#|" else c for c in printable(text))

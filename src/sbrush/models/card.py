"""The description of a student: sbrush.json, and README.md as its model card."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import sbrush
from sbrush.console import count, printable
from sbrush.models.comfyui import instructions
from sbrush.models.ladder import Sampling
from sbrush.models.model import Model
from sbrush.models.scheduler_swap import same_image
from sbrush.models.source import BUILT_IN_STUDENTS


class About(NamedTuple):
    """A method as a card names it."""

    text: str
    tag: str


METHODS = {
    "vsd": About("[SwiftBrush](https://arxiv.org/abs/2312.05239) (Variational Score Distillation)", "swiftbrush"),
    "lcm": About("[latent consistency distillation](https://arxiv.org/abs/2310.04378)", "latent-consistency"),
    "guided": About("[Guided Distillation](https://arxiv.org/abs/2210.03142)", "guided-distillation"),
    "dreambooth": About("[DreamBooth](https://arxiv.org/abs/2208.12242)", "dreambooth"),
}
STATED = ("license", "license_name", "license_link", "safety_checker")  # what others say that students must say too
BUILT_IN_TEACHER = "stickers (built in)"
SHIPPED = """\
unet = UNet2DConditionModel.from_pretrained(BUILT_IN / "{folder}" / "unet")
scheduler = {scheduler}.from_pretrained(BUILT_IN / "{folder}" / "scheduler")
pipe = DiffusionPipeline.from_pretrained(BUILT_IN / "teacher", unet=unet, scheduler=scheduler)
pipe.to(torch.float32)
"""  # how diffusers loads the shipped student


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
        **Sampling(**config["sampling"]).about,
        "recipe": dict(recipe),
        "seed": config["seed"],
        "prompts": config["prompts"],
    }
    if config.get("images") is not None:
        about["images"] = config["images"]
    if config.get("control") is not None:
        about["control"] = config["control"]
    if config.get("teacher_config") is not None:
        about["teacher_config"] = config["teacher_config"]
    about |= {key: teacher.about[key] for key in ("world", *STATED) if key in teacher.about}
    if init is not None:
        about["init"] = {"student": config["init"]} | {key: init.about[key] for key in STATED if key in init.about}
    return about


def model_card(student: Model) -> str:
    """The student's README.md: front matter that the Hub reads, a snippet that runs, how it was made.

    `student` has its own scheduler and says in `about` what sbrush.json is to say.
    """
    about, own = student.about, type(student.sampler).__name__
    whole = len(set(student.folders.values())) == 1  # the shipped student's other parts are the built-in teacher's
    imports = {"DiffusionPipeline"} | sampling_imports(about)
    option, folder = " --student path/to/this/folder" if whole else "", student.folders["unet"].name
    first, load, holds = "", 'pipe = DiffusionPipeline.from_pretrained("path/to/this/folder")\n', ""
    if not whole:
        option = "".join(
            f" --student {name}" for name, place in BUILT_IN_STUDENTS.items() if place == folder != "student"
        )
        imports |= {own, "UNet2DConditionModel"}
        first = "from sbrush.models.load import BUILT_IN\n"
        load = SHIPPED.format(folder=folder, scheduler=own)
        holds = "\n- It consists of UNet and scheduler. Its other parts are those of its teacher."
    checker = "may have had a safety checker"
    if "safety_checker" in about:
        checker = "came with a safety checker" if about["safety_checker"] else "came without a safety checker"
    return f"""{front_matter(about)}
# A {kind(about)} student of {plain(about["teacher"])}

It draws an image of a prompt in {steps_text(about)}. sbrush {about["version"]} distilled it with
{method_text(about)}, from {prompts_text(about)} and {images_text(about)}.

- Licence of what it was made of: {plain("; ".join(sorted(licence_names(about))))}. This student is a derivative of it.
- Its teacher {checker}. This folder has none.{holds}

## Use it with diffusers

```python
import torch
from diffusers import {", ".join(sorted(imports))}
{first}
{load}{sampling_lines(about)}```

{same_text(student, option)}.

{schedulers_text(student)}

## Use it in ComfyUI

{instructions(student)}
## Figures

None are recorded here. `sbrush eval{option}` measures them and names its protocol.

{settings_table(about)}"""


def settings_table(about: Mapping[str, Any]) -> str:
    """The section of a card on how a student was made."""
    merged = "".join(f"| {what} | {plain(text)} |\n" for what, text in _origins(about))
    settings = "\n".join(f"| {key} | {plain(str(value))} |" for key, value in about["recipe"].items())
    whose = "\nThe settings are those of the first student that was merged.\n" if "merged" in about else ""
    return f"""## How it was made
{whose}
| setting | value |
|---|---|
| seed | {about["seed"]} |
| prompts, SHA-256 | {about["prompts"]["sha256"]} |
{merged}{settings}
"""


def front_matter(about: Mapping[str, Any], *tags: str) -> str:
    """The front matter that the Hub reads, in YAML, whose strings may be JSON's."""
    licences = licence_names(about)
    # One of several licences cannot stand for all: the Hub is told "other", people are told each.
    alone = {key: about[key] for key in STATED[:3] if key in about} if len(licences) == 1 else {}
    lines = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["one-step", "distillation", METHODS.get(_named(about), METHODS["vsd"]).tag, "sbrush", *tags],
        **({"license": "other"} | alone),
    }
    # The Hub refuses a card whose base model is not one of its own.
    if re.fullmatch(r"[\w.-]+/[\w.-]+", about["teacher"]) and not Path(about["teacher"]).exists():
        lines["base_model"] = about["teacher"]
    return "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in lines.items()) + "---\n"


def sampling_lines(about: Mapping[str, Any]) -> str:
    """The last lines of a snippet, after `pipe` is made."""
    lines = ""
    if not about.get("reparameterised", True):
        lines = "# The output of this student's UNet is the image itself.\n"
        lines += 'pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="sample")\n'
    numbers = f"num_inference_steps={about.get('steps', 1)}, guidance_scale={about.get('guidance', 1):g}"
    return f"""{lines}generator = torch.Generator().manual_seed(0)
image = pipe("a cat", {numbers}, generator=generator).images[0]
image.save("cat.png")
"""


def sampling_imports(about: Mapping[str, Any]) -> set[str]:
    """What _sampling needs of diffusers."""
    return set() if about.get("reparameterised", True) else {"DDIMScheduler"}


def kind(about: Mapping[str, Any]) -> str:
    return "one-step" if about.get("steps", 1) == 1 else f"{about['steps']}-step"


def steps_text(about: Mapping[str, Any]) -> str:
    return "a single step" if about.get("steps", 1) == 1 else f"{about['steps']} steps"


def able_text(student: Model) -> str:
    """How many steps a student takes, as the rest of a sentence."""
    if not student.ladder:
        return "one step and no other number"
    choices = student.ladder.choices
    return f"{choices[0]} to {choices[-1]} steps" if len(choices) > 1 else f"{choices[0]} steps and no other number"


def same_text(student: Model, options: str) -> str:
    """What draws the same image as the snippet: `sbrush sample` with these options besides."""
    if "guidance" in student.about:
        low, high = (1 + student.about["recipe"][name] for name in ("w_min", "w_max"))
        how = f"with a `guidance_scale` of {low:g} to {high:g}, which costs no second forward"
    else:
        how = "without guidance (`guidance_scale=1`)"
    keep = f"Keep to {able_text(student)}, {how}: it was trained for that and nothing else."
    if student.ladder and len(student.ladder.choices) > 1:
        options += f" --steps {student.ladder.trained}"
    return f"""{keep}
sbrush draws the same image: `sbrush sample "a cat" --seed 0{options}`"""


def schedulers_text(student: Model) -> str:
    """Which of diffusers' schedulers may take the place of the student's own."""
    if student.ladder:
        *others, last = map(str, student.rungs())
        return f"""The scheduler in this folder, `{type(student.sampler).__name__}`, takes the steps at the timesteps
{", ".join(others)} and {last}. Other schedulers draw another image."""
    own = student.scheduler
    if not student.about.get("reparameterised", True):
        own = type(own).from_config(own.config, prediction_type="sample")
    found = same_image(own)
    same, others = ([f"`{name}`" for name, is_same in found.items() if is_same is wanted] for wanted in (True, False))
    return f"""The scheduler in this folder takes the step at timestep {len(own.alphas_cumprod) - 1}.
Made of its configuration (`DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)`), these schedulers of
diffusers draw the same image: {", ".join(same)}.
These draw another image, without an error in most cases: {", ".join(others)}."""


def _origins(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a student was made of besides its teacher: its start, or those that were merged; rows of a table."""
    rows = []
    if "init" in about:
        rows.append(("started as", f"{about['init']['student']} (licence: {licence_text(about['init'])})"))
    if "control" in about:
        made = f"{about['control']['model']}, its control images made by {about['control']['prep']}"
        rows.append(("prepared for the ControlNet", made))
    for part in about.get("merged", ()):
        said = f"{part['share']:g} of {part['student']} (SHA-256 {part['sha256']}, licence: {licence_text(part)})"
        rows.append(("merged from", said))
    return rows


def licence_names(about: Mapping[str, Any]) -> set[str]:
    """Of the teacher and of all students that went into one, as people read them."""
    parts = [about["init"]] if "init" in about else about.get("merged", [])
    return {licence_text(part) for part in (about, *parts)}


def licence_text(about: Mapping[str, Any]) -> str:
    """As people read it."""
    name = about.get("license_name", about.get("license", "not stated in its folder"))
    return f"{name} ({about['license_link']})" if "license_link" in about else str(name)


def prompts_text(about: Mapping[str, Any]) -> str:
    return count(about["prompts"]["count"], "prompt")


def _named(about: Mapping[str, Any]) -> str:
    return str(about["recipe"].get("method", "vsd"))


def method_text(about: Mapping[str, Any]) -> str:
    """The method that it was trained with, linked to its paper; one of another's is called by its name."""
    return METHODS[_named(about)].text if _named(about) in METHODS else plain(_named(about))


def images_text(about: Mapping[str, Any]) -> str:
    """The images that it learned from, besides prompts."""
    if (images := about.get("images")) is None:
        return "no images"
    source = {"the teacher": "of the teacher's own", "stickers": "drawn by the built-in world"}
    return f"{count(images['count'], 'image')} {source.get(images['source'], 'of a folder')}"


def quoted(text: str) -> str:
    """A string as Python source, on one line."""
    return json.dumps(printable(text), ensure_ascii=False)


def plain(text: str) -> str:
    """Text that Markdown takes for text."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>#|" else c for c in printable(text))

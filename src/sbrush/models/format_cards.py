"""README.md of a student in another form than a folder: a LoRA, a single file, ONNX graphs."""

from __future__ import annotations

from sbrush.models.card import (
    BUILT_IN_TEACHER,
    able_text,
    front_matter,
    images_text,
    kind,
    licence_names,
    licence_text,
    method_text,
    plain,
    prompts_text,
    quoted,
    same_text,
    sampling_imports,
    sampling_lines,
    schedulers_text,
    settings_table,
    steps_text,
)
from sbrush.models.comfyui import has_known_unet, instructions, starts_before_the_end
from sbrush.models.model import Model

SD2_WIDTH = 1024  # of text embeddings: of such a UNet the web UI finds out by itself whether it predicts v


def lora_card(student: Model, *, measured: str = "") -> str:
    """The README.md of a student's LoRA alone, see model_card: what it is for, and what it needs besides.

    `measured`: how near it comes to the student, for one that was taken from a whole student.
    """
    about = student.about
    own = type(student.sampler).__name__
    imports = {own, "DiffusionPipeline"} | sampling_imports(about)
    load = f"DiffusionPipeline.from_pretrained({quoted(about['teacher'])})"
    first = ""
    if about["teacher"] == BUILT_IN_TEACHER:
        first = "from sbrush.models.load import BUILT_IN\n"
        load = 'DiffusionPipeline.from_pretrained(BUILT_IN / "teacher")'
    elif about["teacher"].lower().endswith(".safetensors"):
        config = f", config={quoted(about['teacher_config'])}" if "teacher_config" in about else ""
        imports = imports - {"DiffusionPipeline"} | {student.pipeline}
        load = f"{student.pipeline}.from_single_file({quoted(about['teacher'])}{config})"
    same = same_text(student, " --student path/to/student")
    beside = ", the folder of the merged student that was written beside this one."
    same += ", but for what the LoRA leaves out." if measured else beside
    return f"""{front_matter(about, "lora")}
# The LoRA of a {kind(about)} student of {plain(about["teacher"])}

It turns its teacher into a student that draws an image of a prompt in {steps_text(about)}. sbrush {about["version"]}
distilled it with {method_text(about)}, from {prompts_text(about)}
and {images_text(about)}.

- It works in {able_text(student)}, at strength 1 and without guidance.
- It needs the scheduler in `scheduler/` of this folder. With the teacher's own scheduler it draws noise.
- Licence of the teacher, of which it is a derivative: {plain(licence_text(about))}.
{measured}
## Use it with diffusers

```python
import torch
from diffusers import {", ".join(sorted(imports))}
{first}
pipe = {load}
pipe.load_lora_weights("path/to/this/folder", weight_name="pytorch_lora_weights.safetensors")
pipe.scheduler = {own}.from_pretrained("path/to/this/folder", subfolder="scheduler")
pipe.to(torch.float32)  # a teacher in half precision does not go together with a LoRA in float32
{sampling_lines(about)}```

{same}

{schedulers_text(student)}

## Use it in ComfyUI and sd-scripts

{instructions(student, lora=True)}
`comfyui.safetensors` names its layers as kohya's sd-scripts does, and changes no layers but those that sd-scripts
applies a LoRA to.
"""


def single_file_card(student: Model, file: str) -> str:
    """The README.md of a student in one `file`, which lies beside it with its scheduler."""
    about, own = student.about, type(student.sampler).__name__
    imports = {own, student.pipeline} | sampling_imports(about)
    config, first = "", ""
    if about["teacher"] == BUILT_IN_TEACHER:
        config, first = ', config=str(BUILT_IN / "teacher")', "from sbrush.models.load import BUILT_IN\n"
    elif "teacher_config" in about or not about["teacher"].lower().endswith(".safetensors"):
        config = f", config={quoted(about.get('teacher_config', about['teacher']))}"
    return f"""{front_matter(about, "single-file")}
{_introduction(student, "in a single file")}
- It works in {able_text(student)}, without guidance (CFG 1).
- `{file}` holds UNet, autoencoder and text encoder by Stable Diffusion's original names.
- `scheduler/` is for diffusers and sbrush: a single file has no scheduler.

## Use it in ComfyUI

{instructions(student, checkpoint=file)}
## Use it in AUTOMATIC1111's web UI and its forks

Copy `{file}` to `models/Stable-diffusion/`.
{_web_ui(student)}

## Use it with diffusers

```python
import torch
from diffusers import {", ".join(sorted(imports))}
{first}
pipe = {student.pipeline}.from_single_file("path/to/this/folder/{file}"{config})
pipe.scheduler = {own}.from_pretrained("path/to/this/folder", subfolder="scheduler")
{sampling_lines(about)}```

`config` takes the folder or Hub id of the teacher, for what a single file does not hold: configuration and tokenizer.
{same_text(student, " --student path/to/student")}, the student that this file was made of, but for rounding.

{schedulers_text(student)}

{settings_table(about)}"""


def onnx_card(student: Model) -> str:
    """The README.md of a student as ONNX graphs."""
    about = student.about
    steps = f"num_inference_steps={about.get('steps', 1)}, guidance_scale=1"
    return f"""{front_matter(about, "onnx")}
{_introduction(student, "as ONNX graphs")}
- It works in {able_text(student)}, without guidance.
- The graphs are `text_encoder/model.onnx`, `unet/model.onnx` and `vae_decoder/model.onnx`, in float32, each with its
  weights beside it. They take any number of images at once, of one size.

## Use it with sbrush

`sbrush sample "a cat" --seed 0 --student path/to/this/folder` draws with onnxruntime, on the CPU.

## Use it with optimum

The folder has the layout that optimum's pipelines load.

```python
from optimum.onnxruntime import ORTStableDiffusionPipeline

pipe = ORTStableDiffusionPipeline.from_pretrained("path/to/this/folder")
image = pipe("a cat", {steps}).images[0]
```

Keep to the scheduler in `scheduler/`. ComfyUI and AUTOMATIC1111's web UI have no stock nodes or samplers for ONNX.

{settings_table(about)}"""


def _introduction(student: Model, form: str) -> str:
    """The heading, and what was made of what."""
    about = student.about
    licences = plain("; ".join(sorted(licence_names(about))))
    return f"""# A {kind(about)} student of {plain(about["teacher"])}, {form}

It draws an image of a prompt in {steps_text(about)}. sbrush {about["version"]} distilled it with
{method_text(about)}, from {prompts_text(about)} and {images_text(about)}.

- Licence of what it was made of: {licences}. This student is a derivative of it."""


def _web_ui(student: Model) -> str:
    """How AUTOMATIC1111's web UI is to sample, or why it draws another image."""
    if not has_known_unet(student):
        return "It cannot draw with this student: its UNet is none of Stable Diffusion 1.x, 2.x or XL."
    if not student.about.get("reparameterised", True):
        return "It has no sampler for this student, whose UNet's output is the image itself."
    if student.ladder:
        return (
            "Its samplers stand on other timesteps than this student's several steps: the image is another, and less\n"
            "good. Use ComfyUI or diffusers."
        )
    if starts_before_the_end(student):
        return (
            "It starts every image at the end of the noise schedule, and this student starts before: the image is not "
            "this\nstudent's. Use ComfyUI or diffusers."
        )
    prediction = ""
    if student.prediction == "v_prediction" and student.unet.config.cross_attention_dim != SD2_WIDTH:
        prediction = (
            "\nThe student predicts v. The file says so in a tensor `v_pred`, which not every version reads: if images "
            "are\nnoise, use ComfyUI or diffusers."
        )
    return (
        "Take sampler `Euler`, schedule type `Simple`, sampling steps 1 and CFG scale 1. For sbrush's image of a "
        f"seed,\nset the random number generator to CPU and SGM noise multiplier on in its settings.{prediction}"
    )

"""A student in ComfyUI: the sampler settings of its one step, and a workflow of ComfyUI's own nodes.

ComfyUI counts noise in sigma_t / alpha_t, here `s`: x = x0 + s eps, of which the network sees x / sqrt(1 + s^2). The
student sees unit noise z at its timestep, so that x = sqrt(1 + s^2) z. At the end of ComfyUI's schedule KSampler scales
noise in just this way; before the end it takes s z, which is too little. There AddNoise adds noise at the sigma
sqrt(1 + s^2), and SamplerCustom takes the step from s to 0 without adding any.

A student of several steps from the end of the schedule on takes them with the sampler lcm, which noises each image
anew, at the timesteps of the scheduler simple: T, T - 1000 / N ... Its first noise is ours, those between are not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sbrush.console import count
from sbrush.models.model import Model

WORKFLOW = "comfyui-workflow.json"
# The UNets that ComfyUI knows, by the width of their text embeddings: channels, heads and transformers of each block.
UNETS = {
    768: ((320, 640, 1280, 1280), (8, 8, 8, 8), (1, 1, 1, 1)),
    1024: ((320, 640, 1280, 1280), (5, 10, 20, 20), (1, 1, 1, 1)),
    2048: ((320, 640, 1280), (5, 10, 20), (1, 2, 10)),
}
LAYERS = 2  # in each of their blocks
# Each file of a student's folder, and what it is to be called below ComfyUI's models/.
FILES = {
    "unet/diffusion_pytorch_model.safetensors": "diffusion_models/student-unet.safetensors",
    "text_encoder/model.safetensors": "text_encoders/student-text-encoder.safetensors",
    "text_encoder_2/model.safetensors": "text_encoders/student-text-encoder-2.safetensors",
    "vae/diffusion_pytorch_model.safetensors": "vae/student-vae.safetensors",
}
TEACHER, LORA = "checkpoints/teacher.safetensors", "loras/student.safetensors"


@dataclass(frozen=True)
class Step:
    """The one step: `prediction` and `zsnr` (the schedule ends in pure noise) are ModelSamplingDiscrete's.

    `sigmas`: at which noise is added, and from which the step goes to 0; None: KSampler does both.
    """

    prediction: str
    zsnr: bool
    sigmas: tuple[float, float] | None


def obstacle(student: Model) -> str | None:
    """Why ComfyUI's stock nodes cannot draw with a student, as the rest of a sentence; None if they can.

    `student`: with its own one-step scheduler; of its networks only the configuration is read.
    """
    if not student.about.get("reparameterised", True):
        return "its output is the image itself"
    if "guidance" in student.about:
        return "its UNet takes a guidance scale as input"
    step = _step(student)
    if step is None:
        return "its noise schedule is not Stable Diffusion's own"
    if student.ladder and not student.ladder.fresh:
        return "none of its samplers keeps the student's noise from one of these timesteps to the next"
    if student.ladder and step.sigmas:
        return "its several steps start before the end of the noise schedule"
    return None if has_known_unet(student) else "its UNet is none of Stable Diffusion 1.x, 2.x or XL"


def has_known_unet(student: Model) -> bool:
    """Whether a student's UNet is one that ComfyUI knows, see UNETS."""
    unet = student.unet.config
    depth = len(unet.block_out_channels)

    def of_each(value: int | tuple[int, ...] | list[int]) -> tuple[int, ...]:
        return (value,) * depth if isinstance(value, int) else tuple(value)

    shape = tuple(unet.block_out_channels), *map(of_each, (unet.attention_head_dim, unet.transformer_layers_per_block))
    return UNETS.get(unet.cross_attention_dim) == shape and of_each(unet.layers_per_block) == (LAYERS,) * depth


def workflow(student: Model, *, lora: bool = False, checkpoint: str | None = None) -> dict[str, Any]:
    """A workflow in ComfyUI's API format that draws "a cat" with seed 0; ValueError without such a noise schedule.

    Of the student's own files, named as in FILES; or with `lora` of the teacher's checkpoint and the LoRA; or of the
    student as a single file, whose name is `checkpoint`.
    """
    step = _step(student)
    if step is None:
        raise ValueError("ComfyUI has no such noise schedule")
    nodes, model, clip, vae = _loaders(student, lora, checkpoint)
    height, width = (8 * side for side in student.latent_shape[1:])
    nodes |= {
        "10": _node("ModelSamplingDiscrete", model=model, sampling=step.prediction, zsnr=step.zsnr),
        "11": _node("CLIPTextEncode", text="a cat", clip=clip),
        "12": _node("CLIPTextEncode", text="", clip=clip),  # which is not looked at with cfg 1
        "13": _node("EmptyLatentImage", width=width, height=height, batch_size=1),
    }
    drawn: dict[str, Any] = {"model": ["10", 0], "cfg": 1.0, "positive": ["11", 0], "negative": ["12", 0]}
    if step.sigmas is None:
        nodes["20"] = _node(
            "KSampler", **drawn, seed=0, steps=student.ladder.trained if student.ladder else 1,
            sampler_name=_sampler(student), scheduler="simple", denoise=1.0, latent_image=["13", 0],
        )  # fmt: skip
    else:
        nodes |= {
            "14": _node("RandomNoise", noise_seed=0),
            "15": _node("BasicScheduler", model=["10", 0], scheduler="simple", steps=1, denoise=1.0),
            "16": _node("SetFirstSigma", sigmas=["15", 0], sigma=step.sigmas[0]),
            "17": _node("SetFirstSigma", sigmas=["15", 0], sigma=step.sigmas[1]),
            "18": _node("AddNoise", model=["10", 0], noise=["14", 0], sigmas=["16", 0], latent_image=["13", 0]),
            "19": _node("KSamplerSelect", sampler_name="euler"),
            "20": _node(
                "SamplerCustom", **drawn, add_noise=False, noise_seed=0, sampler=["19", 0], sigmas=["17", 0],
                latent_image=["18", 0],
            ),
        }  # fmt: skip
    nodes["21"] = _node("VAEDecode", samples=["20", 0], vae=vae)
    nodes["22"] = _node("SaveImage", images=["21", 0], filename_prefix="sbrush")
    return nodes


def instructions(student: Model, *, lora: bool = False, checkpoint: str | None = None) -> str:
    """The section of a card on ComfyUI, in Markdown, without a heading."""
    if why := obstacle(student):
        return f"ComfyUI cannot draw with this student by its own nodes: {why}.\n"
    step = _step(student)
    assert step is not None  # else there is an obstacle
    rows = "".join(f"| `{file}` | `models/{place}` |\n" for file, place in _places(student, lora, checkpoint).items())
    if lora:
        rows += f"| the teacher, as a single `.safetensors` checkpoint | `models/{TEACHER}` |\n"
    node = f"`ModelSamplingDiscrete` with sampling `{step.prediction}`" + (" and zsnr on" if step.zsnr else "")
    if step.sigmas is None:
        steps = count(student.ladder.trained if student.ladder else 1, "step")
        how = f"`KSampler` with sampler `{_sampler(student)}`, scheduler `simple`, {steps}, cfg 1 and denoise 1"
    else:
        how = (
            f"`AddNoise` on an empty latent at sigma {step.sigmas[0]:.6f}, then `SamplerCustom` with add_noise off, "
            f"sampler `euler`, cfg 1 and the sigmas {step.sigmas[1]:.6f} and 0.\n`KSampler` cannot take this step: it "
            "scales the noise in another way, and draws another image"
        )
    same = "The same seed gives the same image as above, but for rounding"
    if student.ladder:
        same = (
            "Of several steps, the same seed gives another image than above: ComfyUI draws the later noise differently"
        )
    return f"""`{WORKFLOW}` draws with this student by ComfyUI's own nodes.
Copy the files below, then drop it on ComfyUI's window.

| file | place in ComfyUI |
|---|---|
{rows}
To build a workflow of your own, take {node}, then {how}.
{same}. ComfyUI reads parentheses in a prompt as emphasis.
"""


def starts_before_the_end(student: Model) -> bool:
    """Whether its first step is not at the end of Stable Diffusion's noise schedule."""
    step = _step(student)
    return step is None or step.sigmas is not None


def _sampler(student: Model) -> str:
    """ComfyUI's name of it."""
    return "lcm" if student.ladder else "euler"


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def _places(student: Model, lora: bool, checkpoint: str | None) -> dict[str, str]:
    """Which file of an exported folder goes where below ComfyUI's models/."""
    if lora:
        return {"comfyui.safetensors": LORA}
    if checkpoint:
        return {checkpoint: f"checkpoints/{checkpoint}"}
    return {file: place for file, place in FILES.items() if file.split("/")[0] in student.parts}


def _loaders(
    student: Model, lora: bool, checkpoint: str | None
) -> tuple[dict[str, Any], list[Any], list[Any], list[Any]]:
    """The nodes that load, and where the model, the text encoders and the autoencoder come out of them."""
    if checkpoint:
        return {"1": _node("CheckpointLoaderSimple", ckpt_name=checkpoint)}, ["1", 0], ["1", 1], ["1", 2]
    if lora:
        nodes = {
            "1": _node("CheckpointLoaderSimple", ckpt_name=_name(TEACHER)),
            "2": _node("LoraLoaderModelOnly", model=["1", 0], lora_name=_name(LORA), strength_model=1.0),
        }
        return nodes, ["2", 0], ["1", 1], ["1", 2]
    unet, text, second, vae = map(_name, FILES.values())
    clip = _node("CLIPLoader", clip_name=text, type="stable_diffusion")
    if "text_encoder_2" in student.parts:
        clip = _node("DualCLIPLoader", clip_name1=text, clip_name2=second, type="sdxl")
    nodes = {
        "1": _node("UNETLoader", unet_name=unet, weight_dtype="default"),
        "2": clip,
        "3": _node("VAELoader", vae_name=vae),
    }
    return nodes, ["1", 0], ["2", 0], ["3", 0]


def _name(place: str) -> str:
    return place.split("/")[1]


def _step(student: Model) -> Step | None:
    """None if ComfyUI has no such noise schedule, or no such prediction."""
    alphas_cumprod = student.scheduler.alphas_cumprod.double()
    prediction = {"epsilon": "eps", "v_prediction": "v_prediction"}.get(student.prediction)
    for zsnr in (False, True):
        theirs = _alphas_cumprod(zsnr)
        if prediction is None or len(alphas_cumprod) > len(theirs):
            return None
        if torch.allclose(theirs[: len(alphas_cumprod)], alphas_cumprod, rtol=1e-4, atol=1e-7):  # float32 here or there
            if len(alphas_cumprod) == len(theirs):
                return Step(prediction, zsnr, None)
            sigma = math.sqrt(1 / float(alphas_cumprod[-1]) - 1)
            return Step(prediction, zsnr, (math.hypot(1, sigma), sigma))
    return None


def _alphas_cumprod(zsnr: bool) -> Tensor:
    """ComfyUI's noise schedule, the only one that its nodes offer: alpha_t^2, float64 [1000]."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    alpha = (1 - betas).cumprod(0).sqrt()
    if zsnr:  # shifted and stretched, so that alpha_T is 0 (arXiv 2305.08891)
        alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    return alpha.square()

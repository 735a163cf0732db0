"""A student in ComfyUI: its workflow, followed by nodes written anew from what ComfyUI's do, draws the student's image.

The nodes count noise in s = sigma_t / alpha_t: x = x0 + s eps, the network sees x / sqrt(1 + s^2) at the timestep
whose s is nearest, and is taken for eps or v. Their schedule is Stable Diffusion's own, computed here in numpy.
"""

import dataclasses
import itertools
import json
import math
import re

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from conftest import build_tiny_teacher
from sbrush.benchmarks.full_size import UNETS
from sbrush.models import comfyui, export, ladder
from sbrush.models.card import model_card
from sbrush.models.format_cards import lora_card
from sbrush.models.load import load_teacher
from sbrush.models.schedule import one_step_scheduler
from sbrush.models.unet import STUDENT_TARGETS, add_lora
from sbrush.sampling.generation import student_latents

# Each node's inputs as ComfyUI's own source names them; "outputs" is how many it has.
NODES = {
    "CheckpointLoaderSimple": ({"ckpt_name"}, 3),
    "LoraLoaderModelOnly": ({"model", "lora_name", "strength_model"}, 1),
    "UNETLoader": ({"unet_name", "weight_dtype"}, 1),
    "CLIPLoader": ({"clip_name", "type"}, 1),
    "DualCLIPLoader": ({"clip_name1", "clip_name2", "type"}, 1),
    "VAELoader": ({"vae_name"}, 1),
    "ModelSamplingDiscrete": ({"model", "sampling", "zsnr"}, 1),
    "CLIPTextEncode": ({"text", "clip"}, 1),
    "EmptyLatentImage": ({"width", "height", "batch_size"}, 1),
    "RandomNoise": ({"noise_seed"}, 1),
    "BasicScheduler": ({"model", "scheduler", "steps", "denoise"}, 1),
    "SetFirstSigma": ({"sigmas", "sigma"}, 1),
    "AddNoise": ({"model", "noise", "sigmas", "latent_image"}, 1),
    "KSamplerSelect": ({"sampler_name"}, 1),
    "SamplerCustom": (
        {"model", "add_noise", "noise_seed", "cfg", "positive", "negative", "sampler", "sigmas", "latent_image"}, 2,
    ),
    "KSampler": (
        {"model", "seed", "steps", "cfg", "sampler_name", "scheduler", "positive", "negative", "latent_image",
         "denoise"}, 1,
    ),
    "VAEDecode": ({"samples", "vae"}, 1),
    "SaveImage": ({"images", "filename_prefix"}, 0),
}  # fmt: skip


class Sampling:
    """ModelSamplingDiscrete: the schedule, and the network as a denoiser of x = x0 + s eps."""

    def __init__(self, student, kind, zsnr):
        self.student, self.kind = student, kind
        abar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
        if zsnr:
            root = np.sqrt(abar)
            abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
            abar[-1] = 5e-8  # ComfyUI's own end is about this, for the division
        self.s = np.sqrt((1 - abar) / abar)

    def denoise(self, x, s, prompt):
        t = int(np.abs(np.log(s) - np.log(self.s)).argmin())
        cond = self.student.encode([prompt])
        output = self.student.predict(self.student.unet, x / math.sqrt(1 + s * s), torch.tensor([t]), cond)
        return x - s * output if self.kind == "eps" else x / (1 + s * s) - output * s / math.sqrt(1 + s * s)


def noise(seed, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def euler(sampling, x, sigmas, prompt):
    for here, there in itertools.pairwise(sigmas):
        x = x + (x - sampling.denoise(x, here, prompt)) / here * (there - here)
    return x


@torch.no_grad()
def follow(nodes, student):
    """The latents that arrive at VAEDecode."""

    def at(link):
        return result(nodes[link[0]])

    def result(node):
        kind, i = node["class_type"], node["inputs"]
        match kind:
            case "ModelSamplingDiscrete":
                return Sampling(student, i["sampling"], i["zsnr"])
            case "CLIPTextEncode":
                return i["text"]
            case "EmptyLatentImage":
                return torch.zeros(i["batch_size"], 4, i["height"] // 8, i["width"] // 8)
            case "BasicScheduler":
                assert (i["scheduler"], i["steps"], i["denoise"]) == ("simple", 1, 1.0)
                return [at(i["model"]).s[-1], 0.0]
            case "SetFirstSigma":
                assert 0 <= i["sigma"] <= 20000  # the node's own limits
                return [i["sigma"], *at(i["sigmas"])[1:]]
            case "RandomNoise":
                return i["noise_seed"]
            case "AddNoise":
                sigmas, empty = at(i["sigmas"]), at(i["latent_image"])
                return empty + abs(sigmas[0] - sigmas[-1]) * noise(at(i["noise"]), empty.shape)
            case "KSampler":
                assert (i["sampler_name"], i["scheduler"], i["steps"], i["denoise"]) == ("euler", "simple", 1, 1.0)
                sampling, empty = at(i["model"]), at(i["latent_image"])
                x = empty + noise(i["seed"], empty.shape) * math.sqrt(1 + sampling.s[-1] ** 2)
                return euler(sampling, x, [sampling.s[-1], 0.0], at(i["positive"]))
            case "SamplerCustom":
                assert not i["add_noise"] and nodes[i["sampler"][0]]["inputs"] == {"sampler_name": "euler"}
                return euler(at(i["model"]), at(i["latent_image"]), at(i["sigmas"]), at(i["positive"]))
        raise AssertionError(kind)

    (end,) = (node for node in nodes.values() if node["class_type"] == "VAEDecode")
    return at(end["inputs"]["samples"])


def make(folder, prediction="epsilon", t_init=None, zsnr=False, **about):
    """A tiny student, its weights those of its teacher."""
    teacher = load_teacher(str(build_tiny_teacher(folder, prediction=prediction)))
    own = teacher.scheduler
    if zsnr:
        own = DDIMScheduler.from_config(own.config, rescale_betas_zero_snr=True)
    return dataclasses.replace(teacher, scheduler=one_step_scheduler(own, t_init), about=ABOUT | about)


ABOUT = {"version": "0", "teacher": "t", "reparameterised": True, "recipe": {"name": "x"}, "seed": 0,
         "prompts": {"count": 3, "sha256": "0"}}  # fmt: skip
# From pure noise on a schedule that ends there ComfyUI stops short of it, by sqrt(5e-8) of the noise.
CASES = [
    ("epsilon", None, False, 1e-5), ("epsilon", 625, False, 1e-5), ("v_prediction", None, False, 1e-5),
    ("v_prediction", 625, False, 1e-5), ("v_prediction", 700, True, 1e-5), ("v_prediction", None, True, 2e-3),
]  # fmt: skip


@pytest.mark.parametrize("form", [{}, {"lora": True}, {"checkpoint": "fast.safetensors"}], ids=["full", "lora", "file"])
@pytest.mark.parametrize(("prediction", "t_init", "zsnr", "bound"), CASES)
def test_the_workflow_draws_the_students_image(tmp_path, prediction, t_init, zsnr, bound, form):
    student = make(tmp_path, prediction, t_init, zsnr)
    nodes = comfyui.workflow(student, **form)
    for node in nodes.values():  # and is one that ComfyUI takes
        inputs, _ = NODES[node["class_type"]]
        assert node["inputs"].keys() == inputs
        for value in node["inputs"].values():
            if isinstance(value, list):
                assert value[1] < NODES[nodes[value[0]]["class_type"]][1]
    (ours,) = student_latents(student, ["a cat"], [0])
    theirs = follow(nodes, student)
    assert (theirs - ours).abs().max() <= bound * max(1, ours.abs().max()) and ours.std() > 0.1
    assert ("KSampler" in {node["class_type"] for node in nodes.values()}) == (t_init is None)


def test_another_start_would_draw_another_image(tmp_path):
    """What the card said before, and KSampler at the right sigma: both are far off."""
    student = make(tmp_path, "epsilon", 625)
    (ours,) = student_latents(student, ["a cat"], [0])
    said_before = comfyui.workflow(dataclasses.replace(student, scheduler=one_step_scheduler(student.scheduler, None)))
    nodes = comfyui.workflow(make(tmp_path / "T", "epsilon", None))
    assert said_before != nodes and (follow(nodes, student) - ours).abs().max() > 1
    right = comfyui.workflow(student)
    right["16"]["inputs"]["sigma"] = right["17"]["inputs"]["sigma"]
    assert (follow(right, student) - ours).abs().max() > 0.1


def big(name, **changed):
    """A UNet of a full size without numbers."""
    with torch.device("meta"):
        config = UNETS[name] | ({"transformer_layers_per_block": (1, 2, 10)} if name == "sdxl" else {})
        return UNet2DConditionModel(**(config | changed))


@pytest.mark.parametrize("name", UNETS)
def test_the_numbers_on_a_card_are_those_of_the_schedule(tmp_path, name):
    abar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    for t_init in (None, 400, 625):
        student = dataclasses.replace(make(tmp_path, "epsilon", t_init), unet=big(name))
        for text in (model_card(student), lora_card(student)):
            assert comfyui.WORKFLOW in text and "cannot draw with this student" not in text
            if t_init is None:
                assert "sampler `euler`, scheduler `simple`, 1 step, cfg 1" in text
                continue
            s = math.sqrt(1 / abar[t_init] - 1)
            found = re.search(
                r"at sigma ([\d.]+), then `SamplerCustom` .*\n?.*the sigmas ([\d.]+) and 0", text
            ).groups()
            assert [float(number) for number in found] == pytest.approx([math.sqrt(1 + s * s), s], rel=1e-5)


def test_what_stock_nodes_cannot_draw_gets_no_workflow_and_says_why(tmp_path):
    student = make(tmp_path, "epsilon", 625)
    known = dataclasses.replace(student, unet=big("sd15"))
    other = DDIMScheduler.from_config(student.scheduler.config, trained_betas=None, beta_schedule="linear")
    cases = {
        "its UNet is none of Stable Diffusion": student,
        "its UNet is none of": dataclasses.replace(student, unet=big("sd15", layers_per_block=1)),
        "its noise schedule is not": dataclasses.replace(known, scheduler=other),
        "its output is the image": dataclasses.replace(known, about=ABOUT | {"reparameterised": False}),
    }
    for why, case in cases.items():
        assert comfyui.obstacle(case).startswith(why)
        for text in (model_card(case), lora_card(case)):
            assert f"ComfyUI cannot draw with this student by its own nodes: {why}" in text
            assert comfyui.WORKFLOW not in text
    assert comfyui.obstacle(known) is None
    with pytest.raises(ValueError, match="no such noise schedule"):
        comfyui.workflow(cases["its noise schedule is not"])


def test_both_folders_ship_the_workflow(tmp_path, monkeypatch):
    student = make(tmp_path / "teacher", "epsilon")
    config = student.unet.config
    monkeypatch.setitem(comfyui.UNETS, config.cross_attention_dim, ((8, 16), (config.attention_head_dim,) * 2, (1, 1)))
    monkeypatch.setattr(comfyui, "LAYERS", 1)
    add_lora(student.unet, "student", rank=2, alpha=2, targets=STUDENT_TARGETS, seed=0)
    teacher = load_teacher(str(tmp_path / "teacher"))
    cut = ladder.Sampling().scheduler(teacher.scheduler, 625)
    export.export_lora(tmp_path / "lora", teacher, student.unet, "student", about=ABOUT, scheduler=cut)
    export.export_student(tmp_path / "student", teacher, teacher.unet, about=ABOUT, scheduler=cut)
    for folder, lora in (("lora", True), ("student", False)):
        shipped = json.loads((tmp_path / folder / comfyui.WORKFLOW).read_text())
        exported = dataclasses.replace(teacher, scheduler=one_step_scheduler(teacher.scheduler, 625))
        assert shipped == comfyui.workflow(exported, lora=lora)
        text = (tmp_path / folder / "README.md").read_text()
        places = dict(re.findall(r"^\| `(.+?)` \| `models/(.+?)` \|$", text, re.MULTILINE))
        assert all((tmp_path / folder / file).is_file() for file in places) and places
        named = {str(value) for node in shipped.values() for value in node["inputs"].values()}
        assert {place.split("/")[1] for place in places.values()} <= named

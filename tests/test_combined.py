"""LoRA, ControlNet and negative prompt at once, in one step and in four: plain diffusers draws the same image."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import sbrush as package
from conftest import sbrush
from sbrush.models.load import load_student
from sbrush.models.lora_request import LoraRequest
from sbrush.models.negative_attention import negative_guidance, negative_processors
from sbrush.sampling.control import load_steering
from sbrush.sampling.control_request import Control
from sbrush.sampling.generation import student_images
from sbrush.sampling.guidance import with_negative
from sbrush.sampling.negative_request import Negative
from test_control import folders, hint  # noqa: F401
from test_lora import in_layout, layers_of, written

AWAY = Negative("a red dog", "nasa", 0.9)
LORA_WEIGHT, CONTROL_SCALE = 0.6, 0.7


@pytest.fixture(params=["sd", "xl"])
def parts(request, folders, tmp_path):  # noqa: F811
    """Of SD's and of SDXL's format: students of four steps and of one, a LoRA's file, a ControlNet."""
    kind = request.param
    made = layers_of(load_student(str(folders[kind])))
    lora = written(tmp_path / "lora.safetensors", in_layout(made, "kohya", xl=kind == "xl"))
    return {4: folders[kind], 1: folders[f"{kind} one"]}, lora, folders[f"{kind} 1"]


def ours(folder, *, lora=None, control=None, hint=None, away=None):  # noqa: F811
    """The image of "a red cat", seed 5, with what is given: float [3, H, W]."""
    student = load_student(str(folder), loras=[LoraRequest(str(lora), LORA_WEIGHT)] if lora else [])
    images = None
    if control:
        steering = load_steering(student, [Control(str(control), hint, CONTROL_SCALE)])
        student, images = steering.steer(student), steering.images
    student = with_negative(student, away)
    return next(student_images(student, ["a red cat"], [5], control=images))[0].float()


def in_plain_diffusers(folder, steps, *, lora=None, control=None, hint=None, away=None):  # noqa: F811
    from diffusers import AutoPipelineForText2Image, ControlNetModel

    more = {"controlnet": ControlNetModel.from_pretrained(control)} if control else {}
    pipe = AutoPipelineForText2Image.from_pretrained(folder, **more)
    pipe.set_progress_bar_config(disable=True)
    if lora:
        pipe.load_lora_weights(str(lora), adapter_name="one")
        pipe.set_adapters(["one"], [LORA_WEIGHT])
    if away:
        tokens = pipe.encode_prompt(
            away.text, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )[0]
        guidance = negative_guidance(pipe.unet, away.method, away.scale)
        pipe.unet.set_attn_processor(negative_processors(pipe.unet, tokens, guidance))
    steer = {"image": hint, "controlnet_conditioning_scale": CONTROL_SCALE} if control else {}
    drawn = pipe(
        "a red cat", num_inference_steps=steps, guidance_scale=1, generator=torch.Generator().manual_seed(5),
        output_type="np", **steer,
    )  # fmt: skip
    return torch.from_numpy(drawn.images[0] * 255).round().permute(2, 0, 1)


@pytest.mark.parametrize("steps", [1, 4])
def test_all_at_once_and_two_at_a_time(parts, hint, steps):  # noqa: F811
    """Each leaves its mark: without any of the three the image is another."""
    students, lora, control = parts
    everything = {"lora": lora, "control": control, "hint": hint, "away": AWAY}
    whole = ours(students[steps], **everything)
    assert (whole - in_plain_diffusers(students[steps], steps, **everything)).abs().max() <= 1
    for missing in ("lora", "control", "away"):
        two = everything | {missing: None}
        drawn = ours(students[steps], **two)
        assert (drawn - whole).abs().mean() > 1, missing
        if steps == 1:
            assert (drawn - in_plain_diffusers(students[1], 1, **two)).abs().max() <= 1, missing


def test_the_command_records_all_three_and_says_how_to_go_on(folders, hint, tmp_path):  # noqa: F811
    hint.save(tmp_path / "hint.png")
    student, control = folders["sd one"], folders["sd 1"]
    made = layers_of(load_student(str(student)))
    lora = written(tmp_path / "lora.safetensors", in_layout(made, "peft", xl=False))
    flags = [
        "--student", student, "--lora", f"{lora}:{LORA_WEIGHT}", "--control", control,
        "--control-image", tmp_path / "hint.png", "--control-scale", CONTROL_SCALE,
        "--negative", AWAY.text, "--negative-method", AWAY.method, "--negative-scale", AWAY.scale,
    ]  # fmt: skip
    done = sbrush("sample", "a red cat", "--seed", 5, "--device", "cpu", *flags, "-o", tmp_path / "cat.png")
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "cat.png") as image:
        written_image, record = np.array(image.convert("RGB")), json.loads(image.info["sbrush"])
    expected = ours(student, lora=lora, control=control, hint=hint, away=AWAY)
    assert np.array_equal(written_image, expected.to(torch.uint8).permute(1, 2, 0).numpy())
    assert record["control"] and record["loras"] and record["negative"] == AWAY.text
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("next: ") and all(f"{flag}" in last for flag in flags), last
    api = package.load_student(str(student), device="cpu", loras=[f"{lora}:{LORA_WEIGHT}"])
    same = api("a red cat", seed=5, control=package.Control(str(control), hint, CONTROL_SCALE), negative=AWAY)
    assert np.array_equal(np.array(same), written_image)
    assert not np.array_equal(np.array(api("a red cat", seed=5, negative=replace(AWAY, text="blue"))), written_image)

"""A ControlNet in the loop: who is given which control images, what a run records, what is refused."""

import dataclasses
import json
import shutil

import pytest
import torch

from conftest import sbrush
from sbrush.models.control import ControlNet
from sbrush.models.load import load_student, load_teacher
from sbrush.models.load_control import load_control
from sbrush.models.unet import set_role
from sbrush.noise import StepNoise
from sbrush.prompts import ShuffledPrompts
from sbrush.sampling.preprocess import canny
from sbrush.training.cost import Prepared, estimate
from sbrush.training.methods.rehearsal import forwards
from sbrush.training.plan import prepare
from sbrush.training.request import ExecutionOptions, RunRequest
from test_control import control_folder
from test_distill import PROMPTS, SMALL, distiller, shake_lora
from test_few_steps import student_folder

PREPARE = ["--control", "outline", "--control-prep", "outline", "--init", "stickers"]
LOW = dataclasses.replace(SMALL, guide_lora=False, lora_updates=2, null_chance=0.5, batch=2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_teacher):
    root = tmp_path_factory.mktemp("steering")
    student = student_folder(root / "student", tiny_teacher, steps=1)
    return {"student": student, "control": control_folder(root / "control", tiny_teacher), "out": root / "run"}


def steered(teacher, folders, recipe=SMALL, precision="no"):
    """A distiller with the ControlNet in its loop, and its LoRA teacher shaken."""
    model = load_teacher(str(teacher))
    controls = (ControlNet(load_control(str(folders["control"]), model), 0.8, "canny"),)
    from accelerate import Accelerator

    from sbrush.training.methods.vsd import VSD

    made = VSD(
        dataclasses.replace(model, controls=controls), recipe, seed=3,
        accelerator=Accelerator(cpu=True, mixed_precision=precision),
        init=load_student(str(folders["student"])),
    )  # fmt: skip
    shake_lora(made)
    return made


def test_a_step_with_a_controlnet_is_the_formulas_written_out(tiny_teacher, folders):
    """Control images of the first student's images; the same for the student and both halves of both scores."""
    ours = steered(tiny_teacher, folders)
    teacher, init = ours.teacher, load_student(str(folders["student"]))
    control, order = load_control(str(folders["control"]), init), ShuffledPrompts(PROMPTS, 3)
    draw = StepNoise(3, 1, range(4), torch.device("cpu"))
    tokens, empty = (teacher.encode(texts)["tokens"] for texts in ([order[i] for i in range(4)], [""] * 4))
    abar, T = teacher.scheduler.alphas_cumprod, torch.full((4,), 999)

    def image(unet, z, **steering):
        return (z - (1 - abar[999]).sqrt() * unet(z, T, tokens, **steering).sample) / abar[999].sqrt()

    def steering(x, t, told):
        down, mid = control(
            x, t, told, controlnet_cond=hint, conditioning_scale=0.8, return_dict=False
        )  # fmt: skip
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}

    with torch.no_grad():
        hint = canny(teacher.decode(image(init.unet, draw.normal(teacher.latent_shape)))).float() / 255
        assert hint.any()
        z = draw.normal(teacher.latent_shape)
        x0 = image(ours.student, z, **steering(z, T, tokens))
        t, noise = draw.timesteps(20, 980), draw.normal(teacher.latent_shape)
        a = abar[t].view(-1, 1, 1, 1)
        x_t = a.sqrt() * x0 + (1 - a).sqrt() * noise

        def guided(role):
            set_role(teacher.unet, role)
            cond, null = (teacher.unet(x_t, t, told, **steering(x_t, t, told)).sample for told in (tokens, empty))
            return null + ours.recipe.guidance * (cond - null)

        gap = (1 - a) * (guided("teacher") - guided("lora_teacher"))
    metrics = ours.step(1, order)
    assert torch.allclose(metrics["x0"], x0, atol=1e-4)
    assert torch.isclose(metrics["gap"], gap.abs().mean(), rtol=1e-3)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_only_student_and_lora_change(tiny_teacher, folders, precision):
    ours = steered(tiny_teacher, folders, LOW, precision)
    frozen = [*ours.teacher.controls[0].network.parameters(), *ours._control_images._source.unet.parameters()]
    before = [p.detach().clone() for p in frozen]
    student = [p.detach().clone() for p in ours.student.parameters()]
    for step in (1, 2):
        ours.step(step, ShuffledPrompts(PROMPTS, 3))
    assert all(torch.equal(p, b) and p.grad is None for p, b in zip(frozen, before, strict=True))
    assert any(not torch.equal(p, b) for p, b in zip(ours.student.parameters(), student, strict=True))


def test_a_run_records_its_controlnet_and_goes_on(tiny_teacher, folders, prompt_file):
    command = [
        "distill", prompt_file, "--teacher", tiny_teacher, "--out", folders["out"], "--init", folders["student"],
        "--control", folders["control"], "--control-prep", "canny", "--batch", 2, "--steps", 2, "--grid-every", 0,
        "--device", "cpu", "--precision", "float32",
    ]  # fmt: skip
    told = sbrush(*command, "--dry-run")
    assert told.returncode == 0 and f"ControlNet: {folders['control']}, control images by canny" in told.stdout
    assert "student as it was, frozen" in told.stdout
    done = sbrush(*command)
    assert done.returncode == 0, done.stderr
    said = json.loads((folders["out"] / "student" / "sbrush.json").read_text())["control"]
    assert said["model"] == str(folders["control"]) and said["prep"] == "canny" and len(said["sha256"]) == 64
    assert "prepared for the ControlNet" in (folders["out"] / "student" / "README.md").read_text()
    moved = shutil.copytree(folders["control"], folders["out"].parent / "moved")
    for control in (folders["control"], moved):  # the same one by another name is the same run
        again = sbrush(*[control if word == folders["control"] else word for word in command])
        assert again.returncode == 0 and "is complete" in again.stderr
    other = sbrush(*["outline" if word == "canny" else word for word in command])
    assert other.returncode == 2 and "control.prep was" in other.stderr


def test_the_cost_counts_the_controlnet(tiny_teacher, folders):
    plain = estimate(str(tiny_teacher), SMALL, ExecutionOptions())
    with_it = estimate(str(tiny_teacher), SMALL, ExecutionOptions(), prepared=Prepared(control=str(folders["control"])))
    control = load_control(str(folders["control"]), load_teacher(str(tiny_teacher)))
    assert with_it.memory["ControlNet, frozen"] == sum(p.nbytes for p in control.parameters())
    assert with_it.memory["student as it was, frozen"] == 4 * plain.parameters["UNet"]
    assert with_it.forwards == forwards(SMALL) + 1 and with_it.flops > plain.flops
    assert with_it.checkpoint == plain.checkpoint


def test_without_one_nothing_is_drawn_or_recorded(tiny_teacher, tmp_path):
    ours = distiller(tiny_teacher, SMALL)
    assert ours._control_images is None and ours.teachers.null_of({"tokens": torch.zeros(1)}).keys() == {"tokens"}
    request = RunRequest(SMALL, PROMPTS, out=tmp_path, teacher=str(tiny_teacher), precision="float32")
    assert prepare(request).run.config["control"] is None


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--control-prep", "canny"], "--control-prep is for a ControlNet"),
        (["--control-scale", 1], "--control-scale is for a ControlNet"),
        (["--control", "outline"], "does not say how its control images are made"),
        (["--control", "outline", "--control-prep", "outline", "--control-scale", 99], "a control scale of 99"),
        (["--control", "nothing", "--control-prep", "outline"], "no ControlNet nothing"),
        (["--control", "outline", "--control-prep", "outline"], "--control prepares a student"),
        (["--control", "outline", "--control-prep", "outline", "--recipe", "stickers-v2"], "draws already"),
        ([*PREPARE, "--recipe", "lcm"], "method lcm trains without"),
    ],
)
def test_what_cannot_be_prepared_is_refused(tmp_path, prompt_file, flags, said):
    done = sbrush("distill", prompt_file, "--out", tmp_path / "run", "--device", "cpu", *flags)
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert done.stderr.count("error:") == done.stderr.count("hint:") == 1

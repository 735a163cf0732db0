"""Prompts whose images stay while a student learns a new subject: methods/holding.py."""

import dataclasses

import pytest
import torch
from accelerate import Accelerator

from conftest import sbrush
from sbrush.console import SbrushError
from sbrush.models.load import load_student, load_teacher
from sbrush.noise import StepNoise
from sbrush.prompts import ShuffledPrompts, make_prompts
from sbrush.training.methods.holding import Held
from sbrush.training.methods.method import split_batch
from sbrush.training.methods.rehearsal import forwards
from sbrush.training.methods.vsd import VSD
from sbrush.training.plan import prepare
from sbrush.training.request import ExecutionOptions, HoldRequest, RunRequest
from test_distill import PROMPTS, SMALL, distiller
from test_few_steps import student_folder

OTHERS = make_prompts(["a cat", "a house", "a boat"], "others")
HELD = dataclasses.replace(SMALL, hold=4, hold_weight=50.0)


@pytest.fixture(scope="module")
def before(tmp_path_factory, tiny_teacher):
    return student_folder(tmp_path_factory.mktemp("holding") / "student", tiny_teacher, steps=1)


def holding(teacher, before, recipe=HELD, **options):
    ours = distiller(teacher, recipe, init=load_student(str(before)), **options)
    ours.hold(Held(load_student(str(before)), OTHERS))
    return ours


@torch.no_grad()
def far(ours, student):
    """The mean squared distance of the student's images of the other prompts from another's, on fresh noise."""
    teacher = ours.teacher
    z = StepNoise(9, 1, range(8), torch.device("cpu")).normal(teacher.latent_shape)
    t, tokens = torch.full((8,), 999), teacher.encode([OTHERS.texts[i % 3] for i in range(8)])["tokens"]
    return (ours.student(z, t, tokens).sample - student.unet(z, t, tokens).sample).pow(2).mean().item()


def test_the_loss_is_the_distance_from_what_the_student_drew_of_samples_beyond_the_batch(tiny_teacher, before):
    ours, old = holding(tiny_teacher, before), load_student(str(before))
    step = ours._holding.loss(ours._as_student, 2, 0, range(4))
    assert step < 1e-9  # it starts as that student
    with torch.no_grad():
        for parameter in ours.student.parameters():
            parameter.mul_(1.1)
    order, teacher = ShuffledPrompts(OTHERS, 3), ours.teacher
    z = StepNoise(3, 2, range(4, 8), torch.device("cpu")).normal(teacher.latent_shape)
    t, tokens = torch.full((4,), 999), teacher.encode([order[4 + i] for i in range(4)])["tokens"]
    abar = teacher.scheduler.alphas_cumprod[999]
    with torch.no_grad():
        x0, was = (
            (z - (1 - abar).sqrt() * unet(z, t, tokens).sample) / abar.sqrt() for unet in (ours.student, old.unet)
        )
    loss = ours._holding.loss(ours._as_student, 2, 0, range(4))
    assert loss.requires_grad and torch.isclose(loss.detach(), 0.5 * (x0 - was).pow(2).mean(), rtol=1e-4)


def test_a_student_that_is_held_leaves_its_images_less(tiny_teacher, before):
    recipe = dataclasses.replace(HELD, student_lr=1e-3, steps=4)
    free = distiller(tiny_teacher, dataclasses.replace(recipe, hold=0), init=load_student(str(before)))
    ours, old = holding(tiny_teacher, before, recipe), load_student(str(before))
    frozen = ours._holding._before.unet
    was = [p.detach().clone() for p in frozen.parameters()]
    for step in range(1, 5):
        metrics = ours.step(step, ShuffledPrompts(PROMPTS, 3))
        free.step(step, ShuffledPrompts(PROMPTS, 3))
    assert metrics["hold_loss"] > 0
    assert far(ours, old) < 0.5 * far(free, old)
    assert all(torch.equal(p, w) and p.grad is None for p, w in zip(frozen.parameters(), was, strict=True))


def test_micro_batches_hold_the_same_samples(tiny_teacher, before):
    losses = []
    for parts in (1, 2):
        ours = holding(tiny_teacher, before, execution=ExecutionOptions(micro_batches=parts))
        with torch.no_grad():
            for parameter in ours.student.parameters():
                parameter.mul_(1.1)
        losses.append(ours.step(1, ShuffledPrompts(PROMPTS, 3))["hold_loss"])
    assert torch.isclose(*losses, rtol=1e-4)


def test_a_run_says_what_it_holds_and_none_can_hold_to_nothing(tmp_path, tiny_teacher, before, prompt_file):
    request = RunRequest(
        HELD, PROMPTS, tmp_path / "run", teacher=str(tiny_teacher), init=str(before),
        hold=HoldRequest(str(before), OTHERS), precision="float32",
    )  # fmt: skip
    plan = prepare(request)
    assert plan.run.config["held"]["prompts_sha256"] == OTHERS.sha256 and plan.held.prompts == OTHERS
    assert forwards(HELD) == forwards(dataclasses.replace(HELD, hold=0)) + 4
    done = sbrush("distill", prompt_file, "--set", "hold=4", "--dry-run")
    assert done.returncode == 2 and "hold needs a student" in done.stderr and "hint:" in done.stderr
    with pytest.raises(SbrushError, match="3 held samples"):
        split_batch(dataclasses.replace(HELD, hold=3), ExecutionOptions(micro_batches=2), 0, 1)


def test_the_old_student_computes_in_the_precision_of_the_training(tiny_teacher, before):
    ours = VSD(
        load_teacher(str(tiny_teacher)), HELD, seed=3, accelerator=Accelerator(cpu=True, mixed_precision="bf16"),
        init=load_student(str(before)),
    )  # fmt: skip
    ours.hold(Held(load_student(str(before)), OTHERS))
    assert ours._holding.loss(ours._as_student, 1, 0, range(4)) < 1e-4

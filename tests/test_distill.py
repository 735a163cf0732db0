"""The loop: one step against the paper written out by hand, resuming, refusing, what a run leaves behind."""

import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers import DDIMScheduler
from safetensors.torch import load_file

import gradients
from conftest import build_tiny_teacher, sbrush
from launch import launch
from sbrush import core
from sbrush.console import SbrushError
from sbrush.models.load import load_shapes, load_student, load_teacher
from sbrush.models.unet import set_role
from sbrush.noise import StepNoise
from sbrush.prompts import ShuffledPrompts, make_prompts, read_prompts
from sbrush.storage import checkpoint
from sbrush.training.engine import make_accelerator
from sbrush.training.loop import CheckpointTimer, distill, stop_requests
from sbrush.training.methods.vsd import VSD
from sbrush.training.plan import check, prepare
from sbrush.training.recipes import RECIPES
from sbrush.training.request import ExecutionOptions, Intervals, RunRequest
from sbrush.training.run import read_log

PROMPTS = make_prompts(["a cat", "a dog", "a red fish", "a blue car on a mint background"], "four")
SMALL = dataclasses.replace(
    RECIPES["swiftbrush"], steps=6, batch=4, student_lr=1e-3, lora_lr=1e-2, lora_rank=4, lora_alpha=4
)


def distiller(teacher, recipe, **options):
    return VSD(load_teacher(str(teacher)), recipe, seed=3, accelerator=Accelerator(cpu=True), **options)


EVERY = Intervals(log=2, grid=3, checkpoint=3)


def plan(teacher, out, recipe=SMALL, prompts=PROMPTS, seed=3, init=None, every=EVERY):
    return prepare(RunRequest(
        recipe, prompts, out=out, teacher=str(teacher), init=init, seed=seed, device="cpu", precision="float32",
        every=every,
    ))  # fmt: skip


def by_hand(distiller, step):
    """x0 and the gap of one SwiftBrush step, four separate calls, straight from the paper's formulas."""
    recipe, teacher = distiller.recipe, distiller.teacher
    order = ShuffledPrompts(PROMPTS, 3)
    draw = StepNoise(3, step, range(recipe.batch), torch.device("cpu"))
    conditioning = teacher.encode([order[(step - 1) * recipe.batch + i] for i in range(recipe.batch)])
    empty = teacher.encode([""] * recipe.batch)
    abar = teacher.scheduler.alphas_cumprod
    z = draw.normal(teacher.latent_shape)
    T = torch.full((recipe.batch,), 999)
    x0 = (z - (1 - abar[999]).sqrt() * distiller.student(z, T, conditioning["tokens"]).sample) / abar[999].sqrt()
    t, noise = draw.timesteps(20, 980), draw.normal(teacher.latent_shape)
    a = abar[t].view(-1, 1, 1, 1)
    x_t = (a.sqrt() * x0 + (1 - a).sqrt() * noise).detach()

    def guided():
        cond, null = teacher.unet(x_t, t, conditioning["tokens"]).sample, teacher.unet(x_t, t, empty["tokens"]).sample
        return null + recipe.guidance * (cond - null)

    with torch.no_grad():
        set_role(teacher.unet, "teacher")
        phi = guided()
        set_role(teacher.unet, "lora_teacher")
        psi = guided()
    return x0, (1 - a) * (phi - psi)


def shake_lora(distiller):
    torch.manual_seed(1)
    for parameter in distiller.lora.values():
        parameter.data.normal_(std=0.1)


def test_a_step_is_the_papers_formulas_written_out(tiny_teacher):
    ours = distiller(tiny_teacher, SMALL)
    shake_lora(ours)
    x0, gap = by_hand(ours, 1)
    (x0 * gap / x0.numel()).sum().backward()  # the gradient of the loss by x0 is gap / numel
    expected = [p.grad.clone() for p in ours.student.parameters()]
    norm = torch.stack([g.norm() for g in expected]).norm()
    ours.student.zero_grad()
    seen = {}
    ours.student_optimizer.step = lambda: seen.update(g=[p.grad.clone() for p in ours.student.parameters()])
    metrics = ours.step(1, ShuffledPrompts(PROMPTS, 3))
    assert torch.allclose(metrics["x0"], x0.detach(), atol=1e-4)
    assert torch.isclose(metrics["gap"], gap.abs().mean(), rtol=1e-4)
    assert torch.isclose(metrics["student_grad"], norm, rtol=1e-3)
    mine, theirs = (torch.cat([g.flatten() for g in gradients]) for gradients in (seen["g"], expected))
    theirs *= min(1.0, 1.0 / norm.item())
    assert (mine - theirs).norm() < 5e-3 * theirs.norm()  # the scores' difference cancels most digits


def test_the_gap_is_zero_before_the_lora_teacher_has_learned_anything(tiny_teacher):
    ours = distiller(tiny_teacher, SMALL)
    before = [p.detach().clone() for p in ours.student.parameters()]
    metrics = ours.step(1, ShuffledPrompts(PROMPTS, 3))
    assert metrics["gap"] == 0 and metrics["lora_loss"] > 0
    assert all(torch.equal(p, b) for p, b in zip(ours.student.parameters(), before, strict=True))
    assert ours.step(2, ShuffledPrompts(PROMPTS, 3))["gap"] > 0


def test_only_student_and_lora_change(tiny_teacher):
    ours = distiller(tiny_teacher, SMALL)
    frozen = {n: p.detach().clone() for n, p in ours.teacher.unet.named_parameters() if not p.requires_grad}
    assert frozen
    for step in (1, 2, 3):
        ours.step(step, ShuffledPrompts(PROMPTS, 3))
    now = dict(ours.teacher.unet.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())
    assert all(p.requires_grad for p in ours.lora.values()) and any(p.abs().sum() > 0 for p in ours.lora.values())


def test_a_shared_forward_gives_the_same_gap_and_trains_the_lora_teacher_on_it(tiny_teacher):
    apart = dataclasses.replace(SMALL, guidance=1.0, guide_lora=False)
    one, two, fresh = (
        distiller(tiny_teacher, recipe)
        for recipe in (apart, dataclasses.replace(apart, shared_forward=True), apart)
    )  # fmt: skip
    for each in (one, two, fresh):
        shake_lora(each)
    before = [p.detach().clone() for p in two.lora.values()]
    order = ShuffledPrompts(PROMPTS, 3)
    first, second = one.step(1, order), two.step(1, order)
    assert second["gap"] == first["gap"] > 0 and second["student_grad"] == first["student_grad"]
    draw, abar = StepNoise(3, 1, range(4), torch.device("cpu")), fresh.teacher.scheduler.alphas_cumprod
    draw.normal((4, 16, 16))
    t, noise = draw.timesteps(20, 980), draw.normal((4, 16, 16))
    a = abar[t].view(-1, 1, 1, 1)
    conditioning = fresh.teacher.encode([order[i] for i in range(4)])
    with torch.no_grad():
        psi = fresh.teacher.unet(a.sqrt() * second["x0"] + (1 - a).sqrt() * noise, t, conditioning["tokens"]).sample
    assert torch.isclose(second["lora_loss"], (a * (psi - noise).pow(2)).mean(), rtol=1e-4)
    assert second["lora_grad"] > 0 and not all(
        torch.equal(p, b) for p, b in zip(two.lora.values(), before, strict=True)
    )
    with pytest.raises(ValueError, match="guided"):
        dataclasses.replace(SMALL, shared_forward=True)


def test_without_a_lora_teacher_the_gap_is_score_distillation_sampling(tiny_teacher):
    ours = distiller(tiny_teacher, dataclasses.replace(SMALL, gap="sds"))
    lora = [p.detach().clone() for p in ours.lora.values()]
    metrics = ours.step(1, ShuffledPrompts(PROMPTS, 3))
    assert metrics["gap"] > 0.01 and metrics["lora_loss"] == 0
    assert all(torch.equal(p, b) for p, b in zip(ours.lora.values(), lora, strict=True))


def test_without_the_reparameterisation_x0_is_the_unets_output(tiny_teacher):
    ours = distiller(tiny_teacher, dataclasses.replace(SMALL, reparameterised=False))
    draw = StepNoise(3, 1, range(4), torch.device("cpu"))
    order = ShuffledPrompts(PROMPTS, 3)
    conditioning = ours.teacher.encode([order[i] for i in range(4)])
    with torch.no_grad():
        output = ours.student(draw.normal((4, 16, 16)), torch.full((4,), 999), conditioning["tokens"]).sample
    assert torch.allclose(ours.step(1, order)["x0"], output, atol=1e-5)


def test_pairs_hold_some_samples_to_the_teachers_own_images_of_their_noise(tiny_teacher):
    plain = dataclasses.replace(SMALL, student_lr=0.0)
    paired = dataclasses.replace(plain, pairs=2, pair_steps=4, pair_guidance=2.0, pair_weight=0.7)
    order = ShuffledPrompts(PROMPTS, 3)
    without, ours = distiller(tiny_teacher, plain).step(2, order), distiller(tiny_teacher, paired)
    result = ours.step(2, order)
    draw, teacher = StepNoise(3, 2, range(4), torch.device("cpu")), load_teacher(str(tiny_teacher))
    x, conditioning = draw.normal((4, 16, 16))[[0, 2]], teacher.encode([order[4], order[6]])
    abar = teacher.scheduler.alphas_cumprod
    for now, then in ((999, 749), (749, 499), (499, 249), (249, None)):  # DDIM, written out
        with torch.no_grad():
            t = torch.full((2,), now)
            cond, null = (teacher.unet(x, t, w["tokens"]).sample for w in (conditioning, teacher.encode(["", ""])))
        eps = null + 2.0 * (cond - null)
        x0 = (x - (1 - abar[now]).sqrt() * eps) / abar[now].sqrt()
        x = x0 if then is None else abar[then].sqrt() * x0 + (1 - abar[then]).sqrt() * eps
    expected = 0.5 * (result["x0"][[0, 2]] - x).pow(2).mean()
    assert torch.isclose(result["pair_loss"], expected, rtol=1e-3) and without["pair_loss"] == 0
    assert torch.isclose(result["student_loss"] - without["student_loss"], 0.7 * 2 / 4 * expected, rtol=1e-3)
    assert all(p.requires_grad for p in ours.lora.values())
    with pytest.raises(ValueError, match="divides"):
        dataclasses.replace(SMALL, pairs=3)


def test_a_random_guidance_scale_is_one_for_the_step_and_for_both_scores(tiny_teacher):
    ours = distiller(tiny_teacher, dataclasses.replace(RECIPES["proper-guidance"], batch=4, lora_rank=4))
    scales = []
    guided = core.guided_epsilon

    def watch(denoise, x_t, t, cond, null, scale, *rest):
        scales.append(scale)
        return guided(denoise, x_t, t, cond, null, scale, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core, "guided_epsilon", watch)
        for step in range(1, 6):
            ours.step(step, ShuffledPrompts(PROMPTS, 3))
    assert scales[::2] == scales[1::2] and len(set(scales)) == 5  # teacher and LoRA teacher alike, each step anew
    assert all(0.5 <= s <= 4 for s in scales) and max(scales) - min(scales) > 0.5


def test_guidance_below_a_timestep_only(tiny_teacher):
    seen = {}

    def watch(denoise, x_t, t, cond, null, scale, *rest):
        if isinstance(scale, torch.Tensor):
            seen.update(t=t, scale=scale)
        return x_t

    recipe = dataclasses.replace(SMALL, guide_lora=False, guidance=3.0, guidance_high=500, batch=16)
    ours = distiller(tiny_teacher, recipe)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core, "guided_epsilon", watch)
        ours.step(1, ShuffledPrompts(PROMPTS, 3))
    assert seen["scale"].shape == (16, 1, 1, 1)
    assert [s.item() for s in seen["scale"]] == [3.0 if t <= 500 else 1.0 for t in seen["t"]]
    assert len(set(seen["scale"].flatten().tolist())) == 2


def test_pairs_end_with_their_share_of_the_run(tiny_teacher):
    recipe = dataclasses.replace(SMALL, steps=4, pairs=4, pair_steps=1, pair_share=0.5)
    ours, order = distiller(tiny_teacher, recipe), ShuffledPrompts(PROMPTS, 3)
    assert [ours.step(step, order)["pair_loss"] > 0 for step in (1, 2, 3, 4)] == [True, True, False, False]


def test_an_earlier_start_takes_the_noise_for_x_t_there(tiny_teacher):
    ours = distiller(tiny_teacher, dataclasses.replace(SMALL, t_init=700))
    draw, order = StepNoise(3, 1, range(4), torch.device("cpu")), ShuffledPrompts(PROMPTS, 3)
    conditioning = ours.teacher.encode([order[i] for i in range(4)])
    z, abar = draw.normal((4, 16, 16)), ours.teacher.scheduler.alphas_cumprod[700]
    with torch.no_grad():
        output = ours.student(z, torch.full((4,), 700), conditioning["tokens"]).sample
    assert torch.allclose(ours.step(1, order)["x0"], (z - (1 - abar).sqrt() * output) / abar.sqrt(), atol=1e-4)


def test_a_start_beyond_the_schedule_is_refused(tmp_path, tiny_teacher):
    with pytest.raises(SbrushError, match="beyond the teacher's last timestep, 999") as refused:
        plan(tiny_teacher, tmp_path / "run", dataclasses.replace(SMALL, t_init=1000))
    assert refused.value.code == 2 and not (tmp_path / "run").exists()


def test_the_students_learning_rate_rises_while_the_lora_teacher_learns_at_full_rate(tiny_teacher):
    def first_change(warmup):
        ours, order = (
            distiller(tiny_teacher, dataclasses.replace(SMALL, warmup=warmup, guide_lora=False)),
            ShuffledPrompts(PROMPTS, 3),
        )
        before = [p.detach().clone() for p in ours.student.parameters()]
        lora = [p.detach().clone() for p in ours.lora.values()]
        ours.step(1, order)
        change = [(p - b).abs().max() for p, b in zip(ours.student.parameters(), before, strict=True)]
        return max(change), max((p - b).abs().max() for p, b in zip(ours.lora.values(), lora, strict=True))

    (full, lora), (tenth, same) = first_change(0), first_change(10)
    assert (
        abs(tenth / full - 0.1) < 1e-3 and abs(full - SMALL.student_lr) < 1e-5
    )  # Adam's first step is the rate itself
    assert same == lora > SMALL.lora_lr / 2


def test_the_lora_teacher_may_learn_alone_at_first(tiny_teacher, monkeypatch):
    ours = distiller(tiny_teacher, dataclasses.replace(SMALL, steps=5, warmup=2, lora_lead=2, shared_forward=False))
    order, with_gradient, student_x0 = ShuffledPrompts(PROMPTS, 0), [], core.student_x0

    def watch(output, *args, **kwargs):
        with_gradient.append(output.requires_grad)
        return student_x0(output, *args, **kwargs)

    monkeypatch.setattr(core, "student_x0", watch)

    def changed(step):
        before = [[p.detach().clone() for p in part] for part in (ours.trained.values(), ours.lora.values())]
        metrics = ours.step(step, order)
        now = (ours.trained.values(), ours.lora.values())
        moved = [
            any(not torch.equal(p, b) for p, b in zip(part, old, strict=True))
            for part, old in zip(now, before, strict=True)
        ]
        return moved, metrics["student_grad"] > 0

    assert [changed(step) for step in (1, 2)] == [([False, True], False)] * 2
    assert all(p.grad is None for p in ours.trained.values())  # or the student's first update would be of three steps
    assert changed(3) == ([True, True], True)
    assert with_gradient == [False, False, True]  # what nothing learns from keeps no activations
    assert [ours.recipe.student_lr_at(s) for s in (2, 3, 4)] == pytest.approx(
        [0, SMALL.student_lr / 2, SMALL.student_lr]
    )


def test_the_students_learning_rate_rises_stays_and_falls_to_the_end():
    recipe = dataclasses.replace(SMALL, steps=100, warmup=10, cooldown=0.5, student_lr=1.0)
    assert [recipe.student_lr_at(s) for s in (1, 10, 50, 51, 76, 100)] == pytest.approx([0.1, 1, 1, 1, 0.5, 0.02])
    falling = dataclasses.replace(recipe, lora_lr=2.0, lora_lr_end=0.1)
    assert [falling.lora_lr_at(s) for s in (1, 51, 76, 100)] == pytest.approx([2, 2, 1.1, 2 * (0.1 + 0.9 * 0.02)])
    assert {recipe.lora_lr_at(s) for s in (1, 76, 100)} == {recipe.lora_lr}
    constant = dataclasses.replace(recipe, warmup=0, cooldown=0.0)
    assert {constant.student_lr_at(s) for s in (1, 50, 100)} == {1.0}


def student_weights(out):
    return load_file(out / "student" / "unet" / "diffusion_pytorch_model.safetensors")


def test_an_interrupted_run_ends_with_the_same_student_and_log(tmp_path, tiny_teacher, monkeypatch):
    assert distill(plan(tiny_teacher, tmp_path / "whole"))
    save, written = checkpoint.save, []

    def killed_after(folder, step, parts, **options):
        save(folder, step, parts, **options)
        written.append(step)
        raise SystemExit("killed")

    monkeypatch.setattr(checkpoint, "save", killed_after)
    with pytest.raises(SystemExit):
        distill(plan(tiny_teacher, tmp_path / "parts"))
    monkeypatch.undo()
    with (tmp_path / "parts" / "log.jsonl").open("a") as log:  # what a kill between checkpoints leaves
        log.write('{"step": 4, "gap": 9}\n{"step": 5, "ga')
    assert written == [3] and not (tmp_path / "parts" / "student").exists()
    assert distill(plan(tiny_teacher, tmp_path / "parts"))
    whole, parts = student_weights(tmp_path / "whole"), student_weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    logged = [json.loads(line)["step"] for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert logged == sorted(set(logged)) and logged[-1] == 6


def test_a_run_leaves_what_it_promises(tmp_path, tiny_teacher):
    out = tmp_path / "run"
    assert distill(plan(tiny_teacher, out))
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [e["step"] for e in entries] == [1, 2, 3, 4, 6]
    assert {"gap", "student_loss", "lora_loss", "x0_mean", "x0_std", "images_per_second"} <= entries[0].keys()
    names = {p.name for p in (out / "samples").iterdir()}
    assert names == {"teacher.png", "teacher.json"} | {
        f"{kind}-{step:06d}.png" for kind in ("step", "x0") for step in (1, 3, 6)
    }
    config = json.loads((out / "config.json").read_text())
    assert config["recipe"]["batch"] == 4 and config["prompts"]["count"] == 4 and config["format"] == 1
    about = json.loads((out / "student" / "sbrush.json").read_text())
    assert about["seed"] == 3 and about["prompts"]["sha256"] == PROMPTS.sha256
    before = (out / "student" / "sbrush.json").stat().st_mtime_ns
    assert distill(plan(tiny_teacher, out))  # complete: nothing is done again
    assert (out / "student" / "sbrush.json").stat().st_mtime_ns == before


def test_a_changed_configuration_is_refused_with_the_difference(tmp_path, tiny_teacher):
    plan(tiny_teacher, tmp_path / "run").run.claim()
    changed = dataclasses.replace(SMALL, batch=8)
    with pytest.raises(SbrushError, match=r"recipe.batch was 4, now 8"):
        plan(tiny_teacher, tmp_path / "run", changed).run.claim()
    with pytest.raises(SbrushError, match=r"prompts.sha256 was"):
        plan(tiny_teacher, tmp_path / "run", prompts=make_prompts(["a"], "four")).run.claim()
    with pytest.raises(SbrushError, match=r"seed was 3, now 4"):
        plan(tiny_teacher, tmp_path / "run", seed=4).run.claim()


def test_a_run_from_before_a_setting_existed_goes_on_with_its_default(tmp_path, tiny_teacher):
    plan(tiny_teacher, tmp_path / "run").run.claim()
    file = tmp_path / "run" / "config.json"
    config = json.loads(file.read_text())
    del config["recipe"]["student_rank"], config["clip"]
    file.write_text(json.dumps(config))
    plan(tiny_teacher, tmp_path / "run").run.claim()
    with pytest.raises(SbrushError, match=r"recipe.student_rank was 0, now 3"):
        plan(tiny_teacher, tmp_path / "run", dataclasses.replace(SMALL, student_rank=3)).run.claim()


def test_other_engines_are_refused(tmp_path, tiny_teacher, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.DEEPSPEED)
    with pytest.raises(SbrushError, match="under DEEPSPEED") as caught:
        plan(tiny_teacher, tmp_path / "run")
    assert "--student-lora" in caught.value.hint and not (tmp_path / "run").exists()


def test_a_folder_of_somebody_elses_is_left_alone(tmp_path, tiny_teacher):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(SbrushError, match="no run of sbrush"):
        plan(tiny_teacher, tmp_path).run.claim()
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(SbrushError, match="is a file"):
        plan(tiny_teacher, tmp_path / "thesis.tex").run.claim()


def test_init_starts_from_another_student(tmp_path, tiny_teacher):
    assert distill(plan(tiny_teacher, tmp_path / "first"))
    second = plan(tiny_teacher, tmp_path / "second", init=str(tmp_path / "first"))
    assert second.run.config["init_sha256"] and second.init
    ours = VSD(second.teacher, SMALL, seed=3, accelerator=second.accelerator, init=second.init)
    weights = student_weights(tmp_path / "first")
    assert all(torch.equal(p, weights[name]) for name, p in ours.student.named_parameters())


def test_init_may_name_the_built_in_student(tmp_path, prompt_file, monkeypatch):
    run = sbrush(
        "distill", prompt_file, "--init", "stickers", "--out", tmp_path / "run", "--steps", 1, "--batch", 2,
        "--grid-every", 0, "--student-lr", 1e-30,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    shipped, ours = load_student(), student_weights(tmp_path / "run")
    assert all(torch.allclose(p, ours[name], rtol=0, atol=1e-20) for name, p in shipped.unet.named_parameters())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stickers").mkdir()  # a folder of this name goes first
    refused = sbrush("sample", "a cat", "--student", "stickers", "-o", tmp_path / "cat.png")
    assert refused.returncode == 2 and "no Stable Diffusion model" in refused.stderr


def test_an_init_that_means_something_else_by_noise_words_or_output_is_refused(tmp_path, tiny_teacher, tiny_xl):
    assert distill(plan(tiny_teacher, tmp_path / "late", dataclasses.replace(SMALL, steps=1, t_init=700)))
    v = build_tiny_teacher(tmp_path / "v", prediction="v_prediction")
    linear = shutil.copytree(tiny_teacher, tmp_path / "linear")
    scheduler = json.loads((linear / "scheduler" / "scheduler_config.json").read_text())
    (linear / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler | {"beta_schedule": "linear"}))
    early, late = SMALL, dataclasses.replace(SMALL, t_init=700)
    for init, recipe, complaint in (
        (tiny_xl, early, "another architecture"),  # as many channels, other conditioning
        (v, early, "predicts v_prediction, the teacher epsilon"),
        (linear, early, "another noise schedule"),
        (tmp_path / "late", early, "takes its step at timestep 700, this run at 999"),
        (tiny_teacher, late, "takes its step at timestep 999, this run at 700"),
        (tmp_path / "late", dataclasses.replace(late, reparameterised=False), "not a student without"),
    ):
        with pytest.raises(SbrushError, match=complaint):
            plan(tiny_teacher, tmp_path / "run", recipe, init=str(init))
    assert plan(tiny_teacher, tmp_path / "run", late, init=str(tmp_path / "late")).init
    assert plan(tiny_teacher, tmp_path / "run", early, init=str(tiny_teacher)).init


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_handlers_come_back(number, capfd):
    before = signal.getsignal(number)
    with stop_requests() as stop:
        assert not stop.asked
        os.kill(os.getpid(), number)
        assert stop.asked and signal.getsignal(number) == signal.SIG_DFL  # the second one ends the program
    assert signal.getsignal(number) == before and "stopping after this step" in capfd.readouterr().err


def test_checkpoints_come_as_often_as_they_are_worth(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("sbrush.training.loop.time.monotonic", lambda: now[0])

    def saved_at(every, *, a_step, a_save, steps):
        saving, found = CheckpointTimer(every, Accelerator(cpu=True)), []
        for step in range(1, steps + 1):
            now[0] += a_step
            if saving.due(step):
                found.append(step)
                with saving.timed():
                    now[0] += a_save
        return found

    assert saved_at(3, a_step=1, a_save=1000, steps=10) == [3, 6, 9]
    assert saved_at(None, a_step=1, a_save=1, steps=1000) == [200, 400, 600, 800, 1000]
    # 200 steps take a minute and a checkpoint half of one: its share of the time stays below a twentieth.
    found = saved_at(None, a_step=0.3, a_save=30, steps=20_000)
    assert found[0] == 200 and {b - a for a, b in itertools.pairwise(found)} == {2000}
    assert 30 / (2000 * 0.3 + 30) <= 0.05 < 30 / (1800 * 0.3 + 30)


def test_a_stopped_run_saves_and_goes_on(tmp_path, tiny_teacher):
    out, real = tmp_path / "run", VSD.step

    def asked_in_step_two(self, step, prompts):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, step, prompts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VSD, "step", asked_in_step_two)
        assert distill(plan(tiny_teacher, out)) is False
    assert checkpoint.newest(out / "checkpoints").step == 2
    assert distill(plan(tiny_teacher, out))
    assert distill(plan(tiny_teacher, tmp_path / "whole"))
    whole, parts = student_weights(tmp_path / "whole"), student_weights(out)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def distil_four_steps(teacher, out, *options, **how):
    """The student, its log, and what was said: of four steps, with a checkpoint after the second."""
    prompts = out.parent / "prompts.txt"
    prompts.write_text("a cat\na dog\na red fish\na blue car\n")
    done = sbrush(
        "distill", prompts, "--teacher", teacher, "--out", out, "--recipe", "swiftbrush", "--steps", 4, "--batch", 4,
        "--student-lr", 1e-3, "--device", "cpu", "--precision", "float32", "--checkpoint-every", 2, *options, **how,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return student_weights(out), read_log(out), done.stderr


def assert_same_direction(one, other, teacher):
    """Two students have learnt the same, but for rounding."""
    start = dict(load_teacher(str(teacher)).unet.named_parameters())
    learnt = [torch.cat([(weights[k] - start[k]).flatten() for k in start]) for weights in (one, other)]
    assert torch.cosine_similarity(*learnt, dim=0) > 0.999 and abs(learnt[0].norm() / learnt[1].norm() - 1) < 1e-3


def without_its_last_steps(out):
    """A complete run as if it had ended after its second step."""
    shutil.rmtree(out / "student")
    shutil.rmtree(out / "checkpoints" / "step-000004")


@pytest.mark.parametrize("options", [[], ["--micro-batches", "2"], ["--student-lora", "3"]], ids=" ".join)
def test_two_processes_make_the_student_of_one_and_one_can_go_on(tmp_path, tiny_teacher, options):
    one, log, _ = distil_four_steps(tiny_teacher, tmp_path / "one", *options)
    two, other, _ = distil_four_steps(tiny_teacher, tmp_path / "two", *options, processes=2)
    assert_same_direction(one, two, tiny_teacher)
    assert log[-1]["gap"] == pytest.approx(other[-1]["gap"], rel=1e-3)  # the mean over both processes
    without_its_last_steps(tmp_path / "two")
    rest, _, said = distil_four_steps(tiny_teacher, tmp_path / "two", *options)
    assert "resuming after step 2" in said
    assert_same_direction(one, rest, tiny_teacher)


def test_gradients_of_two_processes_are_those_of_one(tmp_path, tiny_teacher):
    gradients.main(str(tiny_teacher), tmp_path)
    for done in launch(lambda: gradients.main(str(tiny_teacher), tmp_path)):
        assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / f"{processes}.safetensors") for processes in (1, 2))  # so many there were
    assert one.keys() == two.keys() and len(one) == 4 * 2 + 3
    for name, gradient in one.items():
        assert gradient.norm() > 0 and (gradient - two[name]).norm() < 1e-5 * gradient.norm(), name


def test_what_does_not_fit_together_is_refused_before_anything_is_loaded(tiny_teacher, prompt_file):
    guide = load_shapes(str(tiny_teacher))
    small = dataclasses.replace(SMALL, t_init=None)
    check(small, guide, ExecutionOptions(), world=2, init=None)
    for recipe, execution, world, init, complaint in (
        (small, ExecutionOptions(micro_batches=3), 1, None, "cannot be split into 3"),
        (small, ExecutionOptions(), 3, None, "cannot be shared by 3"),
        (small, ExecutionOptions(shard=True, ema_on_cpu=True), 2, None, "FSDP is for a full student"),
        (
            dataclasses.replace(small, student_rank=2),
            ExecutionOptions(shard=True),
            2,
            None,
            "FSDP is for a full student",
        ),
        (dataclasses.replace(small, ema=0.0), ExecutionOptions(ema_on_cpu=True), 1, None, "no average"),
        (dataclasses.replace(small, student_rank=2), ExecutionOptions(), 1, "x", "starts as its teacher"),
        (dataclasses.replace(small, t_init=1000), ExecutionOptions(), 1, None, "beyond the teacher's last timestep"),
        (dataclasses.replace(small, t_high=1000), ExecutionOptions(), 1, None, "beyond the teacher's last timestep"),
    ):
        with pytest.raises(SbrushError, match=complaint) as caught:
            check(recipe, guide, execution, world=world, init=init)
        assert caught.value.code == 2
    pure = dataclasses.replace(guide, scheduler=DDIMScheduler.from_config(guide.scheduler.config))
    pure.scheduler.alphas_cumprod[-1] = 0
    check(small, pure, ExecutionOptions(), world=1, init=None)
    with pytest.raises(SbrushError, match="ends in pure noise"):
        check(dataclasses.replace(small, lora_weight="v"), pure, ExecutionOptions(), world=1, init=None)
    told = sbrush("distill", prompt_file, "--teacher", tiny_teacher, "--dry-run", "--micro-batches", "5")
    assert told.returncode == 2 and "cannot be split into 5" in told.stderr and "hint:" in told.stderr
    twice = sbrush("distill", prompt_file, "--student-lr", "1", "--set", "student_lr=2", "--dry-run")
    assert twice.returncode == 2 and "student_lr is given twice" in twice.stderr


def test_a_student_shared_out_is_the_same_and_goes_on_in_one_piece(tmp_path, tiny_teacher, clip_folder):
    """FSDP by accelerate's configuration: two processes hold half of it each."""
    options = "--log-every", 1, "--validate-every", 3, "--validation-clip", clip_folder
    sharded = {"processes": 2, "ACCELERATE_USE_FSDP": "true"}
    one, log, said = distil_four_steps(tiny_teacher, tmp_path / "one", *options)
    assert "sharded among" not in said
    two, other_log, said = distil_four_steps(tiny_teacher, tmp_path / "two", *options, **sharded)
    share = re.search(r"sharded among 2 processes \(FSDP2\); here (\d+) %", said)
    assert share and 45 < int(share[1]) < 60  # what cannot be halved is the first one's
    assert_same_direction(one, two, tiny_teacher)
    for mine, theirs in zip(log, other_log, strict=True):
        for name in ("gap", "student_grad", "lora_grad"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-2, abs=1e-5), name
    assert log[2]["clip_score"] == pytest.approx(other_log[2]["clip_score"], abs=1e-3)
    assert log[0]["student_grad"] == pytest.approx(other_log[0]["student_grad"], rel=1e-5)  # before Adam had a say
    for how in (sharded, {}):
        without_its_last_steps(tmp_path / "two")
        rest, _, said = distil_four_steps(tiny_teacher, tmp_path / "two", *options, **how)
        assert "resuming after step 2" in said
        assert_same_direction(one, rest, tiny_teacher)


def assert_a_checkpoint_is_kept(out, step):
    kept = checkpoint.newest(out / "checkpoints")
    assert kept and kept.step >= step and kept.part("student") and kept.part("lora_optimizer")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_run_and_leaves_a_checkpoint(
    tmp_path, tiny_teacher, prompt_file, monkeypatch, victim
):
    real, out = VSD.step, tmp_path / "run"

    def killed_in_step_four(self, step, prompts):
        if step == 4 and self.accelerator.process_index == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, step, prompts)

    monkeypatch.setattr(VSD, "step", killed_in_step_four)
    ended = sbrush(
        "distill", prompt_file, "--teacher", tiny_teacher, "--out", out, "--steps", 5000, "--batch", 4,
        "--device", "cpu", "--precision", "float32", "--checkpoint-every", 2, "--grid-every", 0, processes=2,
    )  # fmt: skip
    assert ended.returncode == -signal.SIGKILL  # and the other one does not wait for it
    said = ended.stderr
    assert "error: another process of this run has ended" in said and f"\nhint: what is in {out}/checkpoints" in said
    assert_a_checkpoint_is_kept(out, 2)


def test_a_process_that_is_killed_under_torchrun_ends_the_run(tmp_path, tiny_teacher, prompt_file):
    """By the launcher itself, which ends the others too."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "sbrush"]
    command += ["distill", prompt_file, "--teacher", tiny_teacher, "--out", tmp_path / "run", "--steps", "5000"]
    command += ["--recipe", "swiftbrush", "--batch", "4", "--device", "cpu", "--precision", "float32"]
    command += ["--checkpoint-every", "2", "--grid-every", "0"]
    both = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while both.poll() is None and not (tmp_path / "run" / "checkpoints" / "step-000004").exists():
        time.sleep(0.05)
    for process in Path(f"/proc/{both.pid}/task/{both.pid}/children").read_text().split():
        if "RANK=1" in Path(f"/proc/{process}/environ").read_text().split("\0"):
            os.kill(int(process), signal.SIGKILL)
    said = both.communicate(timeout=600)[1]
    assert both.returncode != 0 and "torch.distributed.elastic.multiprocessing.errors.ChildFailedError" in said
    assert_a_checkpoint_is_kept(tmp_path / "run", 4)


def test_the_shipped_prompt_file_holds_no_held_out_combination():
    from pathlib import Path

    from sbrush.stickers.world import HELD_OUT

    texts = read_prompts(Path(__file__).parent.parent / "prompts" / "stickers.txt").texts
    assert len(texts) == 2751
    assert not [t for t in texts for kind, colour in HELD_OUT if f"{colour} {kind}" in t]


def test_processes_exchange_gradients_where_they_lie():
    """Else a full student's gradients would be there twice, in DDP's buckets and out of them."""
    made = make_accelerator("cpu", "no", {})
    assert made.ddp_handler.to_kwargs() == {"gradient_as_bucket_view": True}

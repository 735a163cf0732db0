"""Guided Distillation: its formulas, halvings that are exact where the student can be, a run down to diffusers."""

import dataclasses
import json
import shutil

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler
from safetensors.torch import load_file

from conftest import build_tiny_teacher, sbrush
from sbrush import core
from sbrush.console import SbrushError
from sbrush.models.load import load_shapes, load_student, load_teacher
from sbrush.prompts import ShuffledPrompts, make_prompts
from sbrush.sampling.generation import student_images
from sbrush.training.images import TrainingImages
from sbrush.training.methods import Guided
from sbrush.training.methods.guided import (
    CLEAN,
    Stage,
    halving_target,
    snr_weight,
    stages_of,
    trailing,
    weighted_loss,
    with_clean,
)
from sbrush.training.plan import check
from sbrush.training.recipes import RECIPES
from sbrush.training.request import ExecutionOptions, ImagesRequest
from test_lcm import latents_of

SMALL = dataclasses.replace(
    RECIPES["guided"], steps=6, batch=2, student_lr=1e-2, ema=0.5, guidance=3.0, w_min=0.0, w_max=4.0, image_steps=2,
    halve_from=4, student_steps=1, guide_share=0.34,
)  # fmt: skip
PROMPTS = make_prompts(["a cat", "a red dog", "a fish"], "three")
SCHEDULER = DDIMScheduler(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing", clip_sample=False,
    set_alpha_to_one=True,
)  # fmt: skip
SCHEDULE = core.NoiseSchedule.from_alphas_cumprod(SCHEDULER.alphas_cumprod)


def test_the_weights_are_what_errors_in_x0_are_worth_in_epsilon_and_in_v():
    torch.manual_seed(0)
    t = torch.tensor([0, 200, 500, 999])
    x0, guess, noise = torch.randn(3, 4, 2, 3, 3)
    (alpha, sigma), x_t = SCHEDULE.at(t), core.add_noise(x0, noise, t, SCHEDULE)
    eps = (x_t - alpha * guess) / sigma
    errors = [
        (a - b).pow(2)
        for a, b in ((guess, x0), (eps, noise), (alpha * eps - sigma * guess, alpha * noise - sigma * x0))
    ]
    in_x0, in_eps, in_v = (error.mean(dim=(1, 2, 3)) for error in errors)
    for kind, wanted in (("truncated", torch.maximum(in_x0, in_eps)), ("plus-one", in_v)):
        weighed = snr_weight(t, SCHEDULE, kind).flatten() * in_x0
        assert torch.allclose(weighed, wanted, rtol=1e-3)
        assert weighted_loss(guess, x0, snr_weight(t, SCHEDULE, kind)) == pytest.approx(wanted.mean().item(), rel=1e-3)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_halving_is_exact_where_the_student_can_be(steps):
    """One step of diffusers' DDIM with the target as the student's guess ends where two of its half steps end."""
    half, whole = (DDIMScheduler.from_config(SCHEDULER.config) for _ in range(2))
    half.set_timesteps(2 * steps)
    whole.set_timesteps(steps)
    grid = trailing(SCHEDULER, 2 * steps)
    assert grid.tolist() == [*half.timesteps.tolist(), CLEAN] and grid[:-1:2].tolist() == whole.timesteps.tolist()
    torch.manual_seed(0)
    for place in range(steps):
        t, middle, end = grid[2 * place : 2 * place + 3].tolist()
        z_t = torch.randn(3, 4, 8, 8)
        z = z_t
        for start in (t, middle):  # any network will do: here a curved one
            z = half.step(torch.sin(3 * z) + start / 1000, start, z).prev_sample
        where = (torch.full((3,), step) for step in (t, end))
        target = halving_target(z_t, z, *where, with_clean(SCHEDULE))
        alpha, sigma = SCHEDULE.at(torch.tensor([t]))
        epsilon = (z_t - alpha * target) / sigma  # of a student whose guess is the target
        assert torch.allclose(whole.step(epsilon, t, z_t).prev_sample, z, atol=2e-4)


def test_the_stages_of_a_run():
    recipe = dataclasses.replace(RECIPES["guided"], steps=100, guide_share=0.4, halve_from=8, student_steps=1)
    assert stages_of(recipe) == [Stage(1, 40, None), Stage(41, 60, 4), Stage(61, 80, 2), Stage(81, 100, 1)]
    assert stages_of(dataclasses.replace(recipe, student_steps=4))[1:] == [Stage(41, 100, 4)]
    assert stages_of(dataclasses.replace(recipe, student_steps=8)) == [Stage(1, 100, None)]
    for wrong in (
        {"student_steps": 3},
        {"student_steps": 16},
        {"steps": 3},
        {"guide_share": 1.0},
        {"guide_share": 0.0},
    ):
        with pytest.raises(ValueError):
            stages_of(dataclasses.replace(recipe, **wrong))
    for name in ("guided", "stickers-guided"):
        for steps in (1, 2, 4):
            stages_of(dataclasses.replace(RECIPES[name], student_steps=steps))


def made(teacher, tmp_path, **changes):
    recipe = dataclasses.replace(SMALL, **changes)
    model, accelerator = load_teacher(str(teacher)), Accelerator(cpu=True)
    images = TrainingImages.plan(ImagesRequest(), recipe, PROMPTS, model, accelerator, tmp_path)
    images.fill(model, accelerator)
    method = Guided(model, recipe, seed=3, accelerator=accelerator, images=images)
    seen, own = {}, method.noisy
    method.noisy = lambda batch, t: seen.setdefault("x_t", own(batch, seen.setdefault("t", t)))
    return method, ShuffledPrompts(images.prompts, 3), seen


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_with_w_fixed_the_target_is_the_guided_teachers(tmp_path, prediction):
    teacher = build_tiny_teacher(tmp_path / "teacher", prediction=prediction)
    method, prompts, seen = made(teacher, tmp_path, w_min=2.5, w_max=2.5)
    batch = method._micro_batch(1, range(2), prompts)
    outcome = method.compare(1, batch)
    x_t, t, tokens = seen["x_t"], seen["t"], batch.cond["tokens"]
    assert torch.equal(batch.w, torch.full((2,), 2.5))
    own = DDIMScheduler.from_pretrained(teacher / "scheduler")
    with torch.no_grad():
        for i in range(2):
            guesses = []
            for told in (tokens[i : i + 1], method.teacher.encode([""])["tokens"]):
                output = method.teacher.unet(x_t[i : i + 1], t[i], told).sample
                own.set_timesteps(1000)
                guesses.append(own.step(output, int(t[i]), x_t[i : i + 1]).pred_original_sample)
            wanted = 3.5 * guesses[0] - 2.5 * guesses[1]
            assert torch.allclose(outcome.target[i : i + 1], wanted, atol=1e-3 * float(1 + wanted.abs().max()))
    assert outcome.loss.requires_grad


def test_a_halving_is_taught_by_the_students_own_average(tiny_teacher, tmp_path):
    method, prompts, seen = made(tiny_teacher, tmp_path)
    assert method.stages == [Stage(1, 2, None), Stage(3, 4, 2), Stage(5, 6, 1)]
    assert "halved" not in method.state()
    for step in (1, 2):
        assert method.step(step, prompts)["taught_steps"] == 0
    average = {name: tensor.clone() for name, tensor in method.ema.tensors.items()}
    assert any(not torch.equal(p, average[name]) for name, p in method.trained.items())
    method._start_halving()
    assert all(torch.equal(p, average[name]) for name, p in method.trained.items())
    assert all(torch.equal(p, average[name]) for name, p in method.state()["halved"].items())
    assert not method.student_optimizer.state

    seen.clear()
    batch = method._micro_batch(3, range(2), prompts)
    outcome = method.compare(3, batch)
    x_t, t, told = seen["x_t"], seen["t"], batch.guided
    grid = [999, 749, 499, 249, None]  # four steps, which two are to replace
    scheduler = DDIMScheduler.from_config(SCHEDULER.config)
    scheduler.set_timesteps(4)
    for i in range(2):
        place = grid.index(int(t[i]))
        assert place in (0, 2)
        z = x_t[i : i + 1]
        with torch.no_grad():
            for step in grid[place : place + 2]:
                eps = method.halved(
                    z, step, told["tokens"][i : i + 1], timestep_cond=told["guidance"][i : i + 1]
                ).sample
                z = scheduler.step(eps, step, z).prev_sample
        alpha, sigma = SCHEDULE.at(t[i : i + 1])
        eps = (x_t[i : i + 1] - alpha * outcome.target[i : i + 1]) / sigma
        scheduler.set_timesteps(2)
        assert torch.allclose(scheduler.step(eps, int(t[i]), x_t[i : i + 1]).prev_sample, z, atol=1e-3)
        scheduler.set_timesteps(4)
    assert method.step(3, prompts)["taught_steps"] == 2 and method.step(5, prompts)["taught_steps"] == 1


def test_each_stage_has_a_learning_rate_that_rises_and_falls(tiny_teacher, tmp_path):
    method, _, _ = made(tiny_teacher, tmp_path, steps=60, warmup=2, cooldown=1.0)
    rates = [method.learning_rate(step) for step in range(1, 61)]
    assert method.stages == [Stage(1, 20, None), Stage(21, 40, 2), Stage(41, 60, 1)]
    assert rates[:20] == rates[20:40] == rates[40:] and rates[0] < rates[1] > rates[19] > 0
    assert [method.average_step(step) for step in (1, 20, 21, 60)] == [1, 20, 1, 20]


def distilled(prompt_file, teacher, out, *more):
    return sbrush(
        "distill", prompt_file, "--teacher", teacher, "--recipe", "guided", "--batch", 2, "--student-lr", 0.01,
        "--guidance", 3, "--set", "w_max=4", "--set", "image_steps=2", "--set", "halve_from=4", "--set", "ema=0.5",
        "--log-every", 1, "--device", "cpu", "--precision", "float32", "--out", out, *more,
    )  # fmt: skip


@pytest.mark.parametrize(("tiny", "steps"), [("tiny_teacher", 1), ("tiny_teacher", 2), ("tiny_xl", 1)])
def test_a_run_gives_a_folder_with_which_diffusers_draws_the_same(request, tmp_path, prompt_file, tiny, steps):
    teacher = request.getfixturevalue(tiny)
    done = distilled(prompt_file, teacher, tmp_path, "--student-steps", steps, "--steps", 6, "--grid-every", 6)
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [entry["taught_steps"] for entry in log] == ([0, 0, 0, 2, 2, 2] if steps == 2 else [0, 0, 0, 2, 2, 1])
    about = json.loads((tmp_path / "student" / "sbrush.json").read_text())
    assert about["guidance"] == 3 and about["steps"] == steps
    student = load_student(str(tmp_path))
    ours = next(student_images(student, ["a red dog"], [5]))[0].permute(1, 2, 0) / 255
    theirs = torch.from_numpy(latents_of(tmp_path / "student", steps, 3))
    assert (ours - theirs).abs().max() < 2 / 255
    assert abs(latents_of(tmp_path / "student", steps, 4.5) - theirs.numpy()).max() > 1e-4


@pytest.mark.parametrize("broken", [4, 5])  # before a halving begins, and within one
def test_a_run_that_was_stopped_goes_on_to_the_same_student(tmp_path, prompt_file, tiny_teacher, monkeypatch, broken):
    shape = "--steps", 6, "--grid-every", 0, "--checkpoint-every", 1
    assert distilled(prompt_file, tiny_teacher, tmp_path / "whole", *shape).returncode == 0
    own = Guided.step
    with monkeypatch.context() as patch:
        patch.setattr(Guided, "step", lambda self, step, p: 1 / 0 if step == broken else own(self, step, p))
        assert distilled(prompt_file, tiny_teacher, tmp_path / "again", *shape).returncode == 1
    halved = tmp_path / "again" / "checkpoints" / f"step-{broken - 1:06d}" / "halved.safetensors"
    assert halved.is_file() == (broken == 5)
    done = distilled(prompt_file, tiny_teacher, tmp_path / "again", *shape)
    assert done.returncode == 0 and f"resuming after step {broken - 1}" in done.stderr
    one, two = (
        load_file(tmp_path / run / "student" / "unet" / "diffusion_pytorch_model.safetensors")
        for run in ("whole", "again")
    )
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    longer = distilled(prompt_file, tiny_teacher, tmp_path / "again", *shape, "--extend", 2)
    assert longer.returncode == 2 and "cannot be extended" in longer.stderr


def test_the_dry_run_counts_the_halvings_teacher(prompt_file, tiny_teacher, tmp_path):
    done = sbrush(
        "distill", prompt_file, "--teacher", tiny_teacher, "--recipe", "guided", "--dry-run", "--out", tmp_path / "run"
    )
    assert done.returncode == 0, done.stderr
    assert "\n5 UNet forwards" in done.stdout and "teacher of the present halving" in done.stdout


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--student-lora", 4), "trains a full student"),
        (("--student-steps", 3), "does not give 3"),
        (("--steps", 2, "--set", "halve_from=32"), "too few for guidance and 5 halvings"),
        (("--set", "halve_from=1024"), "1,024 steps on a schedule of 1000"),
        (("--set", "grid_steps=20"), "does not use the setting grid_steps"),
    ],
)
def test_what_it_cannot_do_is_refused(tmp_path, prompt_file, tiny_teacher, more, said):
    done = sbrush(
        "distill", prompt_file, "--teacher", tiny_teacher, "--recipe", "guided", *more, "-o", tmp_path / "run"
    )
    assert done.returncode == 2 and said in done.stderr and "\nhint: " in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()


def test_one_step_cannot_be_taught_from_pure_noise(tmp_path, prompt_file):
    teacher = build_tiny_teacher(tmp_path / "teacher", prediction="v_prediction")
    file = teacher / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rescale_betas_zero_snr": True}))
    ask = "distill", prompt_file, "--teacher", teacher, "--recipe", "guided", "--dry-run", "--out", tmp_path / "run"
    done = sbrush(*ask)
    assert done.returncode == 2 and "ends in pure noise" in done.stderr
    assert sbrush(*ask, "--student-steps", 2).returncode == 0


@pytest.mark.parametrize(
    ("recipe", "options"),
    [("lcm", ["--set", "huber_c=0"]), ("guided", ["--set", "halve_from=2", "--set", "guide_share=0.5"])],
)
def test_two_processes_make_the_student_of_one_and_one_can_go_on(tmp_path, tiny_teacher, recipe, options):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na red fish\na blue car\n")

    def run(name, processes=1):
        done = sbrush(
            "distill", tmp_path / "prompts.txt", "--teacher", tiny_teacher, "--out", tmp_path / name,
            "--recipe", recipe, "--steps", 4, "--batch", 4, "--student-lr", 1e-3, "--device", "cpu",
            "--precision", "float32", "--checkpoint-every", 3, "--grid-every", 0, "--log-every", 1,
            "--set", "image_steps=2", *options, processes=processes,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        log = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        return load_file(tmp_path / name / "student" / "unet" / "diffusion_pytorch_model.safetensors"), log, done.stderr

    one, log, _ = run("one")
    start = dict(load_teacher(str(tiny_teacher)).unet.named_parameters())

    def agrees(other):
        learnt = [torch.cat([(weights[k] - start[k]).flatten() for k in start]) for weights in (one, other)]
        assert torch.cosine_similarity(*learnt, dim=0) > 0.999 and abs(learnt[0].norm() / learnt[1].norm() - 1) < 1e-3

    two, other_log, _ = run("two", processes=2)
    agrees(two)
    for key in ("student_loss", "student_grad"):
        assert log[0][key] == pytest.approx(other_log[0][key], rel=1e-3), key
    shutil.rmtree(tmp_path / "two" / "student")
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-000004")
    rest, _, said = run("two")
    assert "resuming after step 3" in said
    agrees(rest)


def test_it_does_not_run_sharded(tiny_teacher):
    for name in ("lcm", "guided"):
        with pytest.raises(SbrushError, match="does not run under FSDP"):
            check(RECIPES[name], load_shapes(str(tiny_teacher)), ExecutionOptions(shard=True), world=2, init=None)

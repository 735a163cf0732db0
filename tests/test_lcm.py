"""Latent consistency distillation: its formulas, an exactly known teacher, a run from images to diffusers' pipeline."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, DiffusionPipeline, LCMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from conftest import sbrush
from sbrush import core
from sbrush.models.load import load_student, load_teacher
from sbrush.models.model import guidance_embedding
from sbrush.prompts import ShuffledPrompts, make_prompts
from sbrush.sampling.generation import student_images
from sbrush.training.images import TrainingImages
from sbrush.training.methods import LCM
from sbrush.training.methods.lcm import boundary_scalings, consistency, ddim_step, grid_of, previous, pseudo_huber
from sbrush.training.recipes import RECIPES
from sbrush.training.request import ExecutionOptions, ImagesRequest

SMALL = dataclasses.replace(
    RECIPES["lcm"], steps=3, batch=2, student_lr=1e-2, ema=0.5, guidance=3.0, w_min=0.0, w_max=4.0, image_steps=2
)
PROMPTS = make_prompts(["a cat", "a red dog", "a fish"], "three")


def test_the_boundary_scalings_are_those_that_lcm_scheduler_samples_with():
    scheduler = LCMScheduler()
    for t in (0, 1, 19, 259, 999):
        skip, out = boundary_scalings(torch.tensor([t]))
        theirs = scheduler.get_scalings_for_boundary_condition_discrete(t)
        assert (skip.item(), out.item()) == pytest.approx([float(x) for x in theirs], rel=1e-5, abs=1e-12)
    t = torch.tensor([0, 19])
    x, x0 = torch.randn(2, 2, 4, 3, 3)
    found = consistency(x, x0, t)
    assert torch.equal(found[0], x[0])  # f(x, 0) = x, whatever the network says
    assert torch.allclose(found[1], x0[1], atol=1e-4)


@pytest.mark.parametrize("steps", [50, 25, 7])
def test_the_grid_is_the_one_that_lcm_scheduler_chooses_from(steps):
    scheduler = LCMScheduler(original_inference_steps=steps)
    scheduler.set_timesteps(steps)
    grid = grid_of(1000, steps)
    assert grid.tolist() == scheduler.timesteps.flip(0).tolist()
    assert previous(grid, 1000, steps).tolist() == [max(t - 1000 // steps, 0) for t in grid.tolist()]


def test_the_pseudo_huber_loss():
    found, target = torch.tensor([0.0, 3.0]), torch.tensor([4.0, 3.0])
    assert pseudo_huber(found, target, 3.0) == pytest.approx((5 - 3) / 2)
    assert pseudo_huber(found, target, 0.0) == pytest.approx(8)
    assert pseudo_huber(found, target, 1e-3) == pytest.approx(2, abs=1e-3)  # nearly the absolute difference


def test_guidance_is_embedded_as_diffusers_embeds_it():
    w = torch.tensor([0.0, 0.37, 7.5, 14.0])
    for width in (256, 7):
        theirs = StableDiffusionPipeline.get_guidance_scale_embedding(SimpleNamespace(), w, embedding_dim=width)
        assert torch.allclose(guidance_embedding(w, width), theirs, atol=1e-6)


def gaussian(grid_steps):
    """The student's x0 at the grid's timesteps, affine in x_t, that LCM's targets give for an exactly known teacher.

    Images are N(mean, deviation^2) in each channel, so that the noise prediction is known, and the path too:
    (x_t - alpha mean) / sqrt(alpha^2 deviation^2 + sigma^2) is the same at every t.
    """
    schedule = core.NoiseSchedule.from_alphas_cumprod(
        DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
    )
    mean, deviation = torch.tensor([0.5, -1.0]).view(1, 2, 1, 1), torch.tensor([0.7, 0.3]).view(1, 2, 1, 1)

    def epsilon(x_t, t):
        alpha, sigma = schedule.at(t)
        return sigma * (x_t - alpha * mean) / (alpha**2 * deviation**2 + sigma**2)

    torch.manual_seed(0)
    student = {}  # by timestep: slope and intercept of x0 in x_t, by channel

    def say(x_t, t):
        slope, intercept = student[int(t[0])] if int(t[0]) in student else (torch.zeros_like(mean), mean)
        return consistency(x_t, slope * x_t + intercept, t)

    for step in grid_of(1000, grid_steps).tolist():
        t = torch.full((64,), step)
        s = previous(t, 1000, grid_steps)
        x_t = core.add_noise(mean + deviation * torch.randn(64, 2, 1, 1), torch.randn(64, 2, 1, 1), t, schedule)
        target = say(ddim_step(epsilon(x_t, t), x_t, t, s, schedule, "epsilon"), s)
        skip, out = boundary_scalings(t)
        wanted = (target - skip * x_t) / out  # the x0 whose loss is 0; that it is affine is part of the test
        slope = ((x_t - x_t.mean(0)) * (wanted - wanted.mean(0))).mean(0) / x_t.var(0, correction=0)
        student[step] = slope, wanted.mean(0) - slope * x_t.mean(0)
        assert pseudo_huber(say(x_t, t), target, 1e-3) < 1e-5

    def exact(x_t, t):
        alpha, sigma = schedule.at(t)
        return mean + deviation * (x_t - alpha * mean) / (alpha**2 * deviation**2 + sigma**2).sqrt()

    z, t = torch.randn(64, 2, 1, 1), torch.full((64,), 999)
    return (say(z, t) - exact(z, t)).abs().max()


def test_a_student_of_a_gaussian_teacher_follows_its_probability_flow():
    """One step from noise is where the path ends; a finer grid, nearer to the path itself, is nearer to that."""
    coarse, fine = gaussian(50), gaussian(500)
    assert coarse < 0.1 and fine < coarse / 4


def made(teacher, recipe, tmp_path, **options):
    model, accelerator = load_teacher(str(teacher)), Accelerator(cpu=True)
    images = TrainingImages.plan(ImagesRequest(), recipe, PROMPTS, model, accelerator, tmp_path)
    images.fill(model, accelerator)
    method = LCM(model, recipe, seed=3, accelerator=accelerator, images=images, **options)
    return method, ShuffledPrompts(images.prompts, 3)


def test_the_student_starts_as_its_teacher_and_takes_w_as_input(tiny_teacher, tmp_path):
    method, prompts = made(tiny_teacher, SMALL, tmp_path)
    batch = method._micro_batch(1, range(2), prompts)
    assert batch.guided["guidance"].shape == (2, 256) and 0 <= batch.w.min() and batch.w.max() <= 4
    x, t = torch.randn(2, 4, 16, 16), torch.tensor([999, 19])
    ours = method.student_output(x, t, batch, grad=False)
    assert torch.equal(ours, method.output_of(method.teacher.unet, x, t, batch.cond))
    torch.nn.init.normal_(method.student.get_parameter("time_embedding.cond_proj.weight"))
    other = dict(batch.guided) | {"guidance": guidance_embedding(batch.w + 1, 256)}
    assert not torch.allclose(
        method.output_of(method.student, x, t, batch.guided), method.output_of(method.student, x, t, other)
    )


def test_the_target_is_the_averages_and_the_teacher_is_guided_by_w(tiny_teacher, tmp_path):
    """Each of compare's two sides, by formulas of its own."""
    method, prompts = made(tiny_teacher, SMALL, tmp_path)
    torch.manual_seed(0)
    for tensor in method.ema.tensors.values():
        tensor.add_(0.02 * torch.randn(tensor.shape))  # away from the student
    seen = {}
    own = method.noisy
    method.noisy = lambda batch, t: seen.setdefault("x_t", own(batch, seen.setdefault("t", t)))
    batch = method._micro_batch(1, range(2), prompts)
    before = {name: p.detach().clone() for name, p in method.trained.items()}
    outcome = method.compare(1, batch)
    assert all(torch.equal(p, before[name]) for name, p in method.trained.items())
    x_t, t, schedule, (unet, tokens) = (
        seen["x_t"],
        seen["t"],
        method.schedule,
        (method.teacher.unet, batch.cond["tokens"]),
    )
    assert all(step in grid_of(1000, 50).tolist() for step in t.tolist())
    s, w = (t - 20).clamp(min=0), batch.w.view(-1, 1, 1, 1)
    null = method.teacher.encode([""])["tokens"].expand_as(tokens)
    with torch.no_grad():
        eps = (1 + w) * unet(x_t, t, tokens).sample - w * unet(x_t, t, null).sample
        (alpha, sigma), (alpha_s, sigma_s) = schedule.at(t), schedule.at(s)
        x_s = alpha_s * (x_t - sigma * eps) / alpha + sigma_s * eps
        with method.ema.inside():
            noise = method.student(x_s, s, tokens, timestep_cond=batch.guided["guidance"]).sample
    skip, out = boundary_scalings(s)
    assert torch.allclose(outcome.target, skip * x_s + out * (x_s - sigma_s * noise) / alpha_s, atol=1e-4)
    assert outcome.loss.requires_grad and not outcome.target.requires_grad


def test_micro_batches_give_the_same_student(tiny_teacher, tmp_path):
    students = []
    for parts in (1, 2):
        recipe = dataclasses.replace(SMALL, huber_c=0.0)  # else near zero a gradient is a sign, and rounding turns it
        method, prompts = made(tiny_teacher, recipe, tmp_path, execution=ExecutionOptions(micro_batches=parts))
        grads = []
        method.apply = lambda adam, parameters, grads=grads: (
            grads.append(torch.cat([p.grad.flatten() for p in parameters.values()])) or torch.ones(())
        )
        method.step(1, prompts)
        students.append(grads[0])
    one, two = students
    assert (one - two).norm() < 1e-4 * one.norm()


def distilled(prompt_file, teacher, out, *more):
    return sbrush(
        "distill", prompt_file, "--teacher", teacher, "--recipe", "lcm", "--batch", 2, "--student-lr", 0.01,
        "--guidance", 3, "--set", "w_min=0", "--set", "w_max=4", "--set", "image_steps=2", "--log-every", 1,
        "--device", "cpu", "--precision", "float32", "--out", out, *more,
    )  # fmt: skip


def latents_of(folder, steps, scale, seed=5):
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        "a red dog", num_inference_steps=steps, guidance_scale=scale, generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).images[0]  # fmt: skip


@pytest.mark.parametrize("tiny", ["tiny_teacher", "tiny_xl"])
def test_a_run_gives_a_folder_with_which_diffusers_draws_the_same(request, tmp_path, prompt_file, tiny):
    teacher = request.getfixturevalue(tiny)
    done = distilled(prompt_file, teacher, tmp_path / "run", "--steps", 3, "--grid-every", 3)
    assert done.returncode == 0, done.stderr
    assert "of the teacher" in done.stderr
    folder = tmp_path / "run" / "student"
    about = json.loads((folder / "sbrush.json").read_text())
    assert about["guidance"] == 3 and about["steps"] == 4
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert len(log) == 3 and all(entry["student_loss"] > 0 and entry["skipped"] == 0 for entry in log)
    card = (folder / "README.md").read_text()
    assert "[latent consistency distillation]" in card and "4 prompts and 4 images of the teacher's own" in card
    assert "num_inference_steps=4, guidance_scale=3" in card and "`guidance_scale` of 1 to 5" in card
    assert "swiftbrush" not in card.split("---")[1] and not (folder / "comfyui-workflow.json").exists()
    student = load_student(str(tmp_path / "run"))
    assert student.unet.config.time_cond_proj_dim == 256
    drawn = sbrush("sample", "a red dog", "--student", folder, "--device", "cpu", "-o", tmp_path / "dog.png")
    assert drawn.returncode == 0, drawn.stderr
    with Image.open(tmp_path / "dog.png") as image:
        assert json.loads(image.text["sbrush"])["guidance"] == 3
    for steps in (1, 2, 4):
        ours = next(student_images(student, ["a red dog"], [5], steps=steps))[0].permute(1, 2, 0) / 255
        theirs = torch.from_numpy(latents_of(folder, steps, 3))
        assert (ours - theirs).abs().max() < 2 / 255, steps
    assert abs(latents_of(folder, 1, 3) - latents_of(folder, 1, 4.5)).max() > 1e-4  # the scale matters
    checkpoint = load_student(str(tmp_path / "run" / "checkpoints" / "step-000003"))
    one, two = (next(student_images(model, ["a cat"], [1])) for model in (student, checkpoint))
    assert torch.equal(one, two)


def test_a_run_that_was_stopped_goes_on_to_the_same_student(tmp_path, prompt_file, tiny_teacher, monkeypatch):
    shape = "--steps", 4, "--grid-every", 0, "--checkpoint-every", 2
    assert distilled(prompt_file, tiny_teacher, tmp_path / "whole", *shape).returncode == 0
    own = LCM.step
    with monkeypatch.context() as patch:
        patch.setattr(LCM, "step", lambda self, step, prompts: 1 / 0 if step == 4 else own(self, step, prompts))
        assert distilled(prompt_file, tiny_teacher, tmp_path / "again", *shape).returncode == 1
    done = distilled(prompt_file, tiny_teacher, tmp_path / "again", *shape)
    assert done.returncode == 0 and "resuming after step 2" in done.stderr
    one, two = (
        load_file(tmp_path / run / "student" / "unet" / "diffusion_pytorch_model.safetensors")
        for run in ("whole", "again")
    )
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert "time_embedding.cond_proj.weight" in one


def test_a_lora_student_takes_no_guidance_scale(tmp_path, prompt_file, tiny_teacher):
    done = distilled(prompt_file, tiny_teacher, tmp_path / "run", "--steps", 2, "--grid-every", 0, "--student-lora", 2)
    assert done.returncode == 0, done.stderr
    about = json.loads((tmp_path / "run" / "student" / "sbrush.json").read_text())
    assert (
        "guidance" not in about and (tmp_path / "run" / "student-lora" / "pytorch_lora_weights.safetensors").is_file()
    )
    ours = next(student_images(load_student(str(tmp_path / "run")), ["a red dog"], [5]))[0].permute(1, 2, 0) / 255
    theirs = torch.from_numpy(latents_of(tmp_path / "run" / "student", 4, 1))
    assert (ours - theirs).abs().max() < 2 / 255


def test_the_dry_run_counts_forwards_and_the_teachers_images(prompt_file, tiny_teacher, tmp_path):
    plan = "distill", prompt_file, "--teacher", tiny_teacher, "--recipe", "lcm", "--dry-run", "--out", tmp_path / "run"
    done = sbrush(*plan)
    assert done.returncode == 0, done.stderr
    assert "\n6 UNet forwards" in done.stdout and "images: the teacher's own" in done.stdout
    assert "before the first, for the teacher's images" in done.stdout and "disk for latents" in done.stdout
    assert "\n5 UNet forwards" in sbrush(*plan, "--student-lora", 4).stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--guidance", 20), "draw at guidance 20, and learns 1 to 5"),
        (("--student-steps", 60), "60 steps on a grid of 50"),
        (("--set", "grid_steps=300"), "does not fit"),
        (("--no-lora-teacher",), "does not use the setting gap"),
        (("--no-reparameterisation", "--student-steps", 1), "does not use the setting reparameterised"),
        (("--clip-loss", 0.1), "does not use the setting clip_weight"),
        (("--set", "t_init=500"), "does not use the setting t_init"),
    ],
)
def test_what_it_cannot_do_is_refused(tmp_path, prompt_file, tiny_teacher, more, said):
    twice = {"--guidance"} & set(map(str, more))
    base = ("--set", "w_min=0", "--set", "w_max=4", *(() if twice else ("--guidance", 3)))
    done = sbrush(
        "distill", prompt_file, "--teacher", tiny_teacher, "--recipe", "lcm", *base, *more, "--out", tmp_path / "run"
    )
    assert done.returncode == 2 and said in done.stderr and "\nhint: " in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()


def test_a_latent_consistency_model_is_no_teacher_and_vsd_has_no_such_settings(tmp_path, prompt_file, tiny_teacher):
    done = distilled(prompt_file, tiny_teacher, tmp_path / "run", "--steps", 1, "--grid-every", 0)
    assert done.returncode == 0, done.stderr
    again = sbrush("distill", prompt_file, "--teacher", tmp_path / "run" / "student", "--out", tmp_path / "two")
    assert again.returncode == 2 and "takes a guidance scale as input" in again.stderr
    wrong = sbrush("distill", prompt_file, "--set", "huber_c=0.1", "--out", tmp_path / "two")
    assert wrong.returncode == 2 and "does not use the setting huber_c" in wrong.stderr

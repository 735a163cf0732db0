"""Other ways to the same student: in parts, with activations computed twice, as a LoRA, of other teachers."""

import dataclasses

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from conftest import build_tiny_teacher
from sbrush.console import SbrushError
from sbrush.models.load import digest, load_student, load_teacher
from sbrush.models.unet import set_role
from sbrush.noise import image_noise
from sbrush.prompts import ShuffledPrompts, make_prompts
from sbrush.sampling.generation import student_images
from sbrush.storage import checkpoint
from sbrush.training.loop import distill
from sbrush.training.methods.vsd import VSD
from sbrush.training.plan import prepare
from sbrush.training.recipes import RECIPES
from sbrush.training.request import ExecutionOptions, Intervals, RunRequest

PROMPTS = make_prompts(["a cat", "a dog", "a red fish", "a blue car on a mint background"], "four")
SMALL = dataclasses.replace(
    RECIPES["swiftbrush"], steps=6, batch=4, student_lr=1e-3, lora_lr=1e-2, lora_rank=4, lora_alpha=4
)
SHARED = dataclasses.replace(SMALL, guide_lora=False, shared_forward=True, lora_updates=2, pairs=2, pair_steps=1)
LORA = dataclasses.replace(SMALL, student_rank=3)
FEW = dataclasses.replace(SMALL, student_steps=4, tell_rung=True)
variants = pytest.mark.parametrize("recipe", [SMALL, SHARED, LORA, dataclasses.replace(SHARED, student_rank=3), FEW])


def distiller(teacher, recipe, **execution):
    made = VSD(
        load_teacher(str(teacher)),
        recipe,
        seed=3,
        accelerator=Accelerator(cpu=True),
        execution=ExecutionOptions(**execution),
    )
    torch.manual_seed(1)
    # The LoRA teacher is far from the teacher: their difference is what is compared, and a small one is mere rounding.
    for parts, std in ((made.lora, 1.0), (made.trained if recipe.student_rank else {}, 0.1)):
        for name, parameter in sorted(parts.items()):
            parameter.data.normal_(std=std)
            assert ".lora_" in name or name == "rung_tokens"
    return made


def gradients(made):
    """Every gradient that the optimisers see in one step."""
    seen = []
    for optimizer in (made.student_optimizer, made.lora_optimizer):
        parameters = optimizer.param_groups[0]["params"]
        optimizer.step = lambda parameters=parameters: seen.append(torch.cat([p.grad.flatten() for p in parameters]))
    metrics = made.step(1, ShuffledPrompts(PROMPTS, 3))
    return seen, metrics


@variants
@pytest.mark.parametrize("execution", [{"micro_batches": 2}, {"checkpointing": True}, {"ema_on_cpu": True}])
def test_whatever_fits_a_run_to_its_machine_leaves_its_gradients_alone(tiny_teacher, recipe, execution):
    plain, other = (gradients(distiller(tiny_teacher, recipe, **options)) for options in ({}, execution))
    assert len(plain[0]) == len(other[0]) == 1 + recipe.lora_updates and plain[1]["score_gap_ratio"] > 0.01
    for one, two in zip(plain[0], other[0], strict=True):
        assert one.norm() > 0 and (one - two).norm() < 1e-4 * one.norm()
    for name, value in plain[1].items():
        assert torch.allclose(value, other[1][name], rtol=1e-3, atol=1e-5), name


def test_a_batch_that_cannot_be_split_so_is_refused(tiny_teacher):
    with pytest.raises(SbrushError, match="4 samples a process cannot be split into 3 micro-batches"):
        distiller(tiny_teacher, SMALL, micro_batches=3)


def test_a_lora_student_starts_as_the_teacher_and_alone_is_trained(tiny_teacher):
    made = VSD(load_teacher(str(tiny_teacher)), LORA, seed=3, accelerator=Accelerator(cpu=True))
    own = load_teacher(str(tiny_teacher))
    z, t, conditioning = image_noise([1, 2], (4, 16, 16)), torch.tensor([999, 999]), own.encode(["a cat", "a dog"])
    with made.average() as student, torch.no_grad():
        assert torch.allclose(student.denoise(z, t, conditioning), own.denoise(z, t, conditioning), atol=1e-6)
    before = {n: p.detach().clone() for n, p in made.student.named_parameters() if ".lora_" not in n}
    order = ShuffledPrompts(PROMPTS, 3)
    for step in (1, 2, 3):
        made.step(step, order)
    now = dict(made.student.named_parameters())
    assert before and all(torch.equal(now[n], p) for n, p in before.items())
    assert all(".lora_" in n and ".student." in n for n in made.trained)
    assert set(made.trained).isdisjoint(made.lora)
    with made.average() as student, torch.no_grad():
        assert not torch.allclose(student.denoise(z, t, conditioning), own.denoise(z, t, conditioning), atol=1e-3)
        merged = made.exported()
        assert torch.allclose(
            student.denoise(z, t, conditioning), merged(z, t, conditioning["tokens"]).sample, atol=1e-4
        )
    set_role(made.student, "teacher")
    with torch.no_grad():
        assert torch.allclose(made.teacher.denoise(z, t, conditioning), own.denoise(z, t, conditioning), atol=1e-6)


def test_the_two_loras_of_a_run_start_apart(tiny_teacher):
    """Else the student would begin in the directions that the LoRA teacher learns in."""
    recipe = dataclasses.replace(LORA, student_rank=4, lora_rank=4, lora_targets="blocks")  # of the same layers
    made = VSD(load_teacher(str(tiny_teacher)), recipe, seed=3, accelerator=Accelerator(cpu=True))
    both = [
        (value, made.lora[name.replace(".student.", ".lora_teacher.")])
        for name, value in made.trained.items()
        if ".lora_A." in name and name.replace(".student.", ".lora_teacher.") in made.lora
    ]
    assert both and not any(torch.equal(one, other) for one, other in both)


def run(teacher, out, recipe=SMALL, **options):
    plan = prepare(RunRequest(
        recipe, PROMPTS, out=out, teacher=str(teacher), init=options.pop("init", None), seed=3, device="cpu",
        precision="float32", every=options.pop("every", Intervals(log=2, grid=3, checkpoint=3)),
        execution=ExecutionOptions(**options),
    ))  # fmt: skip
    assert distill(plan)
    return out / "student"


@pytest.mark.parametrize("recipe", [SMALL, LORA, FEW, dataclasses.replace(SHARED, optimizer="adam8bit")])
def test_a_run_of_any_kind_goes_on_from_its_checkpoint_exactly(tmp_path, tiny_teacher, recipe):
    whole = run(tiny_teacher, tmp_path / "whole", recipe)
    run(tiny_teacher, tmp_path / "part", recipe)
    part = tmp_path / "part"
    (part / "student").rename(tmp_path / "gone")
    newest = checkpoint.paths(part / "checkpoints")[0]
    newest.rename(tmp_path / "newest")
    run(tiny_teacher, part, recipe)
    name = "unet/diffusion_pytorch_model.safetensors"
    one, two = load_file(whole / name), load_file(part / "student" / name)
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize(
    "recipe",
    [
        SMALL,
        FEW,
        dataclasses.replace(LORA, t_init=700, student_steps=2),
        dataclasses.replace(SMALL, ema=0.0, reparameterised=False),
    ],
)
def test_a_checkpoint_is_the_student_of_its_step(tmp_path, tiny_teacher, recipe):
    run(tiny_teacher, tmp_path / "run", recipe, every=Intervals(log=1, grid=0, checkpoint=2, keep=3))
    then = [load_student(str(path)) for path in reversed(checkpoint.paths(tmp_path / "run" / "checkpoints"))]
    assert [model.name for model in then] == ["run after step 2", "run after step 4", "run after step 6"]
    texts, seeds = ["a cat", "a dog"], [1, 2]
    drawn = [torch.cat(list(student_images(model, texts, seeds))) for model in then]
    exported = torch.cat(list(student_images(load_student(str(tmp_path / "run")), texts, seeds)))
    assert torch.equal(drawn[2], exported) and not torch.equal(drawn[0], drawn[2])
    assert len({digest(model) for model in then}) == 3  # by which measured features are kept apart
    whole = load_student(str(tmp_path / "run")).about
    about = {key: value for key, value in whole.items() if key not in ("format", "license")}  # the card's "other"
    assert then[2].about == about | {"after_step": 6}


def test_a_checkpoint_without_its_teacher_or_its_bytes_is_refused(tmp_path):
    teacher = build_tiny_teacher(tmp_path / "teacher")
    run(teacher, tmp_path / "run", dataclasses.replace(SMALL, steps=1))
    saved = tmp_path / "run" / "checkpoints" / "step-000001"
    build_tiny_teacher(tmp_path / "teacher", seed=1)
    with pytest.raises(SbrushError, match="has changed since the run"):
        load_student(str(saved))
    with (saved / "ema.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(SbrushError, match="checksum of ema"):
        load_student(str(saved))
    (tmp_path / "run" / "config.json").write_text('{"teacher": 3}')
    with pytest.raises(SbrushError, match="cannot read the checkpoint"):
        load_student(str(saved))


def test_a_checkpoint_with_numbers_that_are_none_is_refused(tmp_path, tiny_teacher):
    """Though its checksums are right: it was written so."""
    made = VSD(load_teacher(str(tiny_teacher)), LORA, seed=3, accelerator=Accelerator(cpu=True))
    for name, damaged in (("ema", torch.nan), ("student", torch.inf)):
        parts = {part: {k: v.clone() for k, v in tensors.items()} for part, tensors in made.state().items()}
        next(iter(parts[name].values())).fill_(damaged)
        checkpoint.save(tmp_path, 1, parts)
        with pytest.raises(SbrushError, match="does not belong to this run"):
            made.load(checkpoint.newest(tmp_path))


def test_a_lora_student_is_exported_whole_and_as_a_lora_for_plain_diffusers(tmp_path, tiny_teacher):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    student = run(tiny_teacher, tmp_path / "run", dataclasses.replace(LORA, student_lr=1e-2))
    ours = next(student_images(load_student(str(student)), ["a red cat"], [5]))[0].float()
    from_teacher = next(student_images(load_student(str(tiny_teacher)), ["a red cat"], [5]))[0].float()
    assert (ours - from_teacher).abs().max() > 5
    pipe = StableDiffusionPipeline.from_pretrained(tiny_teacher)
    pipe.scheduler = DDIMScheduler.from_pretrained(student / "scheduler")
    pipe.load_lora_weights(tmp_path / "run" / "student-lora", weight_name="pytorch_lora_weights.safetensors")
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 1, "guidance_scale": 1, "output_type": "np"}
    theirs = pipe("a red cat", generator=torch.Generator().manual_seed(5), **options).images[0]
    assert (torch.from_numpy(theirs * 255).round().permute(2, 0, 1) - ours).abs().max() <= 1

    # As ComfyUI reads it: kohya's names, made of diffusers' by dots for underscores; W + alpha / rank * up down.
    file = load_file(tmp_path / "run" / "student-lora" / "comfyui.safetensors")
    name = "unet/diffusion_pytorch_model.safetensors"
    plain, merged = load_file(tiny_teacher / name), load_file(student / name)
    for key in [k for k in plain if k.endswith(".weight")]:
        module = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
        if f"{module}.alpha" in file:
            down, up = file.pop(f"{module}.lora_down.weight"), file.pop(f"{module}.lora_up.weight")
            product = (up.flatten(1) @ down.flatten(1)).view_as(plain[key])
            plain[key] += file.pop(f"{module}.alpha") / len(down) * product
        assert torch.allclose(plain[key], merged[key], atol=1e-6), key
    assert not file


def test_a_lora_student_and_init_are_refused_together(tmp_path, tiny_teacher):
    student = run(tiny_teacher, tmp_path / "run")
    with pytest.raises(SbrushError, match="cannot start as another student"):
        run(tiny_teacher, tmp_path / "second", LORA, init=str(student))


@pytest.mark.parametrize("recipe", [SHARED, LORA])
def test_an_xl_teacher_distils_and_its_student_is_plain_diffusers(tmp_path, tiny_xl, recipe):
    from diffusers import StableDiffusionXLPipeline

    student = run(tiny_xl, tmp_path / "run", recipe)
    pipe = StableDiffusionXLPipeline.from_pretrained(student, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 1, "guidance_scale": 1, "output_type": "np"}
    theirs = pipe("a red cat", generator=torch.Generator().manual_seed(5), **options).images[0]
    ours = next(student_images(load_student(str(student)), ["a red cat"], [5]))[0].float()
    assert (torch.from_numpy(theirs * 255).round().permute(2, 0, 1) - ours).abs().max() <= 1
    assert ours.std() > 5


def test_what_the_unet_is_told_is_what_diffusers_tells_it(tiny_xl):
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_xl, add_watermarker=False)
    model = load_teacher(str(tiny_xl))
    cond, null, pooled, null_pooled = pipe.encode_prompt("a red cat", device="cpu", do_classifier_free_guidance=True)
    conditioning, nothing = model.encode(["a red cat"]), model.null()
    assert torch.allclose(conditioning["tokens"], cond, atol=1e-6) and torch.allclose(
        conditioning["pooled"], pooled, atol=1e-6
    )
    assert torch.equal(nothing["tokens"], null) and torch.equal(nothing["pooled"], null_pooled)
    assert pooled.abs().max() > 0 and cond.shape == (1, 16, 40)
    model.index["force_zeros_for_empty_prompt"] = False
    assert torch.allclose(model.null()["tokens"], model.encode([""])["tokens"]) and model.null()["tokens"].any()
    assert model.image_size == (32, 32)


def test_the_size_that_an_xl_network_is_told_matters_and_is_its_own(tiny_xl):
    model = load_teacher(str(tiny_xl))
    x, t, conditioning = image_noise([1], (4, 16, 16)), torch.tensor([500]), model.encode(["a cat"])
    sizes = torch.tensor([[32.0, 32, 0, 0, 32, 32]])

    def told(ids):
        added = {"text_embeds": conditioning["pooled"], "time_ids": ids}
        return model.unet(x, t, conditioning["tokens"], added_cond_kwargs=added).sample

    assert torch.allclose(model.denoise(x, t, conditioning), told(sizes), atol=1e-6)
    assert not torch.allclose(told(sizes), told(sizes * 2), atol=1e-4)


def test_a_flow_matching_network_is_one_more_adapter(tmp_path):
    """u = eps - x0 on x_s = (1 - s) x0 + s eps, for a Gaussian whose answers are known, seen through a v prediction."""
    from sbrush import core
    from sbrush.models.model import Model

    class Flow(Model):
        def predict(self, network, x_t, t, conditioning):
            alpha, sigma = self.schedule.at(t)
            s = sigma / (alpha + sigma)
            x = x_t / (alpha + sigma)
            u = network(x, s)
            return alpha * (x + (1 - s) * u) - sigma * (x - s * u)

    base = load_teacher(str(build_tiny_teacher(tmp_path / "teacher", prediction="v_prediction")))
    model = Flow(**{f.name: getattr(base, f.name) for f in dataclasses.fields(base)})
    deviation = 0.5  # of x0 ~ N(0, deviation^2)

    def network(x, s):
        variance = ((1 - s) * deviation) ** 2 + s**2
        return s / variance * x - (1 - s) * deviation**2 / variance * x

    x_t, t = image_noise([1, 2, 3], (4, 8, 8)), torch.tensor([3, 500, 999])
    eps = core.to_epsilon(model.predict(network, x_t, t, {}), x_t, t, model.schedule, model.prediction)
    alpha, sigma = model.schedule.at(t)
    expected = sigma / ((alpha * deviation) ** 2 + sigma**2) * x_t  # E[eps | x_t]
    assert torch.allclose(eps, expected, atol=1e-4)

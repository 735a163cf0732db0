"""A student of several steps: Gaussians at every rung, its folder in plain diffusers, what a run and a command take."""

import dataclasses
import json

import pytest
import torch
from PIL import Image

from conftest import build_tiny_teacher, build_tiny_xl, sbrush
from sbrush.console import SbrushError
from sbrush.core import add_noise, student_input, student_x0, vsd_gap, vsd_loss
from sbrush.models.export import export_student
from sbrush.models.ladder import Sampling
from sbrush.models.load import load_student, load_teacher
from sbrush.models.merge import merge
from sbrush.noise import StepNoise, image_noise, step_noises
from sbrush.sampling.generation import student_images
from sbrush.training.methods.rehearsal import forwards
from sbrush.training.methods.teachers import Teachers
from sbrush.training.methods.vsd import VSD
from sbrush.training.recipes import RECIPES
from test_core import SCHEDULE, TARGET, Gaussian, close, normal

ABOUT = {
    "version": "0", "teacher": "tiny", "reparameterised": True, "recipe": {"name": "x"}, "seed": 0,
    "prompts": {"count": 3, "sha256": "0"},
}  # fmt: skip
SMALL = "--batch", 2, "--steps", 2, "--grid-every", 0, "--device", "cpu", "--precision", "float32"


class LinearStudent:
    """x0 = factor x + mean at each of its rungs, trained as a student of several steps is.

    The scores are exact: the student's is that of what it draws at the rung in hand, or, unless `told`, of the mixture
    of what it draws at all of them, which is what a LoRA teacher learns that is not told the rung.
    """

    rungs = (999, 749, 499)

    def __init__(self, *, fresh=True, told=True):
        self.fresh, self.told = fresh, told
        self.means = torch.zeros(len(self.rungs), 2, requires_grad=True)
        self.factors = (0.5 * torch.eye(2)).repeat(len(self.rungs), 1, 1).requires_grad_()

    def denoise(self, x_t, t, cond):
        """The noise prediction that means x0 = factor x + mean."""
        rung = self.rungs.index(int(t[0]))
        x0 = (x_t[:, :, 0, 0] @ self.factors[rung].T + self.means[rung])[:, :, None, None]
        alpha, sigma = SCHEDULE.at(t)
        return (x_t - alpha * x0) / sigma

    def input(self, rung, z, noises):
        noises = noises[:rung] if self.fresh else [z] * rung
        with torch.no_grad():
            return student_input(self.denoise, z, noises, self.rungs[: rung + 1], {}, SCHEDULE, "epsilon")

    def image(self, rung, z, noises):
        x, t = self.input(rung, z, noises), torch.full((len(z),), self.rungs[rung])
        return student_x0(self.denoise(x, t, {}), x, t, SCHEDULE, "epsilon")

    @torch.no_grad()
    def drawn(self):
        """The Gaussian that it draws at each rung, by what the steps down do to a mean and a covariance."""
        mean, cov, onto_z = torch.zeros(2), torch.eye(2), torch.eye(2)  # x = onto_z z + what does not depend on z
        found, ladder = [], [*map(int, self.rungs[1:]), None]
        for factor, shift, following in zip(self.factors, self.means, ladder, strict=True):
            mean, cov, onto_z = factor @ mean + shift, factor @ cov @ factor.T, factor @ onto_z
            found.append(Gaussian(mean, cov))
            if following is not None:
                alpha, sigma = (float(value) for value in SCHEDULE.at(torch.tensor([following])))
                mean, cov, onto_z = alpha * mean, alpha**2 * cov + sigma**2 * torch.eye(2), alpha * onto_z
                if not self.fresh:
                    cov = cov + sigma * (onto_z + onto_z.T)
                    onto_z = onto_z + sigma * torch.eye(2)
        return found

    def train(self, steps=600):
        optimizer = torch.optim.Adam([self.means, self.factors], lr=0.05)
        cooling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
        generator = torch.Generator().manual_seed(24)
        for step in range(steps):
            rung = step % len(self.rungs)
            z, noise, *noises = torch.randn(4, 64, 2, 1, 1, generator=generator)
            t = torch.randint(20, 981, (64,), generator=generator)
            x0 = self.image(rung, z, noises)
            x_t = add_noise(x0.detach(), noise, t, SCHEDULE)
            optimizer.zero_grad()
            vsd_loss(x0, vsd_gap(TARGET.epsilon(x_t, t), self.score(rung, x_t, t), t, SCHEDULE)).backward()
            optimizer.step()
            cooling.step()
        return self

    def score(self, rung, x_t, t):
        drawn = [self.drawn()[rung]] if self.told else self.drawn()
        log_p = torch.stack([one.noised(t).log_prob(x_t.double()[:, :, 0, 0]) for one in drawn])
        shares = log_p.softmax(dim=0)[:, :, None, None, None]
        return (shares * torch.stack([one.epsilon(x_t, t) for one in drawn])).sum(dim=0).float()


def moments(x):
    flat = x[:, :, 0, 0].double()
    return flat.mean(dim=0), flat.T.cov()


def test_a_linear_student_of_several_steps_recovers_mean_and_covariance_at_every_rung():
    """With fresh noise what it sees at each rung is the noised target, whose images the step down then are."""
    student = LinearStudent().train()
    for drawn in student.drawn():
        close(drawn.mean, TARGET.mean, rtol=0, atol=0.03)
        close(drawn.cov, TARGET.cov, rtol=0, atol=0.03)
    z, *noises = normal(3, 20000, 2, 1, 1, seed=30)
    for rung, t in enumerate(student.rungs[1:], 1):
        x, expected = student.input(rung, z, noises), TARGET.noised(torch.tensor([t]))
        for ours, exact in zip(moments(x), (expected.mean[0], expected.covariance_matrix[0]), strict=True):
            close(ours, exact, rtol=0, atol=0.05)


def test_a_score_that_is_not_told_the_rung_holds_the_rungs_together_only():
    """What all rungs draw together has the target's moments; each alone is free to have others."""
    drawn = LinearStudent(told=False).train().drawn()
    means, covs = (torch.stack([getattr(one, name) for one in drawn]) for name in ("mean", "cov"))
    close(means.mean(dim=0), TARGET.mean, rtol=0, atol=0.05)
    close(covs.mean(dim=0) + means.T.cov(correction=0), TARGET.cov, rtol=0, atol=0.1)
    assert (means - TARGET.mean).abs().max() > 0.2


def test_noise_that_is_used_again_shows_the_student_other_inputs_than_the_noised_images():
    """A linear student still finds the target, but not from x_t: the noise of z comes twice in what it sees."""
    student = LinearStudent(fresh=False).train()
    for drawn in student.drawn():
        close(drawn.mean, TARGET.mean, rtol=0, atol=0.03)
        close(drawn.cov, TARGET.cov, rtol=0, atol=0.03)
    z, *noises = normal(3, 20000, 2, 1, 1, seed=30)
    _, cov = moments(student.input(1, z, noises))
    assert (cov - TARGET.noised(torch.tensor([749])).covariance_matrix[0]).abs().max() > 0.2


def student_folder(folder, source, *, steps=4, t_init=None, **sampling):
    teacher = load_teacher(str(source))
    scheduler = Sampling(steps, **sampling).scheduler(teacher.scheduler, t_init)
    export_student(folder, teacher, teacher.unet, about=ABOUT | {"steps": steps}, scheduler=scheduler)
    return folder


def draw(folder, steps, seeds=(5, 6), **options):
    return torch.cat(list(student_images(load_student(str(folder)), ["a red cat"] * len(seeds), seeds, steps=steps)))


def in_diffusers(folder, steps, seeds=(5, 6)):
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    drawn = [
        pipe("a red cat", num_inference_steps=steps, guidance_scale=1, output_type="np",
             generator=torch.Generator().manual_seed(seed)).images[0]
        for seed in seeds
    ]  # fmt: skip
    return torch.stack([torch.from_numpy(image * 255).round().permute(2, 0, 1) for image in drawn])


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "xl", "cut"])
def test_plain_diffusers_draws_the_same_image_in_any_number_of_steps(tmp_path, kind):
    if kind == "xl":
        source = build_tiny_xl(tmp_path / "teacher")
    else:
        source = build_tiny_teacher(tmp_path / "teacher", prediction="epsilon" if kind == "cut" else kind)
    folder = student_folder(tmp_path / "student", source, t_init=625 if kind == "cut" else None)
    assert load_student(str(folder)).rungs() == ((623, 467, 311, 155) if kind == "cut" else (999, 749, 499, 249))
    drawn = {steps: draw(folder, steps) for steps in (1, 2, 4)}
    for steps, ours in drawn.items():
        assert (ours.float() - in_diffusers(folder, steps)).abs().max() <= 1
        assert ours.float().std() > 5
    assert not torch.equal(drawn[1], drawn[2]) and not torch.equal(drawn[2], drawn[4])
    assert torch.equal(drawn[4], draw(folder, None))


def test_a_student_may_keep_its_own_noise_from_step_to_step_as_ddim_does(tmp_path, tiny_teacher):
    folder = student_folder(tmp_path / "student", tiny_teacher, fresh=False)
    assert (draw(folder, None).float() - in_diffusers(folder, 4)).abs().max() <= 1
    with pytest.raises(SbrushError, match="does not take 2 steps"):
        draw(folder, 2)


def test_the_noise_of_a_step_depends_on_the_seed_and_the_step_alone():
    noises = step_noises([3, 4], (2, 5, 5), 3)
    assert torch.equal(noises[0], image_noise([3, 4], (2, 5, 5)))
    for step in range(3):
        assert torch.equal(noises[step][1], step_noises([4], (2, 5, 5), step + 1)[step][0])
    assert not torch.equal(noises[1], noises[2])


def test_images_of_several_steps_do_not_depend_on_their_batch(tmp_path, tiny_teacher):
    folder = student_folder(tmp_path / "student", tiny_teacher)
    alone, together = draw(folder, 4, [6]), draw(folder, 4, [5, 6, 7])
    assert (alone[0].float() - together[1].float()).abs().max() <= 1


def test_a_training_step_takes_one_rung_of_its_own_random_numbers_for_the_whole_batch(tiny_teacher, monkeypatch):
    from accelerate import Accelerator

    from sbrush.prompts import ShuffledPrompts, make_prompts

    recipe = dataclasses.replace(RECIPES["swiftbrush"], batch=4, student_steps=4, lora_rank=2, lora_alpha=2, steps=9)
    made = VSD(load_teacher(str(tiny_teacher)), recipe, seed=3, accelerator=Accelerator(cpu=True))
    seen, predict = [], type(made.teacher).predict

    def watch(self, network, x_t, t, conditioning):
        if network is made._student:
            seen.append((int(t[0]), torch.is_grad_enabled()))
            assert (t == t[0]).all()
        return predict(self, network, x_t, t, conditioning)

    monkeypatch.setattr(type(made.teacher), "predict", watch)
    prompts, ladder, taken = ShuffledPrompts(make_prompts(["a cat", "a dog"], "two"), 3), [999, 749, 499, 249], []
    for step in range(1, 10):
        seen.clear()
        made.step(step, prompts)
        *simulated, (last, with_gradient) = seen
        assert with_gradient and not any(gradient for _, gradient in simulated)
        assert [t for t, _ in seen] == ladder[: len(seen)]
        taken.append(ladder.index(last))
    expected = [StepNoise(3, step, range(4), torch.device("cpu")).index(4) for step in range(1, 10)]
    assert taken == expected and set(taken) == {0, 1, 2, 3}


@pytest.mark.parametrize(("share", "expected"), [(None, [1 / 4] * 4), (0.7, [0.7, 0.1, 0.1, 0.1]), (1.0, [1, 0, 0, 0])])
def test_the_first_of_several_steps_is_trained_in_its_share_of_the_steps(share, expected, tiny_teacher):
    from accelerate import Accelerator

    recipe = dataclasses.replace(RECIPES["swiftbrush"], batch=2, student_steps=4, lora_rank=2, first_share=share)
    made = VSD(load_teacher(str(tiny_teacher)), recipe, seed=3, accelerator=Accelerator(cpu=True))
    chosen = [made._choose_rung(StepNoise(3, step, range(2), torch.device("cpu"))) for step in range(4000)]
    assert [chosen.count(rung) / 4000 for rung in range(4)] == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize(("guidance_high", "anchor_end"), [(None, 1.0), (600, 0.5)])
def test_the_anchor_is_the_image_before_or_the_teachers_guess_from_what_the_student_sees(
    guidance_high, anchor_end, tiny_teacher, monkeypatch
):
    """While the LoRA teacher leads, the student learns from it alone."""
    from accelerate import Accelerator

    from sbrush.prompts import ShuffledPrompts, make_prompts

    recipe = dataclasses.replace(
        RECIPES["swiftbrush"], batch=4, student_steps=4, lora_rank=2, lora_alpha=2, steps=30, lora_lead=20,
        guidance=30.0, guide_lora=False, anchor_weight=2.0, anchor_end=anchor_end, student_lr=1e-3,
        guidance_high=guidance_high, cooldown=1.0,
    )  # fmt: skip

    def student():
        model = load_teacher(str(tiny_teacher))
        torch.manual_seed(1)
        for parameter in model.unet.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        return model

    made = VSD(load_teacher(str(tiny_teacher)), recipe, seed=3, accelerator=Accelerator(cpu=True), init=student())
    for parameter in made.lora.values():  # or the LoRA teacher would guess what the teacher does
        parameter.data.normal_()
    seen, predict = [], type(made.teacher).predict

    def watch(self, network, x_t, t, conditioning):
        if network is made._student and torch.is_grad_enabled():
            seen.append((x_t.clone(), t, conditioning))
        return predict(self, network, x_t, t, conditioning)

    monkeypatch.setattr(type(made.teacher), "predict", watch)
    prompts = ShuffledPrompts(make_prompts(["a cat", "a dog"], "two"), 3)
    before, plain, taken = student(), load_teacher(str(tiny_teacher)), []

    @torch.no_grad()
    def x0_by_hand(model, guidance, x_t, t, cond):
        """Guided in terms of the network's output, to which x0 is linear."""
        null = {name: value.expand_as(cond[name]) for name, value in model.null().items()}
        outputs = [model.predict(model.unet, x_t, t, each).float() for each in (null, cond)]
        output = outputs[0] + guidance * (outputs[1] - outputs[0])
        alpha, sigma = (value.view(-1, 1, 1, 1) for value in model.schedule.at(t))
        return (x_t - sigma * output) / alpha if model.prediction == "epsilon" else alpha * x_t - sigma * output

    for step in range(2, 10):
        metrics = made.step(step, prompts)
        x_t, t, cond = seen.pop()
        taken.append(rung := [999, 749, 499, 249].index(int(t[0])))
        scale = 30.0 if guidance_high is None or t[0] <= guidance_high else 1.0
        guess = x0_by_hand(before, 1.0, x_t, t, cond) if rung == 0 else x0_by_hand(plain, scale, x_t, t, cond)
        wanted = 0.5 * (metrics["x0"] - guess).pow(2).mean()
        assert metrics["anchor_loss"] == pytest.approx(wanted.item(), rel=1e-2) and wanted > 1e-6
        fallen = 0 if rung else (1 - anchor_end) * (step - 1) / 30  # the first step's anchor goes with student_lr
        assert metrics["student_loss"] == pytest.approx(2 * (1 - fallen) * metrics["anchor_loss"].item())
        assert metrics["student_grad"] > 0
    assert set(taken) == {0, 1, 2, 3} and taken[0] > 0  # or the first step would still be what it was


def test_the_lora_teacher_learns_a_token_of_the_rung_in_hand_and_the_teacher_is_told_nothing(tiny_teacher, monkeypatch):
    from accelerate import Accelerator

    from sbrush.models.unet import Role
    from sbrush.prompts import ShuffledPrompts, make_prompts

    recipe = dataclasses.replace(
        RECIPES["swiftbrush"], batch=2, student_steps=4, tell_rung=True, lora_rank=2, lora_alpha=2, null_chance=0.0
    )
    made = VSD(load_teacher(str(tiny_teacher)), recipe, seed=3, accelerator=Accelerator(cpu=True))
    made._rung_tokens.data.fill_(2.0)
    told: dict[Role, list] = {"teacher": [], "lora_teacher": []}
    score = Teachers._score

    def watch(self, role, x_t, t, prompts, scale):
        told[role].append(prompts)
        return score(self, role, x_t, t, prompts, scale)

    monkeypatch.setattr(Teachers, "_score", watch)
    before = made._rung_tokens.detach().clone()
    rungs = {step: StepNoise(3, step, range(2), torch.device("cpu")).index(4) for step in range(1, 20)}
    step, rung = next((step, rung) for step, rung in rungs.items() if rung == 2)
    made.step(step, ShuffledPrompts(make_prompts(["a cat", "a dog"], "two"), 3))
    changed = (made._rung_tokens.detach() != before).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [rung]
    for plain, hinted in zip(told["teacher"][0], told["lora_teacher"][0], strict=True):
        difference = hinted["tokens"] - plain["tokens"]
        assert torch.allclose(difference[:, 0], torch.tensor(2.0)) and not difference[:, 1:].any()


def test_a_run_of_several_steps_is_exported_merged_and_drawn(tmp_path, tiny_teacher, prompt_file):
    for seed in (0, 1):
        done = sbrush("distill", prompt_file, "--teacher", tiny_teacher, "--student-steps", 2, "--seed", seed,
                      "--out", tmp_path / f"run{seed}", *SMALL)  # fmt: skip
        assert done.returncode == 0, done.stderr
    folder = tmp_path / "run0" / "student"
    assert json.loads((folder / "sbrush.json").read_text())["steps"] == 2
    assert json.loads((folder / "model_index.json").read_text())["scheduler"] == ["diffusers", "LCMScheduler"]
    card = (folder / "README.md").read_text()
    assert "2-step student" in card and "num_inference_steps=2" in card and "999 and 499" in card
    merge(str(tmp_path / "run0"), str(tmp_path / "run1"), tmp_path / "merged")
    assert load_student(str(tmp_path / "merged")).rungs() == (999, 499)
    out = tmp_path / "out.png"
    for steps, taken in (((), 2), (("--steps", 1), 1)):
        done = sbrush("sample", "a cat", "--student", tmp_path / "run0", *steps, "-o", out, "--json")
        assert done.returncode == 0, done.stderr
        with Image.open(out) as image:
            assert f'"steps": {taken}' in json.dumps(json.loads(image.text["sbrush"]))
    done = sbrush("sample", "a cat", "--student", tmp_path / "run0", "--steps", 4, "-o", out)
    assert (done.returncode, "does not take 4 steps" in done.stderr) == (2, True)
    assert "--steps 1 to 2" in done.stderr
    student = ["--init", tmp_path / "run0", "--teacher", tiny_teacher, *SMALL]
    for steps, code in ((4, 0), (3, 2), (1, 0)):
        done = sbrush("distill", prompt_file, *student, "--student-steps", steps, "--out", tmp_path / f"on{steps}")
        assert done.returncode == code, done.stderr
        assert ("stands on the timesteps 999, 499, this run's student on 998, 665, 332" in done.stderr) == (code == 2)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--student-steps", 101], "a ladder of 101 steps does not fit into the schedule's 1000 timesteps"),
        (["--student-steps", 2, "--no-reparameterisation"], "without re-parameterisation takes one step"),
        (["--student-steps", 2, "--set", "pairs=2"], "pairs"),
        (["--set", "anchor_weight=2"], "anchor_weight is for students of several steps"),
        (["--set", "tell_rung=true"], "tell_rung is for students of several steps"),
        (["--student-steps", 2, "--set", "anchor_end=0"], "anchor_end is what is left of anchor_weight, which is 0"),
        (["--set", "first_share=0.5"], "first_share is for students of several steps"),
        (["--student-steps", 2, "--set", "first_share=1.5"], "first_share is a share of 1"),
        (["--student-steps", 2, "--set", "anchor_weight=2"], "this one starts as the teacher"),
    ],
)
def test_a_ladder_that_cannot_be_is_refused(tmp_path, tiny_teacher, prompt_file, flags, said):
    done = sbrush("distill", prompt_file, "--teacher", tiny_teacher, "--out", tmp_path / "run", *SMALL, *flags)
    assert done.returncode == 2 and said in done.stderr and "hint:" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_student_of_one_step_takes_one(tmp_path, tiny_teacher):
    done = sbrush("sample", "a cat", "--steps", 2, "-o", tmp_path / "out.png")
    assert done.returncode == 2 and "takes 1 step, not 2" in done.stderr and "--student-steps" in done.stderr
    assert not (tmp_path / "out.png").exists()


def test_the_plan_counts_the_simulated_forwards():
    """Half of those before the last, on average."""
    counted = [forwards(dataclasses.replace(RECIPES["stickers"], student_steps=steps)) for steps in (1, 2, 4)]
    assert counted == [7, 7.5, 8.5]
    anchored = [dataclasses.replace(RECIPES["stickers"], student_steps=steps, anchor_weight=1.0) for steps in (2, 4)]
    assert [forwards(recipe) for recipe in anchored] == [
        9,
        10.25,
    ]  # of the student before at the first, the teacher's 2
    mostly_first = dataclasses.replace(anchored[1], first_share=0.7)
    assert forwards(mostly_first) == pytest.approx(7 + 0.1 * (1 + 2 + 3) + 0.7 * 1 + 0.3 * 2)

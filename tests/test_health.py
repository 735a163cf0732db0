"""Each alarm is provoked, and silent in health; steps that are not finite are skipped, and many of them stop a run."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from launch import launch
from sbrush.console import SbrushError
from sbrush.models.load import load_teacher
from sbrush.prompts import ShuffledPrompts, make_prompts, read_prompts
from sbrush.sampling.generation import student_latents, teacher_latents
from sbrush.storage import checkpoint
from sbrush.training import health
from sbrush.training.health import ALARMS, GRACE, LASTING, MOST_SKIPPED, TeacherReference, alarms, spreads
from sbrush.training.loop import _run_of_skipped, distill
from sbrush.training.methods.vsd import VSD
from sbrush.training.plan import prepare
from sbrush.training.recipes import RECIPES
from sbrush.training.request import Intervals, RunRequest
from sbrush.training.run import read_log

HEALTHY = Path(__file__).parent.parent / "docs" / "healthy"
STICKERS = Path(__file__).parent.parent / "prompts" / "stickers.txt"
PROMPTS = make_prompts(["a cat", "a dog", "a red fish", "a blue car on a mint background"], "four")
SMALL = dataclasses.replace(
    RECIPES["swiftbrush"], steps=24, batch=4, student_lr=1e-4, lora_lr=1e-2, lora_rank=4, lora_alpha=4
)
FINE = {
    "latent_drift": 0.2, "saturation": 0.0, "score_gap_ratio": 0.1, "lora_divergence": 0.9, "prompt_spread": 0.8,
    "seed_spread": 0.8,
}  # fmt: skip
BAD = {
    "latent_drift": {"latent_drift": 1.1},
    "saturation": {"saturation": 0.02},
    "score_gap_ratio": {"score_gap_ratio": 0.001},
    "lora_divergence": {"lora_divergence": 1.6},
    "prompt_spread": {"prompt_spread": 0.2},
    "seed_spread": {"seed_spread": 0.2},
}


def entries(*, steps=range(10, 201, 10), bad_from=math.inf, **bad):
    return [{"step": 1, **FINE}, *({"step": s, **FINE, **(bad if s >= bad_from else {})} for s in steps)]


def names(log):
    return [alarm.name for alarm in alarms(log)]


def run(teacher, out, recipe, *, prompts=PROMPTS, grid=1000):
    every = Intervals(log=2, grid=grid, checkpoint=8)
    plan = prepare(RunRequest(
        recipe, prompts, out=out, teacher=teacher and str(teacher), seed=3, device="cpu",
        precision="float32", every=every,
    ))  # fmt: skip
    distill(plan)
    return read_log(out)


@pytest.fixture
def impatient(monkeypatch):
    """Alarms from step 12 on, after a sign of 8 steps."""
    monkeypatch.setattr(health, "GRACE", 12)
    monkeypatch.setattr(health, "LASTING", 8)


def test_every_alarm_is_provoked_here():
    assert BAD.keys() == {alarm.name for alarm in ALARMS}


@pytest.mark.parametrize("name", BAD)
def test_a_sign_raises_its_own_alarm_and_no_other(name):
    assert names(entries()) == []
    assert names(entries(bad_from=10, **BAD[name])) == [name]


@pytest.mark.parametrize("name", BAD)
def test_a_sign_must_last_and_the_first_steps_do_not_count(name):
    bad = BAD[name]
    assert names(entries(bad_from=201 - LASTING, **bad)) == [name]
    assert names(entries(bad_from=201 - LASTING + 10, **bad)) == []
    assert names(entries(steps=range(10, GRACE, 10), bad_from=0, **bad)) == []
    assert names(entries(bad_from=10, **bad)[:-1] + entries()[-1:]) == []


def test_what_was_not_measured_says_nothing():
    assert names([{"step": s} for s in range(10, 200, 10)]) == names([]) == []
    assert names([{"step": s, **dict.fromkeys(FINE)} for s in range(10, 200, 10)]) == []
    grids = entries()
    for entry in grids[1:-1]:
        del entry["prompt_spread"]
    grids[-1]["prompt_spread"] = 0.1  # measured with the sample grid only, so one sign is enough
    assert names(grids) == ["prompt_spread"]


def test_the_reference_run_is_silent():
    log = [json.loads(line) for line in (HEALTHY / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(log) > 50 and log[-1]["latent_drift"] is not None and "prompt_spread" in log[-1]
    assert {name for i in range(1, len(log) + 1) for name in names(log[:i])} == set()


def test_a_student_that_begins_without_variety_has_time_to_find_it():
    start = {"step": 1, **FINE, "prompt_spread": 0.1, "seed_spread": 0.2}
    assert names([start, {"step": 200, **FINE, "prompt_spread": 0.15, "seed_spread": 0.22}]) == []
    assert names([start, {"step": 200, **FINE, "prompt_spread": 0.05}]) == ["prompt_spread"]


def test_a_short_healthy_run_is_silent(tmp_path, impatient, capsys):
    recipe = dataclasses.replace(RECIPES["stickers"], steps=16, batch=4)
    log = run(None, tmp_path / "run", recipe, prompts=read_prompts(STICKERS), grid=8)
    assert not [e for e in log if e.get("alarms")] and "alarm:" not in capsys.readouterr().err
    assert all(e["latent_drift"] > 0 and e["skipped"] == 0 for e in log)
    assert [e["step"] for e in log if "seed_spread" in e] == [1, 8, 16]


def provoked(log, name):
    return [e["step"] for e in log if name in e.get("alarms", ())]


def test_a_lora_teacher_that_does_not_learn_leaves_no_gap(tmp_path, tiny_teacher, impatient, true_curves, capsys):
    log = run(tiny_teacher, tmp_path / "run", dataclasses.replace(SMALL, lora_lr=0.0))
    assert provoked(log, "score_gap_ratio")[0] == 12 and log[-1]["gap"] == 0
    said = capsys.readouterr().err
    assert said.count("alarm: score_gap_ratio at step 12") == 1 == said.count("alarm: score_gap_ratio")  # at its onset
    assert (tmp_path / "run" / "curves.png").stat().st_size > 5000


def test_a_lora_teacher_that_learns_too_fast_diverges(tmp_path, impatient):
    fast = dataclasses.replace(SMALL, lora_lr=0.3, student_lr=1e-5, steps=14, guidance=1.0)
    log = run(None, tmp_path / "run", fast, grid=0)  # of the built-in teacher, which has something to lose
    assert provoked(log, "lora_divergence")


def test_a_student_that_learns_too_fast_drifts_and_saturates(tmp_path, tiny_teacher, impatient):
    log = run(tiny_teacher, tmp_path / "run", dataclasses.replace(SMALL, student_lr=0.1))
    assert provoked(log, "latent_drift") and provoked(log, "saturation")


def test_images_that_ignore_their_prompt_or_their_seed_are_seen(tiny_teacher):
    model = load_teacher(str(tiny_teacher))
    texts, seeds = ["a cat", "a red fish", "a blue car"] * 3, [s for s in (1, 2, 3) for _ in range(3)]
    latents = torch.cat(list(teacher_latents(model, texts, seeds, steps=5, guidance=7.5))).unflatten(0, (3, 3))
    reference = TeacherReference.of(latents)
    same = reference.compare_spreads(latents)
    assert same["prompt_spread"] == pytest.approx(1) and same["seed_spread"] == pytest.approx(1)
    for name, parameter in model.unet.named_parameters():
        if "attn2.to_out" in name:
            parameter.data.zero_()
    deaf = torch.cat(list(student_latents(model, texts, seeds))).unflatten(0, (3, 3))
    shares = reference.compare_spreads(deaf)
    assert shares["prompt_spread"] < 1e-3 < 0.25 < shares["seed_spread"]
    start = {"step": 1, **FINE}
    assert names([start, {"step": 200, **FINE, **shares}]) == ["prompt_spread"]
    one_seed = latents[:1].expand_as(latents)
    assert names([start, {"step": 200, **FINE, **reference.compare_spreads(one_seed)}]) == ["seed_spread"]
    assert reference.compare_spreads(latents[:1, :1]) == {}


def test_the_yardstick_measures_what_it_says():
    torch.manual_seed(0)
    latents = torch.randn(3, 4, 2, 8, 8) * torch.tensor([1.0, 5.0]).view(2, 1, 1) + torch.tensor([0.0, 10.0]).view(
        2, 1, 1
    )
    reference = TeacherReference.of(latents)
    assert reference.mean[1] == pytest.approx(10, abs=0.5) and reference.deviation[1] == pytest.approx(5, rel=0.1)
    shifted = reference.compare(latents.flatten(0, 1) + torch.tensor([0.0, 10.0]).view(2, 1, 1))
    assert shifted["latent_drift"].item() == pytest.approx(2, rel=0.1)  # ten in a channel whose deviation is five
    assert reference.compare(latents.flatten(0, 1)) == {"latent_drift": pytest.approx(0, abs=1e-5), "saturation": 0}
    assert reference.compare(latents.flatten(0, 1) * 100)["saturation"] > 0.9
    checkers = torch.tensor([[1.0, -1.0], [1.0, -1.0]]).view(2, 2, 1, 1, 1)  # each column a prompt, each row a seed
    assert spreads(checkers) == (1.0, 0.0)


def not_finite_in(steps, teacher, monkeypatch, network="student"):
    """A distiller whose student or LoRA teacher gives NaN in these steps."""
    real = VSD.step
    now = []

    def step(self, number, prompts):
        now[:] = [number]
        return real(self, number, prompts)

    def build(self, *arguments, **options):
        init(self, *arguments, **options)
        layers = (self.student if network == "student" else self.teacher.unet).named_modules()
        first = next(m for n, m in layers if n.endswith("conv_out" if network == "student" else "lora_B.lora_teacher"))
        first.register_forward_hook(lambda module, given, out: out * math.nan if now[0] in steps else out)

    init = VSD.__init__
    monkeypatch.setattr(VSD, "__init__", build)
    monkeypatch.setattr(VSD, "step", step)


@pytest.mark.parametrize("network", ["student", "lora"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(tiny_teacher, monkeypatch, network):
    not_finite_in({2}, tiny_teacher, monkeypatch, network)
    ours = VSD(load_teacher(str(tiny_teacher)), SMALL, seed=3, accelerator=Accelerator(cpu=True))
    order = ShuffledPrompts(PROMPTS, 3)

    def everything():
        return {f"{part}.{k}": v.clone() for part, tensors in ours.state().items() for k, v in tensors.items()}

    assert ours.step(1, order)["skipped"] == 0
    before = everything()
    assert ours.step(2, order)["skipped"] == 1
    after = everything()
    student = [k for k in before if k.startswith("student")]
    assert student and all(torch.equal(before[k], after[k]) for k in student)
    if network == "student":  # whose images the LoRA teacher cannot learn from
        assert all(torch.equal(before[k], after[k]) for k in before if k.startswith("lora"))
    assert ours.step(3, order)["skipped"] == 0
    third = everything()
    assert any(not torch.equal(third[k], after[k]) for k in student)
    assert all(v.isfinite().all() for v in third.values())


def test_skipped_steps_are_logged_and_the_means_are_of_the_others(tmp_path, tiny_teacher, monkeypatch):
    not_finite_in({3, 4, 6}, tiny_teacher, monkeypatch)
    log = run(tiny_teacher, tmp_path / "run", SMALL)
    skipped = {entry["step"]: entry["skipped"] for entry in log}
    assert (skipped[2], skipped[4], skipped[6], skipped[8]) == (0, 2, 1, 0)
    gaps = {entry["step"]: entry["gap"] for entry in log}
    assert gaps[4] is None and gaps[6] is not None


def test_many_of_them_in_a_row_stop_the_run_with_its_last_good_checkpoint(tmp_path, tiny_teacher, monkeypatch):
    not_finite_in(range(10, 1000), tiny_teacher, monkeypatch)
    with pytest.raises(SbrushError, match=rf"{MOST_SKIPPED} steps in a row.*step-000008") as stopped:
        run(tiny_teacher, tmp_path / "run", dataclasses.replace(SMALL, steps=100))
    assert "--student-lr" in stopped.value.hint
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").step == 8  # none since was kept


def one_bad_rank(teacher):
    """Three steps in each of two processes, of which the second is not finite in the second process alone."""
    accelerator, step = Accelerator(cpu=True), 0
    assert accelerator.num_processes == 2
    ours = VSD(load_teacher(str(teacher)), dataclasses.replace(SMALL, student_lr=1e-3), seed=3, accelerator=accelerator)
    ours.student.conv_out.register_forward_hook(
        lambda module, given, out: out * math.nan if step == 2 and accelerator.process_index == 1 else out
    )

    def student():
        return torch.cat([p.detach().flatten() for p in ours.student.parameters()])

    for step in (1, 2, 3):
        before = student().clone()
        skipped = ours.step(step, ShuffledPrompts(PROMPTS, 3))["skipped"].item()
        print(skipped, torch.equal(before, student()))
    everywhere = accelerator.gather(student()[None])
    assert torch.equal(everywhere[0], everywhere[1]) and everywhere.isfinite().all()


def test_a_step_that_is_not_finite_in_one_process_is_skipped_by_all(tiny_teacher):
    for done in launch(lambda: one_bad_rank(tiny_teacher)):
        assert done.returncode == 0, done.stderr
        # Nothing happens to a student in its first step, before the LoRA teacher has learnt.
        assert done.stdout.splitlines() == ["0.0 True", "1.0 True", "0.0 False"]


def test_steps_that_are_skipped_here_and_there_do_not_stop_a_run():
    bad, good = torch.tensor(1.0), torch.tensor(0.0)
    assert _run_of_skipped([bad] * 3, 20) == 23
    assert _run_of_skipped([bad, good, bad, bad], 20) == 2 and _run_of_skipped([bad, good], 20) == 0

"""The loop, checkpoints, grids, cost and export know no method: one that is made up here trains like VSD does."""

import dataclasses
import json
import sys

import pytest
import torch
from safetensors.torch import load_file

from conftest import sbrush
from sbrush import core
from sbrush.cli.dry_run import compare_with_free_memory
from sbrush.console import SbrushError
from sbrush.models.load import load_student
from sbrush.noise import StepNoise
from sbrush.prompts import make_prompts
from sbrush.training.cost import estimate
from sbrush.training.loop import distill
from sbrush.training.methods import METHODS, Method, Rehearsal
from sbrush.training.networks import Networks
from sbrush.training.plan import check_compiler, prepare
from sbrush.training.recipes import RECIPES
from sbrush.training.request import ExecutionOptions, Intervals, RunRequest

RECIPE = dataclasses.replace(RECIPES["swiftbrush"], method="mimic", steps=4, batch=2, student_lr=1e-3, ema=0.5)


class Mimic(Networks, Method):
    """A student that learns the teacher's x0 at the first timestep of its schedule; it has no LoRA teacher."""

    metrics = ("mimic_loss", "skipped")
    views = {"student x0": "x0"}  # noqa: RUF012

    def __init__(self, teacher, recipe, *, alignment=None, text_cache=None, **options):
        super().__init__(teacher, recipe, **options)

    def step(self, step, prompts):
        draw = StepNoise(self.seed, step, range(self.recipe.batch), self.accelerator.device)
        cond = self.teacher.encode([prompts[(step - 1) * self.recipe.batch + i] for i in range(self.recipe.batch)])
        z, t = draw.normal(self.teacher.latent_shape), self.teacher.schedule.start(self.recipe.batch)

        def x0(network):
            output = self.teacher.predict(network, z, t, cond)
            return core.student_x0(output, z, t, self.teacher.schedule, self.teacher.prediction)

        with torch.no_grad():
            target = 0.5 * x0(self.teacher.unet)
        found = x0(self._student)
        loss = core.pair_loss(found, target)
        self.accelerator.backward(loss)
        norm = self.apply(self.student_optimizer, self.trained)
        self.ema.update(step)
        return {"mimic_loss": loss.detach(), "skipped": (~norm.isfinite()).float(), "x0": found.detach()}

    def summary(self, entry):
        return f"loss {entry['mimic_loss']:.3g}"

    @classmethod
    def check(cls, recipe, teacher):
        if recipe.guidance > 100:
            raise SbrushError("mimics need less guidance", "lower it", code=2)

    @classmethod
    def rehearse(cls, recipe, teacher, execution, machine, alignment):
        trained = sum(p.numel() for p in teacher.unet.parameters())
        return Rehearsal(trained, {}, working=1000, flops=1e9, forwards=4)


@pytest.fixture
def mimic(monkeypatch):
    monkeypatch.setitem(METHODS, "mimic", Mimic)


def request(teacher, out, **options):
    prompts = make_prompts(["a cat", "a red dog", "a fish"], "three")
    every = Intervals(log=1, grid=2, checkpoint=2)
    return RunRequest(RECIPE, prompts, out, teacher=str(teacher), seed=3, precision="float32", every=every, **options)


def test_another_method_trains_resumes_and_exports_through_the_same_loop(tmp_path, tiny_teacher, mimic, monkeypatch):
    whole = prepare(request(tiny_teacher, tmp_path / "whole"))
    assert distill(whole)
    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [1, 2, 3, 4] and log[-1]["mimic_loss"] < log[0]["mimic_loss"]
    assert {"latent_drift", "saturation", "prompt_spread"} <= log[-1].keys() and "gap" not in log[-1]
    assert (tmp_path / "whole" / "samples" / "x0-000004.png").is_file()
    load_student(str(tmp_path / "whole"))

    own_step = Mimic.step
    stopped = prepare(request(tiny_teacher, tmp_path / "again"))
    with monkeypatch.context() as patch:
        patch.setattr(Mimic, "step", lambda self, step, p: 1 / 0 if step == 3 else own_step(self, step, p))
        with pytest.raises(ZeroDivisionError):
            distill(stopped)
    assert distill(prepare(request(tiny_teacher, tmp_path / "again")))
    weights = "student/unet/diffusion_pytorch_model.safetensors"
    one, two = (load_file(tmp_path / run / weights) for run in ("whole", "again"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_its_cost_and_its_checks_are_asked_of_it(tiny_teacher, mimic, tmp_path):
    cost = estimate(str(tiny_teacher), RECIPE, ExecutionOptions())
    assert cost.forwards == 4 and cost.flops == 1e9 and "LoRA teacher" not in cost.parameters
    assert cost.memory["student's weights, float32"] == 4 * cost.parameters["UNet"]
    with pytest.raises(SbrushError, match="less guidance"):
        too_much = dataclasses.replace(RECIPE, guidance=101.0)
        prepare(dataclasses.replace(request(tiny_teacher, tmp_path / "run"), recipe=too_much))
    assert not (tmp_path / "run").exists()


def test_an_unknown_method_is_refused_by_name(prompt_file, tmp_path):
    done = sbrush("distill", prompt_file, "--set", "method=magic", "-o", tmp_path / "run")
    assert done.returncode == 2 and "no method magic" in done.stderr and "vsd" in done.stderr


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "would change the run"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "would change the run"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "would change the run"),
        ("ACCELERATE_TORCH_DEVICE", "cuda:0", "asks for cuda:0, this run for cpu"),
    ],
)
def test_what_accelerate_reads_from_the_environment_changes_nothing_unseen(
    tmp_path, prompt_file, tiny_teacher, variable, value, message
):
    shape = "--steps", 1, "--batch", 1, "--grid-every", 0, "--device", "cpu", "--out", tmp_path / "run"
    done = sbrush("distill", prompt_file, "--teacher", tiny_teacher, *shape, **{variable: value})
    assert done.returncode == 2 and message in done.stderr and "\nhint: " in done.stderr
    assert not (tmp_path / "run").exists()


def test_accelerates_own_precision_is_not_taken_in_silence(tmp_path, prompt_file, tiny_teacher):
    shape = "--steps", 1, "--batch", 1, "--grid-every", 0, "--device", "cpu", "--precision", "float32"
    launched = {"ACCELERATE_MIXED_PRECISION": "fp16", "ACCELERATE_DYNAMO_BACKEND": "no"}
    done = sbrush("distill", prompt_file, "--teacher", tiny_teacher, *shape, "--out", tmp_path / "run", **launched)
    assert done.returncode == 0 and "mixed_precision fp16 is not used" in done.stderr, done.stderr


def test_out_of_memory_names_what_makes_the_run_smaller(tmp_path, tiny_teacher, monkeypatch):
    def too_large(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    plan = prepare(dataclasses.replace(request(tiny_teacher, tmp_path / "run"), recipe=RECIPES["swiftbrush"]))
    monkeypatch.setattr(METHODS["vsd"], "step", too_large)
    with pytest.raises(SbrushError, match="out of memory on cpu") as refused:
        distill(plan)
    hint = refused.value.hint
    assert "--micro-batches 4" in hint and "--student-lora 256" in hint and "checkpoints is kept" in hint


def test_a_run_larger_than_the_free_memory_is_noted_before_it_starts(tiny_teacher, tmp_path, monkeypatch, capsys):
    asked = dataclasses.replace(request(tiny_teacher, tmp_path / "run"), recipe=RECIPES["swiftbrush"], device="cuda")
    for free, noted in ((2**10, True), (2**40, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 2**40))
        compare_with_free_memory(asked)
        said = capsys.readouterr().err
        assert ("GiB free; these make it smaller: --ema-on-cpu" in said) == noted


@pytest.mark.parametrize(("device", "variable"), [("cpu", "CXX"), ("cuda", "CC")])
def test_compile_needs_a_compiler_and_says_so_at_the_start(tiny_teacher, tmp_path, monkeypatch, device, variable):
    asked = dataclasses.replace(
        request(tiny_teacher, tmp_path / "run"), execution=ExecutionOptions(compile="inductor"), device=device
    )
    monkeypatch.setenv(variable, "no-such-compiler")
    with pytest.raises(SbrushError, match="no-such-compiler is not found") as refused:
        prepare(asked)
    assert variable in refused.value.hint and not (tmp_path / "run").exists()
    monkeypatch.setenv(variable, sys.executable)  # a program that is there
    check_compiler(device)

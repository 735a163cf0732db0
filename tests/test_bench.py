"""The bench measures like with like, says what it counts, and keeps to its minutes."""

import dataclasses
import json
import shutil
import weakref

import pytest
import torch
import typer
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from typer.testing import CliRunner

from sbrush.benchmarks.roofline import Rates, Roofline, copy_rate, matrix_rate
from sbrush.benchmarks.training import BASELINE, BaselineVSD, contenders, main, measure, rows
from sbrush.models.load import load_teacher
from sbrush.models.model import Model
from sbrush.prompts import ShuffledPrompts, make_prompts
from sbrush.training.cost import estimate
from sbrush.training.methods.vsd import VSD
from sbrush.training.recipes import RECIPES
from sbrush.training.request import ExecutionOptions

PROMPTS = make_prompts(["a cat", "a dog", "a red fish"], "three")
RECIPE = dataclasses.replace(RECIPES["swiftbrush"], batch=4, lora_rank=4, lora_alpha=4, lora_lr=1e-2, student_lr=1e-3)
RATES = Rates(matrix=1e12, copy=1e10)


def steps(teacher, kind, **execution):
    """Metrics of three steps, and the student's weights after them."""
    made = kind(
        load_teacher(str(teacher)),
        RECIPE,
        seed=3,
        accelerator=Accelerator(cpu=True),
        execution=ExecutionOptions(**execution),
    )
    shuffled = ShuffledPrompts(PROMPTS, 3)
    metrics = [made.step(step, shuffled) for step in (1, 2, 3)]
    return metrics, torch.cat([p.detach().flatten() for p in made.trained.values()])


def test_the_plain_formulation_trains_the_same_student_in_single_score_calls(tiny_teacher, monkeypatch):
    predict, sizes = Model.predict, list[int]()

    def watch(self, network, x_t, t, conditioning):
        sizes.append(len(x_t))
        return predict(self, network, x_t, t, conditioning)

    monkeypatch.setattr(Model, "predict", watch)
    (ours, student), (plain, other) = (steps(tiny_teacher, kind) for kind in (VSD, BaselineVSD))
    assert sizes == 3 * [4, 8, 8, 4] + 3 * [4, 4, 4, 4, 4, 4]  # student, the scores, the LoRA teacher's loss
    for one, two in zip(ours, plain, strict=True):
        for name in ("gap", "student_grad", "lora_grad", "lora_loss"):
            assert torch.allclose(one[name], two[name], rtol=1e-3, atol=1e-6), name
    assert (student - other).norm() < 1e-3 * student.norm()  # Adam makes much of gradients near nothing


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch hides it, but not from a filter of "error"
def test_compiled_roles_stay_who_they_are_and_are_compiled_once(tmp_path, monkeypatch, tiny_teacher):
    from torch._dynamo.utils import counters

    # Compiling takes its time with each shape: one block down, two up, all alike.
    tiny_teacher = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    UNet2DConditionModel(
        sample_size=16, block_out_channels=(8,), layers_per_block=1, cross_attention_dim=16, attention_head_dim=2,
        norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        mid_block_type=None,
    ).save_pretrained(tiny_teacher / "unet")  # fmt: skip
    plain, student = steps(tiny_teacher, VSD)
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 2)  # of a block of many shapes, torch's own 8 are few
    compiled, other = steps(tiny_teacher, VSD, compile="aot_eager")
    for one, two in zip(plain, compiled, strict=True):
        assert torch.allclose(one["gap"], two["gap"], rtol=1e-3, atol=1e-6)
    assert plain[2]["gap"] > 0  # the LoRA teacher answers differently from the teacher by now
    assert torch.allclose(student, other, atol=1e-5)
    # Student; teacher; LoRA teacher as a score; and in training, the first block apart, whose input needs no gradient.
    assert counters["stats"]["unique_graphs"] == 5
    assert not counters["graph_break"]
    torch._dynamo.reset()


def test_the_floor_is_products_over_their_rate_and_bytes_over_theirs():
    recipe = dataclasses.replace(RECIPE, batch=10, ema=0.0)
    floor = Roofline.of_step(recipe, 2e9, trained=1000, lora=100, bf16=False, rates=RATES)
    assert floor.compute == pytest.approx(10 * 9 * 2e9 / 1e12)  # nine forwards
    assert floor.moving == pytest.approx(32 * 1100 / 1e10)
    assert floor.seconds == floor.compute + floor.moving
    more = Roofline.of_step(dataclasses.replace(recipe, ema=0.9), 2e9, trained=1000, lora=100, bf16=True, rates=RATES)
    assert more.moving - floor.moving == pytest.approx(18 * 1000 / 1e10)


def test_rates_are_measured():
    assert matrix_rate("cpu", torch.float32) > 1e8 and copy_rate("cpu") > 1e7


@pytest.mark.parametrize(("at_once", "order"), [(True, "ab" * 6), (False, "a" * 6 + "b" * 6)])
def test_contenders_take_turns_or_follow_each_other(at_once, order):
    taken = []

    def way(name):
        return lambda: lambda step: taken.append((name, step))

    found = measure(
        {"a": way("a"), "b": way("b")}, "cpu", turns=2, steps=2, at_once=at_once, until=1, clock=lambda: 0,
        report=lambda name, times: None,
    )  # fmt: skip
    assert "".join(name for name, _ in taken) == ("aabb" * 3 if at_once else order)
    assert [step for name, step in taken if name == "a"] == [1, 2, 3, 4, 5, 6]  # of which two warm up
    assert [len(found[name]["step"]) for name in "ab"] == [2, 2]


def test_no_turn_begins_after_the_minutes_are_over():
    now, made = [0.0], []

    def way(name):
        def make():
            made.append(name)
            return lambda step: now.__setitem__(0, now[0] + 1)

        return make

    found = measure(
        {name: way(name) for name in "abc"}, "cpu", turns=2, steps=1, at_once=False, until=5, clock=lambda: now[0],
        report=lambda name, times: None,
    )  # fmt: skip
    # Three seconds for a; b has its warm-up and a turn; c is not even made.
    assert made == ["a", "b"] and {name: len(row["step"]) for name, row in found.items()} == {"a": 2, "b": 1}


def test_rows_are_medians_and_ratios_of_turns(tiny_teacher):
    chosen = {
        name: dataclasses.replace(one, recipe=RECIPE)
        for name, one in contenders(4, built_in=False, compiled=False).items()
    }
    cost = estimate(str(tiny_teacher), RECIPE, ExecutionOptions())
    measured = {
        BASELINE: {"step": [4.0, 6.0, 8.0], "warm_up": 9.0},
        "sbrush": {"step": [2.0, 2.0, 2.0], "warm_up": 1.0},
    }
    found = rows(measured, chosen, dict.fromkeys(chosen, cost), False, RATES)
    assert list(found) == [BASELINE, "sbrush"]
    assert found["sbrush"]["times_baseline"] == 3 and found[BASELINE]["times_baseline"] == 1
    assert found["sbrush"]["images_per_second"] == 2
    assert found["sbrush"]["matrix_rate_share"] == pytest.approx(4 * 9 * cost.flops / 1e12 / 2)


def test_the_command_prints_json(tiny_teacher):
    command = ["--teacher", tiny_teacher, "--batch", "2", "--turns", "1", "--steps", "1", "--device", "cpu", "--json"]
    app = typer.Typer()
    app.command()(main)
    done = CliRunner().invoke(app, [*map(str, command)])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert list(found["rows"]) == [BASELINE, "sbrush", "sbrush, one LoRA forward", "the same, 4 student steps"]
    # Of the four steps, half of those before the last are simulated.
    assert [row["forwards_per_image"] for row in found["rows"].values()] == [9, 9, 7, 8.5]
    assert all(0 < row["roofline_fraction"] < 1 for row in found["rows"].values())
    assert "turn 1" in done.stderr  # a run that is cut off has said what it knew


def test_a_contender_of_full_size_is_gone_before_the_next_is_made(tiny_teacher, monkeypatch):
    made, alive = list[weakref.ref[UNet2DConditionModel]](), list[int]()

    def watch(source):
        alive.append(sum(each() is not None for each in made))
        teacher = load_teacher(source)
        made.append(weakref.ref(teacher.unet))
        return teacher

    monkeypatch.setattr("sbrush.benchmarks.training.load_teacher", watch)
    main(
        teacher=str(tiny_teacher), device="cpu", batch=2, student_lora=0, only=["sbrush", "sbrush, one LoRA forward"],
        turns=1, steps=1, minutes=9, compiled=False, json_=True,
    )  # fmt: skip
    assert alive == [0, 0]

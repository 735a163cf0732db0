"""What a run says and shows of its prompts: sample grids of few, and words that the built-in world has never seen."""

import dataclasses
from pathlib import Path

import pytest
from accelerate import Accelerator

from conftest import sbrush
from sbrush.models.load import load_teacher
from sbrush.prompts import make_prompts
from sbrush.training.config import GRID_PROMPTS, make_config
from sbrush.training.methods.vsd import VSD
from sbrush.training.plan import prepare
from sbrush.training.recipes import RECIPES
from sbrush.training.request import RunRequest
from sbrush.training.run import Run

STRANGE = ["an astronaut riding a red horse", "a small cat"]


def grid_prompts(count):
    request = RunRequest(RECIPES["swiftbrush"], make_prompts([f"prompt {i}" for i in range(count)], "x"), Path("run"))
    config = make_config(
        request, sampling=VSD.sampling(request.recipe), images=None, teacher_sha256="", init_sha256=None,
        control_sha256=None, clip=None, bf16=False,
    )  # fmt: skip
    return [int(prompt.split()[1]) for prompt in config["grid_prompts"]]


@pytest.mark.parametrize("count", range(1, GRID_PROMPTS + 1))
def test_of_few_prompts_a_sample_grid_shows_each_once(count):
    assert grid_prompts(count) == list(range(count))


def test_of_many_prompts_a_sample_grid_shows_eight_spread_over_the_list():
    assert grid_prompts(9) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert grid_prompts(2751) == [0, 343, 687, 1031, 1375, 1719, 2063, 2407]


def test_a_dry_run_tells_of_words_that_the_world_has_never_seen(tmp_path):
    """As the run itself and sample do; and not of another teacher's."""
    file = tmp_path / "p.txt"
    file.write_text("\n".join(STRANGE))
    done = sbrush("distill", file, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("note: the built-in world has never seen: astronaut, horse, riding\n") == 1


def test_a_run_tells_of_words_that_the_world_has_never_seen(tmp_path, tiny_teacher, capsys):
    recipe = dataclasses.replace(RECIPES["stickers"], batch=2, steps=1)
    many = [f"a w{i} cat" for i in range(30)]
    for prompts, said in (
        (STRANGE, "astronaut, horse, riding\n"),
        (many, " and 20 others\n"),
        (["a small cat"], None),
    ):
        prepare(RunRequest(recipe, make_prompts(prompts, "x"), tmp_path / "run"))
        told = capsys.readouterr().err
        assert told.count("has never seen") == bool(said) and (not said or said in told)
    prepare(RunRequest(recipe, make_prompts(STRANGE, "x"), tmp_path / "run", teacher=str(tiny_teacher)))
    assert "never seen" not in capsys.readouterr().err


def test_a_row_of_a_grid_is_a_seed_and_a_column_a_prompt(monkeypatch):
    """As its labels say."""
    monkeypatch.setattr("sbrush.training.run.student_latents", lambda _, *what, batch: zip(*what, strict=True))
    drawn = Run(Path("run"), {"grid_prompts": ["a cat", "a dog"]}, RECIPES["swiftbrush"]).draw(None)
    assert drawn == [(prompt, seed) for seed in (1, 2, 3) for prompt in ("a cat", "a dog")]


def test_a_grid_is_drawn_as_the_student_will_be(tiny_teacher):
    recipe = dataclasses.replace(RECIPES["swiftbrush"], batch=2, lora_rank=2, t_init=700, reparameterised=False)
    made = VSD(load_teacher(str(tiny_teacher)), recipe, seed=0, accelerator=Accelerator(cpu=True))
    with made.average() as student:
        assert len(student.schedule) == 701 and student.about["reparameterised"] is False

"""Recipes: what a run may set, what is refused, what a step costs."""

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbrush.console import SbrushError
from sbrush.training.methods.rehearsal import forwards
from sbrush.training.recipes import RECIPES, Recipe

FIELDS = [field.name for field in dataclasses.fields(Recipe) if field.name != "name"]
ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=2)
)


def test_the_papers_numbers():
    paper = RECIPES["swiftbrush"]
    assert (paper.gap, paper.guidance, paper.guide_lora, paper.batch) == ("vsd", 4.5, True, 16)
    assert (paper.student_lr, paper.lora_lr, paper.lora_rank, paper.lora_alpha) == (1e-6, 1e-3, 64, 108)
    assert (paper.lora_targets, paper.null_chance, paper.ema, paper.t_low, paper.t_high) == (
        "to_q to_v", 0.1, 0.9999, 20, 980,
    )  # fmt: skip
    proper = RECIPES["proper-guidance"]
    changed = {f for f in FIELDS if getattr(proper, f) != getattr(paper, f)}
    assert changed == {"guidance", "guidance_to"} and (proper.guidance, proper.guidance_to) == (0.5, 4.0)
    assert (RECIPES["dmd"].gap, RECIPES["dmd"].guide_lora) == ("dmd", False)


def test_what_a_step_costs():
    paper = RECIPES["swiftbrush"]
    assert forwards(paper) == 9 and forwards(RECIPES["proper-guidance"]) == 9
    plain = dataclasses.replace(paper, guidance=1.0, guide_lora=False)
    assert forwards(plain) == 7 and forwards(dataclasses.replace(plain, shared_forward=True)) == 6
    assert forwards(dataclasses.replace(plain, guidance_to=2.0)) == 8


@pytest.mark.parametrize("name", RECIPES)
def test_settings_are_read_back_as_they_are_written(name):
    recipe = RECIPES[name]
    assert recipe.but_for(f"{f}={json.dumps(getattr(recipe, f))}" for f in FIELDS) == recipe
    assert recipe.but_for(["gap=sds", "shared_forward=false"]).gap == "sds"  # a bare word


@given(field=st.sampled_from(FIELDS), value=ANYTHING)
def test_a_recipe_holds_what_makes_sense_or_is_refused(field, value):
    try:
        recipe = dataclasses.replace(RECIPES["stickers"], **{field: value})
    except ValueError:
        return
    numbers = [getattr(recipe, f) for f in FIELDS if type(getattr(recipe, f)) in (int, float)]
    assert all(math.isfinite(n) and n >= 0 for n in numbers)
    assert recipe.steps >= 1 and recipe.batch >= 1 and forwards(recipe) >= 4 and recipe.t_low <= recipe.t_high
    assert 0 <= recipe.student_lr_at(1) <= recipe.student_lr
    assert dataclasses.replace(RECIPES["stickers"], **json.loads(json.dumps(dataclasses.asdict(recipe)))) == recipe


@given(text=st.one_of(st.text(max_size=30), st.tuples(st.sampled_from(FIELDS), st.text(max_size=8)).map("=".join)))
def test_a_setting_is_taken_or_refused_in_one_line(text):
    try:
        RECIPES["stickers"].but_for([text])
    except SbrushError as refused:
        assert refused.code == 2 and "\n" not in str(refused) and refused.hint


@given(
    steps=st.integers(1, 500), warmup=st.integers(0, 600), cooldown=st.floats(0, 1), step=st.integers(1, 500)
)  # fmt: skip
def test_the_learning_rate_stays_between_nothing_and_the_recipes(steps, warmup, cooldown, step):
    recipe = dataclasses.replace(RECIPES["stickers"], steps=steps, warmup=warmup, cooldown=cooldown)
    rate = recipe.student_lr_at(min(step, steps))
    assert 0 < rate <= recipe.student_lr
    if min(step, steps) >= warmup and min(step, steps) <= (1 - cooldown) * steps:
        assert rate == recipe.student_lr

"""Settings of a training that contradict each other, or that would be passed over: refused, with a hint."""

import pytest

from conftest import sbrush
from sbrush.console import SbrushError
from sbrush.models.load import load_teacher
from sbrush.models.unet import add_lora


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--no-lora-teacher", "--set", "gap=dmd"), "gap is given twice"),
        (("--no-reparameterisation", "--set", "reparameterised=true"), "reparameterised is given twice"),
        (("--set", "batch=8", "--set", "batch=16"), "batch is given twice"),
        (("--set", "clip=0"), "clip is above 0"),
        (("--seed", 10**18), "Invalid value for '--seed'"),
    ],
)
def test_what_would_be_passed_over_is_refused(flags, said):
    done = sbrush("distill", "--recipes", *flags)
    assert done.returncode == 2 and said in done.stderr and "hint: " in done.stderr, done.stderr


def test_a_personal_seed_has_a_bound_too():
    done = sbrush("personalize", "photos", "--token", "sks dog", "--class", "dog", "--seed", 10**18)
    assert done.returncode == 2 and "Invalid value for '--seed'" in done.stderr


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ("foo", "foo, which is no name"), ("to_q foo to_v", "foo, which is no name"), ("norm1", "norm1, which is no"),
        ("attn1", "attn1, which is no"), (" ", "no layer"),
    ],
)  # fmt: skip
def test_a_lora_on_layers_that_are_not_there_is_refused(tiny_teacher, targets, said):
    """PEFT passes over a name that no module has if it finds another, and raises errors of its own for the rest."""
    with pytest.raises(SbrushError, match=said) as problem:
        add_lora(load_teacher(str(tiny_teacher)).unet, "student", rank=2, alpha=2, targets=targets, seed=0)
    assert problem.value.code == 2


def test_a_second_lora_finds_the_layers_that_have_one_already(tiny_teacher):
    unet = load_teacher(str(tiny_teacher)).unet
    first = add_lora(unet, "lora_teacher", rank=2, alpha=2, targets="to_q attn2.to_out.0", seed=0)
    second = add_lora(unet, "student", rank=2, alpha=2, targets="to_q attn2.to_out.0", seed=1)
    assert len(first) == len(second) > 0

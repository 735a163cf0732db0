"""Seeds as people write them, and the noise that they stand for."""

import pytest
import torch

from sbrush.console import SbrushError
from sbrush.noise import StepNoise, image_noise
from sbrush.sampling.seeds import parse_seeds


@pytest.mark.parametrize(
    ("text", "seeds"), [("7", [7]), ("1-3", [1, 2, 3]), ("0, 5,9-10", [0, 5, 9, 10]), ("4-4", [4])]
)
def test_seed_ranges(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "3-1", "-1", "1-", "1..4", "1-999999999", "1.5", "9" * 30, "1,,2"])
def test_what_is_no_seed_range_is_refused(text):
    with pytest.raises(SbrushError) as refusal:
        parse_seeds(text)
    assert refusal.value.code == 2


def test_a_images_noise_is_what_diffusers_draws_and_depends_on_its_seed_alone():
    together = image_noise([3, 8, 3], (4, 5, 6))
    assert torch.equal(together[0], together[2]) and not torch.equal(together[0], together[1])
    assert torch.equal(together[1:2], torch.randn(1, 4, 5, 6, generator=torch.Generator().manual_seed(8)))


def test_step_noise_does_not_depend_on_how_the_batch_is_shared_out():
    cpu = torch.device("cpu")
    whole, part = StepNoise(1, 5, range(4), cpu), StepNoise(1, 5, range(2, 4), cpu)
    assert torch.equal(whole.normal((2, 3))[2:], part.normal((2, 3)))
    assert torch.equal(whole.timesteps(20, 980)[2:], part.timesteps(20, 980))
    assert [whole.chance(0.5) for _ in range(20)] == [part.chance(0.5) for _ in range(20)]
    assert not torch.equal(StepNoise(1, 6, range(4), cpu).normal((2, 3)), StepNoise(1, 5, range(4), cpu).normal((2, 3)))


def test_step_noise_is_standard_normal_and_its_timesteps_are_uniform_with_both_ends():
    draws = StepNoise(0, 1, range(4000), torch.device("cpu"))
    x, t = draws.normal((16,)), draws.timesteps(3, 6)
    assert abs(x.mean().item()) < 0.02 and abs(x.std().item() - 1) < 0.02
    assert abs((x[:-1] * x[1:]).mean().item()) < 0.02  # neighbouring samples are independent
    counts = torch.bincount(t, minlength=7)
    assert counts[:3].sum() == 0 and len(counts) == 7 and (counts[3:] - 1000).abs().max() < 150

"""One step of the optimiser: gradients are clipped together, and are gone afterwards."""

import pytest
import torch

from sbrush.training.optimizer import clip_and_step, make_adam


@pytest.mark.parametrize(("clip", "share"), [(1.0, 0.2), (10.0, 1.0)])
def test_gradients_are_clipped_to_their_common_norm(clip, share):
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    adam = make_adam(weights, kind="adam", lr=0.1, beta2=0.9)
    for weight, gradient in zip(weights, (3.0, 4.0), strict=True):
        weight.grad = torch.tensor([gradient])
    assert clip_and_step(adam, clip).item() == 5  # as it was before
    assert [w.grad for w in weights] == [None, None]
    moments = [adam.state[w]["exp_avg"].item() for w in weights]
    assert moments == pytest.approx([0.1 * 3 * share, 0.1 * 4 * share], rel=1e-4)

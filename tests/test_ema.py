"""The moving average: its ramp, its limit, and the swap in and out."""

import torch

from sbrush.ema import EMA


def test_the_average_follows_the_ramp_and_then_the_decay():
    net = torch.nn.Linear(1, 1, bias=False)
    net.weight.data.fill_(0.0)
    average, expected = EMA(dict(net.named_parameters()), 0.5), 0.0
    net.weight.data.fill_(1.0)
    for step, decay in ((1, 2 / 11), (2, 3 / 12), (8, 0.5), (1000, 0.5)):
        average.update(step)
        expected = decay * expected + (1 - decay)
        assert torch.allclose(average.tensors["weight"], torch.tensor(expected))


def test_inside_swaps_the_average_in_and_the_parameters_back_even_on_an_error():
    net = torch.nn.Linear(2, 2)
    average = EMA(dict(net.named_parameters()), 0.9)
    first = net.weight.detach().clone()
    net.weight.data += 1
    own = net.weight.detach().clone()
    try:
        with average.inside():
            assert torch.equal(net.weight, first)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert torch.equal(net.weight, own)

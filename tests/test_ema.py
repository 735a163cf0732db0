"""The moving average: its ramp, its limit, and the swap in and out."""

import threading

import pytest
import torch

from sbrush.training import ema
from sbrush.training.ema import EMA


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


def test_an_average_kept_away_is_the_same_and_whoever_asks_waits_for_it():
    torch.manual_seed(0)
    net = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    near = EMA(dict(net.named_parameters()), 0.9)
    away = EMA(dict(net.named_parameters()), 0.9, device=torch.device("cpu"))
    held, begun = threading.Event(), threading.Event()
    first = {name: value.clone() for name, value in away.tensors.items()}

    def late(*arguments):
        begun.set()
        assert held.wait(60)
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        real = ema._move
        patch.setattr(ema, "_move", late)
        for step in (1, 2, 3):
            for parameter in net.parameters():
                parameter.data += torch.randn_like(parameter)
            near.update(step)
            held.clear() if step == 3 else held.set()
            begun.clear()
            away.update(step)  # does not wait
            assert begun.wait(60)
        # What moves is a copy: the parameters may go on before it has.
        for parameter in net.parameters():
            parameter.data.fill_(torch.nan)
        threading.Timer(0.2, held.set).start()
        for name, value in away.tensors.items():
            assert torch.equal(value, near.tensors[name]) and not torch.equal(value, first[name])
            assert value.stride() == near.tensors[name].stride()


def test_a_failure_of_the_average_is_heard():
    net = torch.nn.Linear(1, 1)
    away = EMA(dict(net.named_parameters()), 0.9, device=torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ema, "_move", lambda *_: (_ for _ in ()).throw(MemoryError("none left")))
        away.update(1)
        with pytest.raises(MemoryError):
            away.update(2)

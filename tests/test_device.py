"""Where the work runs: what is asked for must be there, and processes that lose each other say so."""

import pytest
import torch
from accelerate import PartialState

from sbrush.console import SbrushError
from sbrush.device import is_disconnected, pick_device, process_group, send

LOST = "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"


def test_a_device_that_is_not_there_is_refused():
    assert pick_device("cpu") == "cpu"
    for name in ("warp", "mps") if torch.cuda.is_available() else ("warp", "mps", "cuda"):
        with pytest.raises(SbrushError):
            pick_device(name)


def test_a_tensor_for_the_cpu_is_left_as_it_is():
    tensor = torch.arange(3)
    assert send(tensor, torch.device("cpu")) is tensor


def test_a_crew_that_loses_one_says_so(monkeypatch):
    assert is_disconnected(RuntimeError(LOST)) and not is_disconnected(RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="Connection closed"), process_group("cpu"):  # alone there is nobody to lose
        raise RuntimeError(LOST)
    monkeypatch.setitem(PartialState._shared_state, "num_processes", 2)
    with pytest.raises(SbrushError, match="another process has ended"), process_group("cpu"):
        raise RuntimeError(LOST)
    with pytest.raises(RuntimeError, match="shapes"), process_group("cpu"):
        raise RuntimeError("shapes do not match")

"""Checkpoints: what goes in comes out; damage is seen and passed over; nothing is removed too early."""

import json
import shutil

import pytest
import torch

from sbrush.console import SbrushError
from sbrush.storage import checkpoint
from sbrush.training.optimizer import restore, state_of


def trained(steps, saved=None):
    """A small Adam run, from `saved` on if given."""
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    first = 0
    if saved:
        net.load_state_dict(saved.part("net"))
        restore(optimizer, saved.part("optimizer"))
        first = saved.step
    for step in range(first, steps):
        loss = net(torch.full((1, 3), float(step + 1))).pow(2).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net, optimizer


def save(folder, step, **options):
    net, optimizer = trained(step)
    parts = {"net": net.state_dict(), "optimizer": state_of(optimizer)}
    checkpoint.save(folder, step, parts, note="kept", **options)


def test_a_resumed_optimiser_goes_on_bit_for_bit(tmp_path):
    save(tmp_path, 3)
    saved = checkpoint.newest(tmp_path)
    assert saved.step == 3 and saved.extra["note"] == "kept"
    resumed, whole = trained(7, saved)[0], trained(7)[0]
    assert torch.equal(resumed.weight, whole.weight) and torch.equal(resumed.bias, whole.bias)


def test_the_newest_two_are_kept(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000002", "step-000003"]


def flip_byte(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: flip_byte(f / "net.safetensors"),
        lambda f: (f / "net.safetensors").write_bytes((f / "net.safetensors").read_bytes()[:-9]),
        lambda f: (f / "net.safetensors").unlink(),
        lambda f: (f / "state.json").write_text("{"),
        lambda f: (f / "state.json").write_text("[]"),
        lambda f: (f / "state.json").unlink(),
    ],
)
def test_a_damaged_newest_one_is_passed_over_with_a_word(tmp_path, capsys, damage):
    save(tmp_path, 1)
    save(tmp_path, 2)
    damage(tmp_path / "step-000002")
    assert checkpoint.newest(tmp_path).step == 1
    assert "step-000002 is damaged" in capsys.readouterr().err


def test_a_half_written_one_does_not_count_and_is_written_over(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "step-000002.partial").mkdir()
    (tmp_path / "step-000002.partial" / "net.safetensors").write_bytes(b"half")
    assert checkpoint.newest(tmp_path).step == 1
    save(tmp_path, 2)
    assert checkpoint.newest(tmp_path).step == 2


def test_another_format_version_gets_a_message_that_helps(tmp_path):
    save(tmp_path, 1)
    file = tmp_path / "step-000001" / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))
    with pytest.raises(SbrushError, match="format 99"):
        checkpoint.newest(tmp_path)


def test_an_empty_or_missing_folder_holds_none(tmp_path):
    assert checkpoint.newest(tmp_path) is None and checkpoint.newest(tmp_path / "none") is None


def test_one_of_another_step_than_its_name_says_is_passed_over(tmp_path, capsys):
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "step-000002").rename(tmp_path / "step-000009")
    assert checkpoint.newest(tmp_path).step == 1 and "step-000009 is damaged" in capsys.readouterr().err


def test_room_is_looked_for_before_anything_is_written(tmp_path, monkeypatch):
    room = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: room._replace(free=2**21))
    checkpoint.save(tmp_path, 1, {"student": {"w": torch.zeros(100)}})
    with pytest.raises(SbrushError, match="no room for a checkpoint"):
        checkpoint.save(tmp_path, 2, {"student": {"w": torch.zeros(2**19)}})
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]


def test_a_damaged_one_of_a_later_step_takes_no_good_ones_place(tmp_path):
    """A run that has passed over it, and is stopped before that step, would have lost all."""
    save(tmp_path, 1)
    save(tmp_path, 4)
    flip_byte(tmp_path / "step-000004" / "net.safetensors")
    save(tmp_path, 2, keep=1)
    assert checkpoint.newest(tmp_path).step == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000004"]

"""The training of the built-in world: from nothing, and on from where it was stopped."""

import pytest
import torch

from sbrush.training.ema import EMA
from sbrush.training.world import teach


def trained(work, steps, *, stop_after=None):
    """A few steps of a network of one weight towards each step's random number; the weight, and its average."""
    net = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(net.weight)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    average = EMA(dict(net.named_parameters()), 0.5)

    def loss(step, draw):
        if step == stop_after:
            raise KeyboardInterrupt
        return (net(torch.ones(1, 1)) - torch.rand(1, generator=draw)).pow(2).sum()

    teach.train("one", work, steps, {"net": net}, optimizer, loss, lr=lambda step: 0.1 / step, average=average)
    return net.weight.item(), average.tensors["weight"].item()


def test_it_starts_in_an_empty_folder_and_goes_on_from_its_checkpoint_exactly(tmp_path, monkeypatch):
    monkeypatch.setattr(teach, "CHECKPOINT_EVERY", 2)
    whole = trained(tmp_path / "whole", 5)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "stopped", 5, stop_after=4)
    assert whole[0] != 0 and trained(tmp_path / "stopped", 5) == whole


def test_the_lora_of_a_style_is_trained_on_the_shipped_teacher_and_fits_student_and_teacher(tmp_path, monkeypatch):
    from sbrush.models.load import load_student, load_teacher
    from sbrush.models.lora_request import LoraRequest
    from sbrush.training.world import style

    monkeypatch.setattr(style, "IMAGES", 4)
    losses = []

    def stage(net, optimizer, loss):
        for step in (1, 2):
            losses.append(loss(step, torch.Generator().manual_seed(step)))
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()

    file = style.train_lora(stage, batch=2, lr=1e-2, to=tmp_path)
    assert file == tmp_path / "loras" / "blueprint.safetensors" and all(loss.isfinite() for loss in losses)
    request = LoraRequest(str(file))
    for load in (load_student, load_teacher):
        plain, styled = load().unet.state_dict(), load(loras=[request]).unet.state_dict()
        changed = {name for name in plain if not torch.equal(plain[name], styled[name])}
        assert changed and all("attentions" in name for name in changed)


def test_a_controlnet_is_adapted_to_a_student_that_stays(tmp_path):
    """Each step of noise has unit variance, from the student's own to another."""
    from sbrush.models.load import load_student
    from sbrush.models.load_control import load_control
    from sbrush.training.world import control

    z, fresh = torch.randn(2, 4, 100, 100).unbind()
    for share in (0.0, 0.3, 1.0):
        between = control.mixed(z, fresh, torch.tensor(share))
        assert between.std() == pytest.approx(1, abs=0.02)
        assert (z * between).mean() == pytest.approx((1 - share**2) ** 0.5, abs=0.02)
    control.adapt(tmp_path, steps=2, batch=2, threads=0)
    student = load_student()
    adapted, before = (load_control(name, student).state_dict() for name in (str(tmp_path / "adapted"), "outline"))
    change = [(value - before[name].float()).abs().max() for name, value in adapted.items()]
    assert max(change) > 0 and all(c < 1e-3 for c in change)


def test_the_controlnet_is_trained_beside_the_teacher_and_shipped(tmp_path, monkeypatch):
    from diffusers import ControlNetModel

    from sbrush.models.load import load_teacher
    from sbrush.models.load_control import load_control
    from sbrush.training.world import control

    monkeypatch.setattr(teach, "IMAGES", 8)
    control.train(tmp_path / "work", steps=2, batch=4, lr=1e-3, threads=0)
    control.ship(tmp_path / "work", to=tmp_path / "package")
    shipped = load_control(str(tmp_path / "package" / "control" / "outline"), load_teacher())
    start = ControlNetModel.from_unet(load_teacher().unet, conditioning_embedding_out_channels=control.HINT)
    assert any(p.any() for p in shipped.controlnet_mid_block.parameters())
    assert not any(p.any() for p in start.controlnet_mid_block.parameters())

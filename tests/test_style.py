"""The style that the built-in LoRA teaches: how it is drawn, and how it is measured."""

from dataclasses import replace

import torch
from torchvision.transforms.functional import pil_to_tensor

from sbrush.benchmarks import style as benchmark
from sbrush.stickers.draw import WHITE, draw
from sbrush.stickers.style import PALETTE, draw_blueprint
from sbrush.stickers.world import random_sticker, stream


def test_it_is_blue_on_night_whatever_the_sticker_with_white_for_ink():
    stickers = [random_sticker(stream("test-style", i)) for i in range(24)]
    styled = torch.stack([pil_to_tensor(draw_blueprint(sticker)) for sticker in stickers])
    plain = torch.stack([pil_to_tensor(draw(sticker)) for sticker in stickers])
    assert benchmark.style_colours(styled) > 0.97 > 0.5 > benchmark.style_colours(plain)
    assert all(tuple(image[:, 0, 0].tolist()) == PALETTE[0] for image in styled)
    cat = replace(stickers[0], kind="cat", x=32.0, y=32.0, radius=24.0)
    nose = pil_to_tensor(draw_blueprint(cat))[:, 32 + round(0.36 * 24), 32]
    assert tuple(nose.tolist()) == WHITE and pil_to_tensor(draw(cat))[:, 32 + round(0.36 * 24), 32].float().mean() < 100


def test_the_benchmark_measures_models_and_drawn_stickers(tmp_path, capsys):
    benchmark.main(images=6, seeds=2, weights="1", grid=tmp_path / "grid.png", teacher_steps=1)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| student, 1 step, LoRA at 1", "| teacher, 1 step, LoRA at 1", "| stickers drawn in the style",
    ]  # fmt: skip
    assert (tmp_path / "grid.png").stat().st_size > 1000

"""The judge: how it is loaded, what it computes, and that it is right, checked against the truth and against pixels."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sbrush.console import SbrushError
from sbrush.stickers.draw import draw
from sbrush.stickers.judge import Judge, foreground, pixel_attributes
from sbrush.stickers.networks import build_judge, build_tokenizer
from sbrush.stickers.world import ATTRIBUTES, BACKGROUNDS, Sticker, random_sticker, stream

UNSEEN = 400


@cache
def unseen() -> tuple[list[Sticker], Tensor]:
    """Stickers that no training has drawn, held-out combinations among them, and their images."""
    stickers = [random_sticker(stream("judge-test", i), held_out=True) for i in range(UNSEEN)]
    return stickers, torch.stack([torch.from_numpy(np.array(draw(s))).permute(2, 0, 1) for s in stickers])


def truth(name: str) -> Tensor:
    return torch.tensor([ATTRIBUTES[name].index(getattr(sticker, name)) for sticker in unseen()[0]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained judge as it is stored: float16, with its tokenizer beside it."""
    folder = tmp_path_factory.mktemp("judge")
    torch.manual_seed(0)
    net, config = build_judge(build_tokenizer(folder / "tokenizer"))
    state = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in net.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def untrained(folder: Path) -> Judge:
    return Judge.load(folder, folder / "tokenizer")


def test_features_do_not_depend_on_the_batch(untrained: Judge) -> None:
    images = unseen()[1][:24]
    together = untrained.features(images)
    apart = torch.cat([untrained.features(p) for p in images.split(5)])
    assert together.shape == (24, untrained.width) and together.dtype == torch.float32
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-6)


def test_pixels_reach_the_network_between_minus_one_and_one(untrained: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr(untrained._net, "encode_image", lambda x: seen.append(x) or torch.zeros(len(x), 128))
    untrained.features(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 64, 64))
    assert torch.equal(seen[0][:, 0, 0, 0], torch.tensor([-1.0, 1.0]))


def test_classify_offers_every_value_of_every_attribute(untrained: Judge) -> None:
    """Features that are a caption's own vector are classified as what that caption names."""
    for name, values in ATTRIBUTES.items():
        vectors = untrained._single[name]
        assert vectors.shape == (len(values), untrained.width)
        assert torch.equal(untrained.classify(7 * vectors)[name], torch.arange(len(values)))
    assert all(labels.dtype == torch.int64 for labels in untrained.classify(vectors).values())


def test_clip_score_is_the_cosine_with_the_own_caption(untrained: Judge) -> None:
    captions = ["a cat", "a red car", "a cat", "a teal bird on a mint background"]
    said = untrained._said(captions)
    torch.testing.assert_close(untrained.clip_score(3 * said, captions), torch.ones(4))
    features = torch.randn(4, untrained.width, generator=torch.Generator().manual_seed(0))
    expected = [torch.dot(f / f.norm(), s).item() for f, s in zip(features, said, strict=True)]
    torch.testing.assert_close(untrained.clip_score(features, captions), torch.tensor(expected))
    assert untrained.clip_score(features[:0], []).shape == (0,)
    with pytest.raises(ValueError, match="4 images"):
        untrained.clip_score(features, captions[:3])


def test_any_text_can_be_scored(untrained: Judge) -> None:
    strange = ["", "a xylophone é 猫", "word " * 100]
    assert untrained.clip_score(torch.ones(3, untrained.width), strange).isfinite().all()


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 3, 64, 64),
        torch.zeros(3, 64, 64, dtype=torch.uint8),
        torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
    ],
)
def test_other_images_are_refused(untrained: Judge, images: Tensor) -> None:
    with pytest.raises(ValueError, match="uint8"):
        untrained.features(images)
    with pytest.raises(ValueError, match="uint8"):
        pixel_attributes(images)


@pytest.mark.parametrize("damage", ["absent", "empty", "foreign", "config"])
def test_a_damaged_judge_is_told_in_one_line(folder: Path, tmp_path: Path, damage: str) -> None:
    for name in ("open_clip_model.safetensors", "open_clip_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    weights = tmp_path / "open_clip_model.safetensors"
    if damage == "absent":
        weights.unlink()
    elif damage == "empty":
        weights.write_bytes(b"")
    elif damage == "foreign":
        save_file({"x": torch.zeros(1)}, weights)
    else:
        (tmp_path / "open_clip_config.json").write_text("[1]")
    with pytest.raises(SbrushError, match="judge") as problem:
        Judge.load(tmp_path, folder / "tokenizer")
    assert "\n" not in str(problem.value) and problem.value.hint


def test_foreground_of_a_flat_image_is_empty_and_its_background_exact() -> None:
    mint = torch.tensor(BACKGROUNDS["mint"], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 64, 64)
    background, mask = foreground(mint)
    assert background.tolist() == [list(map(float, BACKGROUNDS["mint"]))] and not mask.any()
    assert pixel_attributes(mint)["background"].item() == ATTRIBUTES["background"].index("mint")


@pytest.mark.parametrize("noise", [0, 10])
@pytest.mark.parametrize("name", ["colour", "background"])
def test_pixels_tell_colour_and_background(name: str, noise: int) -> None:
    images = unseen()[1].float()
    images += noise * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    found = pixel_attributes(images.round().clamp(0, 255).byte())[name]
    assert (found == truth(name)).float().mean() >= 0.99


def test_the_shipped_judge_is_right_and_agrees_with_the_pixels() -> None:
    judge = Judge.load()
    images = unseen()[1]
    judged = judge.classify(torch.cat([judge.features(p) for p in images.split(100)]))
    right = {name: (labels == truth(name)).float().mean().item() for name, labels in judged.items()}
    assert min(right.values()) >= 0.99, right
    counted = pixel_attributes(images)
    agreement = {name: (judged[name] == labels).float().mean().item() for name, labels in counted.items()}
    assert set(agreement) == {"colour", "background"} and min(agreement.values()) >= 0.99, agreement


def test_the_shipped_judge_gives_the_true_caption_the_highest_score() -> None:
    from sbrush.stickers.world import Caption

    judge, (stickers, images) = Judge.load(), unseen()
    captions = [Caption(kind=s.kind, colour=s.colour, background=s.background, size=s.size).text for s in stickers]
    features = judge.features(images[:200])
    true, other = judge.clip_score(features, captions[:200]), judge.clip_score(features, captions[200:400])
    assert (true > other).float().mean() >= 0.97


def test_the_shipped_judge_is_right_on_images_that_the_autoencoder_has_softened() -> None:
    from sbrush.models.load import load_teacher

    judge, teacher, images = Judge.load(), load_teacher(), unseen()[1][:500]
    with torch.no_grad():
        latents = teacher.vae.encode(images.float() / 127.5 - 1).latent_dist.mean
    softened = teacher.decode(latents * teacher.vae.config.scaling_factor)
    judged = judge.classify(judge.features(softened))
    right = {name: (labels == truth(name)[:500]).float().mean().item() for name, labels in judged.items()}
    assert min(right.values()) >= 0.98, right

"""One measurement: images under their captions' numbers, whichever of them were missing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sbrush.evaluate.coco.features import FeatureExtractor, UnreadableImages
from sbrush.evaluate.coco.measurement import Measurement, Subject, Workspace
from sbrush.evaluate.coco.protocols import PROTOCOLS, Coco
from sbrush.storage import shards
from test_prefetch import Means


def gray(texts: list[str], seeds: list[int]) -> Iterator[Tensor]:
    """Of each seed an image in its own gray, two at a time."""
    for some in torch.tensor(seeds).split(2):
        yield (10 * some).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)


def test_a_block_that_was_missing_is_drawn_saved_and_shown_under_its_own_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "BLOCK", 3)
    Image.new("RGB", (9, 9)).save(tmp_path / "real.jpg")
    inception = Means()
    inception.digest = "means"
    measurement = Measurement(
        coco=Coco(["a"], [tmp_path / "real.jpg"]), captions=list("abcdefgh"),
        extractor=FeatureExtractor(PROTOCOLS["swiftbrush"], inception, None),
        seed=0, unreadable=UnreadableImages(0),
        workspace=Workspace(tmp_path / "work", tmp_path / "images", "cpu"),
        process_group=SimpleNamespace(  # type: ignore[arg-type]
            process_index=0, num_processes=1, wait_for_everyone=lambda: None
        ),
    )  # fmt: skip
    subject, shown = Subject("grays", ["grays"], gray), dict[int, Image.Image]()
    first = measurement.extract(subject, shown)
    saved = {file.name: np.array(Image.open(file))[0, 0, 0] for file in (tmp_path / "images").iterdir()}
    assert saved == {f"{i:05d}.png": 10 * i for i in range(8)}
    assert {i: image.getpixel((0, 0))[0] for i, image in shown.items()} == {i: 10 * i for i in range(8)}

    next((tmp_path / "work").glob("coco-images-*/000003.safetensors")).unlink()
    for i in (3, 4, 5):
        (tmp_path / "images" / f"{i:05d}.png").unlink()
    shown.clear()
    again = measurement.extract(subject, shown)
    assert torch.equal(again["features"], first["features"])
    saved = {file.name: np.array(Image.open(file))[0, 0, 0] for file in (tmp_path / "images").iterdir()}
    assert saved == {f"{i:05d}.png": 10 * i for i in range(8)}
    assert {i: image.getpixel((0, 0))[0] for i, image in shown.items()} == {i: 10 * i for i in (3, 4, 5)}

    (tmp_path / "images" / "00007.png").unlink()  # its rows are known, but it is to be kept
    shown.clear()
    assert torch.equal(measurement.extract(subject, shown)["features"], first["features"])
    assert shown.keys() == {6, 7} and (tmp_path / "images" / "00007.png").is_file()

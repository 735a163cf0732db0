"""The evaluation's bench measures like with like, and counts what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sbrush.benchmarks.evaluation import baseline, flops, ours
from sbrush.evaluate.coco.features import FeatureExtractor
from sbrush.evaluate.coco.protocols import PROTOCOLS
from sbrush.models.load import load_student
from test_prefetch import Means


class Linear(Means):
    """With a product of a known size."""

    def features(self, images: torch.Tensor, resize: str) -> torch.Tensor:
        return super().features(images, resize) @ torch.ones(3, 5)


@pytest.mark.filterwarnings("ignore")  # plain diffusers' and DataLoader's own
def test_both_ways_see_the_same(tmp_path: Path) -> None:
    student, texts = load_student(), ["a cat", "a red fish", "two"]
    extractor = FeatureExtractor(PROTOCOLS["swiftbrush"], Means(), Means())  # type: ignore[arg-type]
    (tmp_path / "pngs").mkdir()
    mine = ours(student, extractor, texts, tmp_path / "shards", batch=2)
    theirs = baseline(student, extractor, texts, tmp_path / "pngs", batch=2)
    assert mine.keys() == theirs.keys()
    for name, rows in mine.items():
        assert torch.allclose(rows, theirs[name], atol=0.1), name  # of 255: a rounding here and there
    assert mine["features"].std(dim=0).min() > 1


def test_flops_are_those_of_a_image() -> None:
    student = load_student()
    extractor = FeatureExtractor(PROTOCOLS["swiftbrush"], Linear(), Means())  # type: ignore[arg-type]
    one, three = (flops(student, extractor, ["a cat"] * n) for n in (1, 3))
    assert one["Inception"] == three["Inception"] == 2 * 3 * 5
    assert one["CLIP"] == 0
    assert one["student and VAE"] > 1e6

"""Protocols: the crop and the cast that each one states, and the keys under which rows are kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import center_crop

from sbrush.cli.eval import Protocol
from sbrush.device import Arithmetic
from sbrush.evaluate.coco import measurement as module
from sbrush.evaluate.coco.features import FeatureExtractor, UnreadableImages, square
from sbrush.evaluate.coco.measurement import Measurement, Subject, Workspace
from sbrush.evaluate.coco.protocols import PROTOCOLS, Coco
from sbrush.evaluate.coco.published import PUBLISHED, BenchmarkReport, Measured, _rows
from sbrush.evaluate.coco.subjects import Generator
from sbrush.evaluate.request import CocoRequest, Execution, Models
from sbrush.metrics.fid import GROUPS, INTERVAL
from sbrush.models.load import load_student
from sbrush.sampling.generation import student_images, student_latents
from test_prefetch import Means


def test_the_command_line_offers_the_protocols_that_there_are() -> None:
    assert [p.value for p in Protocol] == list(PROTOCOLS)


@pytest.mark.parametrize("width, height", [(300, 300), (301, 300), (300, 303), (257, 400), (403, 256), (259, 256)])
def test_the_square_of_published_protocols_is_torchvisions(width: int, height: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    side = min(image.size)
    theirs = center_crop(image, side).resize((256, 256), Image.Resampling.LANCZOS)
    expected = torch.from_numpy(np.array(theirs)).permute(2, 0, 1)
    for name in ("swiftbrush", "gigagan", "dmd2"):
        assert torch.equal(square(image, PROTOCOLS[name].crop), expected)
    other = square(image, PROTOCOLS["torchmetrics"].crop)
    # Of 3, 7, 11 ... spare pixels half are 1.5, 3.5, 5.5 ..., which to even is up.
    assert torch.equal(other, expected) == ((max(width, height) - side) % 4 != 3)


def test_dmd2s_protocol_alone_truncates(tiny_teacher: Path) -> None:
    """By DMD2's formula on the decoder's own output; and a student's images under each protocol."""
    student, texts, seeds = load_student(str(tiny_teacher)), ["a cat", "a dog"], [1, 2]
    (x0,) = student_latents(student, texts, seeds)
    pixels = student.vae.decode(x0 / student.vae.config.scaling_factor).sample
    expected = {
        "truncate": ((pixels + 1.0) * 127.5).clamp(0, 255).to(torch.uint8),
        "round": (pixels / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8),
    }
    assert 0.3 < (expected["round"].float() - expected["truncate"].float()).mean() < 0.7
    for protocol in PROTOCOLS.values():
        request = CocoRequest(Models(student=str(tiny_teacher)), execution=Execution(batch=2))
        (subject,) = Generator(request, protocol, "cpu", Arithmetic()).subjects([])
        assert subject.images is not None and subject.key["cast"] == protocol.cast
        (drawn,) = subject.images(texts, seeds)
        assert torch.equal(drawn, expected[protocol.cast])
        assert protocol.cast == ("truncate" if protocol.name == "dmd2" else "round")
    (plain,) = student_images(student, texts, seeds)
    assert torch.equal(plain, expected["round"])


class TestKeys:
    """What rows are kept under: everything that they depend on, and nothing else."""

    def folders(self, work: Path, protocol: str = "swiftbrush", key: dict[str, object] | None = None) -> set[str]:
        def gray(texts: list[str], seeds: list[int]) -> Iterator[Tensor]:
            yield torch.zeros(len(texts), 3, 8, 8, dtype=torch.uint8)

        real, inception = work.parent / "real.png", Means()
        if not real.exists():
            Image.new("RGB", (9, 9)).save(real)
        inception.digest = "means"
        alone = SimpleNamespace(process_index=0, num_processes=1, wait_for_everyone=lambda: None)
        rules = replace(PROTOCOLS[protocol], resize="clean")  # as Means has it
        measurement = Measurement(
            Coco(["a"], [real]), ["a", "b"], FeatureExtractor(rules, inception, None), 0,  # type: ignore[arg-type]
            UnreadableImages(0), Workspace(work, None, "cpu"), alone,  # type: ignore[arg-type]
        )  # fmt: skip
        measurement.extract(Subject("gray", {"kind": "student", "batch": 64} | (key or {}), gray))
        return {folder.name for folder in work.iterdir()}

    @pytest.mark.parametrize("package", ["torch", "torch-fidelity", "numpy", "pillow", "sbrush"])
    def test_packages_that_read_files_are_in_both_keys(self, tmp_path, monkeypatch, package) -> None:  # type: ignore[no-untyped-def]
        assert self.another_version(tmp_path, monkeypatch, package) == ["images", "reference"]

    @pytest.mark.parametrize("package", ["diffusers", "transformers", "torchvision", "open_clip_torch", "torchmetrics"])
    def test_packages_that_generate_and_score_are_in_the_images_key(self, tmp_path, monkeypatch, package) -> None:  # type: ignore[no-untyped-def]
        assert self.another_version(tmp_path, monkeypatch, package) == ["images"]

    def another_version(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> list[str]:
        """Which rows are made again with another version of a package."""
        before, real = self.folders(tmp_path / "work"), module.versions
        assert self.folders(tmp_path / "work") == before
        monkeypatch.setattr(
            module, "versions", lambda *given: {k: "9" if k == package else v for k, v in real(*given).items()}
        )
        return sorted(name.split("-")[1] for name in self.folders(tmp_path / "work") - before)

    def test_batch_and_cast_are_in_a_models_key(self, tiny_teacher: Path, tmp_path: Path) -> None:
        keys = []
        for batch, protocol in ((64, "gigagan"), (32, "gigagan"), (64, "dmd2")):
            request = CocoRequest(Models(student=str(tiny_teacher)), execution=Execution(batch=batch))
            (subject,) = Generator(request, PROTOCOLS[protocol], "cpu", Arithmetic()).subjects([])
            keys.append(subject.key)
        one, smaller, cut = (self.folders(tmp_path / str(i), "gigagan", key) for i, key in enumerate(keys))
        assert len(one & smaller) == len(one & cut) == len(smaller & cut) == 1  # the reference

    def test_another_crop_is_another_reference(self, tmp_path: Path) -> None:
        one, same, other = (self.folders(tmp_path / p, p) for p in ("swiftbrush", "dmd2", "torchmetrics"))
        assert len(one & same) == 2 and not one & other  # a cast matters to a model's images alone, in their own key


METRICS = dict.fromkeys(["fid", "fid_standard_error", "kid", "clip_score", "precision", "recall"], 0.5)
MANIFEST = {
    "protocol": {"name": "swiftbrush", "images": 30_000}, "images": 30_000, "captions": "COCO's own",
    "inception_sha256": "6726825d", "clip": "ViT-g-14",
}  # fmt: skip


class TestReport:
    def notes(self, metrics: dict[str, float] | None = None, **manifest: object) -> str:
        point = Measured("student", METRICS | {"fid_interval": 1.0} | (metrics or {}), {}, {})
        return BenchmarkReport([point], MANIFEST | manifest).table()

    def test_the_interval_is_students_t(self) -> None:
        from scipy.stats import t

        assert INTERVAL == pytest.approx(t.ppf(0.975, GROUPS - 1), rel=1e-6)
        assert dict(_rows(METRICS | {"fid_interval": INTERVAL * 0.5}))["its interval, 95 % (jackknife)"] == [
            "+- 1.13", ""
        ]  # fmt: skip

    def test_fewer_images_than_features_are_noted(self) -> None:
        assert "rank-deficient" in self.notes(images=2047) and "rank-deficient" not in self.notes(images=2048)

    def test_a_negative_kid_is_explained(self) -> None:
        assert "KID is unbiased" in self.notes({"kid": -1e-4}) and "KID is unbiased" not in self.notes()

    def test_which_features_precision_and_recall_use_is_said(self) -> None:
        assert "TensorFlow's Inception" in self.notes()
        assert all("pool3" in p.precision_and_recall for p in PROTOCOLS.values())

    def test_published_figures_name_their_protocol_and_those_at_second_hand_are_marked(self) -> None:
        assert {p.protocol for p in PUBLISHED} <= set(PROTOCOLS)
        assert {p.fid for p in PUBLISHED if p.second_hand} == {15.46, 8.77, 11.69}
        table = self.notes()
        rows = {
            fid: next(line for line in table.splitlines() if f" {fid}" in line) for fid in ("8.14", "15.46", "9.28")
        }
        assert (
            "second hand" in rows["15.46"] and "second hand" not in rows["8.14"] and "--protocol dmd2" in rows["9.28"]
        )
        assert "not known" in PROTOCOLS["swiftbrush"].compares_with

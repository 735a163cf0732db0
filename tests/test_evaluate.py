"""The metrics against independent computations and known cases; the protocol, its memory and its report."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sbrush.console import SbrushError
from sbrush.evaluate import stickers
from sbrush.evaluate.report import Metrics, Report, finite, from_png, png
from sbrush.evaluate.stickers import Candidate, Pair, diversity_pairs, evaluate_stickers, pairs, real_images
from sbrush.metrics import diversity
from sbrush.metrics.accuracy import accuracy, attribute_accuracy
from sbrush.metrics.fid import FID, fid
from sbrush.metrics.precision_recall import coverage, precision_recall, radii
from sbrush.stickers.draw import draw
from sbrush.stickers.judge import foreground, pixel_attributes
from sbrush.stickers.world import ATTRIBUTES, COLOURS, IMAGE_SIZE, Caption, Sticker, random_sticker, stream
from sbrush.storage.files import write_text


def normal(n: int, width: int, seed: int, *, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=torch.Generator().manual_seed(99)) / width**0.5
    return torch.randn(n, width, generator=draw) @ mix * scale + shift


class TestFID:
    @staticmethod
    def independent(real: Tensor, fake: Tensor) -> float:
        """The formula with numpy, the root taken of the symmetric C_r^(1/2) C_f C_r^(1/2)."""
        r, f = real.double().numpy(), fake.double().numpy()
        c_r, c_f = np.cov(r, rowvar=False), np.cov(f, rowvar=False)
        values, vectors = np.linalg.eigh(c_r)
        root = vectors * np.sqrt(values.clip(0)) @ vectors.T
        overlap = np.sqrt(np.linalg.eigvalsh(root @ c_f @ root).clip(0)).sum()
        return float(((r.mean(0) - f.mean(0)) ** 2).sum() + np.trace(c_r) + np.trace(c_f) - 2 * overlap)

    @pytest.mark.parametrize("shift, scale", [(0.0, 1.0), (0.3, 1.0), (0.0, 2.0), (50.0, 1.3)])
    def test_agrees_with_an_independent_implementation(self, shift: float, scale: float) -> None:
        real, fake = normal(700, 32, 0), normal(600, 32, 1, shift=shift, scale=scale)
        assert fid(real, fake) == pytest.approx(self.independent(real, fake), rel=1e-6, abs=1e-6)

    def test_known_distance_of_gaussians(self) -> None:
        """N(0, I) against N(m, s^2 I): |m|^2 + width (s - 1)^2, reached exactly by whitened samples."""
        x = normal(400, 8, 0).double()
        x -= x.mean(dim=0)
        x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (len(x) - 1))).T
        assert fid(x, 3 * x + 2) == pytest.approx(8 * 2**2 + 8 * (3 - 1) ** 2, rel=1e-9)

    def test_equal_sets_are_at_zero(self) -> None:
        real = normal(300, 16, 0)
        assert 0 <= fid(real, real) < 1e-6

    @pytest.mark.parametrize("batch", [1, 7, 64, 500])
    def test_does_not_depend_on_the_batches(self, batch: int) -> None:
        real, fake = normal(500, 16, 0), normal(300, 16, 1, shift=0.2)
        metric = FID(16)
        for part in fake.split(batch):
            metric.update(part, real=False)
        for part in real.flip(0).split(batch):
            metric.update(part, real=True)
        metric.update(real[:0], real=True)
        assert metric.compute() == pytest.approx(fid(real, fake), rel=1e-9)


class TestPrecisionRecall:
    @staticmethod
    def brute_force(real: Tensor, fake: Tensor, k: int) -> tuple[float, float]:
        def inside(region: np.ndarray, points: np.ndarray) -> float:
            reach = [sorted(np.linalg.norm(c - other) for other in region)[k] for c in region]  # the first is itself
            hits = [any(np.linalg.norm(p - c) <= r for c, r in zip(region, reach, strict=True)) for p in points]
            return sum(hits) / len(points)

        r, f = real.double().numpy(), fake.double().numpy()
        return inside(r, f), inside(f, r)

    @pytest.mark.parametrize("k", [1, 3])
    @pytest.mark.parametrize("chunk", [1, 17, 1000])
    def test_agrees_with_brute_force(self, k: int, chunk: int) -> None:
        real, fake = normal(40, 4, 0).double(), normal(30, 4, 1, shift=0.7).double()
        assert precision_recall(real, fake, k=k, chunk=chunk) == self.brute_force(real, fake, k)

    def test_known_cases(self) -> None:
        real, far = normal(50, 4, 0), normal(50, 4, 1, shift=1000)
        assert precision_recall(real, real) == (1, 1)
        assert precision_recall(real, far) == (0, 0)
        one_mode = real[:1].expand(20, 4)  # precise, and covers nothing but the point itself
        assert precision_recall(real, one_mode) == (1, 1 / 50)
        assert precision_recall(torch.cat([real, far]), real) == (1, 0.5)

    def test_radii_on_a_line(self) -> None:
        line = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
        assert radii(line, k=1, chunk=2).tolist() == [1, 1, 2, 4]
        assert radii(line, k=3, chunk=3).tolist() == [7, 6, 4, 7]
        assert coverage(line, torch.tensor([[-1.0], [-1.5], [11.0], [100.0]]), k=1) == 0.5

    @pytest.mark.parametrize("kind", ["apart", "on a grid", "far off", "all but equal", "huge"])
    def test_every_decision_is_that_of_the_differences(self, kind: str) -> None:
        """Where products alone decide wrongly: ties, equal points, small differences of large numbers, overflow."""
        real, fake = normal(300, 64, 0), normal(200, 64, 1)
        if kind == "on a grid":
            real, fake = (torch.cat([x[:, :3].round(), x[:20, :3].round()]) for x in (real, fake))
        elif kind == "far off":
            real, fake = real + 3000, torch.cat([fake, real[:50]]) + 3000
        elif kind == "all but equal":
            real, fake = (1 + 2**-17 * x[:, :40].sign() for x in (real, fake))  # sums of squares are exact, ties too
        elif kind == "huge":
            real, fake = 1e25 * real, 1e25 * fake
        expected = []
        for region, points in ((real.double(), fake.double()), (fake.double(), real.double())):
            among, across = ((x[:, None] - region).square().sum(dim=2).sqrt() for x in (region, points))
            reach = among.fill_diagonal_(torch.inf).kthvalue(3, dim=1).values
            assert torch.allclose(radii(region.float(), k=3, chunk=128), reach, rtol=1e-14)
            expected.append((across <= reach).any(dim=1).double().mean().item())
        assert precision_recall(real, fake, chunk=128) == pytest.approx(tuple(expected), abs=1e-9)
        assert 0 < min(expected) < 1

    def test_torch_fidelity_agrees(self) -> None:
        from torch_fidelity.metric_prc import prc_features_to_metric

        real, fake = normal(700, 16, 0).double(), normal(500, 16, 1, shift=0.5).double()
        options = {"prc_neighborhood": 3, "prc_batch_size": 300, "save_cpu_ram": True, "verbose": False}
        theirs = prc_features_to_metric(fake, real, **options)
        assert precision_recall(real, fake) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)
        assert theirs["precision"] != theirs["recall"]

    def test_too_few_images_are_refused(self) -> None:
        with pytest.raises(ValueError, match="too few"):
            radii(torch.zeros(3, 2), k=3)


class TestAccuracy:
    captions = (
        Caption(kind="cat", colour="red"),
        Caption(kind="cat"),
        Caption(colour="red", background="mint"),
        Caption(kind="cat", colour="orange", size="big"),  # held out
    )

    @staticmethod
    def judged(*seen: tuple[str, str, str, str]) -> dict[str, Tensor]:
        columns = zip(ATTRIBUTES.items(), zip(*seen, strict=True), strict=True)
        return {name: torch.tensor([values.index(v) for v in column]) for (name, values), column in columns}

    def test_only_what_a_caption_names_counts_and_held_out_combinations_apart(self) -> None:
        assert [c.held_out for c in self.captions] == [False, False, False, True]
        judged = self.judged(
            ("cat", "blue", "sky", "big"),  # colour wrong
            ("dog", "pink", "sky", "big"),  # kind wrong, the rest free
            ("car", "red", "mint", "big"),
            ("cat", "brown", "sky", "big"),  # colour wrong
        )
        seen = accuracy(self.captions, judged, held_out=False)
        assert seen.share == {"kind": 0.5, "colour": 0.5, "background": 1.0, "size": None}
        assert seen.named == {"kind": 2, "colour": 2, "background": 1, "size": 0}
        apart = accuracy(self.captions, judged, held_out=True)
        assert apart.share == {"kind": 1.0, "colour": 0.0, "background": None, "size": 1.0}
        assert apart.named == {"kind": 1, "colour": 1, "background": 0, "size": 1}
        assert attribute_accuracy(self.captions, judged) == {
            "kind": 2 / 3, "colour": 1 / 3, "background": 1.0, "size": 1.0,
        }  # fmt: skip
        assert attribute_accuracy(self.captions[1:2], {k: v[1:2] for k, v in judged.items()}) == {"kind": 0.0}

    def test_lengths_must_agree(self) -> None:
        with pytest.raises(ValueError):
            accuracy(self.captions, self.judged(("cat", "red", "sky", "big")))


class TestDiversity:
    PER_CAPTION = 100

    def varieties(self, drawn: Sequence[Sticker]) -> list[diversity.Variety]:
        """Variety with the truth in the judge's place, and real centroids."""
        judged = {n: torch.tensor([v.index(getattr(s, n)) for s in drawn]) for n, v in ATTRIBUTES.items()}
        places = torch.cat([diversity.centroids(images(drawn[i : i + 100])) for i in range(0, len(drawn), 100)])
        return diversity.varieties(diversity.CAPTIONS, judged, places)

    def drawn(self, name: str, **fixed: object) -> list[Sticker]:
        made = (random_sticker(stream(name, seed), caption) for caption, seed in diversity_pairs(self.PER_CAPTION))
        return [replace(sticker, **fixed) for sticker in made]

    def test_ten_captions_leave_every_aspect_open_and_name_nothing_held_out(self) -> None:
        assert len(set(diversity.CAPTIONS)) == 10 and not any(c.held_out for c in diversity.CAPTIONS)
        for name in diversity.ENTROPIES:
            assert sum(getattr(c, name) is None for c in diversity.CAPTIONS) >= 4

    def test_real_images_have_the_truths_variety_and_collapsed_ones_none(self) -> None:
        truth = self.varieties(self.drawn("a"))
        real = diversity.shares(self.varieties(self.drawn("b")), truth)
        assert set(real) == {*diversity.ASPECTS, "mean"}
        assert all(share == pytest.approx(1, abs=0.06) for share in real.values()), real
        collapsed = diversity.shares(self.varieties(self.drawn("b", colour="red", x=32.0, y=32.0)), truth)
        assert collapsed["colour"] == 0
        assert collapsed["position"] is not None and collapsed["position"] < 0.15  # shapes differ about their centre
        assert collapsed["background"] == pytest.approx(1, abs=0.06) and collapsed["size"] == pytest.approx(1, abs=0.06)

    def test_half_the_colours_are_less_than_all_of_them(self) -> None:
        truth, few = self.drawn("a"), self.drawn("b")
        few = [replace(s, colour=("red", "blue")[i % 2]) for i, s in enumerate(few)]
        share = diversity.shares(self.varieties(few), self.varieties(truth))["colour"]
        assert share == pytest.approx(math.log(2) / math.log(10), abs=0.05)

    def test_entropy_and_spread_of_known_cases(self) -> None:
        assert diversity.entropy(torch.arange(10), 10) == pytest.approx(math.log(10))
        assert diversity.entropy(torch.zeros(50, dtype=torch.long), 10) == 0
        assert diversity.entropy(torch.tensor([0, 0, 0, 1]), 2) == pytest.approx(
            -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
        )
        assert diversity.spread(torch.tensor([[0.0, 0.0], [6.0, 8.0]])) == pytest.approx(5)

    def test_no_variety_to_compare_with_is_no_number(self) -> None:
        assert diversity.shares([{"position": 1.0}], [{"position": 0.0}]) == {
            "colour": None, "background": None, "size": None, "position": None, "mean": None,
        }  # fmt: skip

    def test_unequal_numbers_are_refused(self) -> None:
        with pytest.raises(ValueError, match="equally many"):
            diversity.varieties(diversity.CAPTIONS, {}, torch.zeros(11, 2))

    @pytest.mark.parametrize("noise", [0, 10])
    def test_centroids_are_where_the_stickers_are(self, noise: int) -> None:
        drawn = [random_sticker(stream("place", i), held_out=True) for i in range(300)]
        seen = images(drawn).float()
        seen += noise * torch.randn(seen.shape, generator=torch.Generator().manual_seed(0))
        places = diversity.centroids(seen.round().clamp(0, 255).byte())
        true = torch.tensor([[s.x, s.y] for s in drawn])
        assert (places[:, 0] - true[:, 0]).abs().max() < 3
        assert (places[:, 1] - true[:, 1]).abs().max() < 9  # a mushroom's cap is heavier than its stem
        for axis, least in enumerate((0.99, 0.95)):
            assert torch.corrcoef(torch.stack([places[:, axis], true[:, axis]]))[0, 1] > least
        assert diversity.spread(places) == pytest.approx(diversity.spread(true), rel=0.06)

    def test_an_empty_image_is_centred(self) -> None:
        assert diversity.centroids(torch.full((1, 3, 64, 64), 200, dtype=torch.uint8)).tolist() == [[32, 32]]


class PixelJudge:
    """Judges by pixels alone, quickly. Features: 4 x 4 thumbnail, colour, background, area in thousands of pixels."""

    width, digest = 51, "pixels"

    def features(self, batch: Tensor) -> Tensor:
        small = torch.nn.functional.avg_pool2d(batch.float() / 255, 16).flatten(1)
        seen, area = pixel_attributes(batch), foreground(batch)[1].sum(dim=(1, 2)) / 1000
        return torch.cat([small, torch.stack([seen["colour"], seen["background"], area], dim=1)], dim=1)

    def classify(self, features: Tensor) -> dict[str, Tensor]:
        colour, background = features[:, -3:-1].long().unbind(dim=1)
        size = (features[:, -1] > 0.6).long()
        return {"kind": torch.zeros_like(size), "colour": colour, "background": background, "size": size}

    def clip_score(self, features: Tensor, captions: Sequence[str]) -> Tensor:
        assert len(features) == len(captions)
        return torch.full((len(captions),), 0.25)


class Maker:
    """A candidate that draws each caption's image, with what `fixed` fixes, in uneven batches; counts its calls."""

    def __init__(self, **fixed: object) -> None:
        self.fixed, self.calls = fixed, 0
        self.captions = {c.text: c for c, _ in (*pairs(400), *diversity_pairs(1))}

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> Iterator[Tensor]:
        self.calls += 1
        drawn = [random_sticker(stream("maker", s), self.captions[p]) for p, s in zip(prompts, seeds, strict=True)]
        yield from images([replace(s, **self.fixed) for s in drawn]).split(37)


def images(drawn: Sequence[Sticker]) -> Tensor:
    return torch.stack([torch.from_numpy(np.array(draw(s))).permute(2, 0, 1) for s in drawn])


class TestProtocol:
    N, PER_CAPTION = 200, 20

    def evaluate(self, *candidates: Candidate, cache: Path, **more: bool) -> Report:
        return evaluate_stickers(candidates, PixelJudge(), n=self.N, per_caption=self.PER_CAPTION, cache=cache, **more)

    def test_pairs_are_fixed_and_do_not_depend_on_how_many(self) -> None:
        assert pairs(5) == pairs(50)[:5]
        assert [seed for _, seed in pairs(3)] == [1_000_000, 1_000_001, 1_000_002]
        assert sum(c.held_out for c, _ in pairs(2000)) == pytest.approx(2000 * 0.9 * 0.6 / 10, rel=0.3)
        varied = diversity_pairs(4)
        assert [c for c, _ in varied[::4]] == list(diversity.CAPTIONS) and varied[7][1] == 2_000_007

    def test_real_images_are_true_and_differ_from_the_reference(self) -> None:
        items: list[Pair] = [(Caption(kind="cat", colour="red", background="sky"), seed) for seed in range(150)]
        reference, real = (torch.cat(list(real_images(name, items))) for name in ("reference", "floor"))
        assert reference.shape == (150, 3, IMAGE_SIZE, IMAGE_SIZE) and reference.dtype == torch.uint8
        assert (pixel_attributes(reference)["colour"] == list(COLOURS).index("red")).all()
        assert not (reference == real).flatten(1).all(dim=1).any()
        torch.testing.assert_close(next(iter(real_images("reference", items[7:8])))[0], reference[7])

    def test_a_good_model_is_as_good_as_real_images_and_a_collapsed_one_is_not(self, tmp_path: Path) -> None:
        good = Candidate("good", Maker(), steps=1)
        red = Candidate("red", Maker(colour="red", x=32.0, y=32.0), guidance=3.0)
        report = self.evaluate(good, red, cache=tmp_path)
        first, second, real = report.metrics
        assert [f.name for f in report.metrics] == ["good", "red", "real images"]
        assert (first.n, first.per_caption, first.steps, first.guidance) == (200, 20, 1, None)
        assert first.fid is not None and real.fid is not None and second.fid is not None
        assert first.fid < 3 * real.fid and second.fid > 10 * real.fid
        assert first.accuracy["colour"] == first.accuracy["background"] == first.held_out["colour"] == 1
        assert second.accuracy["colour"] is not None and second.accuracy["colour"] < 0.3
        assert first.diversity["mean"] == pytest.approx(1, abs=0.1) and second.diversity["colour"] == 0
        assert second.recall is not None and first.recall is not None and second.recall < first.recall
        assert sum(first.accuracy_n.values()) > sum(first.held_out_n.values()) > 0
        assert list(tmp_path.iterdir()) == []  # without a key nothing is cached
        shown = report.images["good"]
        assert [c for c, _ in shown] == [c.text for c, _ in pairs(12)] + ["a cat"] * 12
        assert all(image.size == (IMAGE_SIZE, IMAGE_SIZE) for _, image in shown)

    def test_metrics_do_not_depend_on_the_batches(self) -> None:
        judge, (captions, _) = PixelJudge(), zip(*pairs(60), strict=True)
        first, varied = Maker()(*texts_and_seeds(pairs(60))), Maker()(*texts_and_seeds(diversity_pairs(5)))
        whole, various = torch.cat(list(first)), torch.cat(list(varied))
        judged, places = judge.classify(judge.features(various)), diversity.centroids(various)
        reference = stickers.Reference(
            judge.features(whole.flip(0)), diversity.varieties(diversity.CAPTIONS, judged, places)
        )
        found = [
            stickers.measure("m", whole.split(b), various.split(b), list(captions), judge, reference)  # type: ignore
            for b in (1, 23, 60)
        ]
        assert found[0] == found[1] == found[2]

    @pytest.mark.parametrize("made, problem", [(37, "60 images were asked for, 37 came"), (61, "60 .* 61 came")])
    def test_too_few_or_too_many_images_are_refused(self, made: int, problem: str) -> None:
        blank = torch.zeros(made, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
        with pytest.raises(ValueError, match=problem):
            stickers.measure("m", [blank], [], [Caption()] * 60, PixelJudge(), None)  # type: ignore

    def test_images_of_another_size_are_refused(self) -> None:
        large = torch.zeros(1, 3, 512, 512, dtype=torch.uint8)
        with pytest.raises(SbrushError, match="512 x 512"):
            stickers.measure("m", [large], [], [Caption()], PixelJudge(), None)  # type: ignore

    @pytest.mark.parametrize("n, per_caption", [(3, 10), (0, 10), (2_000_000, 10), (100, 1)])
    def test_numbers_out_of_range_are_refused(self, n: int, per_caption: int) -> None:
        with pytest.raises(SbrushError) as problem:
            evaluate_stickers([], PixelJudge(), n=n, per_caption=per_caption)  # type: ignore
        assert problem.value.code == 2


def texts_and_seeds(items: Sequence[Pair]) -> tuple[list[str], list[int]]:
    return [c.text for c, _ in items], [s for _, s in items]


class TestCache:
    def evaluate(
        self, maker: Maker, cache: Path | None, *, key: str = "k", steps: int = 25, n: int = 10, **more: bool
    ) -> Report:
        candidate = Candidate(f"teacher, {steps} steps", maker, steps, 3.0, key)
        return evaluate_stickers([candidate], PixelJudge(), n=n, per_caption=2, cache=cache, **more)

    def test_what_was_measured_is_not_measured_again(self, tmp_path: Path) -> None:
        maker = Maker()
        first, second = (self.evaluate(maker, tmp_path / "new" / "folder") for _ in range(2))
        assert maker.calls == 2  # pairs and diversity, once
        assert first.metrics == second.metrics and first.json() == second.json()
        assert first.images.keys() == second.images.keys()
        for name, shown in first.images.items():
            assert [(c, i.tobytes()) for c, i in shown] == [(c, i.tobytes()) for c, i in second.images[name]]
        self.evaluate(maker, tmp_path / "new" / "folder", fresh=True)
        assert maker.calls == 4

    def test_another_key_steps_or_number_is_measured(self, tmp_path: Path) -> None:
        maker = Maker()
        self.evaluate(maker, tmp_path)
        for change in ({"key": "other"}, {"steps": 1}, {"n": 11}):
            before = maker.calls
            self.evaluate(maker, tmp_path, **change)
            assert maker.calls == before + 2
        assert len(list(tmp_path.iterdir())) == 4

    @pytest.mark.parametrize(
        "damage",
        [
            lambda text: text[:100],
            lambda text: "",
            lambda text: "[]",
            lambda text: "[" * 100_000,
            lambda text: text.replace('"fid": ', '"fid": NaN, "_": '),
            lambda text: text.replace('"n": 10,', '"n": 9,'),
            lambda text: text.replace('"precision": ', '"precision": "<script>", "_": '),
            lambda text: text.replace("iVBOR", "AAAAA"),
        ],
    )
    def test_a_damaged_file_is_passed_over_and_mended(self, tmp_path: Path, damage, capsys) -> None:  # type: ignore
        maker = Maker()
        whole = self.evaluate(maker, tmp_path)
        (file,) = tmp_path.iterdir()
        text = file.read_text()
        assert damage(text) != text
        file.write_text(damage(text))
        assert self.evaluate(maker, tmp_path).metrics == whole.metrics
        assert maker.calls == 4 and "damaged" in capsys.readouterr().err
        self.evaluate(maker, tmp_path)
        assert maker.calls == 4

    def test_an_unwritable_home_breaks_nothing(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "file").write_text("")
        assert len(self.evaluate(Maker(), tmp_path / "file" / "cache").metrics) == 2
        assert "could not be cached" in capsys.readouterr().err

    def test_the_users_cache_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        self.evaluate(Maker(), None)
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the XDG specification
        self.evaluate(Maker(), None)
        assert len(list((tmp_path / "xdg" / "sbrush").iterdir())) == 1
        assert len(list((tmp_path / "home" / ".cache" / "sbrush").iterdir())) == 1

    def test_metrics_of_other_versions_are_noted(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert not any("measured with" in note for note in self.evaluate(Maker(), tmp_path).notes)
        monkeypatch.setattr(stickers, "versions", lambda: {"torch": "9"})
        assert "teacher, 25 steps was measured with" in self.evaluate(Maker(), tmp_path).notes[-1]


METRICS = Metrics(
    name='<b>"student" & co</b>', n=1000, per_caption=10, steps=1, guidance=None, fid=12.345, clip_score=0.5,
    precision=0.9, recall=0.875, accuracy={"kind": 0.98, "size": None}, accuracy_n={"kind": 850, "size": 0},
    held_out={"kind": 0.75}, held_out_n={"kind": 54}, diversity={"colour": 1.01, "mean": None}, versions={"torch": "2"},
)  # fmt: skip


class TestReport:
    report = Report(
        [METRICS, replace(METRICS, name="teacher", steps=25, guidance=3.0, fid=None)],
        {"captions": "1000", "judge": "<script>alert(1)</script>"},
        ["a & note"],
        {"<h>": [('a "cat" <img>', Image.new("RGB", (64, 64), "red"))]},
    )

    def test_json_goes_there_and_back(self) -> None:
        data = json.loads(json.dumps(self.report.json(), allow_nan=False))
        assert [Metrics.from_json(model) for model in data["models"]] == self.report.metrics
        assert data["protocol"] == self.report.protocol and "images" not in data

    @pytest.mark.parametrize(
        "change",
        [{"fid": float("nan")}, {"n": 1.5}, {"n": True}, {"accuracy": [1]}, {"accuracy": {"kind": "x"}}, {"more": 1}],
    )
    def test_metrics_of_another_shape_are_refused(self, change: dict[str, object]) -> None:
        with pytest.raises(ValueError):
            Metrics.from_json(asdict(METRICS) | change)
        with pytest.raises(ValueError):
            Metrics.from_json({k: v for k, v in asdict(METRICS).items() if k not in ("n",)})

    def test_finite(self) -> None:
        assert finite(1.5) == 1.5 and finite(math.nan) is None and finite(math.inf) is None

    def test_table_is_aligned_and_holds_figures_beside_protocol(self) -> None:
        table = self.report.table()
        row = {line.split("  ")[1].strip(): line for line in table.splitlines() if line.startswith("  ")}
        assert row["FID, lower is better"].split()[-2:] == ["12.35", "-"] or row["FID, lower is better"].split()[
            -2:
        ] == ["12.34", "-"]
        assert "98.0 %" in row["kind (n = 850)"] and "87.5 %" in row["recall"]
        assert "kind (n = 54)" in table and "captions: 1000" in table and "a & note" in table
        body = table[: table.index("captions:")].splitlines()
        assert len({len(line) for line in body if line.startswith("  ")}) == 1

    def test_html_escapes_everything_and_needs_nothing_else(self, tmp_path: Path) -> None:
        self.report.write(tmp_path / "report.html")
        page = (tmp_path / "report.html").read_text(encoding="utf-8")
        assert html.escape('<b>"student" & co</b>').replace("&quot;", "&#34;") in page and "a &amp; note" in page
        assert (
            "<script" not in page
            and "<img>" not in page
            and "<h>" not in page
            and "http" not in page.replace("http-equiv", "")
        )
        assert page.count("data:image/png;base64,") == 1
        code = page.split("data:image/png;base64,")[1].split('"')[0]
        assert from_png(code).getpixel((5, 5)) == (255, 0, 0)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]
        assert json.loads((tmp_path / "report.json").read_text()) == self.report.json()

    def test_what_cannot_be_written_is_said_and_the_old_file_stays(self, tmp_path: Path) -> None:
        with pytest.raises(SbrushError, match="cannot write"):
            self.report.write(tmp_path / "no" / "report.html")
        with pytest.raises(SbrushError, match="cannot write"):
            self.report.write(tmp_path / "r.html" / "x.html")
        old = tmp_path / "old.html"
        old.write_text("old")
        with pytest.raises(TypeError):
            write_text(old, 5)  # type: ignore[arg-type]
        assert old.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["old.html"]

    def test_png_goes_there_and_back(self) -> None:
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
        assert from_png(png(image)).tobytes() == image.tobytes()

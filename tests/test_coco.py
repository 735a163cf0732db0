"""`sbrush eval --coco-30k` on a miniature COCO in COCO's own layout; its steps against clean-fid and torch-fidelity."""

from __future__ import annotations

import base64
import errno
import hashlib
import html
import io
import json
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from conftest import sbrush
from launch import Done
from sbrush.benchmarks.evaluation import BaselineInception
from sbrush.cli.app import app
from sbrush.console import SbrushError
from sbrush.device import quick_products
from sbrush.evaluate.coco.features import UnreadableImages, square
from sbrush.evaluate.coco.protocols import PROTOCOLS, Coco
from sbrush.evaluate.coco.published import BenchmarkReport, Measured
from sbrush.metrics.clip import ClipScorer
from sbrush.metrics.fid import fid, fid_error
from sbrush.metrics.inception import Inception, clean_resize
from sbrush.metrics.kid import kid, mmd
from sbrush.models.load import digest, load_student
from sbrush.sampling.generation import student_images
from sbrush.sampling.image_folder import read_captions
from sbrush.sampling.open_image import UnreadableImage
from sbrush.stickers.draw import draw
from sbrush.stickers.world import random_caption, random_sticker, stream
from sbrush.storage.files import write_json
from sbrush.storage.shards import Shards

IMAGES = 24


def make_coco(root: Path, count: int = IMAGES) -> Path:
    """Stickers as JPEGs of odd sizes, one gray, one CMYK, one turned by EXIF; several captions each, out of order."""
    (root / "annotations").mkdir(parents=True)
    (root / "val2014").mkdir()
    images, annotations = [], []
    for i in range(count):
        caption = random_caption(stream("coco", i))
        width, height = 60 + 7 * (i % 5), 60 + 11 * (i % 4)  # landscape, portrait
        image = draw(random_sticker(stream("coco", i), caption)).resize((width, height))
        name, exif = f"COCO_val2014_{i:012d}.jpg", Image.Exif()
        if i == 3:
            exif[0x0112] = 6  # lies on its side
        image = image.convert({1: "L", 2: "CMYK"}.get(i, "RGB"))
        image.save(root / "val2014" / name, exif=exif)
        images.append({"id": 1000 - i, "file_name": name, "width": width, "height": height})
        annotations.append({"id": i, "image_id": 1000 - i, "caption": f" {caption.text}\n"})
        annotations.append({"id": 900 + i, "image_id": 1000 - i, "caption": "a second caption"})
    annotations.sort(key=lambda a: (a["caption"] == "a second caption", -a["id"]))  # file order is not images' order
    write_json(root / "annotations" / "captions_val2014.json", {"images": images, "annotations": annotations})
    return root


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_coco(tmp_path_factory.mktemp("coco"))


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inception(tmp_path_factory.mktemp("inception") / "inception.pth")


def make_inception(file: Path) -> Path:
    """Inception's true architecture, random weights, batch norms calibrated so that features are neither 0 nor huge."""
    torch.manual_seed(0)
    net = Inception()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the plain mean
    with torch.no_grad():
        net.train()(torch.rand(8, 3, 299, 299) * 2 - 1)
    torch.save({**net.state_dict(), "fc.weight": torch.zeros(1008, 2048)}, file)
    return file


class TinyInception(Inception):
    """In Inception's place where the network is not the point: 64 features of an image's coarse colours."""

    def __init__(self) -> None:
        layers = torch.nn.AvgPool2d(37), torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 64), torch.nn.ReLU()
        torch.nn.Sequential.__init__(self, *layers)
        self.digest = ""


def fill(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def noise(count: int, height: int, width: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, height, width), generator=torch.Generator().manual_seed(1)).byte()


class TestProtocol:
    def test_captions_are_images_order_and_first_in_file(self, coco: Path) -> None:
        read = Coco.read(coco)
        assert read.captions == [random_caption(stream("coco", i)).text for i in range(IMAGES)]
        assert [f.name for f in read.files] == [f"COCO_val2014_{i:012d}.jpg" for i in range(IMAGES)]

    def test_crop_and_resize_against_pillow_alone(self, coco: Path) -> None:
        for file in Coco.read(coco).files[:6]:
            with Image.open(file) as image:
                w, h = image.size
                side = min(w, h)
                box = ((w - side) // 2, (h - side) // 2, (w - side) // 2 + side, (h - side) // 2 + side)
                expected = np.array(image.convert("RGB").crop(box).resize((256, 256), Image.LANCZOS))
                assert torch.equal(square(image, "floor"), torch.from_numpy(expected).permute(2, 0, 1))

    def test_an_image_of_that_size_stays_as_it_is(self) -> None:
        image = noise(1, 256, 256)[0]
        assert torch.equal(square(Image.fromarray(image.permute(1, 2, 0).numpy()), "half to even"), image)

    @pytest.mark.filterwarnings("ignore")
    def test_clean_resize_is_clean_fids(self) -> None:
        resize = pytest.importorskip("cleanfid.resize")
        theirs = resize.make_resizer("PIL", False, "bicubic", (299, 299))
        for image in (*noise(2, 256, 256), *noise(1, 300, 200)):
            ours = clean_resize(image)
            assert np.array_equal(ours.permute(1, 2, 0).numpy(), theirs(image.permute(1, 2, 0).numpy()))

    def test_features_are_torch_fidelitys(self, inception_file: Path, tmp_path: Path) -> None:
        """The whole network and the first FID code's resizing, on the same weights."""
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        state = torch.load(inception_file, weights_only=True)
        torch.save({**state, "fc.bias": torch.zeros(1008)}, tmp_path / "theirs.pth")
        theirs = FeatureExtractorInceptionV3("net", ["2048"], str(tmp_path / "theirs.pth"))
        images = noise(2, 256, 256)
        expected, ours = theirs(images)[0], Inception.load(inception_file)
        assert torch.equal(BaselineInception.load(inception_file).features(images), expected)
        assert torch.allclose(ours.features(images), expected, rtol=1e-5, atol=1e-4)  # in another layout: rounding
        resized = ours.features(torch.stack([clean_resize(p) for p in images]))
        assert not torch.allclose(resized, expected, rtol=1e-3, atol=1e-2)

    @pytest.mark.filterwarnings("ignore")
    def test_the_torchmetrics_presets_features_are_torchmetrics(self, inception_file: Path, tmp_path: Path) -> None:
        from torchmetrics.image.fid import NoTrainInceptionV3

        state = torch.load(inception_file, weights_only=True)
        torch.save({**state, "fc.bias": torch.zeros(1008)}, tmp_path / "theirs.pth")
        theirs = NoTrainInceptionV3("net", ["2048"], str(tmp_path / "theirs.pth"))
        images, ours = noise(2, 256, 256), Inception.load(inception_file)
        resize = PROTOCOLS["torchmetrics"].resize
        assert torch.allclose(ours.features(images, resize), theirs(images), rtol=1e-5, atol=1e-4)
        resize = PROTOCOLS["torch-fidelity"].resize
        assert not torch.allclose(ours.features(images, resize), theirs(images), rtol=1e-3, atol=1e-2)

    def test_inception_is_exact_and_clip_quick_on_a_gpu(self, inception_file: Path) -> None:
        seen = []
        net = Inception.load(inception_file)
        net.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
        net.features(noise(1, 256, 256))
        assert seen == [False] and torch.backends.cudnn.allow_tf32  # as torch has it by default
        for kind, precision in (("cuda", "high"), ("cpu", "highest")):
            with quick_products(torch.device(kind)):
                assert torch.get_float32_matmul_precision() == precision
            assert torch.get_float32_matmul_precision() == "highest"  # or precision and recall would take float64

    @pytest.mark.parametrize(
        "text",
        [{}, {"no_causal_mask": True}, {"pool_type": "last"}],
        ids=["clip", "both directions", "asked at the 77th"],
    )
    @pytest.mark.parametrize(
        "captions",
        [["a cat", "two dogs"], ["a cat", "a " + "very " * 90 + "long dog"], ["", "a cat on a mat by a bat"]],
    )
    def test_clip_score_is_open_clips(self, clip_folder: Path, tmp_path: Path, text: dict, captions: list[str]) -> None:
        """Though a tower that reads from left to right reads nothing behind the longest caption."""
        import open_clip

        folder = tmp_path / "clip"
        shutil.copytree(clip_folder, folder)
        config = json.loads((folder / "open_clip_config.json").read_text())
        config["model_cfg"]["text_cfg"] |= text
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        images = noise(2, 256, 256)
        model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        pixels = torch.stack([preprocess(Image.fromarray(p.permute(1, 2, 0).numpy())) for p in images])
        with torch.no_grad():
            seen = model.eval().encode_image(pixels)
            said = model.encode_text(open_clip.tokenize([f"A photo depicts {c}" for c in captions]))
        expected = torch.nn.functional.cosine_similarity(seen, said)
        ours = ClipScorer.load(folder)
        read: list[int] = []
        ours.network.transformer.register_forward_pre_hook(lambda _, given: read.append(given[0].shape[1]))
        prepared = torch.stack([ours.prepare(p) for p in images])
        assert torch.allclose(ours.scores(prepared, captions), expected, atol=1e-6)
        longest = max(int(t.argmax()) + 1 for t in open_clip.tokenize([f"A photo depicts {c}" for c in captions]))
        assert read == [77 if text else longest]


class TestMetrics:
    def test_fid_and_kid_against_the_references(self) -> None:
        from scipy.linalg import sqrtm
        from torch_fidelity.metric_kid import kernel_mmd

        draw = torch.Generator().manual_seed(0)
        real, fake = torch.randn(3000, 64, generator=draw), 1.1 * torch.randn(2500, 64, generator=draw) + 0.2
        a, b = real.double().numpy(), fake.double().numpy()
        c, d = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
        expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(c + d - 2 * sqrtm(c @ d).real)
        assert fid(real, fake) == pytest.approx(expected, rel=1e-4)
        x, y = real[:500].double(), fake[:500].double()
        options = {"kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None, "kid_kernel_poly_coef0": 1}
        theirs = kernel_mmd(x.numpy(), y.numpy(), kid_kernel="poly", **options)
        assert mmd(x, y).item() == pytest.approx(theirs, rel=1e-6)
        assert kid(real, fake)[0] > 0.01 > abs(kid(real[:1500], real[1500:])[0])

    @pytest.mark.filterwarnings("ignore")  # clean-fid calls scipy's sqrtm as it was, and more
    @pytest.mark.parametrize("width", [16, 128])
    def test_fid_is_clean_fids_and_torch_fidelitys(self, width: int) -> None:
        """On features as uneven as Inception's: correlated, some nearly constant, means far from 0."""
        from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

        theirs = pytest.importorskip("cleanfid.fid")
        draw = torch.Generator().manual_seed(width)
        mix = torch.randn(width, width, generator=draw) / width**0.5 * torch.logspace(0, -2, width)
        real = (torch.randn(6000, width, generator=draw) @ mix).double() + 5
        fake = (torch.randn(5000, width, generator=draw) @ (mix + 0.05 * mix.roll(1, 0))).double() + 5.02
        statistics = [fid_features_to_statistics(features) for features in (real, fake)]
        ours, (a, b) = fid(real, fake), statistics
        assert ours == pytest.approx(fid_statistics_to_metric(a, b, False)[KEY_METRIC_FID], rel=1e-4)
        assert ours == pytest.approx(theirs.frechet_distance(a["mu"], a["sigma"], b["mu"], b["sigma"]), rel=1e-4)
        assert ours > 1e-3

    def test_jackknife_agrees_with_the_spread_of_fresh_samples(self) -> None:
        draw = torch.Generator().manual_seed(0)
        real = torch.randn(4000, 4, generator=draw)
        fakes = [torch.randn(1000, 4, generator=draw) + 0.5 for _ in range(60)]
        spread = torch.tensor([fid(real, fake) for fake in fakes]).std().item()
        told = np.mean([fid_error(real, fake) for fake in fakes[:20]])
        assert told == pytest.approx(spread, rel=0.3)

    @pytest.mark.parametrize(("images", "width"), [((2000, 1507), 24), ((60, 45), 4)])
    def test_jackknife_leaves_out_each_group_once(self, images: tuple[int, int], width: int) -> None:
        """By its definition, each distance through torchmetrics; features correlated, means far from 0."""
        draw = torch.Generator().manual_seed(1)
        mix = torch.randn(width, width, generator=draw) * torch.logspace(0, -2, width)
        real, fake = (torch.randn(n, width, generator=draw) @ mix + 5 for n in images)
        kept = [torch.arange(len(fake)) % 10 != group for group in range(10)]
        found = np.array([fid(real, fake[rows]) for rows in kept])
        expected = (0.9 * ((found - found.mean()) ** 2).sum()) ** 0.5
        assert fid_error(real, fake) == pytest.approx(expected, rel=1e-4)


class TestReport:
    def test_the_page_is_whole_html_with_every_cell(self, tmp_path: Path) -> None:
        """By Python's parser: what is opened is closed, each row has its cells, and nothing from outside is a tag."""
        names = (
            "fid",
            "fid_standard_error",
            "fid_interval",
            "kid",
            "kid_spread",
            "clip_score",
            "hps",
            "precision",
            "recall",
        )
        evil = "<script>alert('x')</script>"
        manifest = {"protocol": {"name": "swiftbrush", "images": 30_000}, "images": 300, "captions": evil, "x": [1]}
        manifest |= {"inception_sha256": "0", "clip": "mine"}
        report = BenchmarkReport(
            [Measured(f"runs/{evil}", dict.fromkeys(names, 0.25), {"sha256": "77"}, {"images": 1})] * 2, manifest
        )
        images = [(f"{i} {evil}", Image.new("RGB", (600, 400), (i, 0, 0))) for i in range(3)]
        report.write(tmp_path / "report.html", {"The first": images, "The lowest": images[:1]})
        page = Tags((tmp_path / "report.html").read_text(encoding="utf-8"))
        assert not page.open and page.count["table"] == 1 and page.count["script"] == 0
        assert {cells for cells in page.rows if cells > 1} == {3}  # a label, two columns; a heading has 1
        assert page.count["img"] == page.count["figcaption"] + 1 == 5  # the plot has no caption
        assert (
            page.text.count(evil) == 3 + 4 + 1
            and "sha256 77" in page.text
            and "name swiftbrush, images 30000" in page.text
        )
        sizes = [Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).size for source in page.sources]
        assert sizes == [(700, 500)] + [(256, 171)] * 4


class Tags(HTMLParser):
    """A page's tags: those left open, how many of each, each row's cells; its text, its images' sources."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open, self.count, self.rows, self.text, self.sources = [], Counter[str](), list[int](), "", list[str]()
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.count[tag] += 1
        self.sources += [value for name, value in attributes if name == "src" and value]
        self.rows += [0] if tag == "tr" else []
        if tag in ("td", "th"):
            self.rows[-1] += 1
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        self.text += text


class TestShards:
    def test_blocks_go_on_where_they_stopped_and_damaged_ones_are_done_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("sbrush.storage.shards.BLOCK", 200)
        rows = torch.arange(450.0)[:, None]

        def batches(blocks):  # type: ignore[no-untyped-def]
            asked.extend(block.start for block in blocks)
            for block in blocks:
                yield from ({"features": part} for part in rows[block.start : block.stop].split(64))

        asked: list[int] = []
        Shards(tmp_path, 450).fill("test", batches, process=1, processes=2)
        assert asked == [200]
        Shards(tmp_path, 450).fill("test", batches)  # another number of processes goes on
        assert asked == [200, 0, 400] and torch.equal(Shards(tmp_path, 450).rows()["features"], rows)
        (tmp_path / "000200.safetensors").write_bytes(b"cut")
        Shards(tmp_path, 450).fill("test", batches)
        assert asked[3:] == [200] and torch.equal(Shards(tmp_path, 450).rows()["features"], rows)
        Shards(tmp_path, 420).fill("test", batches)  # fewer: the last block is another
        assert asked[4:] == [400] and torch.equal(Shards(tmp_path, 420).rows()["features"], rows[:420])
        Shards(tmp_path, 420).fill("test", batches, done=lambda block: block.start != 200)
        assert asked[5:] == [200]

    def test_a_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(file: Path, _: object) -> None:
            file.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("sbrush.storage.shards.save_tensors", full)
        with pytest.raises(SbrushError, match="No space left") as stopped:
            Shards(tmp_path, 4).fill("test", lambda _: [{"features": torch.zeros(4, 2)}])
        assert "goes on" in stopped.value.hint and not list(tmp_path.iterdir())


class TestBadInput:
    def test_annotations(self, tmp_path: Path) -> None:
        root = make_coco(tmp_path / "coco", 3)
        file = root / "annotations" / "captions_val2014.json"
        whole = file.read_text()
        for text in (whole[:100], "[]", "{}", json.dumps({"images": [{"id": 1}], "annotations": [{"image_id": 1}]})):
            file.write_text(text)
            with pytest.raises(SbrushError, match="damaged"):
                Coco.read(root)
        file.write_text(whole.replace("COCO_val2014_000000000000.jpg", "../../etc/passwd"))
        with pytest.raises(SbrushError, match="names"):
            Coco.read(root)
        file.unlink()
        with pytest.raises(SbrushError, match="not there"):
            Coco.read(root)

    def test_weights_that_are_none(self, tmp_path: Path, inception_file: Path) -> None:
        for name in ("x.pth", "x.safetensors"):
            (tmp_path / name).write_bytes(b"nothing")
            with pytest.raises(SbrushError, match="does not hold Inception"):
                Inception.load(tmp_path / name)
            with pytest.raises(SbrushError, match="does not hold a CLIP"):
                ClipScorer.load(
                    tmp_path / name, model_name="ViT-B-32"
                )  # a small one: open_clip makes it before it reads
        state = torch.load(inception_file, weights_only=True)
        torch.save({k: v for k, v in state.items() if "Mixed_6e" not in k}, tmp_path / "x.pth")
        with pytest.raises(SbrushError, match="does not hold Inception"):
            Inception.load(tmp_path / "x.pth")

    def test_weights_that_are_absent(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
        with pytest.raises(SbrushError, match="is not there"):
            Inception.load()
        monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: 1 / 0)
        with pytest.raises(SbrushError, match="not in the Hub's cache"):
            ClipScorer.load()

    def test_an_interrupted_download_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def cut(*_: object, **__: object) -> None:
            raise OSError("connection lost")

        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
        monkeypatch.setattr("urllib.request.urlopen", cut)
        monkeypatch.setattr("torch.hub.urlopen", cut)
        with pytest.raises(SbrushError, match="cannot fetch"):
            Inception.load(download=True)
        assert not list(tmp_path.rglob("*.pth"))

    def test_unreadable_images_are_counted(self, tmp_path: Path) -> None:
        unreadable = UnreadableImages(1)
        unreadable.note(tmp_path / "one.jpg", UnreadableImage("not an image"))
        with pytest.raises(SbrushError, match="missing"):
            unreadable.note(tmp_path / "two.jpg", UnreadableImage("missing"))

    def test_captions(self, tmp_path: Path) -> None:
        (tmp_path / "c.txt").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(SbrushError, match="UTF-16"):
            read_captions(tmp_path / "c.txt")
        (tmp_path / "c.txt").write_text("a cat\n\na dog\n", encoding="utf-8")
        with pytest.raises(SbrushError, match="line 2"):
            read_captions(tmp_path / "c.txt")
        (tmp_path / "c.txt").write_text("\ufeffa cat\r\na\u2028dog", encoding="utf-8")
        assert read_captions(tmp_path / "c.txt").texts == ["a cat", "a\u2028dog"]


@pytest.fixture(scope="module")
def tiny_inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("tiny-inception") / "inception.pth"
    torch.save(TinyInception().state_dict(), file)
    return file


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the evaluations of this module have cached, the real images' features above all."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture
def evaluate(  # type: ignore[no-untyped-def]
    coco: Path, tiny_inception_file: Path, clip_folder: Path, cached: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sbrush.evaluate.coco.benchmark.Inception", TinyInception)

    def run(*more: object, processes: int = 1) -> Done:
        return sbrush(
            "eval", "--coco-30k", "--coco-root", coco, "--inception", tiny_inception_file,
            "--clip-weights", clip_folder, "--work", cached, "--limit", 20, "--report", cached / "report.html", *more,
            processes=processes,
        )  # fmt: skip

    run.work, run.coco = cached, coco  # type: ignore[attr-defined]
    return run


class TestCommand:
    """The whole road, on the shipped student."""

    def test_the_whole_road(self, evaluate, coco: Path) -> None:  # type: ignore[no-untyped-def]
        work = evaluate.work
        first = evaluate("--json", "--save-images", work / "images")
        assert first.returncode == 0, first.stderr
        told = json.loads(first.stdout)
        assert told == json.loads((work / "report.json").read_text())
        manifest = told["manifest"]
        assert (manifest["images"], manifest["reference_images"], manifest["unreadable_images"]) == (20, IMAGES, 0)
        assert manifest["truncated_prompts"] == 0
        page = (work / "report.html").read_text()
        assert (
            "16.67" in page
            and "not comparable with anything published" in page
            and page.count("data:image/png") == 20 + 12
        )

        kept = sorted((work / "images").iterdir())
        kept[7].unlink()  # asked for again they are all there, whatever is known of them
        assert evaluate("--save-images", work / "images").returncode == 0
        assert sorted((work / "images").iterdir()) == kept and len(kept) == 20

        shards = sorted(work.glob("coco-images-*/*.safetensors"))
        shards[-1].unlink()  # as if stopped before the last one
        again = evaluate("--json")
        assert json.loads(again.stdout)["points"][0]["metrics"] == told["points"][0]["metrics"]

        same = evaluate("--json", "--images", work / "images")  # what was kept gives the same again
        assert same.returncode == 0, same.stderr
        metrics = json.loads(same.stdout)["points"][0]["metrics"]
        for absent in ("fid_standard_error", "fid_interval", "hps"):  # no interval of 20 images, and no weights of HPS
            assert metrics.pop(absent) is told["points"][0]["metrics"].pop(absent) is None
        assert metrics == pytest.approx(told["points"][0]["metrics"], rel=1e-5, abs=1e-6)

        refused = evaluate("--seed", 1, "--protocol", "gigagan")
        assert refused.returncode == 2 and refused.stderr.count("error: ") == refused.stderr.count("hint: ") == 1
        assert "Traceback" not in refused.stderr

        other = evaluate("--json", "--seed", 1)
        assert json.loads(other.stdout)["points"][0]["metrics"]["fid"] != told["points"][0]["metrics"]["fid"]
        before = {place.name for place in work.glob("coco-*")}
        resized = evaluate("--json", "--protocol", "torchmetrics", "--images", work / "images")
        assert json.loads(resized.stdout)["points"][0]["metrics"]["fid"] != metrics["fid"]
        assert len({place.name for place in work.glob("coco-*")} - before) == 2  # nothing of another protocol is used

    def test_every_metric_and_every_line_of_the_manifest(
        self, evaluate, tiny_inception_file: Path, clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:  # type: ignore[no-untyped-def]
        """Every figure and every line of the manifest by something else than what made it."""
        import open_clip

        monkeypatch.setattr("sbrush.storage.shards.BLOCK", 64)  # so that images lie in several blocks

        root, seed, work = make_coco(tmp_path / "coco", 120), 7, tmp_path / "work"
        flags = "--coco-root", root, "--work", work, "--limit", 110, "--seed", seed
        done = evaluate(*flags, "--json", "--save-images", tmp_path / "kept", "--report", tmp_path / "report.html")
        assert done.returncode == 0, done.stderr
        told, coco = json.loads(done.stdout), Coco.read(root)
        metrics, manifest = told["points"][0]["metrics"], told["manifest"]

        # The images: each of its caption and of its own seed.
        files, student = sorted((tmp_path / "kept").iterdir()), load_student(None)
        assert [file.name for file in files] == [f"{i:05d}.png" for i in range(110)]
        for i in (0, 1, 63, 64, 109):
            (expected,) = student_images(student, [coco.captions[i]], [seed * 1_000_000 + i])
            with Image.open(files[i]) as image:
                drawn = torch.from_numpy(np.array(image)).permute(2, 0, 1)
            assert (drawn.int() - expected[0].int()).abs().max() <= 1  # another batch: rounding

        # The metrics.
        rows = {
            what: [load_file(f) for f in sorted(work.glob(f"coco-{what}-*/*.safetensors"))]
            for what in ("reference", "images")
        }
        real, fake = (torch.cat([row["features"] for row in rows[what]]) for what in rows)
        assert (len(real), len(fake)) == (120, 110)

        def within(points: Tensor, region: Tensor) -> float:
            reach = torch.cdist(region.double(), region.double()).kthvalue(4, dim=1).values  # itself is the first
            return (torch.cdist(points.double(), region.double()) <= reach).any(dim=1).double().mean().item()

        assert metrics["fid"] == pytest.approx(fid(real, fake), rel=1e-9)
        assert metrics["fid_standard_error"] == pytest.approx(fid_error(real, fake), rel=1e-9)
        assert (metrics["kid"], metrics["kid_spread"]) == pytest.approx(kid(real, fake), rel=1e-9)
        assert metrics["kid"] != metrics["kid_spread"]
        assert (metrics["precision"], metrics["recall"]) == pytest.approx((within(fake, real), within(real, fake)))
        assert metrics["precision"] != metrics["recall"]
        model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{clip_folder}")
        scores = []
        with torch.no_grad():
            for file, caption in zip(files, coco.captions, strict=False):
                with Image.open(file) as image:
                    ready = preprocess(image.convert("RGB").resize((256, 256), Image.Resampling.LANCZOS))
                said = model.eval().encode_text(open_clip.tokenize([f"A photo depicts {caption}"]), normalize=True)
                scores.append((model.encode_image(ready[None], normalize=True) * said).sum())
        scores = torch.stack(scores)
        assert torch.allclose(torch.cat([row["clip"] for row in rows["images"]]), scores, atol=1e-5)
        assert metrics["clip_score"] == pytest.approx(scores.mean().item(), abs=1e-6)

        # The manifest, and the page.
        def sha(data: bytes) -> str:
            return hashlib.sha256(data).hexdigest()

        listed = "".join(f"{file.name} {file.stat().st_size}\n" for file in coco.files)
        assert manifest["reference_sha256"] == sha(listed.encode())
        assert manifest["captions_sha256"] == sha("".join(f"{c}\n" for c in coco.captions[:110]).encode())
        assert manifest["inception_sha256"] == sha(tiny_inception_file.read_bytes())
        assert (manifest["seed"], manifest["reference_images"], manifest["images"]) == (seed, 120, 110)
        assert manifest["protocol"]["prefix"] == "A photo depicts " and manifest["protocol"]["neighbours"] == 3
        assert manifest["versions"]["torch"] == torch.__version__.split("+")[0] and manifest["versions"]["pillow"]
        model_of = {
            "kind": "student",
            "sha256": digest(student),
            "steps": 1,
            "guidance": 1,
            "precision": "float32",
            "batch": 64,
        }
        assert told["points"][0]["model"].items() >= model_of.items()
        page = (tmp_path / "report.html").read_text()
        for said in (
            digest(student),
            "+- ",
            "15.46",
            "0.30",
            "Inception&#39;s weights are not",
            "the CLIP model is not",
        ):
            assert said in page, said
        worst = [f"{scores[i]:.3f} {coco.captions[i]}" for i in scores.argsort()[:3].tolist()]
        places = [page.index(html.escape(text)) for text in worst]
        assert places == sorted(places)

    def test_captions_beside_the_images(self, evaluate, coco: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
        """Real images with COCO's captions, and with others beside them: another CLIP score, the same FID."""
        for i, file in enumerate(Coco.read(coco).files[:20]):
            shutil.copy(file, tmp_path / f"{i}.jpg")
        theirs = json.loads(evaluate("--json", "--images", tmp_path).stdout)
        (tmp_path / "captions.txt").write_text("\n".join(f"some text {i}" for i in range(20)))
        own = json.loads(evaluate("--json", "--images", tmp_path).stdout)
        assert (theirs["manifest"]["captions"], own["manifest"]["captions"]) == (
            "COCO's own",
            "captions.txt beside the images",
        )
        assert theirs["points"][0]["metrics"]["fid"] == own["points"][0]["metrics"]["fid"]
        assert theirs["points"][0]["metrics"]["clip_score"] != own["points"][0]["metrics"]["clip_score"]

    def test_metrics_are_those_of_the_rows(  # type: ignore[no-untyped-def]
        self, evaluate, inception_file: Path, coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """By the metrics alone, from what lies on disk; and a limit that they miss is an error. The true Inception."""
        monkeypatch.setattr("sbrush.evaluate.coco.benchmark.Inception", Inception)
        done = evaluate("--work", tmp_path, "--json", "--max-fid", 0.001, "--inception", inception_file)
        told = json.loads(done.stdout)["points"][0]["metrics"]
        rows = {
            what: [load_file(f) for f in sorted(tmp_path.glob(f"coco-{what}-*/*.safetensors"))]
            for what in ("reference", "images")
        }
        real, fake = (torch.cat([row["features"] for row in rows[what]]) for what in rows)
        assert real.shape == (IMAGES, 2048) and told["fid"] == pytest.approx(fid(real, fake), rel=1e-9)
        with Image.open(Coco.read(coco).files[5]) as image:
            features = Inception.load(inception_file).features(
                clean_resize(square(image, PROTOCOLS["swiftbrush"].crop))[None]
            )
        assert torch.allclose(real[5], features[0], rtol=1e-4, atol=1e-4)
        assert told["clip_score"] == pytest.approx(torch.cat([row["clip"] for row in rows["images"]]).mean().item())
        assert done.returncode == 1 and "is above 0.001" in done.stderr

    def test_hps_is_the_cosine_without_prefix_of_the_image_at_its_own_size(  # type: ignore[no-untyped-def]
        self, evaluate, coco: Path, clip_folder: Path, tmp_path: Path
    ) -> None:
        """By open_clip alone; another tiny model in HPS's place."""
        import open_clip

        for i, file in enumerate(Coco.read(coco).files[:20]):
            shutil.copy(file, tmp_path / f"{i}.jpg")
        done = evaluate("--json", "--images", tmp_path, "--hps-weights", clip_folder, "--hps-version", "2.1")
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{clip_folder}")
        tokenizer, scores = open_clip.get_tokenizer(f"local-dir:{clip_folder}"), []
        with torch.no_grad():
            for i, caption in enumerate(Coco.read(coco).captions[:20]):
                with Image.open(tmp_path / f"{i}.jpg") as image:
                    seen = model.encode_image(preprocess(image.convert("RGB"))[None], normalize=True)
                scores.append((seen * model.encode_text(tokenizer([caption]), normalize=True)).sum().item())
        assert told["points"][0]["metrics"]["hps"] == pytest.approx(100 * np.mean(scores), abs=1e-3)
        assert told["manifest"]["hps"].startswith("v2.1 ") and told["points"][0]["metrics"]["clip_score"]

    def test_a_sweep_and_two_processes(self, evaluate, tiny_teacher: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
        """Two guidance scales; then the second one by two processes from nothing: the same metrics exactly."""
        report, flags = tmp_path / "sweep.html", ["--teacher", tiny_teacher, "--teacher-steps", 2, "--json"]
        done = evaluate(*flags, "--sweep", "1,5", "--report", report)
        assert done.returncode == 0, done.stderr
        one, five = json.loads(done.stdout)["points"]
        assert "guidance 1" in one["name"] and one["metrics"] != five["metrics"]
        with Image.open(report.with_suffix(".png")) as plot:
            assert plot.size == (700, 500) and len(set(plot.convert("L").get_flattened_data())) > 20
        assert 'class="plot"' in report.read_text()

        work = tmp_path / "work"
        two = evaluate(*flags, "--teacher-guidance", 5, "--device", "cpu", "--work", work, processes=2)
        assert two.returncode == 0, two.stderr
        assert json.loads(two.stdout)["points"] == [five]
        assert two.stderr.count("measuring") == 1  # one of them talks

    def test_a_sweep_over_a_runs_checkpoints(self, evaluate, tiny_teacher: Path, prompt_file: Path, tmp_path: Path):  # type: ignore[no-untyped-def]
        shape = "--batch", 2, "--steps", 2, "--checkpoint-every", 1, "--grid-every", 0, "--student-lr", 1e-2
        made = sbrush("distill", prompt_file, "--teacher", tiny_teacher, "--out", tmp_path / "run", *shape)
        assert made.returncode == 0, made.stderr
        done = evaluate("--sweep", tmp_path / "run" / "checkpoints", "--json")
        assert done.returncode == 0, done.stderr
        points = json.loads(done.stdout)["points"]
        assert [point["name"] for point in points] == [f"run after step {n}, 1 step" for n in (1, 2)]
        assert points[0]["metrics"] != points[1]["metrics"]

    @pytest.mark.parametrize(
        "flags, says",
        [
            (["--protocol", "gigagan"], "a list of its own"),
            (["--limit", 25], "there are 24"),
            (["--limit", 20, "--images", "."], "has no images"),
            (["--teacher", "a/x", "--student", "a/y"], "several things"),
            (["--coco-root", "nowhere"], "COCO is not there"),
            (["--teacher", "a/x", "--start-timestep", 9], "is the student's"),
            (["--sweep", "1,2", "--student", "a/y"], "several things"),
            (["--hps-weights", "x"], "which version"),
            (["--sweep", "1,two", "--teacher", "a/x"], "no list of guidance scales"),
            (["--sweep", "a,b", "--no-clip-score"], "--clip-weights is for the CLIP score"),
            (["--sweep", "nowhere,b"], "no model folder nowhere"),
            (["--teacher-guidance", 3], "--teacher-guidance is a teacher's"),
            (["--teacher-steps", 3, "--student", "a/y"], "--teacher-steps is a teacher's"),
            (["--sweep", "1,2", "--teacher-guidance", 3, "--teacher", "a/x"], "is what --sweep goes through"),
            (["--fresh"], "--fresh is for the built-in world"),
            (["--images", ".", "--save-images", "x"], "are there already"),
        ],
    )
    def test_contradictions(  # type: ignore[no-untyped-def]
        self, coco: Path, inception_file: Path, clip_folder: Path, flags: list[object], says: str, tmp_path, monkeypatch
    ) -> None:
        """In this process, for speed: test_the_whole_road says what becomes of a SbrushError."""
        (tmp_path / "empty").mkdir()
        monkeypatch.chdir(tmp_path / "empty")
        baseline = "--coco-root", coco, "--inception", inception_file, "--clip-weights", clip_folder, "--limit", 20
        done = CliRunner().invoke(app, ["eval", "--coco-30k", *map(str, [*baseline, *flags])])
        assert isinstance(done.exception, SbrushError) and done.exception.code == 2, done.output
        assert says in str(done.exception) and done.exception.hint

    def test_images_and_captions_are_of_one_number(self, coco: Path, tmp_path: Path) -> None:
        for i in range(3):
            Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
        flags = "--coco-root", coco, "--images", tmp_path, "--limit", 20, "--no-clip-score"
        done = CliRunner().invoke(app, ["eval", "--coco-30k", *map(str, flags)])
        assert isinstance(done.exception, SbrushError) and done.exception.code == 2, done.output
        assert "3 images for 20 captions" in str(done.exception)

    def test_a_corrupt_image(self, evaluate, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
        root = make_coco(tmp_path / "coco")
        damaged = root / "val2014" / "COCO_val2014_000000000005.jpg"
        damaged.write_bytes(b"\xff\xd8 no image".ljust(damaged.stat().st_size))
        stopped = evaluate("--coco-root", root)
        assert stopped.returncode == 1 and "000000000005.jpg is not an image" in stopped.stderr
        passed = evaluate("--coco-root", root, "--max-unreadable", 1, "--json")
        assert passed.returncode == 0, passed.stderr
        assert json.loads(passed.stdout)["manifest"]["reference_images"] == IMAGES - 1
        # Mended, and as large as before: it is looked at again.
        shutil.copy(evaluate.coco / "val2014" / "COCO_val2014_000000000005.jpg", root / "val2014")
        whole = evaluate("--coco-root", root, "--json")
        assert whole.returncode == 0 and json.loads(whole.stdout)["manifest"]["reference_images"] == IMAGES

    def test_a_corrupt_image_among_those_to_measure(self, evaluate, coco: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
        for i, file in enumerate(Coco.read(coco).files[:20]):
            shutil.copy(file, tmp_path / f"{i}.jpg")
        (tmp_path / "3.jpg").write_bytes(b"\xff\xd8 no image")
        stopped = evaluate("--images", tmp_path)
        assert stopped.returncode == 1 and "3.jpg is not an image" in stopped.stderr
        passed = evaluate("--images", tmp_path, "--max-unreadable", 1, "--json")
        assert passed.returncode == 0, passed.stderr
        assert json.loads(passed.stdout)["manifest"]["images"] == 19
        again = evaluate("--images", tmp_path, "--json")  # it is known by now, and named all the same
        assert again.returncode == 1 and "3.jpg could not be read" in again.stderr
        (tmp_path / "3.jpg").unlink()
        (tmp_path / "3.jpg").symlink_to("nowhere")
        assert "has no image 3" in evaluate("--images", tmp_path).stderr

    def test_whatever_the_images_are_called_and_hold(self, evaluate, coco: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
        """The same figures for the same images under every naming, hidden files or not; the rule is in the manifest."""
        real = Coco.read(coco).files[:20]
        for i, file in enumerate(real):
            shutil.copy(file, fill(tmp_path / "numbers") / f"{i}.jpg")
            shutil.copy(file, fill(tmp_path / "samples") / f"sample_{i}.jpg")
            shutil.copy(file, fill(tmp_path / "names") / file.name)
            shutil.copy(file, fill(tmp_path / "table") / f"{1 - i}th.jpg")
        for hidden in ("._sample_0.jpg", ".DS_Store", "Thumbs.db"):
            (tmp_path / "samples" / hidden).write_bytes(b"\0\5\x16\7")
        rows = [
            {"file_name": f"{1 - i}th.jpg", "Caption": text} for i, text in enumerate(Coco.read(coco).captions[:20])
        ]
        write_json(tmp_path / "table" / "captions.json", rows)
        told = {}
        for folder in ("numbers", "samples", "names", "table"):
            done = evaluate("--json", "--images", tmp_path / folder)
            assert done.returncode == 0, done.stderr
            told[folder] = json.loads(done.stdout)
        assert all(one["points"][0]["metrics"] == told["numbers"]["points"][0]["metrics"] for one in told.values())
        rules = {folder: one["manifest"]["image_order"] for folder, one in told.items()}
        assert rules == {
            "numbers": "the numbers in the file names, from 0",
            "samples": "the numbers in the file names, from 0",
            "names": "COCO's file names, in the annotation file's order",
            "table": "the file names in the table of captions",
        }

    def test_16_bit_images_are_what_they_show(self, evaluate, coco: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
        """The same gray images in 8 and 16 bits give the same figures; integers of no known white are bad images."""
        for i, file in enumerate(Coco.read(coco).files[:20]):
            with Image.open(file) as image:
                gray = np.array(image.convert("L"))
            Image.fromarray(gray).save(fill(tmp_path / "8") / f"{i}.png")
            Image.fromarray(gray.astype(np.uint16) * 257).save(fill(tmp_path / "16") / f"{i}.png")
        eight, sixteen = (evaluate("--json", "--images", tmp_path / bits) for bits in ("8", "16"))
        figures = [json.loads(done.stdout)["points"][0]["metrics"] for done in (eight, sixteen)]
        assert figures[0] == figures[1]
        Image.fromarray(gray.astype(np.int32)).save(tmp_path / "16" / "19.tif")
        (tmp_path / "16" / "19.png").unlink()
        stopped = evaluate("--images", tmp_path / "16")
        assert stopped.returncode == 1 and "19.tif is an image of 32-bit or signed integers" in stopped.stderr

    def test_captions_from_a_table(self, evaluate, coco: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
        """COCO's captions out of a CSV with line breaks in them give the figures that COCO's own give."""
        own, captions = json.loads(evaluate("--json").stdout), Coco.read(coco).captions[:20]
        table = tmp_path / "list.csv"
        table.write_text("id;caption\n" + "".join(f'{i};"{text}\n"\n' for i, text in enumerate(captions)))
        done = evaluate("--json", "--captions", table, "--column", "caption")
        assert (
            done.returncode == 0 and "20 captions from" in done.stderr and "1 other column ignored (id)" in done.stderr
        )
        told = json.loads(done.stdout)
        assert told["points"][0]["metrics"] == own["points"][0]["metrics"] and told["manifest"]["captions"] == str(
            table
        )
        assert evaluate("--captions", table, "--column", "id").returncode == 0  # numbers as captions, asked for by name
        for flags in (["--captions", table, "--column", "x"], ["--column", "caption"]):
            refused = evaluate(*flags)
            assert refused.returncode == 2 and "column" in refused.stderr

    def test_a_clip_folders_configuration_is_part_of_it(self, evaluate, clip_folder: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
        first = json.loads(evaluate("--json").stdout)
        other = shutil.copytree(clip_folder, tmp_path / clip_folder.name)
        config = json.loads((other / "open_clip_config.json").read_text())
        config["preprocess_cfg"]["mean"] = [0.1] * 3
        (other / "open_clip_config.json").write_text(json.dumps(config))
        second = json.loads(evaluate("--json", "--clip-weights", other).stdout)
        assert first["manifest"]["clip_sha256"] != second["manifest"]["clip_sha256"]
        assert first["points"][0]["metrics"]["clip_score"] != second["points"][0]["metrics"]["clip_score"]

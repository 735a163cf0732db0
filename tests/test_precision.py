"""Number formats: which one each command takes where, what it costs in x0, and what becomes of an overflow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import Tensor

from conftest import build_tiny_teacher
from fake_cuda import fake_cuda
from sbrush.console import SbrushError
from sbrush.device import Arithmetic, pick_arithmetic, pick_dtype
from sbrush.evaluate import candidates
from sbrush.evaluate.coco import subjects
from sbrush.evaluate.coco.protocols import PROTOCOLS
from sbrush.evaluate.request import CocoRequest, Models
from sbrush.models import load
from sbrush.models.load import load_shapes, load_student, load_teacher
from sbrush.sampling.files import SampleRequest, sample_to_files
from sbrush.sampling.generation import Overflow, student_images, student_latents
from sbrush.sampling.targets import Images, Target, read_record

TEXTS, SEEDS = ["a cat", "a dog", "a red fish", "two"] * 2, list(range(8))
SETTINGS = tuple[str, bool]


def settings() -> SETTINGS:
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(
    ("purpose", "device", "dtype", "tf32"),
    [
        ("eval", "cpu", torch.float32, False),
        ("eval", "cuda", torch.float32, True),
        ("eval", "cuda:1", torch.float32, True),
        ("sample", "cpu", torch.float32, False),
        ("sample", "cuda", torch.float16, False),
    ],
)
def test_auto_depends_on_purpose_and_device(purpose, device, dtype, tf32) -> None:  # type: ignore[no-untyped-def]
    assert pick_arithmetic("auto", device, purpose) == Arithmetic(dtype, tf32)
    for name in ("float32", "float16", "bfloat16"):  # what is named is taken as it is
        assert pick_arithmetic(name, device, purpose) == Arithmetic(getattr(torch, name), tf32=False)
    with pytest.raises(SbrushError, match="no such precision"):
        pick_dtype("float8", device, purpose)


def test_arithmetic_is_named_for_people() -> None:
    assert str(Arithmetic()) == "float32" and str(Arithmetic(tf32=True)) == "float32 with TF32 products"


@pytest.mark.parametrize(("prediction", "factor"), [("epsilon", 14.6), ("v_prediction", 1.0)])
def test_half_precisions_error_in_x0(tmp_path: Path, prediction: str, factor: float) -> None:
    """sample's default on CUDA, float16: within 0.3 % of float32's x0 on a tiny student, 4 times nearer than bfloat16.

    An epsilon student multiplies its UNet's error by sigma_T / alpha_T, a v student by sigma_T.
    """
    folder = str(build_tiny_teacher(tmp_path, prediction=prediction))
    x0, output = {}, {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        student, seen = load_student(folder, dtype=dtype), []
        student.unet.register_forward_hook(lambda *given, seen=seen: seen.append(given[-1].sample.float()))
        (x0[dtype],) = student_latents(student, TEXTS, SEEDS)
        (output[dtype],) = seen

    def rms(x: Tensor) -> float:
        return x.square().mean().sqrt().item()

    def error(dtype: torch.dtype) -> float:
        return rms(x0[dtype] - x0[torch.float32]) / rms(x0[torch.float32])

    assert error(torch.float16) < 0.003 and 4 * error(torch.float16) < error(torch.bfloat16)
    magnified = rms(x0[torch.float16] - x0[torch.float32]) / rms(output[torch.float16] - output[torch.float32])
    assert magnified == pytest.approx(factor, rel=0.01)


def test_items_are_made_under_the_settings_and_used_under_the_callers() -> None:
    def items() -> Iterator[SETTINGS]:
        yield settings()
        yield settings()

    before = settings()
    for tf32, device, within in (
        (True, "cuda", ("high", True)),
        (True, "cpu", before),
        (False, "cuda", (before[0], False)),
    ):
        used = []
        for made in Arithmetic(tf32=tf32).each(items(), device):
            used.append(settings())
            assert made == within
        assert used == [before, before] and settings() == before


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_the_unet_multiplies_in_tf32_on_cuda(tiny_teacher: Path) -> None:
    model, seen = load_shapes(str(tiny_teacher)), []
    model.unet.register_forward_hook(lambda *_: seen.append(settings()))
    with fake_cuda():
        for network in model.networks:
            network.to_empty(device="cuda")
        drawn = pick_arithmetic("auto", "cuda", "eval").each(student_latents(model, ["a cat", "a dog"], [1, 2]), "cuda")
        (latents,) = drawn
        assert latents.device.type == "cuda" and latents.dtype == torch.float32
    assert seen == [("high", True)]


def test_both_kinds_of_evaluation_generate_under_the_arithmetic(
    tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def images(model: object, texts: list[str], seeds: list[int], **_: object) -> Iterator[Tensor]:
        seen.append(settings())
        yield torch.zeros(len(texts), 3, 8, 8, dtype=torch.uint8)

    for module in (candidates, subjects):
        for name in ("student_images", "teacher_images"):
            monkeypatch.setattr(module, name, images)
    arithmetic = pick_arithmetic("auto", "cuda", "eval")
    there = SimpleNamespace(
        device=SimpleNamespace(type="cuda"), rungs=lambda steps: (999,), null_prompt="", negative=None
    )
    monkeypatch.setattr(candidates, "digest", lambda model: "digest")
    teacher = candidates.teacher_candidate(there, 2, 3.0, arithmetic=arithmetic)  # type: ignore[arg-type]
    assert teacher.cache_key == "digest float32 with TF32 products cuda"  # other than on the CPU
    student = candidates.student_candidate("student", there, arithmetic=arithmetic)  # type: ignore[arg-type]
    for candidate in (teacher, student):
        list(candidate.images(["a cat"], [1]))

    here = str(tiny_teacher)
    monkeypatch.setattr(subjects, "load_student", lambda name, device, **more: load_student(name, **more))
    monkeypatch.setattr(subjects, "load_teacher", lambda name, device, **more: load_teacher(name, **more))
    for models in (Models(student=here), Models(teacher=here)):
        generator = subjects.Generator(CocoRequest(models), PROTOCOLS["swiftbrush"], "cuda", arithmetic)
        (subject,) = generator.subjects([])
        assert subject.images is not None and subject.key["precision"] == "float32 with TF32 products"
        list(subject.images(["a cat"], [1]))
    assert seen == [("high", True)] * 4


@pytest.fixture
def overflowing(tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """A student whose UNet or decoder gives numbers that float16 has not; both draw in float32."""

    def load(part: str) -> None:
        def scaled(source: str | None, **options: object):  # type: ignore[no-untyped-def]
            model = load_student(str(tiny_teacher), dtype=torch.float32)
            network = model.unet.conv_out if part == "unet" else model.vae.decoder.conv_out
            with torch.no_grad():
                network.weight.mul_(1000 if part == "unet" else 30_000)
                network.bias.fill_(60_000.0)
            for one in model.networks:
                torch.nn.Module.to(one, options.get("dtype", torch.float32))  # type: ignore[arg-type]
            return model

        monkeypatch.setattr("sbrush.models.load.load_student", scaled)

    return load


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_sample_draws_in_float32_where_float16_overflows(overflowing, part, tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    overflowing(part)
    for dtype in (torch.float16, torch.float32):
        target = Target(tmp_path / f"{dtype}.png")
        list(sample_to_files(SampleRequest(Images(["a cat"], [3]), target, dtype=dtype, runtime="torch")))
        overflows = "overflows in float16; it draws in float32" in capsys.readouterr().err
        assert overflows == (dtype == torch.float16)
        assert (read_record(tmp_path / f"{dtype}.png") or {})["precision"] == "float32"
    with Image.open(tmp_path / "torch.float16.png") as one, Image.open(tmp_path / "torch.float32.png") as other:
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_elsewhere_an_overflow_is_an_error_and_no_black_image(overflowing, part) -> None:  # type: ignore[no-untyped-def]
    overflowing(part)
    student = load.load_student(None, dtype=torch.float16)
    with pytest.raises(Overflow, match="overflow") as problem:
        list(student_images(student, ["a cat"], [1]))
    assert "--precision float32" in problem.value.hint
    assert len(list(student_images(load.load_student(None, dtype=torch.float32), ["a cat"], [1]))) == 1

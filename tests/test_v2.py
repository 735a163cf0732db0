"""SwiftBrush v2 as one command: a full and a LoRA student are trained, then merged; resumed at any instant."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import sbrush
from sbrush.console import SbrushError
from sbrush.models import merge
from sbrush.models.load import load_student, load_teacher
from sbrush.stickers.judge import Judge
from sbrush.training import plan
from sbrush.training.alignment import Alignment
from sbrush.training.merged import MERGED
from sbrush.training.methods.vsd import VSD
from sbrush.training.request import AlignmentRequest
from sbrush.training.run import Run

STUDENT = ["--student-lr", 1e-3, "--set", "lora_rank=4", "--batch", 2, "--steps", 3, "--precision", "float32"]
RECORD = ["--grid-every", 0, "--log-every", 1, "--checkpoint-every", 1]


@pytest.fixture(scope="module")
def distil(tiny_teacher, clip_folder, prompt_file):
    """`sbrush distill` of a recipe into a folder, tiny and with a CLIP model."""

    def run(out: Path, *flags: object, recipe: str = "swiftbrush-v2"):
        return sbrush(
            "distill", prompt_file, "--teacher", tiny_teacher, "--clip-weights", clip_folder, "--recipe", recipe,
            "--out", out, *STUDENT, *RECORD, *flags,
        )  # fmt: skip

    return run


@pytest.fixture(scope="module")
def undisturbed(distil, tmp_path_factory):
    out = tmp_path_factory.mktemp("v2") / "run"
    done = distil(out, "--student-lora", 4)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out / 'student'}\n" and f'sbrush sample "a cat" --student {out}' in done.stderr
    return out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def test_the_student_is_the_mean_of_a_full_and_a_lora_student_trained_alike(undisturbed):
    full, lora, both = (weights(undisturbed / folder) for folder in ("full/student", "lora/student", "student"))
    assert any(not torch.equal(full[k], lora[k]) for k in full)
    assert all(torch.allclose(both[k], (full[k] + lora[k]) / 2, atol=1e-6) for k in full)
    one, two = (json.loads((undisturbed / part / "config.json").read_text())["recipe"] for part in ("full", "lora"))
    assert {k: (one[k], two[k]) for k in one if one[k] != two[k]} == {"student_rank": (0, 4)}
    assert one["clip_weight"] == 0.1 and (undisturbed / "lora" / "student-lora").is_dir()
    assert [p["share"] for p in json.loads((undisturbed / "student" / "sbrush.json").read_text())["merged"]] == [
        0.5
    ] * 2


@pytest.mark.parametrize(
    ("owner", "name", "which"),
    [
        pytest.param(Run, "export", 1, marks=pytest.mark.slow),  # the full student is trained, and not written
        pytest.param(plan, "prepare", 2, marks=pytest.mark.slow),  # between the two trainings
        (VSD, "step", 5),  # within the second
        (merge, "export_student", 1),  # while the students are merged
    ],
)
def test_killed_at_any_instant_the_same_command_makes_the_same_student(
    tmp_path, undisturbed, distil, monkeypatch, owner, name, which
):
    real, calls = getattr(owner, name), []

    def dying(*args, **kwargs):
        calls.append(name)
        if len(calls) == which:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dying)
        assert distil(tmp_path / "run", "--student-lora", 4).returncode == 130 and len(calls) == which
    assert not (tmp_path / "run" / "student").exists()
    done = distil(tmp_path / "run", "--student-lora", 4)
    assert done.returncode == 0, done.stderr
    expected, found = (weights(out / "student") for out in (undisturbed, tmp_path / "run"))
    assert all(torch.equal(found[k], expected[k]) for k in expected)


def test_what_is_complete_is_left_alone_and_a_part_that_went_on_is_merged_again(tmp_path, undisturbed, distil):
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    before = {path: path.stat().st_mtime_ns for path in (out / "student").rglob("*")}
    done = distil(out, "--student-lora", 4)
    assert done.returncode == 0 and done.stderr.count("this run is complete") == 3
    assert {path: path.stat().st_mtime_ns for path in (out / "student").rglob("*")} == before
    # A part is an ordinary run, which its own command extends.
    assert distil(out / "full", "--clip-loss", 0.1, "--extend", 1, recipe="swiftbrush").returncode == 0
    old = weights(out / "student")
    assert distil(out, "--student-lora", 4).returncode == 0
    full, lora, both = (weights(out / folder) for folder in ("full/student", "lora/student", "student"))
    assert any(not torch.equal(both[k], old[k]) for k in old)
    assert all(torch.allclose(both[k], (full[k] + lora[k]) / 2, atol=1e-6) for k in full)


def test_another_configuration_is_refused_by_what_differs(undisturbed, tmp_path, distil):
    cases = [
        ((undisturbed, "--student-lora", 4, "--set", "clip_tau=0.3"), {}, "recipe.clip_tau was 0.35, now 0.3"),
        ((undisturbed, "--student-lora", 8), {}, "lora holds a run with another configuration: recipe.student_rank"),
        ((undisturbed, "--clip-loss", 0.1), {"recipe": "swiftbrush"}, "recipe swiftbrush-v2, not of swiftbrush"),
        ((undisturbed / "full",), {}, "recipe swiftbrush, not of swiftbrush-v2"),
        ((tmp_path / "new", "--extend", 2), {}, "cannot be extended"),
        ((tmp_path / "new", "--init", undisturbed), {}, "a LoRA student starts as its teacher"),
        ((tmp_path / "new", "--set", "student_rank=0"), {}, "whose rank cannot be 0"),
        ((tmp_path / "new", "--set", "t_init=5000"), {}, "t_init 5000 is beyond"),
    ]
    before = {path: path.stat().st_mtime_ns for path in (undisturbed / "student").rglob("*")}
    for arguments, options, said in cases:
        done = distil(*arguments, **options)
        lines = [line for line in done.stderr.splitlines() if line.startswith(("error:", "hint:"))]
        assert done.returncode == 2 and len(lines) == 2 and said in lines[0], (arguments, done.stderr)
    assert not (tmp_path / "new").exists()
    assert {path: path.stat().st_mtime_ns for path in (undisturbed / "student").rglob("*")} == before


def test_without_a_clip_model_nothing_is_trained(tmp_path, tiny_teacher, prompt_file):
    done = sbrush(
        "distill", prompt_file, "--teacher", tiny_teacher, "--recipe", "swiftbrush-v2", "--out", tmp_path / "x"
    )
    assert done.returncode == 2 and "the CLIP loss needs a CLIP model" in done.stderr
    assert not (tmp_path / "x" / "full").exists()


def test_a_dry_run_tells_both_trainings_and_what_they_come_to(tiny_teacher, prompt_file, tmp_path):
    done = sbrush(
        "distill", prompt_file, "--teacher", tiny_teacher, "--recipe", "swiftbrush-v2", "--dry-run", "--device", "cuda",
        "--student-lora", 4, "--out", tmp_path / "x",
    )  # fmt: skip
    assert done.returncode == 0 and not (tmp_path / "x").exists(), done.stderr
    full, lora = (done.stdout.index(f"training {n} of 2, {name}: swiftbrush") for n, name in ((1, "full"), (2, "lora")))
    assert "9 UNet forwards" in done.stdout[full:lora] and "8 UNet forwards" in done.stdout[lora:]
    amounts = [float(line.split(" PFLOP")[0].split()[-1]) for line in done.stdout.splitlines() if " PFLOP" in line]
    assert amounts[2] == pytest.approx(amounts[0] + amounts[1], rel=0.01)
    peaks = [float(line.split()[-2]) for line in done.stdout.splitlines() if "expected peak" in line]
    assert peaks[2] == max(peaks[:2]) > 0 and "two students while they are merged" in done.stdout


def test_the_built_in_worlds_clip_model_is_its_judge():
    teacher = load_teacher()
    alignment = Alignment.load(teacher, AlignmentRequest(), device="cpu")
    judge, texts = Judge.load(), ["a red cat", "a small blue car on a mint background"]
    assert judge.digest[:16] in alignment.name
    x0 = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    cosines = alignment.cosines(x0, texts)
    with torch.no_grad():
        images = teacher.decode(x0.detach())
    assert torch.allclose(cosines, judge.score(images, texts), atol=5e-3)  # whose images are rounded
    cosines.sum().backward()
    assert x0.grad is not None and x0.grad.abs().max() > 0
    named = AlignmentRequest(clip_weights=Path("nowhere"))
    with pytest.raises(SbrushError, match="no CLIP model nowhere"):
        Alignment.load(teacher, named, device="cpu")


def test_the_built_in_recipe_runs(tmp_path, prompt_file):
    flags = ["--recipe", "stickers-v2", "--batch", 2, "--steps", 1, "--student-lora", 2, *RECORD]
    done = sbrush("distill", prompt_file, "--out", tmp_path / "run", *flags)
    assert done.returncode == 0 and "takes the built-in judge" in done.stderr, done.stderr
    assert "judge" in json.loads((tmp_path / "run" / "full" / "config.json").read_text())["clip"]
    assert load_student(str(tmp_path / "run")).about["merged"]
    assert [part.student_rank for part in MERGED["stickers-v2"].parts.values()] == [0, 64]

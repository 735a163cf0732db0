"""What is exported: published names, readable files, checked before training begins."""

import json
import os
import shutil
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conftest import build_tiny_teacher, build_tiny_xl, sbrush
from ldm import whole_file
from sbrush.console import SbrushError
from sbrush.models.export import check_exportable, export_lora, export_student
from sbrush.models.ladder import Sampling
from sbrush.models.load import load_teacher
from sbrush.models.merge import merge
from sbrush.models.unet import STUDENT_TARGETS, add_lora
from sbrush.storage import checkpoint
from sbrush.storage.files import write_json
from sbrush.training import plan

ABOUT = {"version": "0", "teacher": "tiny", "reparameterised": True, "recipe": {"name": "x"}, "seed": 0,
         "prompts": {"count": 3, "sha256": "0"}}  # fmt: skip

LORA = "pytorch_lora_weights.safetensors"


def export(source, folder, **options):
    teacher = load_teacher(str(source))
    export_student(
        folder, teacher, teacher.unet, about=ABOUT, scheduler=Sampling().scheduler(teacher.scheduler), **options
    )
    return folder


def names(file):
    with safe_open(file, "pt") as opened:
        return set(opened.keys())


def rename(folder, *, flat, shards=1):
    """A folder's text encoders with the prefix of all their tensors, or without, in so many files."""
    for part in ("text_encoder", "text_encoder_2"):
        if not (whole := folder / part / "model.safetensors").exists():
            continue
        tensors = {name.removeprefix("text_model."): value for name, value in load_file(whole).items()}
        if not flat:
            tensors = {n if n.startswith("text_proj") else f"text_model.{n}": v for n, v in tensors.items()}
        whole.unlink()
        if shards == 1:
            save_file(tensors, whole, metadata={"format": "pt"})
            continue
        places = {
            name: f"model-0000{1 + i % shards}-of-0000{shards}.safetensors" for i, name in enumerate(sorted(tensors))
        }
        for place in set(places.values()):
            some = {name: value for name, value in tensors.items() if places[name] == place}
            save_file(some, folder / part / place, metadata={"format": "pt"})
        write_json(folder / part / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})
    return folder


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("build", [build_tiny_teacher, build_tiny_xl])
def test_text_encoders_have_their_published_names_whoever_saved_the_teacher(tmp_path, build, shards):
    from diffusers import DiffusionPipeline

    build(tmp_path / "flat")
    shutil.copytree(tmp_path / "flat", tmp_path / "published")
    made = {}
    for kind in ("flat", "published"):
        folder = rename(tmp_path / kind, flat=kind == "flat", shards=shards)
        student = export(folder, tmp_path / f"{kind} student")
        files = sorted(file.relative_to(student) for file in student.glob("text_encoder*/*"))
        made[kind] = {str(file): (student / file).read_bytes() for file in files}
        for file in files:
            if file.suffix == ".safetensors":
                prefixes = {name.split(".")[0] for name in names(student / file)}
                assert prefixes <= {"text_model", "text_projection"}
            if file.name.endswith("index.json"):
                places = json.loads((student / file).read_text())["weight_map"]
                assert all(name in names((student / file).with_name(place)) for name, place in places.items())
    assert made["flat"] == made["published"]  # to the byte
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "flat student")
    teacher = load_teacher(str(tmp_path / "published"))
    for part in [part for part in teacher.parts if part.startswith("text_encoder")]:
        ours, theirs = getattr(teacher, part).state_dict(), getattr(pipe, part).state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_unets_weights_are_exported_as_they_are_and_in_one_file(tmp_path, tiny_teacher):
    folder = export(tiny_teacher, tmp_path / "student")
    (file,) = (folder / "unet").glob("*.safetensors")
    one, two = (load_file(path / "unet" / file.name) for path in (tiny_teacher, folder))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("kind", ["tiny_teacher", "tiny_xl"])
def test_a_lora_student_changes_no_layer_that_sd_scripts_passes_over(tmp_path, request, kind):
    teacher = load_teacher(str(request.getfixturevalue(kind)))
    add_lora(teacher.unet, "student", rank=2, alpha=4, targets=STUDENT_TARGETS, seed=0)
    export_lora(
        tmp_path / "lora",
        teacher,
        teacher.unet,
        "student",
        about=ABOUT,
        scheduler=Sampling().scheduler(teacher.scheduler),
    )
    modules = dict(teacher.unet.named_modules())
    applied = {"Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"}
    layers = {name.rsplit(".", 2)[0].removeprefix("unet.") for name in names(tmp_path / "lora" / LORA)}
    for layer in layers:
        above = [type(modules[layer[:i]]).__name__ for i, c in enumerate(layer) if c == "."]
        assert applied & set(above), layer
    plain = [
        name
        for name, module in load_teacher(str(request.getfixturevalue(kind))).unet.named_modules()
        if type(module) in (torch.nn.Linear, torch.nn.Conv2d)
    ]
    outside = {name for name in plain if not name.startswith(("down_blocks", "mid_block", "up_blocks"))}
    assert layers == set(plain) - outside and {"conv_in", "conv_out", "time_embedding.linear_1"} <= outside


def pointer(file):
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def cut(file):
    file.write_bytes(file.read_bytes()[:50])


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        ("vae/diffusion_pytorch_model.safetensors", pointer, "Git LFS pointer"),
        ("text_encoder/model.safetensors", pointer, "Git LFS pointer"),
        ("tokenizer/merges.txt", pointer, "Git LFS pointer"),
        ("vae/diffusion_pytorch_model.safetensors", cut, "cannot read"),
        ("vae/config.json", cut, "cannot read"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_training(tmp_path, tiny_teacher, file, damage, said):
    folder = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    teacher = load_teacher(str(folder))
    check_exportable(teacher)
    damage(folder / file)
    with pytest.raises(SbrushError, match=said) as refused:
        check_exportable(teacher)
    assert (folder / file).name in str(refused.value)


def test_a_file_that_may_not_be_read_is_named_with_the_reason(tmp_path, tiny_teacher, monkeypatch):
    from pathlib import Path

    teacher, true_open = load_teacher(str(tiny_teacher)), Path.open

    def refuse(self, *options, **others):
        if self.name == "vocab.json":
            raise PermissionError(13, "Permission denied", str(self))
        return true_open(self, *options, **others)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(SbrushError, match=r"cannot read .*vocab\.json.*Permission denied"):
        check_exportable(teacher)


def test_distill_says_so_before_its_first_step(tmp_path, tiny_teacher, prompt_file, monkeypatch):
    folder = shutil.copytree(tiny_teacher, tmp_path / "teacher")

    def load_and_damage(*options, **others):
        teacher = load_teacher(*options, **others)
        pointer(folder / "tokenizer" / "merges.txt")
        return teacher

    monkeypatch.setattr(plan, "load_teacher", load_and_damage)
    done = sbrush("distill", prompt_file, "--teacher", folder, "--steps", 1, "--batch", 1, "--out", tmp_path / "run")
    assert done.returncode == 2 and "merges.txt is a Git LFS pointer" in done.stderr and "git lfs pull" in done.stderr
    assert not (tmp_path / "run").exists()


def modes(folder):
    return {
        str(file.relative_to(folder)): stat.S_IMODE(file.stat().st_mode)
        for file in folder.rglob("*")
        if file.is_file() and file.name != ".lock"
    }


@pytest.fixture(params=[0o022, 0o077], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_everything_that_is_written_follows_the_umask(tmp_path, tiny_teacher, prompt_file, umask, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = whole_file(tiny_teacher, tmp_path / "teacher.safetensors")
    command = ["distill", prompt_file, "--teacher", file, "--teacher-config", tiny_teacher, "--batch", 1, "--steps", 1]
    done = sbrush(
        *command, "--checkpoint-every", 1, "--grid-every", 1, "--student-lora", 2, "--out", tmp_path / "run",
        "--text-cache", tmp_path / "texts", "--device", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    merge(str(tmp_path / "run"), str(tmp_path / "run"), tmp_path / "merged")
    assert sbrush("sample", "a cat", "--student", tmp_path / "merged", "-o", tmp_path / "images").returncode == 0
    for folder in ("run", "merged", "texts", "images", "cache"):
        found = modes(tmp_path / folder)
        found = {name: mode for name, mode in found.items() if not name.endswith(".lock")}
        assert found and set(found.values()) == {0o666 & ~umask}, found
    assert {"run/student/unet", "run/student-lora", "run/checkpoints/step-000001"} <= {
        str(file.parent.relative_to(tmp_path)) for file in tmp_path.rglob("*.safetensors")
    }
    assert os.umask(umask) == umask  # which is as it was


def test_a_file_system_without_permissions_is_no_obstacle(tmp_path, monkeypatch):
    from pathlib import Path

    def refuse(self, mode):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refuse)
    checkpoint.save(tmp_path, 1, {"student": {"w": torch.zeros(2)}})
    assert checkpoint.newest(tmp_path).step == 1


def test_an_export_that_fails_leaves_the_older_one_and_nothing_else(tmp_path, tiny_teacher, monkeypatch):
    folder = export(tiny_teacher, tmp_path / "student")
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space"):
        export(tiny_teacher, tmp_path / "student")
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    assert before == {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}

"""The files of a model folder: those that are read belong to it, others change nothing, and what is wrong is named."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from transformers import CLIPTextModel

from conftest import build_tiny_teacher, sbrush
from sbrush.console import SbrushError
from sbrush.models.hub import fetch
from sbrush.models.load import digest, load_shapes, load_student, load_teacher
from sbrush.models.parts import TOKENIZER, part_files
from sbrush.sampling.generation import student_images
from test_models import exported

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3438167540\n"
UNET = "diffusion_pytorch_model"


def files(folder):
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())


def litter(folder):
    """What gets into folders, read by nobody."""
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        here = folder / part
        for name in (*(f.name for f in here.iterdir()), "other"):
            (here / f"._{name}").write_bytes(b"\x00\x05\x16\x07\xff" * 20)
        (here / ".DS_Store").write_bytes(b"\x00\x00\x00\x01Bud1")
        (here / "notes.txt").write_text("mine")
        (here / "README.md").write_text("mine")
        (here / "old_config.json").write_text("{")
    unet, text = folder / "unet" / f"{UNET}.safetensors", folder / "text_encoder" / "model.safetensors"
    (unet.with_name(f"{UNET}.fp16.safetensors")).write_bytes(unet.read_bytes())
    (text.with_name("model.fp16.safetensors")).write_text(POINTER)
    (text.with_name("model.fp16-00001-of-00002.safetensors")).write_bytes(b"")
    (folder / "unet" / f"{UNET}.non_ema.bin").write_bytes(b"")
    (folder / "._model_index.json").write_bytes(b"\x00\xff")


def test_what_is_not_read_belongs_to_no_model_and_is_not_exported(tmp_path, tiny_teacher):
    folder = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    clean = digest(load_teacher(str(folder)))
    litter(folder)
    teacher = load_teacher(str(folder))
    assert digest(teacher) == clean and load_shapes(str(folder))
    exported(teacher, tmp_path / "student")
    assert files(tmp_path / "student") == sorted([*files(tiny_teacher), "README.md", "sbrush.json"])
    ours, theirs = (next(student_images(load_student(str(f)), ["a cat"], [1])) for f in (folder, tiny_teacher))
    assert torch.equal(ours, theirs)


def test_a_run_goes_on_whatever_is_put_beside_its_teachers_weights_or_taken_away(tmp_path, tiny_teacher, prompt_file):
    folder = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    command = (
        "distill", prompt_file, "--teacher", folder, "--out", tmp_path / "run", "--batch", 2, "--grid-every", 0,
        "--device", "cpu", "--steps", 2,
    )  # fmt: skip
    litter(folder)
    first = sbrush(*command)
    assert first.returncode == 0, first.stderr
    for stray in (f for f in folder.rglob("*") if f.is_file() and f.name.startswith(".")):
        stray.unlink()
    (folder / "unet" / f"{UNET}.fp16.safetensors").unlink()
    again = sbrush(*command, "--extend", 1)
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "run" / "student" / "sbrush.json").read_text())["recipe"]["steps"] == 3


def sharded(folder, part="unet"):
    """A part's weights in several files with an index, as large ones are saved."""
    kind = UNet2DConditionModel if part == "unet" else CLIPTextModel
    network = kind.from_pretrained(folder / part)
    for file in (folder / part).glob("*.safetensors"):
        file.unlink()
    network.save_pretrained(folder / part, max_shard_size="20KB")
    return sorted((folder / part).glob("*-of-*.safetensors"))


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_weights_in_several_files_are_read_hashed_and_exported(tmp_path, tiny_teacher, part):
    folder = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    pieces = sharded(folder, part)
    assert len(pieces) > 1 and set(pieces) < set(part_files(folder, part))
    teacher = load_teacher(str(folder))
    before = digest(teacher)
    exported(teacher, tmp_path / "student")
    ours, theirs = (
        next(student_images(load_student(str(f)), ["a cat"], [1])) for f in (tmp_path / "student", tiny_teacher)
    )
    assert torch.equal(ours, theirs)
    pieces[0].write_bytes(pieces[0].read_bytes()[:-4] + b"\x00\x00\x00\x01")
    assert digest(load_teacher(str(folder))) != before
    pieces[-1].unlink()
    with pytest.raises(SbrushError, match=rf"lacks 1 of its {len(pieces)} files of weights: {pieces[-1].name}"):
        load_teacher(str(folder))


@pytest.mark.parametrize(("part", "read"), [("unet", "several"), ("text_encoder", "one")])
def test_of_weights_that_are_there_twice_the_librarys_choice_is_hashed_and_named(
    tmp_path, tiny_teacher, part, read, capsys
):
    other = build_tiny_teacher(tmp_path / "other", seed=1)
    folder = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    (one,) = (folder / part).glob("*.safetensors")
    whole, before = one.read_bytes(), digest(load_teacher(str(folder)))
    shutil.copy(other / part / one.name, one)
    sharded(folder, part)  # another model's, in several files
    one.write_bytes(whole)
    model = load_teacher(str(folder))
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "twice" in line]
    alone = load_teacher(str(tiny_teacher if read == "one" else other))
    assert one.name in said and (said.endswith(f"{one.name} is read") == (read == "one"))
    names = {name: p for name, p in getattr(model, part).named_parameters()}
    assert all(torch.equal(names[name], p) for name, p in getattr(alone, part).named_parameters())
    assert (digest(model) == before) == (read == "one")


def renamed(folder, new, part="unet"):
    (weights,) = (folder / part).glob("*.safetensors")
    weights.rename(weights.with_name(new))


def old_variant(folder):
    renamed(folder, f"{UNET}.fp16-00001-of-00002.safetensors")


def new_variant(folder):
    renamed(folder, f"{UNET}-00001-of-00002.bf16.safetensors")


def lone_piece(folder):
    renamed(folder, f"{UNET}-00001-of-00002.safetensors")


def own_name(folder):
    renamed(folder, "my_finetune.safetensors")


def other_librarys_name(folder):
    renamed(folder, "pytorch_model.safetensors", "text_encoder")


def hidden(folder):
    renamed(folder, f"._{UNET}.safetensors")


def none(folder):
    (folder / "vae" / f"{UNET}.safetensors").unlink()


def no_configuration(folder):
    (folder / "vae" / "config.json").unlink()


def adapter(folder):
    (folder / "text_encoder" / "adapter_config.json").write_text('{"base_model_name_or_path": "some/where"}')


def index_outside(folder):
    (folder / "unet" / f"{UNET}.safetensors.index.json").write_text('{"weight_map": {"a": "../../x.safetensors"}}')


def web_page(folder):
    (folder / "unet" / f"{UNET}.safetensors").write_text("<!DOCTYPE html><html>Entry not found</html>")


FAULTS = {
    old_variant: ("variant of the weights alone", 'variant="fp16"'), new_variant: ("variant", 'variant="bf16"'),
    lone_piece: (f"has no {UNET}.safetensors, but", "index.json"), own_name: ("but my_finetune", "rename it to"),
    other_librarys_name: ("has no model.safetensors", "rename it to model"), hidden: ("no weights", "hidden file"),
    none: ("vae holds no weights", f"needs {UNET}"), no_configuration: ("vae has no config.json", "again"),
    adapter: ("PEFT adapter", "merge it"), index_outside: ("no index of weights", "again"),
    web_page: ("is a web page", "itself"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_neither_damaged_nor_half_copied_is_named(tmp_path, tiny_teacher, fault):
    folder = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    fault(folder)
    said, hint = FAULTS[fault]
    with pytest.raises(SbrushError) as refused:
        load_teacher(str(folder))
    assert said in str(refused.value) and hint in refused.value.hint, (str(refused.value), refused.value.hint)
    assert "half copied" not in refused.value.hint and "\n" not in refused.value.hint


@pytest.mark.parametrize(
    "file",
    [
        f"unet/{UNET}.safetensors", f"vae/{UNET}.safetensors", "text_encoder/model.safetensors", "unet/config.json",
        "tokenizer/tokenizer.json", "scheduler/scheduler_config.json",
    ],
)  # fmt: skip
def test_a_git_lfs_pointer_in_place_of_a_file_that_is_read_is_named(tmp_path, tiny_teacher, file):
    folder = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    (folder / file).write_text(POINTER)
    for load in (load_teacher, load_student):
        with pytest.raises(SbrushError, match=rf"{file} is a Git LFS pointer, not the file itself") as refused:
            load(str(folder))
        assert "git lfs pull" in refused.value.hint


def test_so_is_one_in_place_of_a_single_file_or_a_tiny_autoencoder(tmp_path, tiny_teacher, clip_folder):
    from sbrush.training.alignment import Alignment
    from sbrush.training.request import AlignmentRequest

    (tmp_path / "model.safetensors").write_text(POINTER)
    with pytest.raises(SbrushError, match="Git LFS pointer"):
        load_teacher(str(tmp_path / "model.safetensors"))
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).save_pretrained(tmp_path / "vae")  # fmt: skip
    (tmp_path / "vae" / f"{UNET}.safetensors").write_text(POINTER)
    with pytest.raises(SbrushError, match="Git LFS pointer"):
        Alignment.load(
            load_teacher(str(tiny_teacher)), AlignmentRequest(clip_folder, tiny_vae=tmp_path / "vae"), device="cpu"
        )


def test_of_the_hub_only_files_that_are_read_are_asked_for(monkeypatch, tmp_path):
    import fnmatch

    import huggingface_hub

    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda source, **given: asked.update(given) or tmp_path)
    fetch("some/one", ["tokenizer", "text_encoder", "unet", "scheduler"])
    wanted = asked["allow_patterns"]

    def fetched(name):
        return any(fnmatch.fnmatch(name, pattern) for pattern in wanted) and not any(
            fnmatch.fnmatch(name, pattern) for pattern in asked["ignore_patterns"]
        )

    for name in (f"unet/{UNET}.safetensors", f"unet/{UNET}-00001-of-00002.safetensors", "unet/config.json",
                 f"unet/{UNET}.safetensors.index.json", "text_encoder/model.safetensors", "model_index.json",
                 "scheduler/scheduler_config.json", *(f"tokenizer/{name}" for name in TOKENIZER)):  # fmt: skip
        assert fetched(name), name
    for name in (f"unet/{UNET}.fp16.safetensors", f"unet/{UNET}-00001-of-00002.fp16.safetensors", f"unet/{UNET}.bin",
                 f"unet/{UNET}.bf16.safetensors", "text_encoder/openvino_model.xml", "sd_xl_base_1.0.safetensors",
                 "unet/notes.txt", "unet/model.onnx"):  # fmt: skip
        assert not fetched(name), name


def test_the_built_in_models_digests_are_those_that_their_shipped_figures_are_kept_under():
    assert digest(load_teacher()) == "457d1b26555a20c0363b73b46ebd2f5a4565943dd406c7d5b8b7d744544888bf"
    assert digest(load_student()) == "756ad9fc4b024c39e7bd99b4d046b2e23814e88f7a3d08069aaa8f082304ba72"

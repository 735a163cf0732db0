"""Students whose networks are ONNX graphs: the same images as torch's, and nothing of diffusers on the way there."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from conftest import sbrush
from sbrush.console import SbrushError
from sbrush.models.load import BUILT_IN, load_student, load_teacher
from sbrush.models.tokenizers import tokenize
from sbrush.onnx.export import check_onnx, export_onnx, facts_of, write_graphs
from sbrush.onnx.graphs import GRAPHS, open_graph, read_weights
from sbrush.onnx.model import Facts, OnnxModel, find
from sbrush.sampling.files import SampleRequest, sample_to_files
from sbrush.sampling.generation import student_images
from sbrush.sampling.opening import open_student
from sbrush.sampling.targets import Images, Target

PROMPTS = ["a cat", "a small red dog on a mint background", "A CAT, naïve!", "", "a " * 40]


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


@pytest.fixture(scope="module")
def built_in():
    return find(None)


@pytest.fixture(scope="module")
def tiny_onnx(tmp_path_factory, tiny_teacher):
    """A student of two steps, and the folder that it was exported to."""
    teacher = load_teacher(str(tiny_teacher))
    from sbrush.models.ladder import Sampling

    student = teacher.as_student(Sampling(2).scheduler(teacher.scheduler), {"steps": 2, "recipe": {}})
    folder = tmp_path_factory.mktemp("onnx") / "student"
    export_onnx(student, folder)
    return student, folder


def test_the_built_in_student_draws_the_same_with_both_runtimes(built_in):
    """Rounding apart: a value of 255 for one in some thousands."""
    student = load_student()
    texts, seeds = PROMPTS[:3] * 2, range(6)
    ours, torchs = (torch.cat(list(student_images(one, texts, seeds))).int() for one in (built_in, student))
    assert (ours - torchs).abs().max() <= 2 and (ours != torchs).float().mean() < 0.01
    assert built_in.rungs() == student.rungs() and built_in.image_size == student.image_size
    assert torch.equal(built_in.schedule.alpha, student.schedule.alpha)


def test_prompts_are_read_as_transformers_reads_them(built_in):
    student = load_student()
    assert torch.equal(built_in.token_ids(PROMPTS), tokenize(student.tokenizer, PROMPTS).input_ids)
    assert built_in.truncated_prompts(PROMPTS) == student.truncated_prompts(PROMPTS) == 1
    assert built_in.longest_prompt == student.longest_prompt


def test_drawing_needs_neither_diffusers_nor_transformers(tmp_path):
    code = (
        "import sys; from sbrush.cli.app import main; sys.argv = ['sbrush', 'sample', 'a cat', '-o', sys.argv[1]]\n"
        "for more in ([], ['--vae', 'tiny']):\n"
        "    sys.argv += more\n"
        "    try: main()\n    except SystemExit: pass\n"
        "print(sorted({'diffusers', 'transformers', 'accelerate', 'peft', 'torch._dynamo'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "cat.png"], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]" and (tmp_path / "cat.png").is_file()
    assert json.loads(Image.open(tmp_path / "cat.png").text["sbrush"])["vae"]["name"] == "tiny"


def test_the_graphs_are_those_of_the_networks_of_today(tmp_path):
    """A student with other weights draws with the shipped graphs; one of another architecture does not."""
    folder = shutil.copytree(BUILT_IN / "teacher", tmp_path / "student")
    for part in ("unet", "scheduler"):
        shutil.copytree(BUILT_IN / "student" / part, folder / part, dirs_exist_ok=True)
    shutil.copyfile(BUILT_IN / "student" / "sbrush.json", folder / "sbrush.json")
    own = find(str(folder))
    assert isinstance(own, OnnxModel) and own.fingerprint == find(None).fingerprint
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"norm_num_groups": 8}))
    assert find(str(folder)) is None
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(SbrushError, match=r"cannot read .*diffusion_pytorch_model"):
        find(str(folder))


def test_weights_tell_students_apart(tmp_path):
    folder = shutil.copytree(BUILT_IN / "teacher", tmp_path / "student")
    shutil.copyfile(BUILT_IN / "student" / "sbrush.json", folder / "sbrush.json")
    shutil.copytree(BUILT_IN / "student" / "scheduler", folder / "scheduler", dirs_exist_ok=True)
    assert find(str(folder)).fingerprint != find(None).fingerprint  # the teacher's UNet in the student's place


def test_who_draws_is_part_of_the_record_and_torch_can_be_asked_for(tmp_path):
    drawn = {}
    for runtime in ("onnx", "torch", "auto"):
        path = tmp_path / f"{runtime}.png"
        assert sbrush("sample", "a cat", "--runtime", runtime, "-o", path).returncode == 0
        drawn[runtime] = json.loads(Image.open(path).text["sbrush"])
    assert drawn["onnx"]["runtime"] == drawn["auto"]["runtime"] == "onnx" and "runtime" not in drawn["torch"]
    assert np.array_equal(pixels(tmp_path / "onnx.png"), pixels(tmp_path / "auto.png"))
    refused = sbrush("sample", "a cat", "--runtime", "onnx", "--compare", "-o", tmp_path / "x.png")
    assert refused.returncode == 2 and "--compare needs torch" in refused.stderr


def test_onnx_is_refused_where_it_has_no_graphs(tiny_teacher):
    with pytest.raises(SbrushError, match="it has no ONNX graphs") as refused:
        open_student(str(tiny_teacher), runtime="onnx")
    assert refused.value.code == 2
    with pytest.raises(SbrushError, match="on the CPU in float32"):
        open_student(None, dtype=torch.float16, runtime="onnx")
    with pytest.raises(SbrushError, match="no such runtime"):
        open_student(None, runtime="jax")
    assert not isinstance(open_student(None, start_timestep=300), OnnxModel)


@pytest.mark.parametrize("steps", [1, 2])
def test_an_exported_student_draws_within_a_hundredth_of_torchs_image(tiny_onnx, steps):
    student, folder = tiny_onnx
    exported = open_student(str(folder))
    assert isinstance(exported, OnnxModel) and exported.rungs(steps) == student.rungs(steps)
    ours, torchs = (
        torch.cat(list(student_images(one, ["a cat", "a dog", "a cat"], [1, 2, 3], steps=steps))).float() / 255
        for one in (exported, student)
    )
    assert (ours - torchs).abs().max() <= 1e-2
    with pytest.raises(SbrushError, match="takes 1 or 2 steps, not 3"):
        exported.rungs(3)


def test_an_exported_folder_has_the_parts_that_onnx_pipelines_load(tiny_onnx, tmp_path):
    student, folder = tiny_onnx
    session = open_graph(folder / "unet" / "model.onnx")
    assert [i.name for i in session.get_inputs()] == ["sample", "timestep", "encoder_hidden_states"]
    index = json.loads((folder / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "OnnxRuntimeModel"] and index["scheduler"][1] == "LCMScheduler"
    for part in ("text_encoder", "unet", "vae_decoder"):
        assert (folder / part / "config.json").is_file() and (folder / part / "model.onnx").is_file()
    assert (folder / "tokenizer" / "vocab.json").is_file() or (folder / "tokenizer" / "tokenizer.json").is_file()
    assert Facts.read(json.loads((folder / "sbrush.json").read_text())["onnx"]) == facts_of(student)
    with pytest.raises(SbrushError, match="was exported to ONNX") as refused:
        load_student(str(folder))
    assert refused.value.code == 2
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    (damaged / "unet" / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(SbrushError, match="cannot read"):
        open_student(str(damaged))
    (damaged / "sbrush.json").write_text("{}")
    with pytest.raises(SbrushError, match=r"no sbrush\.json that says how"):
        open_student(str(damaged))


def test_an_exported_student_of_the_built_in_world_takes_the_tiny_vae_and_another_does_not(tiny_onnx, tmp_path):
    folder = shutil.copytree(tiny_onnx[1], tmp_path / "student")
    with pytest.raises(SbrushError, match="exported to ONNX with its own VAE") as refused:
        open_student(str(folder), vae="tiny")
    assert refused.value.code == 2
    about = json.loads((folder / "sbrush.json").read_text())
    (folder / "sbrush.json").write_text(json.dumps(about | {"world": "stickers"}))
    exported, built_in = open_student(str(folder), vae="tiny"), find(None, "tiny")
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    assert exported.decoder == built_in.decoder and torch.equal(exported.decode(latents), built_in.decode(latents))
    assert exported.fingerprint != open_student(str(folder)).fingerprint


@pytest.mark.slow  # traced once more; what is shipped was made so
def test_graphs_without_weights_hold_none(tmp_path, tiny_teacher):
    """As they are shipped: a few hundred KB of architecture."""
    teacher = load_teacher(str(tiny_teacher))
    write_graphs(teacher, tmp_path)
    index = json.loads((tmp_path / "graphs.json").read_text())
    assert set(index["unet"]["weights"]) == set(teacher.unet.state_dict())
    assert sum(file.stat().st_size for file in GRAPHS.iterdir()) < 400_000
    with pytest.raises(SbrushError, match="cannot read"):
        open_graph(tmp_path / "unet.onnx")


def test_sampling_goes_on_with_the_runtime_that_began(tmp_path):
    images, target = Images(["a cat"], [0, 1]), Target(tmp_path / "images", folder=True)
    assert all(saved.new for saved in sample_to_files(SampleRequest(images, target)))
    assert not any(saved.new for saved in sample_to_files(SampleRequest(images, target)))
    with pytest.raises(SbrushError):
        list(sample_to_files(SampleRequest(images, target, runtime="torch")))


def test_a_text_encoder_that_masks_is_refused(tiny_teacher):
    """Its graph takes no mask: another image would be drawn, without an error."""
    student = load_teacher(str(tiny_teacher))
    check_onnx(student)
    student.text_encoder.config.use_attention_mask = True
    with pytest.raises(SbrushError, match="masks what fills a prompt up"):
        check_onnx(student)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_any_number_format_are_read(tmp_path, dtype):
    """A student of the built-in world that was exported in bfloat16 was taken for a damaged one."""
    weight = torch.randn(3, 2).to(dtype)
    save_file({"a": weight, "b": weight + 1}, tmp_path / "model.safetensors")
    read = read_weights(tmp_path / "model.safetensors", ["a"])
    assert read.keys() == {"a"} and read["a"].dtype == np.float32
    assert torch.equal(torch.from_numpy(read["a"]), weight.float())

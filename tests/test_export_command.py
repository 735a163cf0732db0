"""`sbrush export`: what other programs draw is the student's image, and bad requests are refused."""

import errno
import json
import re
import shutil
import warnings

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

import ldm
from conftest import build_tiny_teacher, build_tiny_xl, sbrush
from sbrush.exports import export as exporting
from sbrush.exports.lora import decompose, lora_layers
from sbrush.exports.single_file import single_file_tensors
from sbrush.models import comfyui
from sbrush.models.export import export_student
from sbrush.models.ladder import Sampling
from sbrush.models.load import load_student, load_teacher
from test_faults import FailingDisk

ABOUT = {
    "version": "0", "reparameterised": True, "recipe": {"name": "x"}, "seed": 0, "prompts": {"count": 3, "sha256": "0"},
    "license": "mit",
}  # fmt: skip


def build_tiny_sd2(folder, **options):
    """As Stable Diffusion 2.x: linear projections in the UNet, a text encoder of open_clip."""
    build_tiny_teacher(folder, **options)
    for part, said in (("unet", {"use_linear_projection": True}), ("text_encoder", {"hidden_act": "gelu"})):
        config = json.loads((folder / part / "config.json").read_text())
        (folder / part / "config.json").write_text(json.dumps(config | said))
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = {
        name: value.reshape(value.shape[:2]) if ".attentions." in name and value.ndim == 4 else value
        for name, value in load_file(file).items()
    }
    save_file(weights, file)
    return folder


def make_student(folder, teacher_folder, *, t_init=None, steps=1, zsnr=False):
    """A student whose weights are a little off its teacher's."""
    teacher = load_teacher(str(teacher_folder))
    torch.manual_seed(1)
    for parameter in teacher.unet.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
    own = teacher.scheduler
    if zsnr:
        own = DDIMScheduler.from_config(own.config, rescale_betas_zero_snr=True)
    scheduler = Sampling(steps).scheduler(own, t_init)
    about = ABOUT | {"teacher": str(teacher_folder), "steps": steps}
    export_student(folder, teacher, teacher.unet, about=about, scheduler=scheduler)
    return folder


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    home = tmp_path_factory.mktemp("students")
    built = {"sd1": build_tiny_teacher, "sd2": build_tiny_sd2, "xl": build_tiny_xl}
    return {
        name: make_student(home / name, build(home / f"{name}-teacher"), t_init=625 if name == "sd2" else None)
        for name, build in built.items()
    }


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def drawn(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    size = {"height": 32, "width": 32}
    return pipe("a cat", num_inference_steps=1, guidance_scale=1, generator=generator, output_type="pt", **size).images


def export(student, form, out, *options):
    done = sbrush("export", student, "--to", form, "-o", out, "--json", *options)
    assert done.returncode == 0, done.stderr
    assert "next: " in done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("family", ["sd1", "sd2", "xl"])
def test_a_single_file_and_a_half_copy_draw_one_image(tmp_path, students, family):
    """By diffusers' own from_single_file, by sbrush's reader, by plain diffusers from the folder: to the bit."""
    student, teacher = students[family], students[family].with_name(f"{family}-teacher")
    told = export(student, "single-file", tmp_path / "fast")
    export(student, "diffusers", tmp_path / "copy")
    file = tmp_path / "fast" / "fast.safetensors"
    assert told["precision"] == "float16" and told["files"]["fast.safetensors"] == file.stat().st_size
    assert {t.dtype for t in load_file(file).values()} == {torch.float16}
    copy, read = load_student(str(tmp_path / "copy")), load_teacher(str(file), config=str(teacher))
    for one, other in zip(copy.networks, read.networks, strict=True):
        expected, got = one.state_dict(), other.state_dict()
        assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in expected)
    kind = StableDiffusionXLPipeline if family == "xl" else StableDiffusionPipeline
    whole = DiffusionPipeline.from_pretrained(tmp_path / "copy")
    single = kind.from_single_file(str(file), config=str(teacher))
    single.scheduler = DDIMScheduler.from_pretrained(tmp_path / "fast", subfolder="scheduler")
    expected = drawn(whole)
    assert torch.equal(drawn(single), expected) and expected.std() > 0.01
    original = drawn(DiffusionPipeline.from_pretrained(student))
    assert 0 < (original - expected).abs().max() < 0.02  # half precision


@pytest.mark.parametrize(("family", "text"), [("sd1", "clip"), ("sd2", "open_clip"), ("xl", "xl")])
def test_the_names_are_those_of_the_original_code(tmp_path, students, family, text):
    """As another writer of this layout has them; what no program draws with is left out."""
    theirs = load_file(ldm.whole_file(students[family], tmp_path / "theirs.safetensors", text))
    ours = single_file_tensors(load_student(str(students[family])), torch.float32)
    passed = {name for name in theirs if name.endswith(("position_ids", "logit_scale"))}
    assert ours.keys() == theirs.keys() - passed
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_copy_is_loaded_in_one_format_whatever_is_asked_for(tmp_path, students, dtype):
    export(students["xl"], "diffusers", tmp_path / "copy", "--precision", str(dtype).split(".")[1])
    for part in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        assert {t.dtype for t in load_file(tmp_path / "copy" / f"{part}.safetensors").values()} == {dtype}
    for asked in (None, dtype):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer versions call it dtype
            pipe = DiffusionPipeline.from_pretrained(tmp_path / "copy", torch_dtype=asked)
        assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder_2.dtype} == {asked or torch.float32}


def test_a_file_says_that_it_predicts_v(tmp_path):
    folder = build_tiny_teacher(tmp_path / "teacher", prediction="v_prediction")
    student = make_student(tmp_path / "student", folder, zsnr=True)
    export(student, "single-file", tmp_path / "v")
    other = build_tiny_teacher(tmp_path / "other")
    read = load_teacher(str(tmp_path / "v" / "v.safetensors"), config=str(other))
    assert read.prediction == "v_prediction" and read.scheduler.alphas_cumprod[-1] == 0


def test_values_beyond_float16_are_refused_and_nothing_is_left(tmp_path, students):
    student = shutil.copytree(students["sd1"], tmp_path / "student")
    for part in ("unet", "vae"):
        file = student / part / "diffusion_pytorch_model.safetensors"
        before = load_file(file)
        name = next(iter(before))
        save_file(before | {name: before[name] + 1e5}, file)
        for form in ("single-file", "diffusers"):
            done = sbrush("export", student, "--to", form, "-o", tmp_path / "x")
            assert done.returncode == 1 and "beyond 65,504" in done.stderr and "--precision bfloat16" in done.stderr
        save_file(before, file)
    assert not list(tmp_path.glob("x*"))


def test_the_card_and_the_workflow_are_those_of_a_single_file(tmp_path, students, monkeypatch):
    unet = load_student(str(students["sd1"])).unet.config
    monkeypatch.setitem(comfyui.UNETS, unet.cross_attention_dim, ((8, 16), (unet.attention_head_dim,) * 2, (1, 1)))
    monkeypatch.setattr(comfyui, "LAYERS", 1)
    for family, nodes in (("sd1", {"KSampler"}), ("sd2", {"AddNoise", "SamplerCustom"})):
        export(students[family], "single-file", tmp_path / family)
        workflow = json.loads((tmp_path / family / comfyui.WORKFLOW).read_text())
        kinds = {node["class_type"] for node in workflow.values()}
        assert nodes | {"CheckpointLoaderSimple"} <= kinds and "UNETLoader" not in kinds
        (loader,) = (node for node in workflow.values() if node["class_type"] == "CheckpointLoaderSimple")
        assert loader["inputs"] == {"ckpt_name": f"{family}.safetensors"}
        card = (tmp_path / family / "README.md").read_text()
        assert f"| `{family}.safetensors` | `models/checkpoints/{family}.safetensors` |" in card
        early = "this student starts before" in card
        assert early == (family == "sd2") and ("sampling steps 1 and CFG scale 1" in card) != early


@pytest.mark.parametrize("family", ["sd1", "xl"])
def test_a_lora_leaves_the_error_that_it_tells(tmp_path, students, family):
    told = export(students[family], "lora", tmp_path / "lora", "--rank", 4)
    student, teacher = load_student(str(students[family])), load_teacher(f"{students[family]}-teacher")
    tensors, left, size = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors"), 0.0, 0.0
    ours, theirs = student.unet.state_dict(), teacher.unet.state_dict()
    for name in lora_layers(student.unet):
        change = (ours[f"{name}.weight"] - theirs[f"{name}.weight"]).flatten(1).double()
        down, up = (tensors[f"unet.{name}.lora_{half}.weight"].flatten(1).double() for half in "AB")
        assert len(down) == min(4, *change.shape)
        error = (change - up @ down).norm()
        assert told["layers"][name] == pytest.approx(float(error / change.norm()), abs=1e-6)
        best = torch.linalg.svdvals(change)[4:].norm()  # Eckart and Young's bound
        assert error <= best + 1e-3 * change.norm()
        left, size = left + error**2, size + change.norm() ** 2
    assert told["rank"] == 4 and told["relative_error"] == pytest.approx(float((left / size) ** 0.5), abs=1e-6)
    assert told["relative_error_of_whole_unet"] > 0 and "4" in (tmp_path / "lora" / "README.md").read_text()
    kohya = load_file(tmp_path / "lora" / "comfyui.safetensors")
    assert {name.split(".", 1)[1] for name in kohya} == {"lora_down.weight", "lora_up.weight", "alpha"}
    assert all(value == len(kohya[name.replace("alpha", "lora_down.weight")])
               for name, value in kohya.items() if name.endswith("alpha"))  # fmt: skip


def test_the_rank_is_the_lowest_that_keeps_the_error_and_a_whole_lora_is_the_student(tmp_path, students):
    student, teacher = load_student(str(students["sd1"])), load_teacher(f"{students['sd1']}-teacher")
    for error in (0.5, 0.1):
        made = decompose(student, teacher, rank=None, error=error)
        assert made.covered <= error < decompose(student, teacher, rank=made.rank - 1, error=1).covered
    told = export(students["sd1"], "lora", tmp_path / "lora", "--max-error", 0, "--precision", "float32")
    assert told["relative_error"] < 1e-6 < told["relative_error_of_whole_unet"]
    pipe = DiffusionPipeline.from_pretrained(f"{students['sd1']}-teacher")
    pipe.load_lora_weights(tmp_path / "lora", weight_name="pytorch_lora_weights.safetensors")
    pipe.scheduler = DDIMScheduler.from_pretrained(tmp_path / "lora", subfolder="scheduler")
    with torch.no_grad():  # what a LoRA does not change
        own = student.unet.state_dict()
        for name, parameter in pipe.unet.named_parameters():
            if "lora_" not in name and (plain := name.replace(".base_layer", "")) in own:
                if not (plain.endswith(".weight") and plain.removesuffix(".weight") in lora_layers(student.unet)):
                    parameter.copy_(own[plain])
    assert torch.allclose(drawn(pipe), drawn(DiffusionPipeline.from_pretrained(students["sd1"])), atol=1e-3)


def test_onnx_gets_its_card_and_is_whole_or_not_there(tmp_path, students, monkeypatch):
    monkeypatch.setattr(exporting, "export_onnx", lambda student, folder: (folder / "model.onnx").write_text("graph"))
    told = export(students["sd1"], "onnx", tmp_path / "onnx")
    assert set(told["files"]) == {"README.md", "model.onnx"} and told["precision"] == "float32"
    card = (tmp_path / "onnx" / "README.md").read_text()
    assert "ORTStableDiffusionPipeline" in card and "num_inference_steps=1, guidance_scale=1" in card

    def full(student, folder):
        (folder / "half").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(exporting, "export_onnx", full)
    done = sbrush("export", students["sd1"], "--to", "onnx", "-o", tmp_path / "again")
    assert done.returncode == 1 and "No space left" in done.stderr and not list(tmp_path.glob("again*"))


@pytest.mark.parametrize("form", ["single-file", "lora", "diffusers"])
def test_a_disk_that_fills_up_leaves_nothing_half_written(tmp_path, students, form):
    place = tmp_path / "disk"
    place.mkdir()
    with FailingDisk(place) as counted:
        export(students["sd1"], form, place / "x", *(["--rank", 2] if form == "lora" else []))
    shutil.rmtree(place / "x")
    for good in {0, 1, counted.writes // 2, counted.writes - 1}:
        with FailingDisk(place, good, errno.ENOSPC):
            done = sbrush("export", students["sd1"], "--to", form, "-o", place / "x")
        assert done.returncode == 1 and "No space left on device" in done.stderr, (good, done.stderr)
        assert not list(place.iterdir()), good


def test_an_export_goes_into_an_empty_folder_and_no_other(tmp_path, students):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    done = sbrush("export", students["sd1"], "--to", "diffusers", "-o", tmp_path / "full")
    assert done.returncode == 2 and "full is not empty" in done.stderr
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["mine.txt"]
    export(students["sd1"], "diffusers", tmp_path / "empty")
    assert sbrush("sample", "a cat", "--student", tmp_path / "empty", "-o", tmp_path / "cat.png").returncode == 0


BAD = [
    (["--to", "gguf", "-o", "x"], 2, "'gguf' is not one of"),
    (["--to", "lora", "-o", "x", "--rank", "0"], 2, "greater than or equal to 1"),
    (["--to", "lora", "-o", "x", "--rank", "4000"], 2, "--rank 4000 is beyond every layer: the largest has rank"),
    (["--to", "lora", "-o", "x", "--rank", "4", "--max-error", ".1"], 2, "two ways"),
    (["--to", "single-file", "-o", "x", "--rank", "4"], 2, "--rank is for --to lora"),
    (["--to", "diffusers", "-o", "x", "--private"], 2, "--private is for --to hub"),
    (["--to", "onnx", "-o", "x", "--precision", "float16"], 2, "--to onnx writes float32"),
    (["--to", "single-file", "-o", "x.safetensors"], 2, "-o names a folder"),
    (["--to", "hub", "-o", "no-owner"], 2, "no-owner is no repository's name"),
    (["--to", "diffusers"], 2, "'-o' / '--out'"),
]


@pytest.mark.parametrize(("arguments", "code", "said"), BAD, ids=[said for *_, said in BAD])
def test_a_request_that_makes_no_sense(tmp_path, monkeypatch, students, arguments, code, said):
    monkeypatch.chdir(tmp_path)
    done = sbrush("export", students["sd1"], *arguments)
    assert done.returncode == code and said in " ".join(done.stderr.split()), done.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {"cache"}


def test_a_student_that_is_none(tmp_path, students):
    teacher = f"{students['sd1']}-teacher"
    for source, said in (
        (tmp_path / "nowhere", "no model folder"), (tmp_path, "is no Stable Diffusion model"),
        (teacher, "it has no sbrush.json"),
    ):  # fmt: skip
        done = sbrush("export", source, "--to", "diffusers", "-o", tmp_path / "x")
        assert done.returncode == 2 and said in done.stderr and not (tmp_path / "x").exists()
    graphs = shutil.copytree(students["sd1"], tmp_path / "graphs")
    (graphs / "unet" / "model.onnx").write_text("graph")
    done = sbrush("export", graphs, "--to", "diffusers", "-o", tmp_path / "x")
    assert done.returncode == 2 and "was exported to ONNX" in done.stderr


def test_a_lora_needs_a_teacher_of_the_same_shape_that_differs(tmp_path, students):
    for teacher, said in (
        (f"{students['xl']}-teacher", "of another architecture"),
        (students["sd1"], "does not differ"),
    ):
        done = sbrush("export", students["sd1"], "--to", "lora", "-o", tmp_path / "x", "--teacher", teacher)
        assert done.returncode == 2 and said in done.stderr and not (tmp_path / "x").exists()


def test_what_the_original_layout_has_no_name_for_is_refused(tmp_path, students):
    from sbrush.models.unet import with_guidance_input

    student = shutil.copytree(students["sd1"], tmp_path / "student")
    with_guidance_input(load_student(str(student)).unet).save_pretrained(student / "unet")
    done = sbrush("export", student, "--to", "single-file", "-o", tmp_path / "x")
    assert (
        done.returncode == 2 and "cannot be a single file: time_embedding.cond_proj.weight has no name" in done.stderr
    )
    assert not list(tmp_path.glob("x*"))


def test_a_runs_checkpoint_is_exported_as_the_student_was_then(tmp_path, tiny_teacher, prompt_file):
    run = tmp_path / "run"
    small = ("--teacher", tiny_teacher, "--steps", 2, "--batch", 2, "--grid-every", 0, "--device", "cpu")
    assert sbrush("distill", prompt_file, *small, "--out", run).returncode == 0
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    export(checkpoint, "single-file", tmp_path / "then")
    export(run, "single-file", tmp_path / "now")
    then, now = (load_file(tmp_path / name / f"{name}.safetensors") for name in ("then", "now"))
    assert then.keys() == now.keys() and all(torch.equal(then[name], now[name]) for name in then)


@pytest.mark.parametrize(("family", "form"), [("sd2", "single-file"), ("xl", "single-file"), ("sd2", "lora")])
def test_the_snippet_on_a_card_runs_and_draws_the_image(tmp_path, monkeypatch, students, family, form):
    export(students[family], form, tmp_path / "out", *(["--max-error", 0] if form == "lora" else []))
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    exec(
        code.replace("path/to/this/folder", str(tmp_path / "out")).replace('"a cat",', '"a cat", height=32, width=32,')
    )
    assert sbrush("sample", "a cat", "--student", students[family], "-o", "ours.png").returncode == 0
    theirs, ours = (np.asarray(Image.open(name).convert("RGB")).astype(int) for name in ("cat.png", "ours.png"))
    assert np.abs(theirs - ours).mean() < (1 if form == "single-file" else 8) and ours.std() > 1

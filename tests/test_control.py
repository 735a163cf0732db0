"""ControlNets beside a student: the image that plain diffusers draws, what is recorded, what is refused."""

import json

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image
from safetensors.torch import load_file, save_file

import sbrush as package
from conftest import sbrush
from sbrush.console import SbrushError
from sbrush.models.configurations import CONTROL
from sbrush.models.load import load_student, load_teacher
from sbrush.models.load_control import find_control, load_control
from sbrush.sampling.control import as_control, load_steering
from sbrush.sampling.control_request import Control
from sbrush.sampling.generation import student_images, teacher_images
from test_configurations import fields
from test_few_steps import student_folder
from test_open_image import UNREADABLE


def control_folder(folder, teacher, seed=0, **options):
    """A ControlNet of a teacher, its layers that start as zero made random, so that it steers."""
    torch.manual_seed(seed)
    unet = load_teacher(str(teacher)).unet
    net = ControlNetModel.from_unet(unet, **{"conditioning_embedding_out_channels": (4, 8)} | options)
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    net.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hint():
    values = np.random.default_rng(1).integers(0, 2, (8, 8), dtype=np.uint8) * 255
    return Image.fromarray(values).resize((32, 32), Image.Resampling.NEAREST).convert("RGB")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_teacher, tiny_xl):
    """For each format: a student of four steps and two ControlNets; and a student of one step."""
    root, made = tmp_path_factory.mktemp("control"), {}
    for name, source in (("sd", tiny_teacher), ("xl", tiny_xl)):
        made[name] = student_folder(root / name / "student", source)
        made[f"{name} one"] = student_folder(root / name / "one", source, steps=1)
        for seed in (1, 2):
            made[f"{name} {seed}"] = control_folder(root / name / f"control-{seed}", source, seed)
    return made


def in_diffusers(kind, folder, controls, images, *, steps, scales, guidance=1.0):
    """The image of "a red cat", seed 5, by plain diffusers' ControlNet pipeline: uint8 [3, H, W]."""
    from diffusers import StableDiffusionControlNetPipeline, StableDiffusionXLControlNetPipeline

    family = StableDiffusionXLControlNetPipeline if kind == "xl" else StableDiffusionControlNetPipeline
    nets = [ControlNetModel.from_pretrained(control) for control in controls]
    several = len(nets) > 1
    pipe = family.from_pretrained(folder, controlnet=nets if several else nets[0])
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(
        "a red cat", image=images if several else images[0], num_inference_steps=steps, guidance_scale=guidance,
        controlnet_conditioning_scale=scales if several else scales[0], generator=torch.Generator().manual_seed(5),
        output_type="np",
    )  # fmt: skip
    return torch.from_numpy(drawn.images[0] * 255).round().permute(2, 0, 1)


def ours(folder, requests, **options):
    student = load_student(str(folder))
    steering = load_steering(student, requests)
    model = steering.steer(student)
    return next(student_images(model, ["a red cat"], [5], control=steering.images, **options))[0]


@pytest.mark.parametrize("kind", ["sd", "xl"])
@pytest.mark.parametrize("steps", [1, 4])
def test_plain_diffusers_draws_the_same_image(folders, hint, kind, steps):
    """One ControlNet and two, at scales of their own, in one step and four."""
    student, other = folders[kind if steps > 1 else f"{kind} one"], hint.transpose(Image.Transpose.ROTATE_90)
    one = [Control(str(folders[f"{kind} 1"]), hint, 0.7)]
    two = [*one, Control(str(folders[f"{kind} 2"]), other, 0.4)]
    plain = next(student_images(load_student(str(student)), ["a red cat"], [5]))[0]
    for requests in (one, two):
        drawn = ours(student, requests)
        theirs = in_diffusers(
            kind, student, [r.model for r in requests], [r.image for r in requests],
            steps=steps, scales=[r.scale for r in requests],
        )  # fmt: skip
        assert (drawn.float() - theirs).abs().max() <= 1
        assert (drawn.float() - plain.float()).abs().mean() > 2
    assert not torch.equal(ours(student, one), ours(student, two))


def test_at_scale_0_the_image_is_the_students_own(folders, hint):
    own = next(student_images(load_student(str(folders["sd"])), ["a red cat"], [5]))[0]
    assert torch.equal(ours(folders["sd"], [Control(str(folders["sd 1"]), hint, 0.0)]), own)


def test_a_teacher_is_steered_with_and_without_a_prompt(folders, tiny_teacher, hint):
    """Guidance needs the teacher's noise prediction for no prompt: the control image is part of both."""
    teacher = load_teacher(str(tiny_teacher))
    steering = load_steering(teacher, [Control(str(folders["sd 1"]), hint)])
    own = {"steps": 3, "guidance": 4.0, "control": steering.images}
    drawn = next(teacher_images(steering.steer(teacher), ["a red cat", "a dog"], [5, 6], **own))
    # Plain diffusers' own sampler of the folder takes other timesteps; a student's folder has ours.
    folder = folders["sd one"]
    theirs = in_diffusers("sd", folder, [folders["sd 1"]], [hint], steps=3, scales=[1.0], guidance=4.0)
    assert (drawn[0].float() - theirs).abs().max() <= 1


def test_each_image_of_a_batch_has_its_own_control_image(folders, hint):
    student = load_student(str(folders["sd one"]))
    steering = load_steering(student, [Control(str(folders["sd 1"]), hint)])
    model, pixels = steering.steer(student), torch.from_numpy(np.array(hint)).permute(2, 0, 1)
    hints = as_control(torch.stack([pixels, pixels.flip(1), pixels.flip(2)]))[:, None]
    drawn = list(student_images(model, ["a red cat"] * 3, [5] * 3, control=hints, batch=2))
    assert [len(some) for some in drawn] == [2, 1]
    for place, image in enumerate(torch.cat(drawn)):
        alone = next(student_images(model, ["a red cat"], [5], control=hints[place : place + 1]))[0]
        assert (image.float() - alone.float()).abs().max() <= 1


def test_the_command_and_the_python_api_draw_that_image(folders, hint, tmp_path):
    hint.save(tmp_path / "hint.png")
    student, control = folders["sd one"], folders["sd 1"]
    command = [
        "sample", "a red cat", "--seed", 5, "--student", student, "--control", control, "--device", "cpu",
        "--control-image", tmp_path / "hint.png", "--control-scale", 0.7,
    ]  # fmt: skip
    done = sbrush(*command, "-o", tmp_path / "images/")
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "images").glob("*.png")
    with Image.open(file) as image:
        written, record = np.array(image.convert("RGB")), json.loads(image.info["sbrush"])
    expected = ours(student, [Control(str(control), hint, 0.7)]).permute(1, 2, 0).numpy()
    assert np.array_equal(written, expected)
    (said,) = record["control"]
    assert said["model"] == str(control) and said["scale"] == 0.7 and said["prep"] == "none"
    loaded = package.load_student(str(student), device="cpu")
    for wanted in (package.Control(str(control), hint, scale=0.7), [Control(str(control), tmp_path / "hint.png", 0.7)]):
        assert np.array_equal(np.array(loaded("a red cat", seed=5, control=wanted)), expected)
    assert np.array_equal(
        np.array(loaded("a red cat", seed=5)), np.array(package.load_student(str(student))("a red cat", seed=5))
    )
    # The same command finds its image; with another control image, or none, it would be another.
    again = sbrush(*command, "-o", tmp_path / "images/")
    assert again.returncode == 0 and "has 1 of 1 images already" in again.stderr
    hint.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "hint.png")
    for other in (command, command[:6]):
        done = sbrush(*other, "-o", tmp_path / "images/")
        assert done.returncode == 2 and "is another image (control)" in done.stderr


def test_compare_steers_the_teacher_too(folders, tiny_teacher, hint, tmp_path):
    hint.save(tmp_path / "hint.png")
    command = [
        "sample", "a red cat", "--student", folders["sd one"], "--compare", "--teacher", tiny_teacher,
        "--teacher-steps", 2, "--device", "cpu",
    ]  # fmt: skip
    files = [tmp_path / "plain.png", tmp_path / "steered.png"]
    steered = ["--control", folders["sd 1"], "--control-image", tmp_path / "hint.png", "--control-prep", "canny"]
    for file, more in zip(files, ([], steered), strict=True):
        done = sbrush(*command, *more, "-o", file)
        assert done.returncode == 0, done.stderr
    plain, other = (np.array(Image.open(file).convert("RGB")).astype(int) for file in files)
    half = plain.shape[0] // 2
    for part in (slice(None, half), slice(half, None)):
        assert np.abs(plain[part] - other[part]).max() > 10


def test_an_image_of_another_aspect_is_cut_before_its_edges_are_found(folders, hint, capsys):
    student = load_student(str(folders["sd one"]))
    wide = Image.new("RGB", (96, 64), "red")
    wide.paste("white", (32, 16, 64, 48))
    steering = load_steering(student, [Control(str(folders["sd 1"]), wide, prep="outline")])
    assert "the control image is 96 x 64 pixels; its middle is scaled to 32 x 32" in capsys.readouterr().err
    assert steering.images.shape == (1, 1, 3, 32, 32) and steering.images.unique().tolist() == [0, 1]


def test_the_table_knows_every_field_of_a_controlnet():
    assert fields(ControlNetModel) <= CONTROL.keys()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--control", "net"], "1 --control and 0 --control-image"),
        (["--control", "net", "--control-image", "hint.png", "--control-image", "hint.png"], "1 --control and 2"),
        (["--control-image", "hint.png"], "--control-image is for a ControlNet"),
        (["--control-scale", 1], "--control-scale is for a ControlNet"),
        (["--control-prep", "canny"], "--control-prep is for a ControlNet"),
        (
            ["--control", "net", "--control-image", "hint.png", "--control-scale", 1, "--control-scale", 1],
            "for 1 Contr",
        ),
        (["--control", "net", "--control-image", "hint.png", "--control-scale", -1], "a control scale of -1"),
        (["--control", "net", "--control-image", "hint.png", "--control-scale", "nan"], "a control scale of nan"),
        (["--control", "net", "--control-image", "hint.png", "--control-scale", 11], "a control scale of 11"),
        (["--control", "net", "--control-image", "text.png"], "cannot read the image text.png: not an image"),
        (["--control", "net", "--control-image", "bomb.png"], "decompression bomb"),
        (["--control", "net", "--control-image", "none.png"], "cannot read the image none.png: missing"),
        (["--control", "nothing", "--control-image", "hint.png"], "no ControlNet nothing"),
        (["--control", "hint.png", "--control-image", "hint.png"], "hint.png is a file, not a ControlNet"),
        (["--control", "empty", "--control-image", "hint.png"], "empty is no ControlNet"),
    ],
)
def test_what_is_senseless_is_refused_before_torch_loads(tmp_path, monkeypatch, hint, flags, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sbrush.sampling.files.sample_to_files", None)
    hint.save("hint.png")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "bomb.png").write_bytes(UNREADABLE["a bomb"][0])
    (tmp_path / "empty").mkdir()
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "config.json").write_text("{}")
    done = sbrush("sample", "a cat", *flags)
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert done.stderr.count("error:") == done.stderr.count("hint:") == 1 and "loading torch" not in done.stderr
    assert not (tmp_path / "out.png").exists()


def spoil(folder, what):
    """A ControlNet's folder made unfit in one way."""
    config, weights = folder / "config.json", folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    if what == "no weights":
        weights.unlink()
    elif what == "cut":
        weights.write_bytes(weights.read_bytes()[:-9])
    elif what == "NaN":
        tensors["conv_in.weight"][0, 0, 0, 0] = torch.nan
        save_file(tensors, weights)
    elif what == "a tensor is missing":
        del tensors["conv_in.weight"]
        save_file(tensors, weights)
    elif what == "no JSON":
        config.write_text("{")
    else:
        config.write_text(json.dumps(json.loads(config.read_text()) | what))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("no weights", "is no ControlNet"),
        ("cut", "cannot load the ControlNet"),
        ("NaN", "no numbers"),
        ("a tensor is missing", "lacks 1 of its tensors"),
        ("no JSON", "cannot load the ControlNet"),
        ({"conditioning_channels": 4}, "its control images are not RGB"),
        ({"global_pool_conditions": True}, "global_pool_conditions"),
        ({"_class_name": "UNet2DConditionModel"}, "is a UNet2DConditionModel, not a ControlNetModel"),
        ({"block_out_channels": [8, 10**9]}, "out of all proportion"),
    ],
)
def test_a_damaged_controlnet_is_refused(tmp_path, tiny_teacher, what, said):
    spoil(control_folder(tmp_path / "net", tiny_teacher), what)
    with pytest.raises(SbrushError, match=said):
        load_control(str(tmp_path / "net"), load_teacher(str(tiny_teacher)))


def test_a_controlnet_of_another_base_is_refused(tmp_path, folders, tiny_teacher, hint):
    hint.save(tmp_path / "hint.png")
    fits = ["--student", folders["sd one"], "--control-image", tmp_path / "hint.png", "--device", "cpu"]
    done = sbrush("sample", "a cat", "--control", folders["xl 1"], *fits)
    assert done.returncode == 2 and "does not fit" in done.stderr and "cross_attention_dim is 40" in done.stderr
    teacher = load_teacher(str(tiny_teacher))
    with pytest.raises(SbrushError, match="does not fit stickers student"):  # which is loaded again, for torch
        package.load_student(device="cpu")("a cat", control=Control(str(folders["sd 1"]), hint))
    deeper = control_folder(tmp_path / "deeper", tiny_teacher, conditioning_embedding_out_channels=(4, 8, 8))
    with pytest.raises(SbrushError, match="4 pixels of a control image for one of a latent, the model 2"):
        load_control(str(deeper), teacher)
    done = sbrush("sample", "a cat", "--control", folders["sd 1"], *fits[2:])  # the built-in student
    assert done.returncode == 2 and "does not fit stickers student (built in): its block_out_channels" in done.stderr


def test_a_teacher_of_another_base_is_not_steered(folders, tiny_xl, hint):
    steering = load_steering(load_student(str(folders["sd one"])), [Control(str(folders["sd 1"]), hint)])
    with pytest.raises(SbrushError, match="does not fit"):
        steering.steer(load_teacher(str(tiny_xl)))


def test_the_built_in_controlnet_is_followed(capsys):
    """By the benchmark that its page names: without it outlines overlap by chance alone."""
    from sbrush.benchmarks.control import main

    main(outlines=10, control="outline", student=None, scales="1.5", teacher_steps=0, shipped=True)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    chamfer, overlap = ({row[1]: float(row[place]) for row in rows[2:]} for place in (2, 3))
    assert overlap["none"] + 0.2 < overlap["1.5"] < overlap["-"] and overlap["1.5"] > 0.8
    assert chamfer["-"] < chamfer["1.5"] < 1.5 and chamfer["1.5"] < chamfer["none"] / 2
    weights = find_control("outline") / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size < 4e6

"""Another VAE decodes a student's latents: the image that plain diffusers draws, what is recorded, what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline
from PIL import Image

import sbrush as package
from conftest import sbrush
from sbrush.console import SbrushError
from sbrush.models.load import BUILT_IN, load_student, load_teacher
from sbrush.models.load_vae import find_vae, with_vae
from sbrush.models.vae_source import BUILT_IN_TINY, PUBLISHED
from sbrush.onnx.model import find
from sbrush.sampling.generation import student_images, student_latents
from sbrush.sampling.opening import open_student
from sbrush.stickers.world import random_caption, stream
from test_few_steps import student_folder


def tiny_vae(folder, *, blocks=2, **options):
    """An untrained AutoencoderTiny for latents of 4 x 16 x 16 and images of 32 x 32."""
    torch.manual_seed(3)
    AutoencoderTiny(
        encoder_block_out_channels=(8,) * blocks, decoder_block_out_channels=(8,) * blocks,
        num_encoder_blocks=(0,) * blocks, num_decoder_blocks=(1,) * blocks, **options,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def kl_vae(folder, **options):
    torch.manual_seed(4)
    AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, **options,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_teacher, tiny_xl):
    root = tmp_path_factory.mktemp("vae")
    return {
        "sd": student_folder(root / "sd", tiny_teacher, steps=1), "xl": student_folder(root / "xl", tiny_xl, steps=1),
        "four": student_folder(root / "four", tiny_teacher), "tiny": tiny_vae(root / "tiny"),
        "kl": kl_vae(root / "kl"),
    }  # fmt: skip


def record(path):
    return json.loads(Image.open(path).text["sbrush"])


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def in_diffusers(folder, vae):
    """The image of "a cat", seed 5, by plain diffusers with another VAE: uint8 [H, W, 3]."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.vae = vae
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe("a cat", num_inference_steps=1, guidance_scale=1, generator=torch.Generator().manual_seed(5))
    return np.asarray(drawn.images[0]).astype(int)


@pytest.mark.parametrize("kind", ["sd", "xl"])
@pytest.mark.parametrize("vae", ["tiny", "kl"])
def test_the_image_is_that_of_plain_diffusers_with_this_vae(tmp_path, folders, kind, vae):
    path = tmp_path / "cat.png"
    done = sbrush("sample", "a cat", "--seed", 5, "--student", folders[kind], "--vae", folders[vae], "-o", path)
    assert done.returncode == 0, done.stderr
    network = (AutoencoderTiny if vae == "tiny" else AutoencoderKL).from_pretrained(folders[vae])
    wanted = in_diffusers(folders[kind], network)
    assert np.abs(pixels(path) - wanted).max() <= 1 and wanted.std() > 1
    assert record(path)["vae"] == {"name": str(folders[vae]), "sha256": record(path)["vae"]["sha256"]}


@pytest.mark.parametrize("runtime", ["onnx", "torch"])
def test_the_built_in_world_has_its_own(tmp_path, runtime):
    drawn = {}
    for vae in ("own", "tiny"):
        path = drawn[vae] = tmp_path / f"{vae}.png"
        flags = ["--vae", vae] * (vae != "own")
        done = sbrush("sample", "a cat", "--seed", 5, "--runtime", runtime, "-o", path, *flags)
        assert done.returncode == 0, done.stderr
    unet = {"unet": load_student().unet, "scheduler": load_student().sampler}
    pipe = DiffusionPipeline.from_pretrained(BUILT_IN / "teacher", **unet)
    pipe.vae = AutoencoderTiny.from_pretrained(BUILT_IN_TINY)
    pipe.set_progress_bar_config(disable=True)
    plain = pipe("a cat", num_inference_steps=1, guidance_scale=1, generator=torch.Generator().manual_seed(5))
    difference = np.abs(pixels(drawn["tiny"]) - np.asarray(plain.images[0]).astype(int))
    assert difference.max() <= 2 and (difference > 0).mean() < 0.01
    assert not np.array_equal(pixels(drawn["tiny"]), pixels(drawn["own"]))
    own, tiny = record(drawn["own"]), record(drawn["tiny"])
    assert "vae" not in own and tiny["vae"]["name"] == "tiny" and tiny["weights"] != own["weights"]


def test_the_shipped_one_is_small_and_its_latents_are_the_unets():
    config = json.loads((BUILT_IN_TINY / "config.json").read_text())
    files = list(BUILT_IN_TINY.iterdir())
    assert config["_class_name"] == "AutoencoderTiny" and config["scaling_factor"] == 1.0
    assert {file.name for file in files} == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert sum(file.stat().st_size for file in files) < 500_000


def test_the_shipped_one_decodes_and_encodes_as_the_students_own():
    """At least 27 dB beside what the student's own VAE decodes; and what it encodes, the student's own decodes."""
    own, texts = load_student(), [random_caption(stream("eval", i)).text for i in range(24)]
    tiny = with_vae(own, "tiny")
    (x0,) = student_latents(own, texts, range(24))
    drawn, quick = own.decode(x0).float() / 255, tiny.decode(x0).float() / 255
    assert (-10 * (drawn - quick).pow(2).mean(dim=(1, 2, 3)).log10()).mean() > 27
    with torch.no_grad():
        latents = tiny.decoding_vae.encode(2 * drawn - 1).latents
    assert (latents - x0).pow(2).mean() < 0.1 * x0.pow(2).mean()
    assert (own.decode(latents).float() / 255 - drawn).abs().mean() < 0.03


def test_a_part_way_image_is_encoded_by_the_students_own_vae(tmp_path, folders):
    student, photo = open_student(str(folders["four"]), vae=str(folders["tiny"])), torch.randint(256, (1, 3, 32, 32))
    plain = load_student(str(folders["four"]))
    assert torch.equal(student.encode_images(photo), plain.encode_images(photo))
    Image.new("RGB", (32, 32), "red").save(tmp_path / "photo.png")
    Image.new("L", (32, 32), 255).save(tmp_path / "mask.png")
    edit = ["--image", tmp_path / "photo.png", "--mask", tmp_path / "mask.png", "--student", folders["four"]]
    images = []
    for number, vae in enumerate([(), ("--vae", folders["tiny"])]):
        path = tmp_path / f"{number}.png"
        assert sbrush("sample", "a cat", *edit, *vae, "-o", path).returncode == 0
        images.append(pixels(path))
    assert not np.array_equal(*images)


def test_python_takes_it_and_keeps_it_when_torch_has_to_draw(folders):
    quick = package.load_student(vae="tiny")
    assert quick.model.runtime == "onnx" and quick.model.decoder.name == "tiny"
    assert quick._in_torch("a test").decoder.about == quick.model.decoder.about
    assert package.load_student(str(folders["sd"]), vae=str(folders["tiny"])).model.decoder.network is not None


def test_a_folder_of_images_goes_on_with_the_vae_that_began_it(tmp_path, folders):
    base = ["sample", "a cat", "--student", folders["sd"], "-o", tmp_path / "images"]
    assert sbrush(*base, "--vae", folders["tiny"]).returncode == 0
    again, other = sbrush(*base, "--vae", folders["tiny"]), sbrush(*base)
    assert again.returncode == 0 and "1 of 1 images already" in again.stderr
    assert other.returncode == 2 and "vae" in other.stderr


def test_the_built_in_vae_as_a_folder_is_no_other_vae():
    own, other = find(None), find(None, str(BUILT_IN / "teacher" / "vae"))
    images = [torch.cat(list(student_images(one, ["a cat"], [5]))) for one in (own, other)]
    assert torch.equal(*images) and other.fingerprint != own.fingerprint


def test_onnx_is_refused_where_it_has_no_graph_of_the_vae(tmp_path, folders):
    flags = ["--student", folders["sd"], "--vae", folders["tiny"], "-o", tmp_path / "cat.png"]
    refused = sbrush("sample", "a cat", "--runtime", "onnx", *flags)
    assert refused.returncode == 2 and "no ONNX graphs of it with that VAE" in refused.stderr
    assert find(None, str(folders["tiny"])) is None  # of the built-in student, drawn by torch then, or refused


@pytest.mark.parametrize(
    ("made", "says"),
    [
        ({"blocks": 3}, "into images 4 times as wide; those of"),
        ({"latent_channels": 8}, "latents of 8 channels"),
        ({"scaling_factor": 0.5}, "a scaling factor of 0.5"),
    ],
)
def test_one_of_other_latents_is_refused(tmp_path, folders, made, says):
    tiny_vae(tmp_path / "other", **made)
    refused = sbrush(
        "sample", "a cat", "--student", folders["sd"], "--vae", tmp_path / "other", "-o", tmp_path / "x.png"
    )
    assert refused.returncode == 2 and says in refused.stderr and "hint:" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_so_is_an_autoencoder_of_another_scale(tmp_path, folders):
    model = load_student(str(folders["sd"]))
    with pytest.raises(SbrushError, match=r"scaling factor of 0\.13025; with the latents of .* goes 0\.18215"):
        with_vae(model, str(kl_vae(tmp_path / "xl", scaling_factor=0.13025)))
    assert with_vae(model, str(tiny_vae(tmp_path / "own", scaling_factor=0.18215))).decoder  # of the VAE's own latents


def test_the_published_ones_go_with_their_family_alone(folders):
    for kind, own, other in (("sd", "madebyollin/taesd", "madebyollin/taesdxl"),
                             ("xl", "madebyollin/taesdxl", "madebyollin/taesd")):  # fmt: skip
        model = load_student(str(folders[kind]))
        assert PUBLISHED[model.pipeline] == own
        with pytest.raises(SbrushError, match=f"{own} is not, or not whole, in the Hub's cache") as offline:
            find_vae("tiny", model)
        assert "hf download" in offline.value.hint
        with pytest.raises(SbrushError, match="is not for the latents"):
            find_vae(other, model)
    assert find_vae("tiny", load_teacher()) == ("tiny", BUILT_IN_TINY)


@pytest.mark.parametrize("command", [["sample", "a cat"], ["serve"], ["eval"]])
@pytest.mark.parametrize(
    ("vae", "says"),
    [
        ("nothing", "no VAE nothing"),
        ("photo.png", "photo.png is a file, not a VAE's folder"),
        ("empty", "empty is no VAE: it has no config.json"),
        ("model", "model is a whole model, not a VAE"),
        ("unet", "unet is no VAE: it is a UNet2DConditionModel"),
        ("bare", "bare has no diffusion_pytorch_model.safetensors"),
        ("broken", "cannot read broken/config.json"),
    ],
)
def test_what_is_no_vae_is_refused_before_torch_loads(tmp_path, monkeypatch, tiny_teacher, folders, command, vae, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photo.png").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for name, source in (("model", tiny_teacher), ("unet", tiny_teacher / "unet"), ("bare", folders["tiny"])):
        shutil.copytree(source, tmp_path / name)
    (tmp_path / "bare" / "diffusion_pytorch_model.safetensors").unlink()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("[")
    refused = sbrush(*command, "--vae", vae)
    lines = [line for line in refused.stderr.splitlines() if line.startswith(("error:", "hint:"))]
    assert refused.returncode == 2 and len(lines) == 2 and says in lines[0], refused.stderr
    assert "loading" not in refused.stderr


def test_damaged_weights_are_named(tmp_path, folders):
    broken = shutil.copytree(folders["tiny"], tmp_path / "broken")
    (broken / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(SbrushError, match="cannot load the tiny VAE"):
        with_vae(load_student(str(folders["sd"])), str(broken))


def test_eval_says_which_vae_decoded(tmp_path, monkeypatch, folders):
    from sbrush.evaluate import candidates
    from sbrush.evaluate.report import Report

    asked = []

    def measured(given, judge, **options):
        asked.extend(given)
        return Report([], {}, [], {})

    monkeypatch.setattr(candidates, "evaluate_stickers", measured)
    monkeypatch.setattr(Report, "write", lambda self, path: None)
    from sbrush.evaluate.request import Models, StickersRequest

    report = candidates.evaluate(StickersRequest(Models(vae="tiny"), report=tmp_path / "report.html"))
    assert report.protocol["vae"].startswith("tiny (sha256 ")
    tiny, own = (torch.cat(list(asked[0].images(["a cat"], [5]))), load_student())
    assert torch.equal(tiny, torch.cat(list(student_images(with_vae(own, "tiny"), ["a cat"], [5]))))
    refused = sbrush("eval", "--coco-30k", "--teacher", folders["sd"], "--vae", "tiny")
    assert refused.returncode == 2 and "--vae is the student's" in refused.stderr


def test_coco_manifest_says_so_too(folders):
    from sbrush.device import Arithmetic
    from sbrush.evaluate.coco.protocols import PROTOCOLS
    from sbrush.evaluate.coco.subjects import Generator
    from sbrush.evaluate.request import CocoRequest, Models

    found = []
    for vae in (None, str(folders["tiny"])):
        request = CocoRequest(Models(str(folders["sd"]), vae=vae))
        (subject,) = Generator(request, PROTOCOLS["swiftbrush"], "cpu", Arithmetic()).subjects([])
        found.append((subject.key, torch.cat(list(subject.images(["a cat"], [5])))))
    assert "vae" not in found[0][0] and found[1][0]["vae"]["name"] == str(folders["tiny"])
    assert not torch.equal(found[0][1], found[1][1])


def test_the_server_draws_with_it():
    from sbrush.sampling.files import SampleRequest, load_artist
    from sbrush.sampling.targets import Images, Target
    from sbrush.serving.server import Capacity, warm_service

    artist = load_artist(SampleRequest(Images(["a cat"], [0]), Target(None), vae="tiny"))
    with warm_service(artist, Capacity(2, 4)) as service:
        assert service.about()["vae"] == "tiny" and service.about()["runtime"] == "onnx"
    assert artist.record("a cat", 0)["vae"]["name"] == "tiny"


def test_the_training_learns_the_decoder_and_is_shipped_in_float16(tmp_path, monkeypatch):
    from safetensors.torch import load_file

    from sbrush.training.world import tiny_vae as training

    monkeypatch.setattr(training, "IMAGES", 4)
    monkeypatch.setattr(training, "UNSEEN", 2)
    said = []
    monkeypatch.setattr(training, "info", said.append)
    training.train(tmp_path / "work", steps=2, batch=4, lr=1e-3, threads=0)
    training.ship(tmp_path / "work", to=tmp_path / "package")
    weights = load_file(tmp_path / "package" / "tiny_vae" / "diffusion_pytorch_model.safetensors")
    shipped = load_file(BUILT_IN_TINY / "diffusion_pytorch_model.safetensors")
    assert {name: tensor.shape for name, tensor in weights.items()} == {n: t.shape for n, t in shipped.items()}
    assert all(tensor.dtype == torch.float16 for tensor in weights.values())
    assert len(said) == 3 and all("dB against" in line for line in said)

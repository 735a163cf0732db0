"""Images that a method learns from: read from a folder, made by the teacher, or drawn; kept as latents, made once."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from conftest import sbrush
from sbrush.console import SbrushError
from sbrush.models.latents import for_decoder, for_encoder
from sbrush.models.load import load_teacher
from sbrush.prompts import captions_as_prompts, make_prompts
from sbrush.sampling.generation import teacher_latents
from sbrush.sampling.image_folder import ImageFolder
from sbrush.stickers.draw import draw
from sbrush.stickers.world import all_captions, parse_caption, random_sticker, stream
from sbrush.storage import shards
from sbrush.training import images as module
from sbrush.training.images import SEEDS, TrainingImages, rows_of
from sbrush.training.recipes import RECIPES
from sbrush.training.request import ImagesRequest

SMALL = dataclasses.replace(RECIPES["lcm"], image_steps=2, image_guidance=2.0, images=0)
PROMPTS = make_prompts(["a cat", "a red dog", "a fish"], "three")


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(shards, "BLOCK", 4)
    monkeypatch.setattr(module, "BATCH", 2)


def folder_of(folder, count=6, *, captions=True):
    """Images of several sizes and modes, and their captions, two of them equal."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        pixels = rng.integers(0, 255, (40 + i, 50, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        (image if i % 2 else image.convert("L")).save(folder / f"{i:03d}.png")
    if captions:
        lines = ["a cat", "a cat", *(f"a red dog {i}" for i in range(2, count))]
        (folder / "captions.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def planned(request, teacher, out, *, recipe=SMALL, prompts=PROMPTS):
    model, accelerator = load_teacher(teacher and str(teacher)), Accelerator(cpu=True)
    if request.folder:
        found = ImageFolder.read(request.folder)
        prompts = captions_as_prompts(found.captions, "folder", "folder")
    return TrainingImages.plan(request, recipe, prompts, model, accelerator, out), model, accelerator


def test_a_folders_images_are_what_the_vae_makes_of_them(tmp_path, tiny_teacher, small_blocks):
    folder = folder_of(tmp_path / "photos")
    found, model, accelerator = planned(ImagesRequest(folder), tiny_teacher, tmp_path / "run")
    assert found.prompts.texts[:3] == ("a cat", "a cat", "a red dog 2") and list(found.places) == list(range(6))
    assert not (tmp_path / "run").exists()  # nothing is written before a run holds its folder
    found.fill(model, accelerator)
    rows = found.latents([4, 0, 5], torch.device("cpu"))
    assert rows.shape == (3, 4, 16, 16) and rows.dtype == torch.float32
    for row, i in zip(rows, (4, 0, 5), strict=True):
        with Image.open(folder / f"{i:03d}.png") as image:
            image = image.convert("RGB")
        width, height = image.size
        left, top = (width - min(width, height)) / 2, (height - min(width, height)) / 2
        image = image.resize(
            (32, 32), Image.Resampling.LANCZOS, box=(left, top, width - left, height - top)
        )  # the centre square
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.no_grad():
            wanted = model.vae.encode(x).latent_dist.mean * model.vae.config.scaling_factor
        assert torch.allclose(row, wanted[0], atol=2e-3 * float(1 + wanted.abs().max()))


def test_latents_of_vaes_with_a_mean_and_a_deviation_come_back(tiny_teacher):
    vae = load_teacher(str(tiny_teacher)).vae
    latents = torch.randn(2, 4, 3, 3)
    for _ in range(2):
        assert torch.allclose(for_encoder(vae, for_decoder(vae, latents)), latents, atol=1e-5)
        vae.register_to_config(latents_mean=[0.1, -2.0, 0.3, 1.0], latents_std=[0.5, 2.0, 1.0, 3.0])


def test_work_that_was_stopped_goes_on_where_it_was_and_nothing_is_read_twice(
    tmp_path, tiny_teacher, small_blocks, monkeypatch
):
    folder = folder_of(tmp_path / "photos", 10)
    (folder / "007.png").rename(tmp_path / "007.png")
    (folder / "007.png").write_bytes(b"none")
    request = ImagesRequest(folder, cache=tmp_path / "cache")
    found, model, accelerator = planned(request, tiny_teacher, tmp_path)
    with pytest.raises(SbrushError, match=r"007\.png is not an image") as refused:
        found.fill(model, accelerator)
    assert "the same command goes on" in refused.value.hint and found.shards.missing == 6  # the first block is there
    (tmp_path / "007.png").replace(folder / "007.png")
    opened, own = [], module.open_image
    monkeypatch.setattr(module, "open_image", lambda file: opened.append(file.name) or own(file))
    for wanted in (10, 0):  # another image, another key; then all is there
        found, model, accelerator = planned(request, tiny_teacher, tmp_path)
        found.fill(model, accelerator)
        assert len(opened) == wanted
        opened.clear()
    monkeypatch.setattr(ImageFolder, "remember", lambda *_: 1 / 0)
    planned(request, tiny_teacher, tmp_path)  # nor is a file's digest computed again


def test_the_teachers_own_images_are_the_ones_it_draws(tmp_path, tiny_teacher, small_blocks):
    recipe = dataclasses.replace(SMALL, images=5)
    found, model, accelerator = planned(ImagesRequest(), tiny_teacher, tmp_path, recipe=recipe)
    assert found.prompts.texts == ("a cat", "a red dog", "a fish", "a cat", "a red dog")
    assert list(found.places) == [0, 1, 2, 0, 1]
    found.fill(model, accelerator)
    wanted = next(teacher_latents(model, ["a fish", "a cat"], [SEEDS + 2, SEEDS + 3], steps=2, guidance=2.0))
    assert torch.allclose(found.latents([2, 3], torch.device("cpu")), wanted, atol=2e-3 * float(1 + wanted.abs().max()))


def test_images_are_of_prompts_all_over_the_list():
    assert list(rows_of(5, 0)) == [0, 1, 2, 3, 4]
    assert list(rows_of(10, 4)) == [0, 2, 5, 7]
    assert list(rows_of(3, 7)) == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("change", ["steps", "guidance", "prompts", "teacher"])
def test_what_images_depend_on_is_in_their_key(tmp_path, tiny_teacher, change):
    def key(recipe=SMALL, prompts=PROMPTS, teacher=tiny_teacher):
        return planned(ImagesRequest(), teacher, tmp_path, recipe=recipe, prompts=prompts)[0].source.key

    others = {
        "steps": {"recipe": dataclasses.replace(SMALL, image_steps=3)},
        "guidance": {"recipe": dataclasses.replace(SMALL, image_guidance=3.0)},
        "prompts": {"prompts": make_prompts(["a cat", "a red dog", "a bird"], "three")},
        "teacher": {"teacher": None},
    }
    assert key() == key(dataclasses.replace(SMALL, student_lr=1.0)) != key(**others[change])


def test_stickers_are_drawn_to_the_prompts(tmp_path, small_blocks):
    texts = ["a small red cat on a mint background", "a fish", "a sticker"]
    found, model, accelerator = planned(ImagesRequest(drawn=True), None, tmp_path, prompts=make_prompts(texts, "three"))
    found.fill(model, accelerator)
    latents = found.latents(range(3), torch.device("cpu"))
    for row, text in enumerate(texts):
        sticker = random_sticker(stream("training images", row), parse_caption(text))
        assert sticker.matches(parse_caption(text))
        drawn = torch.from_numpy(np.array(draw(sticker))).permute(2, 0, 1)
        assert (model.decode(latents[row : row + 1])[0].float() - drawn.float()).abs().mean() < 12
    assert all(parse_caption(caption.text) == caption for caption in all_captions(held_out=True))
    assert parse_caption("a submarine") is None


def ask(*more):
    shape = "--steps", 2, "--batch", 2, "--grid-every", 0, "--device", "cpu", "--precision", "float32"
    return sbrush("distill", *more, *shape)


def test_a_run_learns_from_a_folder_and_refuses_another_one(tmp_path, tiny_teacher):
    folder, out = folder_of(tmp_path / "photos"), tmp_path / "run"
    command = "--images", folder, "--teacher", tiny_teacher, "--recipe", "lcm", "--out", out
    done = ask(*command)
    assert done.returncode == 0, done.stderr
    config = json.loads((out / "config.json").read_text())
    assert config["prompts"]["count"] == 6 and config["images"]["count"] == 6 and len(config["images"]["sha256"]) == 64
    assert len(list((out / "latents").glob("*/*.safetensors"))) == 1
    Image.new("RGB", (64, 64), (10, 200, 30)).save(folder / "003.png")
    again = ask(*command)
    assert again.returncode == 2 and "images.sha256 was" in again.stderr
    planned_run = ask(*command, "--dry-run")
    assert f"images: those of {folder}" in planned_run.stdout and "6 prompts from" in planned_run.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--images", "PHOTOS", "--recipe", "swiftbrush"), "learns from prompts alone"),
        (("PROMPTS", "--image-cache", "cache", "--recipe", "swiftbrush"), "learns from prompts alone"),
        (("PROMPTS", "--images", "PHOTOS", "--recipe", "lcm"), "are the prompts, and there are others"),
        (("--images", "BARE", "--recipe", "lcm"), "have no captions beside them"),
        (("--images", "EMPTY", "--recipe", "lcm"), "has no images"),
        (("--images", "nowhere", "--recipe", "lcm"), "cannot read nowhere"),
        (("--images", "PHOTOS", "--recipe", "lcm", "--set", "images=9"), "has its own number of images"),
        (("PROMPTS", "--images", "stickers", "--recipe", "lcm"), "draws for the built-in teacher"),
        (("--recipe", "lcm"), "no prompts"),
        ((), "no prompts"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_hint(tmp_path, tiny_teacher, prompt_file, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "photos")
    folder_of(tmp_path / "bare", captions=False)
    (tmp_path / "empty").mkdir()
    places = {"PHOTOS": tmp_path / "photos", "BARE": tmp_path / "bare", "EMPTY": tmp_path / "empty"}
    places["PROMPTS"] = prompt_file
    done = ask(*(places.get(a, a) for a in arguments), "--teacher", tiny_teacher, "--out", tmp_path / "run")
    assert done.returncode == 2 and said in done.stderr and "\nhint: " in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()


def test_a_prompt_that_the_world_cannot_draw_is_refused(tmp_path, prompt_file):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na submarine\n", encoding="utf-8")
    done = ask(prompts, "--images", "stickers", "--recipe", "stickers-lcm", "--out", tmp_path / "run")
    assert done.returncode == 2 and "cannot draw a submarine" in done.stderr and not (tmp_path / "run").exists()

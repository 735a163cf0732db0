"""Images that start from an image: where a student enters its ladder, what a mask leaves alone, what is refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import sbrush
from sbrush.console import SbrushError
from sbrush.core import add_noise, to_x0
from sbrush.models.load import load_student
from sbrush.noise import step_noises
from sbrush.sampling.edit_request import EditRequest, read_mask
from sbrush.sampling.editing import Edit, check_edit, fit_edit
from sbrush.sampling.generation import student_images, student_latents
from test_few_steps import student_folder

RUNGS = (999, 749, 499, 249)


@pytest.fixture(scope="module")
def student(tmp_path_factory, tiny_teacher):
    return load_student(str(student_folder(tmp_path_factory.mktemp("few") / "student", tiny_teacher)))


@pytest.fixture(scope="module")
def photo():
    values = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((32, 32), Image.Resampling.BICUBIC)


def edit_of(photo, strength, mask=None):
    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)
    return Edit(pixels, strength, mask)


@pytest.mark.parametrize(("strength", "place"), [(1, 0), (0.9, 0), (0.7, 1), (0.5, 2), (0.3, 3), (0.01, 3)])
def test_an_image_enters_at_the_rung_nearest_to_its_strength(photo, strength, place):
    assert edit_of(photo, strength).entry(RUNGS) == place


def test_the_steps_from_an_image_are_those_written_out_by_hand(student, photo):
    """At strength .5: noised to 499, a step to 249 with that step's own noise of the seed, a step to the end."""
    (drawn,) = student_latents(student, ["a cat"], [3], edit=edit_of(photo, 0.5))
    noises, cond = step_noises([3], student.latent_shape, 4), student.encode(["a cat"])
    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None].float() / 127.5 - 1
    x0 = student.vae.encode(pixels).latent_dist.mean * student.vae.config.scaling_factor
    for place in (2, 3):
        t = torch.tensor([RUNGS[place]])
        x = add_noise(x0, noises[place], t, student.schedule)
        x0 = to_x0(student.denoise(x, t, cond), x, t, student.schedule, "epsilon")
    assert torch.allclose(drawn, x0, rtol=1e-4, atol=1e-4)


def test_less_strength_leaves_more_of_the_image(student, photo):
    own = student.encode_images(torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None])
    starts = [edit_of(photo, 0.5).start(student, torch.randn(1, *student.latent_shape), rung)[0] for rung in RUNGS]
    far = [float((x - own).pow(2).mean()) for x in starts]
    assert far == sorted(far, reverse=True)


def test_outside_a_mask_every_bit_stays_and_inside_it_is_drawn(student, photo):
    mask = torch.zeros(1, 32, 32)
    mask[:, 8:20, 8:20] = 1
    edit = edit_of(photo, 0.6, mask)
    (drawn,) = student_images(student, ["a cat"], [3], edit=edit)
    own, same = edit.image, (drawn[0] == edit.image).all(0)
    far = torch.ones(32, 32, dtype=torch.bool)
    far[6:22, 6:22] = False
    assert same[far].all() and (drawn[0, :, 8:20, 8:20] != own[:, 8:20, 8:20]).any(0).float().mean() > 0.9
    # The latents outside are those of the image at every step: what is drawn inside fits what stays.
    _, known = edit.start(student, torch.randn(1, *student.latent_shape), 499)
    x0 = torch.randn(1, *student.latent_shape)
    assert torch.equal(known(x0)[..., 4:10, 4:10], x0[..., 4:10, 4:10])
    latent = student.encode_images(own[None])
    assert torch.equal(known(x0)[..., :4, :], latent[..., :4, :])


def test_another_image_is_cut_to_the_students_size(student, photo, capsys):
    wide = Image.new("RGB", (96, 64), "red")
    wide.paste(photo.resize((64, 64)), (16, 0))
    edit = fit_edit(EditRequest(wide, 0.5, Image.new("L", (96, 64), 255)), student)
    assert edit.image.shape == (3, 32, 32) and edit.mask.shape == (1, 32, 32) and edit.mask.all()
    assert (edit.image.float() - torch.from_numpy(np.array(photo)).permute(2, 0, 1)).abs().mean() < 20
    assert "96 x 64 pixels" in capsys.readouterr().err


def test_a_photo_is_turned_as_its_camera_was(tmp_path):
    image = Image.new("RGB", (20, 10), "white")
    image.paste("black", (0, 0, 10, 10))
    exif = image.getexif()
    exif[274] = 6  # turned by a quarter
    image.save(tmp_path / "photo.png", exif=exif)
    turned = EditRequest.read(tmp_path / "photo.png", 0.5, None).image
    assert turned.size == (10, 20) and turned.getpixel((5, 2)) == (0, 0, 0) and turned.getpixel((5, 18)) != (0, 0, 0)


def test_a_student_of_one_step_is_refused(tiny_teacher, tmp_path, student):
    one = load_student(str(student_folder(tmp_path / "one", tiny_teacher, steps=1)))
    for model, steps in ((one, None), (student, 1)):
        with pytest.raises(SbrushError, match="--image needs a student of several steps"):
            check_edit(model, steps)
    check_edit(student, 2)


def test_the_command_edits_an_image_and_says_how(tmp_path, tiny_teacher, photo):
    folder = student_folder(tmp_path / "student", tiny_teacher)
    photo.save(tmp_path / "photo.png")
    mask = Image.new("L", (32, 32))
    mask.paste(255, (8, 8, 20, 20))
    mask.save(tmp_path / "mask.png")
    flags = ["sample", "a cat", "--student", folder, "--image", tmp_path / "photo.png", "-o", tmp_path / "out.png"]
    done = sbrush(*flags, "--mask", tmp_path / "mask.png", "--strength", 0.5)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "out.png") as image:
        said = json.loads(image.text["sbrush"])
        assert said["strength"] == 0.5 and len(said["image"]) == len(said["mask"]) == 16
        assert np.array_equal(np.array(image)[:6], np.array(photo)[:6])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--strength", 0.5], "--strength is for an image to start from"),
        (["--mask", "mask.png"], "--mask is for an image to start from"),
        (["--image", "photo.png", "--strength", 0], "--strength 0 is out of range"),
        (["--image", "photo.png", "--strength", 1.5], "--strength 1.5 is out of range"),
        (["--image", "photo.png", "--strength", "nan"], "--strength nan is out of range"),
        (["--image", "photo.png", "--compare"], "--compare draws without an image"),
        (["--image", "text.png"], "cannot read the image text.png: not an image"),
        (["--image", "none.png"], "cannot read the image none.png: missing"),
        (["--image", "photo.png", "--mask", "small.png"], "the mask small.png is 16 x 16 pixels, the image 32 x 32"),
        (["--image", "photo.png", "--mask", "photo.png"], "the mask photo.png has colours"),
        (["--image", "photo.png", "--mask", "black.png"], "nothing would be drawn anew"),
        (["--image", "photo.png"], "--image needs a student of several steps"),
    ],
)
def test_what_cannot_be_edited_is_refused(tmp_path, monkeypatch, photo, flags, said):
    monkeypatch.chdir(tmp_path)
    photo.save("photo.png")
    Image.new("L", (16, 16), 255).save("small.png")
    Image.new("L", (32, 32)).save("black.png")
    (tmp_path / "text.png").write_text("no image")
    done = sbrush("sample", "a cat", *flags)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("hint:") == 1
    assert not (tmp_path / "out.png").exists()


def test_a_mask_may_be_of_any_gray_kind(tmp_path, photo):
    for mode in ("1", "L", "I;16", "RGB"):
        image = Image.new(mode, (32, 32), {"1": 1, "L": 255, "I;16": 65535, "RGB": (255, 255, 255)}[mode])
        image.save(tmp_path / "mask.png")
        assert read_mask(tmp_path / "mask.png", photo).getextrema() == (255, 255)


def test_a_mask_of_which_nothing_is_left_is_refused(student):
    """The image would come back as it is, and nothing would say so."""
    whole, masked = Image.new("RGB", (64, 32)), np.zeros((32, 64), np.uint8)
    masked[:, :16] = 255  # cut off with the image's edges
    with pytest.raises(SbrushError, match="nothing is left of the mask"):
        fit_edit(EditRequest(whole, 0.6, Image.fromarray(masked)), student)
    masked[:, :17] = 255
    assert fit_edit(EditRequest(whole, 0.6, Image.fromarray(masked)), student).mask.sum() == 32

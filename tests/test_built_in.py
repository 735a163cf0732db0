"""The students that come with sbrush: by name, in one step and in several, from an image, and as one to start from."""

import json

import pytest
import torch
from PIL import Image

from conftest import sbrush
from sbrush.console import SbrushError
from sbrush.models.load import load_student, load_teacher
from sbrush.models.places import teacher_of
from sbrush.models.source import built_in_student
from sbrush.sampling.generation import student_images
from sbrush.sampling.opening import open_student
from sbrush.stickers.judge import Judge

STEPS = (1, 2, 4)


def test_a_name_is_that_of_a_built_in_student_unless_a_folder_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [built_in_student(name) for name in (None, "stickers", "stickers-few", "stickers-4", "few")] == [
        "stickers", "stickers", "stickers-few", None, None,
    ]  # fmt: skip
    (tmp_path / "stickers-few").mkdir()
    assert built_in_student("stickers-few") is None
    with pytest.raises(SbrushError, match="stickers-few"):
        load_student("stickers-few")


def test_the_student_of_several_steps_draws_what_is_asked_in_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few, judge = load_student("stickers-few"), Judge.load()
    assert few.step_choices[:4] == (1, 2, 3, 4) and few.fresh_noise and teacher_of("stickers-few") is None
    assert few.rungs(1) == few.rungs()[:1] and len(few.rungs()) == 4
    texts = ["a big red cat on a mint background"] * 8
    images = {steps: torch.cat(list(student_images(few, texts, range(8), steps=steps))) for steps in STEPS}
    for drawn in images.values():
        seen = judge.classify(judge.features(drawn))
        assert all((value == value.mode().values).sum() >= 7 for value in seen.values())
    assert not torch.equal(images[1], images[4]) and open_student("stickers-few").runtime is None
    weights = load_teacher().unet.state_dict()
    assert any(not torch.equal(value, weights[name]) for name, value in few.unet.state_dict().items())


def test_it_starts_from_an_image_at_once(tmp_path):
    done = sbrush("sample", "a red cat", "--device", "cpu", "-o", tmp_path / "cat.png")
    assert done.returncode == 0, done.stderr
    refused = sbrush("sample", "a blue cat", "--image", tmp_path / "cat.png", "-o", tmp_path / "blue.png")
    assert refused.returncode == 2 and "hint:" in refused.stderr
    done = sbrush(
        "sample", "a blue cat", "--image", tmp_path / "cat.png", "--student", "stickers-few", "--device", "cpu",
        "-o", tmp_path / "blue.png",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "blue.png") as image:
        assert json.loads(image.info["sbrush"])["model"] == "stickers-few student (built in)"

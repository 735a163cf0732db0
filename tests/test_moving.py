"""Few photos made many: training/moving.py."""

import random

import pytest
import torch
from torchvision.transforms.functional import pil_to_tensor

from sbrush.stickers.robot import photos
from sbrush.training.moving import FILLS, MARGIN, moved, subject_box
from sbrush.training.personal import PERSONAL
from sbrush.training.photos import PhotoSource


def square(height=60, width=80, at=(10, 20), side=12):
    photo = torch.full((3, height, width), 200, dtype=torch.uint8)
    photo[:, at[0] : at[0] + side, at[1] : at[1] + side] = torch.tensor([20, 40, 60], dtype=torch.uint8)[:, None, None]
    return photo


def test_the_subject_is_what_is_before_a_plain_background():
    assert subject_box(square()) == (20, 10, 32, 22)
    assert subject_box(square(side=0)) is None
    noise = torch.randint(0, 256, (3, 60, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    assert subject_box(noise) is None and torch.equal(moved(noise, random.Random(1)), noise)


@pytest.mark.parametrize("side", [12, 45])
def test_the_subject_is_whole_elsewhere_in_another_size_on_its_own_background(side):
    photo, boxes = square(at=(5, 20), side=side), set()
    for number in range(20):
        image = moved(photo, random.Random(number))
        assert image.shape == photo.shape and image.dtype == torch.uint8
        left, top, right, bottom = box = subject_box(image)
        margin = MARGIN * 60 - 1.5
        assert min(left, top) >= margin and right <= 80 - margin and bottom <= 60 - margin
        assert abs((right - left) - (bottom - top)) <= 1
        assert FILLS[0] * 60 - 2 <= right - left <= FILLS[1] * 60 + 2
        assert (image[:, 0].float() - 200).abs().max() < 30  # but for ringing
        assert abs(int(image[0, (top + bottom) // 2, (left + right) // 2]) - 20) < 10
        boxes.add(box)
    assert len({box[0] for box in boxes}) > 5 and len({box[2] - box[0] for box in boxes}) > 3


def test_what_is_beyond_a_photos_edge_is_plain_even_if_the_subject_touches_it():
    photo = square(at=(0, 34), side=12)
    for number in range(5):
        image = moved(photo, random.Random(number))
        left, top, right, bottom = subject_box(image)
        assert abs((right - left) - (bottom - top)) <= 1  # no streak up to the edge


def test_robots_stay_robots_in_sizes_and_places_of_the_world():
    for photo in map(pil_to_tensor, photos()):
        left, top, right, bottom = subject_box(moved(photo, random.Random(3)))
        assert 25 <= max(right - left, bottom - top) <= 44


def test_rows_of_a_photo_differ_if_they_are_moved_and_only_then(tmp_path, tiny_teacher):
    from sbrush.models.load import load_student, load_teacher
    from test_few_steps import student_folder

    for number, photo in enumerate(photos()[:3]):
        photo.save(tmp_path / f"{number}.png")
    files = sorted(tmp_path.glob("*.png"))
    student = load_student(str(student_folder(tmp_path / "student", tiny_teacher, steps=1)))
    plain, other = (
        PhotoSource(files, 6, ["a zx"] * 6, load_teacher(str(tiny_teacher)), student, move) for move in (False, True)
    )
    assert torch.equal(plain._photo(0), plain._photo(3)) and not torch.equal(other._photo(0), other._photo(3))
    assert torch.equal(other._photo(4), other._photo(4)) and plain.key != other.key and other.about["moved"]


def test_only_the_built_in_world_moves_photos():
    assert PERSONAL["stickers"].move and not PERSONAL["any"].move

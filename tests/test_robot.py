"""The robot: a kind that the built-in world does not have."""

import torch

from sbrush.benchmarks import personal
from sbrush.benchmarks.kind_judge import (
    KNOWN,
    NONE,
    UNSEEN_WORDS,
    WORDS,
    KindJudge,
    _pairs,
    _stickers,
    drawings,
    exam,
    negatives,
    train,
)
from sbrush.benchmarks.personal import Judges, measure, table
from sbrush.models.load import load_student
from sbrush.stickers.draw import draw
from sbrush.stickers.judge import Judge
from sbrush.stickers.robot import COLOUR, KIND, draw_robot, photos, random_robot
from sbrush.stickers.world import ATTRIBUTES, KINDS, Caption, random_sticker, stream


def test_photos_are_of_one_robot_in_six_places_and_the_same_each_time():
    images = photos()
    assert len(images) == 6 and all(image.size == (64, 64) for image in images)
    assert [image.tobytes() for image in images] == [image.tobytes() for image in photos()]
    assert len({image.getpixel((0, 0)) for image in images}) == 6


def test_a_robot_is_as_its_caption_says_and_changes_no_other_kind():
    robot = random_robot("x", 1, Caption(background="night", size="big"))
    assert (robot.kind, robot.colour, robot.background, robot.size) == ("robot", COLOUR, "night", "big")
    assert "robot" not in KINDS and "robot" not in ATTRIBUTES["kind"]
    sticker = random_sticker(stream("x", 1), Caption(kind="cat"))
    before = draw(sticker).tobytes()
    assert draw_robot(robot).tobytes() != before and draw(sticker).tobytes() == before


def test_the_judge_learns_from_equally_many_drawings_of_each_kind():
    images, kinds = drawings("test", 2)
    assert images.shape == (2 * len(KNOWN), 3, 64, 64) and kinds.bincount().tolist() == [2] * len(KNOWN)


def test_negatives_are_of_each_sort_and_none_is_a_drawing():
    some = negatives("test", 6, load_student())
    assert set(some) == {"meaningless words", "two blended", "halves joined", "warped", "blurred"}
    ones, others, _ = _pairs("test", 6)
    for sort, images in some.items():
        assert images.shape == (6, 3, 64, 64) and images.dtype == torch.uint8
        if sort != "meaningless words":
            for image, one, other in zip(images.float(), ones, others, strict=True):
                assert min((image - one).abs().mean(), (image - other).abs().mean()) > 0.5, sort
    halves = some["halves joined"].float()
    assert (((halves == ones) | (halves == others)).all(dim=1)).all()
    robots = [KIND in (one.kind, other.kind) for one, other in _stickers("test", 6)]
    assert sum(robots) == 2


class Blind(KindJudge):
    """Sees a robot in everything."""

    def kinds(self, images):
        return torch.full((len(images),), KNOWN.index(KIND))


def test_the_judge_is_examined_on_what_it_has_not_seen():
    found = exam(Blind(), load_student(), each=1)
    assert found["robots right"] == found["warped called robots"] == 1 and 0 < found["drawings right"] < 0.1
    assert not set(WORDS) & set(UNSEEN_WORDS) and "zx" in UNSEEN_WORDS


def test_a_judge_is_trained_and_can_say_none():
    judge = train(load_student(), each=2, steps=3, batch=8)
    images, _ = drawings("test", 1)
    assert judge(images.float() / 127.5 - 1).shape == (len(KNOWN), NONE + 1)
    assert not any(parameter.requires_grad for parameter in judge.parameters())


def test_the_table_of_a_run():
    real = personal._real("zx")
    row = measure("robots", real, Judges(Judge.load(), Blind()), "zx", (1, 4, 3))
    assert row.robot == 1 and row.background == 1 and row.size > 0.9 and row.asked <= row.size
    assert 0 <= row.others < 0.9  # robots, whatever a caption names
    lines = table([row, row]).splitlines()
    assert len(lines) == 4 and lines[3].endswith("| 1.00 |")

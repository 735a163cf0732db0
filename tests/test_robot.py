"""The robot: a kind that the built-in world does not have."""

import torch

from sbrush.benchmarks import personal
from sbrush.benchmarks.personal import KNOWN, KindJudge, drawings, measure, table
from sbrush.stickers.draw import draw
from sbrush.stickers.judge import Judge
from sbrush.stickers.robot import COLOUR, draw_robot, photos, random_robot
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


def test_the_table_of_a_run():
    real = personal._real("zx")
    known = KindJudge(Judge.load(), torch.nn.Linear(128, len(KNOWN)))
    torch.nn.init.zeros_(known.layer.weight)
    torch.nn.init.constant_(known.layer.bias, 0)
    known.layer.bias.data[KNOWN.index("robot")] = 1.0
    row = measure("robots", real, known, "zx", (1, 4, 3))
    assert row.robot == 1 and row.background == 1 and row.size > 0.9 and row.asked <= row.size
    assert 0 <= row.others < 0.9  # robots, whatever a caption names
    lines = table([row, row]).splitlines()
    assert len(lines) == 4 and lines[3].endswith("| 1.00 |")

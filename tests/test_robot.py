"""The robot: a kind that the built-in world does not have."""

from sbrush.benchmarks.personal import KNOWN, drawings
from sbrush.stickers.draw import draw
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

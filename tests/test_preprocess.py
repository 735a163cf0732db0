"""Control images: canny against OpenCV's own edges, outlines of drawn stickers."""

import numpy as np
import torch

from sbrush.sampling.preprocess import PREPROCESSORS, canny, outline, silhouette
from sbrush.stickers.draw import draw
from sbrush.stickers.world import BACKGROUNDS, Caption, random_sticker, stream

# cv2.Canny(image, 100, 200) of OpenCV 5.0 for the image of `drawn`.
OPENCV = """
............#...........
.......................#
...........#.........##.
.........##.##.....##...
.......##.....##.##.....
..##..##.......##.......
##....#......##.#.......
.....#.....##....#......
.....#...##......#....##
....#...#........#..##..
.....#...........#......
...#.#...........#......
###...#.........#.......
......##.......##.......
.......##.....##.......#
.........#####.......##.
......##...........##...
....##...........##.....
..##...........##.......
.#............#.........
"""


def test_canny_finds_opencvs_edges_to_the_pixel():
    """Three channels with edges of their own, slants of every direction, chains that start below the high threshold."""
    y, x = np.mgrid[0:20, 0:24]
    disc = 200 * ((x - 11) ** 2 + (y - 9) ** 2 < 40)
    image = np.stack([disc, 9 * x, 60 * ((x + 2 * y) // 13 % 3)]).astype(np.uint8)
    wanted = [[255 * (mark == "#") for mark in row] for row in OPENCV.split()]
    found = canny(torch.from_numpy(np.stack([image, np.zeros_like(image)])))
    assert found.dtype == torch.uint8 and found.shape == (2, 3, 20, 24)
    assert found[0].tolist() == [wanted] * 3 and not found[1].any()


def test_an_outline_is_the_edge_of_what_stands_on_the_background():
    image = torch.full((3, 12, 12), 200, dtype=torch.uint8)
    image[:, 3:9, 2:10] = 20
    image[:, 5:7, 4:8] = 200  # a hole of the background's colour is no edge
    inside, edge = silhouette(image[None])[0, 0], outline(image[None])[0]
    wanted = torch.zeros(12, 12, dtype=torch.bool)
    wanted[3:9, 2:10] = True
    assert torch.equal(inside, wanted)
    wanted[4:8, 3:9] = False
    assert torch.equal(edge, wanted.expand(3, -1, -1).to(torch.uint8) * 255)


def test_nothing_has_no_outline_and_what_fills_the_image_has_its_edge():
    assert not outline(torch.full((1, 3, 8, 8), 30, dtype=torch.uint8)).any()
    halves = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    halves[..., 3:] = 255  # the frame's median is white, then: the thing is black and touches three sides
    assert torch.equal(silhouette(halves)[0, 0], halves[0, 0] == 0)


def test_outlines_are_those_of_the_stickers_on_every_background():
    for place, background in enumerate(BACKGROUNDS):
        sticker = random_sticker(stream("outline", place), Caption(background=background))
        image = torch.from_numpy(np.array(draw(sticker))).permute(2, 0, 1)[None]
        rows, columns = (silhouette(image)[0, 0].any(dim).nonzero()[:, 0] for dim in (1, 0))
        wide = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1
        assert abs(float(wide) - 2 * sticker.radius) < 0.3 * sticker.radius
        noisy = (image.float() + 4 * torch.randn(image.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 255)
        same = silhouette(noisy.to(torch.uint8)) == silhouette(image)
        assert same.float().mean() > 0.995


def test_an_images_control_image_does_not_depend_on_its_batch():
    images = torch.stack(
        [torch.from_numpy(np.array(draw(random_sticker(stream("batch", i))))).permute(2, 0, 1) for i in range(4)]
    )
    for prepare in PREPROCESSORS.values():
        assert torch.equal(prepare(images)[2:3], prepare(images[2:3]))
        assert torch.equal(prepare(images.contiguous(memory_format=torch.channels_last)), prepare(images))

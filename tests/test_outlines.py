"""Chamfer distance and intersection over union, on lines and areas whose figures are known."""

import torch

from sbrush.metrics.outlines import chamfer_distance, intersection_over_union


def test_two_parallel_lines_are_as_far_apart_as_they_are():
    lines = torch.zeros(3, 9, 12, dtype=torch.bool)
    lines[0, 2] = lines[1, 5] = True
    lines[2, 2, :6] = True
    asked = lines[[0, 0, 2, 0]]
    drawn = lines[[0, 1, 0, 2]]
    half = sum(range(1, 7)) / 12 / 2  # the pixels of the longer line beyond the shorter: 1 to 6 away, of 12
    assert torch.allclose(chamfer_distance(asked, drawn), torch.tensor([0, 3, half, half]))


def test_a_line_against_nothing_is_as_far_as_can_be():
    line, nothing = torch.zeros(1, 3, 4, dtype=torch.bool), torch.zeros(1, 3, 4, dtype=torch.bool)
    line[0, 0, 0] = True
    assert chamfer_distance(line, nothing).tolist() == chamfer_distance(nothing, line).tolist() == [5]
    assert chamfer_distance(nothing, nothing).tolist() == [0]


def test_intersection_over_union_counts_pixels():
    one, other = torch.zeros(2, 4, 4, dtype=torch.bool), torch.zeros(2, 4, 4, dtype=torch.bool)
    one[0, :2], other[0, 1:3] = True, True
    assert torch.allclose(intersection_over_union(one, other), torch.tensor([1 / 3, 1.0]))

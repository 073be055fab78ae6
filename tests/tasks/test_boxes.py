"""Tests the geometry of boxes and the pairing of objects with queries, against slow references."""

from itertools import permutations

import pytest
import torch
from torchvision.ops import box_convert, generalized_box_iou

from xprune.tasks.boxes import cheapest_pairs, generalised_iou, queries_of_objects, to_corners


def boxes(count, seed):
    """Returns boxes (count, 4) as (x0, y0, x1, y1) between 0 and 1."""
    pairs = torch.rand(count, 2, 2, generator=torch.Generator().manual_seed(seed)).sort(1).values
    return pairs.flatten(1)


def test_corners_and_overlap_are_those_of_torchvision():
    a, b = boxes(5, 0), boxes(7, 1)
    torch.testing.assert_close(generalised_iou(a, b), generalized_box_iou(a, b))
    centred = box_convert(a, "xyxy", "cxcywh")
    torch.testing.assert_close(to_corners(centred), a)


def test_boxes_without_area_give_finite_overlaps():
    point = torch.tensor([[0.5, 0.5, 0.5, 0.5]])
    assert generalised_iou(point, torch.cat([point, boxes(3, 0)])).isfinite().all()


@pytest.mark.parametrize("rows, columns", [(4, 3), (3, 4), (3, 3), (2, 0)])
def test_pairs_are_the_cheapest(rows, columns):
    cost = torch.rand(rows, columns, generator=torch.Generator().manual_seed(rows))
    chosen = cost if rows <= columns else cost.T
    best = min(
        sum(chosen[i, p[i]] for i in range(len(chosen))) for p in permutations(range(chosen.shape[1]), len(chosen))
    )
    found = cheapest_pairs(cost)
    assert float(cost[found].sum()) == pytest.approx(float(best)) and len(found[0]) == min(rows, columns)


def test_a_cost_that_is_not_finite_is_the_last_choice():
    cost = torch.tensor([[torch.nan, 1.0], [2.0, torch.inf]])
    assert [each.tolist() for each in cheapest_pairs(cost)] == [[0, 1], [1, 0]]


def test_queries_of_objects():
    wanted, labels = boxes(3, 2), torch.tensor([1, 0, 1])
    found, order = torch.cat([boxes(2, 3), wanted]), torch.tensor([4, 0, 3, 1, 2])
    # Query i of the shuffled queries is query order[i] of the others. Queries 2, 3 and 4 have the boxes of the objects.
    expected = [order.tolist().index(2 + i) for i in range(3)]
    assert queries_of_objects(torch.full((5, 3), 1 / 3), found[order], labels, wanted).tolist() == expected
    few = queries_of_objects(torch.full((1, 3), 1 / 3), wanted[1:2], labels, wanted)
    assert few.tolist() == [-1, 0, -1]


def test_the_class_decides_between_equal_boxes():
    box = boxes(1, 4)
    probabilities = torch.tensor([[0.9, 0.1], [0.1, 0.9]])
    assert queries_of_objects(probabilities, box.expand(2, 4), torch.tensor([1, 0]), box.expand(2, 4)).tolist() == [
        1,
        0,
    ]

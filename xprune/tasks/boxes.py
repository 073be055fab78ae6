"""Computes with boxes: converts and compares them, and pairs the objects of an image with the queries of a model."""

import torch
from torch import Tensor


def to_corners(boxes: Tensor) -> Tensor:
    """Converts boxes (..., 4) from centre, width and height to corners.

    Args:
        boxes: The boxes as (centre x, centre y, width, height).

    Returns:
        The boxes as (x0, y0, x1, y1), in the same unit and shape.

    Example:
        >>> to_corners(torch.tensor([[5.0, 5.0, 4.0, 2.0]]))
        tensor([[3., 4., 7., 6.]])
    """
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def generalised_iou(a: Tensor, b: Tensor) -> Tensor:
    """Computes the generalised intersection over union (GIoU) of each box of one set with each box of another set.

    Source: Rezatofighi et al., "Generalized Intersection over Union", CVPR 2019. It is the intersection over union,
    minus the fraction of the smallest box around both that belongs to neither. It lies between -1 and 1.

    Args:
        a: Boxes (n, 4) as (x0, y0, x1, y1).
        b: Boxes (m, 4) in the same form and unit.

    Returns:
        A float tensor (n, m).

    Example:
        >>> boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 1.0, 2.0]])
        >>> generalised_iou(boxes, boxes)
        tensor([[1.0000, 0.5000],
                [0.5000, 1.0000]])
    """
    areas_a, areas_b = (sides.prod(-1) for sides in (a[:, 2:] - a[:, :2], b[:, 2:] - b[:, :2]))
    first, second = a[:, None], b[None]
    low, high = torch.maximum(first[..., :2], second[..., :2]), torch.minimum(first[..., 2:], second[..., 2:])
    both = (high - low).clamp_min(0).prod(-1)
    either = areas_a[:, None] + areas_b[None] - both
    low, high = torch.minimum(first[..., :2], second[..., :2]), torch.maximum(first[..., 2:], second[..., 2:])
    around = (high - low).clamp_min(0).prod(-1)
    # A box without area would otherwise give 0 / 0.
    tiny = torch.finfo(a.dtype).tiny
    return both / either.clamp_min(tiny) - (around - either) / around.clamp_min(tiny)


@torch.no_grad()
def cheapest_pairs(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs rows with columns one to one, so that the sum of the costs of all pairs is smallest (Hungarian algorithm).

    Args:
        cost: The cost of each pair, (rows, columns).

    Returns:
        (rows, columns) of the pairs, both int64 (pairs,), in the order of the rows. There are as many pairs as the
        shorter axis has entries.

    Example:
        >>> cheapest_pairs(torch.tensor([[5.0, 1.0], [9.0, 9.0], [0.0, 2.0]]))
        (tensor([0, 2]), tensor([1, 0]))
    """
    # scipy comes with scikit-learn. Its import takes time that other tasks need not spend.
    from scipy.optimize import linear_sum_assignment

    # scipy refuses NaN. A pair with a cost of NaN is then chosen only if nothing else is possible.
    finite = torch.nan_to_num(cost.detach().float().cpu(), nan=1e30, posinf=1e30, neginf=-1e30)
    rows, columns = linear_sum_assignment(finite.numpy())
    return torch.as_tensor(rows, device=cost.device), torch.as_tensor(columns, device=cost.device)


@torch.no_grad()
def queries_of_objects(probabilities: Tensor, found: Tensor, labels: Tensor, boxes: Tensor) -> Tensor:
    """Finds the query of a model that stands for each object of an image, as in the loss of DETR.

    Objects and queries are paired one to one. The cost of a pair is 5 times the L1 distance of the boxes, minus 2 times
    their GIoU, minus the probability of the object's class. These are the weights of DETR (Carion et al., 2020).

    Args:
        probabilities: The probability of each class at each query, (queries, classes).
        found: The boxes of the queries, (queries, 4), as (x0, y0, x1, y1) in fractions of the image's size.
        labels: The class of each object, int64 (objects,).
        boxes: The boxes of the objects, (objects, 4), in the same form.

    Returns:
        The query of each object, int64 (objects,). -1 for an object without a query, if there are more objects than
        queries.
    """
    cost = 5 * torch.cdist(found.float(), boxes.float(), p=1) - 2 * generalised_iou(found.float(), boxes.float())
    queries, objects = cheapest_pairs(cost - probabilities.float()[:, labels])
    result = torch.full_like(labels, -1)
    result[objects] = queries
    return result

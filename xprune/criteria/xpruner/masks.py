"""The table of masks, the sampling of gates from masks, and the penalties that can be added to the loss."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from xprune.costs.expected import TEMPERATURE, remaining

_STEEPNESS = 2.0
"""How steeply the masks rise with the rank of a unit at a warm start, see `from_scores`."""

_COLUMNS = 256
"""The number of columns of a low-rank table that are computed at a time, for all classes."""


class MaskTable(nn.Module):
    """A table of the logits of masks: one row that all classes share, and a row for each class. All logits start at 0.

    The row of a class is stored as its difference from a base row. Training the row of a class does not change the
    shared row. The shared row decides which units stay for all classes, so it must not follow the samples of one
    class.

    Args:
        classes: The number of classes.
        units: The number of units of all sites together.
        rank: If None, the differences are one table (classes, units). If a number r, they are the product of two
            matrices (classes, r) and (r, units). Memory then grows with classes + units, not with classes * units.
        sparse: If True, the gradient of the differences contains only the rows that were used. If False, it contains
            all rows.
        alone: If True, the base row is 0, so the row of a class is independent of the shared row. If False, the base
            row is the shared row.

    Example:
        >>> import torch
        >>> table = MaskTable(classes=3, units=5)
        >>> table(torch.tensor([2, 0, 2])).shape  # rows of three samples, of classes 2, 0 and 2
        torch.Size([3, 5])
        >>> table().shape  # the shared row
        torch.Size([1, 5])
    """

    def __init__(
        self, classes: int, units: int, rank: int | None = None, sparse: bool = False, alone: bool = False
    ) -> None:
        super().__init__()
        self.classes, self.alone = classes, alone
        self.shared = nn.Parameter(torch.zeros(units))
        self.deviations = nn.Embedding(classes, rank or units, sparse=sparse)
        nn.init.zeros_(self.deviations.weight)
        # One of the two matrices has to be random. If both were 0, both gradients would be 0, and nothing could be
        # learned.
        self.basis = nn.Parameter(torch.randn(rank, units) / rank**0.5) if rank else None

    @property
    def base(self) -> Tensor:
        """The base row, (units,): zeros, or the shared row. No gradient flows from it to the shared row."""
        return torch.zeros_like(self.shared) if self.alone else self.shared.detach()

    def forward(self, classes: Tensor | None = None) -> Tensor:
        """Returns rows of the table.

        Args:
            classes: The classes of the wanted rows, int64 (rows,). None means the shared row.

        Returns:
            Logits (rows, units). The shared row is (1, units).
        """
        if classes is None:
            return self.shared[None]
        deviations: Tensor = self.deviations(classes)
        return self.base + (deviations if self.basis is None else deviations @ self.basis)

    @torch.no_grad()
    def aggregate(self, how: str, undrawn: Sequence[int] = ()) -> Tensor:
        """Combines the rows into one logit for each unit.

        Args:
            how: "shared": returns the shared row. "mean" or "max": the mean or the maximum over the rows of classes.
            undrawn: The classes whose rows were never trained. They are left out. If no row of a class was trained, the
                shared row is returned.

        Returns:
            Logits (units,).
        """
        drawn = torch.ones(self.classes, dtype=torch.bool, device=self.shared.device)
        drawn[list(undrawn)] = False
        if how == "shared" or not drawn.any():
            return self.shared
        weight = self.deviations.weight[drawn]
        if self.basis is None:
            return self.base + (weight.mean(0) if how == "mean" else weight.amax(0))
        if how == "mean":
            return self.base + weight.mean(0) @ self.basis
        # The product is computed for some columns at a time, because the whole table may be too large for memory.
        return self.base + torch.cat([(weight @ part).amax(0) for part in self.basis.split(_COLUMNS, dim=1)])


def from_scores(values: Tensor) -> Tensor:
    """Turns scores of another criterion into logits that put the units in the same order. Training starts from them.

    Only the ranks of the scores are used, so the result does not depend on the scale of the scores. The formula is
    chosen for the case that half of the cost is allowed. Then a unit of rank r in (0, 1) starts with a mask m for which
    m / (1 - m) = (r / (1 - r))^2. So masks near the threshold start between 0 and 1, and training can still move them
    in both directions.

    Args:
        values: Scores (units,) that can be compared across sites.

    Returns:
        Logits, float32 (units,).
    """
    count = len(values)
    ranks = torch.empty(count, dtype=torch.float64)
    ranks[torch.argsort(values.cpu(), stable=True)] = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return (_STEEPNESS * TEMPERATURE * torch.logit(ranks)).float()


def spread(index: Tensor) -> Tensor:
    """Turns consecutive whole numbers into numbers from 0 to 1 that cover this interval evenly.

    The result is Weyl's sequence of the golden ratio. It is used instead of random numbers because it has no state: to
    continue a killed run, only the number of the step is needed.

    Args:
        index: Whole numbers, int64, of any shape.

    Returns:
        Numbers in [0, 1], float32, of the same shape.
    """
    # 2654435769 is 2^32 divided by the golden ratio. Integers are exact, and MPS has no float64.
    return (index * 2_654_435_769 % 2**32).float() / 2**32


LOWEST = 0.1
"""The smallest share of the cost of all units that masks for any budget are learned for."""


def any_share(step: Tensor, progress: float, lowest: float = LOWEST) -> Tensor:
    """Returns the share of the units' cost that masks for any budget may spend in a step.

    The shares of all steps cover the range of budgets evenly. The range begins at the dense model, and grows during
    learning until it reaches down to `lowest`. At first, no unit is preferred. A small model is then a random one, and
    its gradients say little.

    Args:
        step: The number of the step, int64, of any shape.
        progress: The part of the growth that is over, from 0 to 1. Larger values count as 1.
        lowest: The smallest share.

    Returns:
        Shares of the same shape, float32, from `lowest` to 1.
    """
    return 1 - (1 - lowest) * (1 - remaining(progress)) * spread(step)


def sampled(masks: Tensor) -> Tensor:
    """Samples gates of 0 and 1. The mask of a gate is the probability that the gate is 1.

    The gradient of a gate is passed to its mask unchanged. This is the straight-through estimator (Bengio et al.,
    2013). Some gradients are computed with the unit present, and others with the unit absent. By the trapezoidal rule,
    their mean estimates the change of the loss by removal better than a single gradient at a mask between 0 and 1,
    because the mean includes the curvature of the loss.

    Args:
        masks: Probabilities, of any shape.

    Returns:
        Gates of the same shape and dtype.
    """
    gates: Tensor = _StraightThrough.apply(masks)
    return gates


class _StraightThrough(torch.autograd.Function):
    """Samples gates of 0 and 1 in the forward pass, and passes gradients on unchanged in the backward pass."""

    @staticmethod
    def forward(ctx: Any, masks: Tensor) -> Tensor:
        """Returns gates of the shape and dtype of `masks`."""
        return (torch.rand_like(masks) < masks).to(masks.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Returns the gradient of the gates as that of the masks."""
        return gradient


SPARSITY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cost": lambda masks, cost: (masks * cost).sum(1),
    "l1": lambda masks, cost: masks.sum(1),
    "l2": lambda masks, cost: masks.square().sum(1).sqrt(),
}
"""The penalties for large masks, by name. "l2" is equation 7 of the paper.

Each is a function of masks (rows, units) and of the costs of these units (rows, units). It returns one number for each
row. If a script adds a penalty under a new name, `XPruner(sparsity=...)` accepts this name.
"""

SMOOTHNESS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "classes": lambda masks, shared: (masks - shared).abs().mean(),
    "units": lambda masks, shared: masks.diff(dim=1).abs().mean(),
}
"""The penalties for differences between masks, by name.

Both are means of absolute differences, like the L1 norm in equation 6 of the paper. The paper does not say which masks
are compared. "classes" compares the row of each class with the shared row, or with the mean of the rows of the batch.
"units" compares neighbouring units of a row. Heads and neurons have no natural order, so it has no meaning which units
are neighbours.

Each is a function of masks (rows, units) and of the masks that "classes" compares them with, (1, units) or
(rows, units). It returns one number. If a script adds a penalty under a new name, `XPruner(smoothness=...)` accepts
this name.
"""


def split(values: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Splits a tensor (..., units of all sites) into one tensor for each site, float32 on the CPU."""
    return tuple(part.detach().float().cpu().contiguous() for part in values.split(list(sizes), dim=-1))

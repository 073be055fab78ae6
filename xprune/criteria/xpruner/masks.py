"""The table of masks, how gates are drawn from masks, and the terms that can be added to the loss."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from xprune.costs.expected import TEMPERATURE

_STEEPNESS = 2.0
"""How steeply the masks of a warm start rise with the rank of a unit, see `from_scores`."""

_COLUMNS = 256
"""Units for which rows of all classes are computed at once, where the table is a product of factors."""


class MaskTable(nn.Module):
    """A table of logits of masks: one row that all classes share, and a row for each class. All start at 0.

    The row of a class is stored as its deviation from a base. Training the row of a class does not train the shared
    row: the shared row decides which units stay for all classes, so it learns only from samples of all classes.

    Args:
        classes: The number of classes.
        units: The number of units of all sites together.
        rank: None: the deviations are one table (classes, units). r: they are the product of two factors, (classes, r)
            and (r, units). Memory then grows with classes + units, not with classes * units.
        sparse: True: the gradient of the deviations holds only the rows that were drawn. False: it holds all rows.
        alone: True: the base is 0, so the row of a class is independent of the shared row. False: the base is the
            shared row.

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
        # One factor has to be random: if both were 0, both gradients would be 0, and nothing would be learned.
        self.basis = nn.Parameter(torch.randn(rank, units) / rank**0.5) if rank else None

    @property
    def base(self) -> Tensor:
        """The logits that rows of classes deviate from, (units,): 0, or the shared row without its gradient."""
        return torch.zeros_like(self.shared) if self.alone else self.shared.detach()

    def forward(self, classes: Tensor | None = None) -> Tensor:
        """Looks up rows of the table.

        Args:
            classes: The classes, int64 (rows,). None: the shared row.

        Returns:
            Logits (rows, units). (1, units) for the shared row.
        """
        if classes is None:
            return self.shared[None]
        deviations: Tensor = self.deviations(classes)
        return self.base + (deviations if self.basis is None else deviations @ self.basis)

    @torch.no_grad()
    def aggregate(self, how: str, undrawn: Sequence[int] = ()) -> Tensor:
        """Combines the rows into one logit for each unit.

        Args:
            how: "shared": the shared row. "mean" or "max": over the rows of classes.
            undrawn: Classes that were never drawn. Their rows are left out. If no class was drawn, the shared row is
                returned.

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
        # Some columns at a time: the full product (classes, units) may be too large for memory.
        return self.base + torch.cat([(weight @ part).amax(0) for part in self.basis.split(_COLUMNS, dim=1)])


def from_scores(values: Tensor) -> Tensor:
    """Turns scores of another criterion into logits to start from, in the same order.

    Only the ranks of the scores are used, so the result does not depend on the scale of the criterion. If half of the
    cost is allowed, a unit of rank r in (0, 1) starts with a mask m where m / (1 - m) = (r / (1 - r))^2. So masks near
    the budget's threshold start between 0 and 1, and can still move to either side.

    Args:
        values: Scores (units,) that are comparable across sites.

    Returns:
        Logits, float32 (units,).
    """
    count = len(values)
    ranks = torch.empty(count, dtype=torch.float64)
    ranks[torch.argsort(values.cpu(), stable=True)] = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return (_STEEPNESS * TEMPERATURE * torch.logit(ranks)).float()


def spread(index: Tensor) -> Tensor:
    """Turns whole numbers into numbers from 0 to 1 that cover the interval evenly: Weyl's sequence of the golden ratio.

    Any run of consecutive numbers gives an even cover. It is used instead of random numbers, because it has no state: a
    run that was killed needs only the number of the step to continue.

    Args:
        index: Whole numbers, int64, of any shape.

    Returns:
        Numbers in [0, 1], float32, of the same shape.
    """
    # 2654435769 is 2^32 divided by the golden ratio. Integers are exact, and MPS has no float64.
    return (index * 2_654_435_769 % 2**32).float() / 2**32


def sampled(masks: Tensor) -> Tensor:
    """Draws gates of 0 and 1, each 1 with its mask as the probability.

    The gradient of a gate is passed to its mask unchanged: the straight-through estimator (Bengio et al., 2013). Some
    gradients are taken with the unit kept, others with the unit removed. By the trapezoidal rule, their mean estimates
    the change of the loss by removal better than the gradient at a mask in between, because it includes curvature.

    Args:
        masks: Probabilities, of any shape.

    Returns:
        Gates of the same shape and dtype.
    """
    gates = (torch.rand_like(masks) < masks).to(masks.dtype)
    # The value is that of the gates, and the gradient that of the masks.
    return gates + masks - masks.detach()


SPARSITY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cost": lambda masks, cost: (masks * cost).sum(1),
    "l1": lambda masks, cost: masks.sum(1),
    "l2": lambda masks, cost: masks.square().sum(1).sqrt(),
}
"""Name -> a term that makes masks small. "l2" is equation 7 of the paper.

Each is a function of masks (rows, units) and of the costs of these units (rows, units). It returns one number for each
row. A script may add a term under a new name. `XPruner(sparsity=...)` then accepts this name.
"""

SMOOTHNESS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "classes": lambda masks, shared: (masks - shared).abs().mean(),
    "units": lambda masks, shared: masks.diff(dim=1).abs().mean(),
}
"""Name -> a term that makes masks similar: an L1 norm of differences, equation 6 of the paper.

The paper leaves the axis open. "classes" compares the row of each class with the shared row, or with the mean of the
rows that were drawn. "units" compares neighbouring units of a row. Heads and neurons have no order, so their neighbours
are neighbours by chance.

Each is a function of masks (rows, units) and of the masks that "classes" compares with, (1, units) or (rows, units). It
returns one number. A script may add a term under a new name. `XPruner(smoothness=...)` then accepts this name.
"""


def split(values: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Splits values (..., units) of all sites into a tensor for each site, float32 on the CPU."""
    return tuple(part.detach().float().cpu().contiguous() for part in values.split(list(sizes), dim=-1))

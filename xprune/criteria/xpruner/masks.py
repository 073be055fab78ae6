"""Class-wise masks: the table they are kept in, and the budget they are held to while they learn."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from xprune.costs.expected import TEMPERATURE

_SPREAD = 2.0
_COLUMNS = 256


class MaskTable(nn.Module):
    """Logits of masks: a row that all classes share, and one for each class, all 0 at the start.

    A step of a class's row does not train the shared one: what is kept for all is learned where all are asked for.

    classes, units   rows and columns of the table
    rank             None: deviations are a table (classes, units). r: they are factors (classes, r) times a basis
                     (r, units), so that memory grows with classes + units, not with their product
    sparse           gradients of the deviations hold the rows drawn alone
    alone            a class's row is its deviation alone; False: the shared row and its deviation
    """

    def __init__(
        self, classes: int, units: int, rank: int | None = None, sparse: bool = False, alone: bool = False
    ) -> None:
        super().__init__()
        self.classes, self.alone = classes, alone
        self.shared = nn.Parameter(torch.zeros(units))
        self.deviations = nn.Embedding(classes, rank or units, sparse=sparse)
        nn.init.zeros_(self.deviations.weight)
        self.basis = nn.Parameter(torch.randn(rank, units) / rank**0.5) if rank else None

    @property
    def base(self) -> Tensor:
        """What classes' rows deviate from (units,)."""
        return torch.zeros_like(self.shared) if self.alone else self.shared.detach()

    def forward(self, classes: Tensor | None = None) -> Tensor:
        """Logits (rows, units) of the classes, int64 (rows,); None: of the shared row, (1, units)."""
        if classes is None:
            return self.shared[None]
        deviations: Tensor = self.deviations(classes)
        return self.base + (deviations if self.basis is None else deviations @ self.basis)

    @torch.no_grad()
    def aggregate(self, how: str, undrawn: Sequence[int] = ()) -> Tensor:
        """One logit a unit (units,): of the "shared" row, or the "mean" or "max" over the classes that were drawn."""
        drawn = torch.ones(self.classes, dtype=torch.bool, device=self.shared.device)
        drawn[list(undrawn)] = False
        if how == "shared" or not drawn.any():
            return self.shared
        weight = self.deviations.weight[drawn]
        if self.basis is None:
            return self.base + (weight.mean(0) if how == "mean" else weight.amax(0))
        if how == "mean":
            return self.base + weight.mean(0) @ self.basis
        return self.base + torch.cat([(weight @ part).amax(0) for part in self.basis.split(_COLUMNS, dim=1)])


def from_scores(values: Tensor) -> Tensor:
    """Logits float32 (units,) in the order of comparable scores (units,), spread so that the budget parts them softly.

    Of the ranks alone, so that one spread fits every criterion: odds of the mask = (r / (1 - r))^2 at half the cost.
    """
    ranks = torch.empty(len(values), dtype=torch.float64)
    ranks[torch.argsort(values.cpu(), stable=True)] = (torch.arange(len(values), dtype=torch.float64) + 0.5) / len(
        values
    )
    return (_SPREAD * TEMPERATURE * torch.logit(ranks)).float()


def spread(index: Tensor) -> Tensor:
    """Numbers float32 in [0, 1], as even as can be over any run of indices int64: Weyl's sequence of the golden ratio.

    In place of chance: a run that goes on after a crash has nothing to remember. Integers, for want of float64 on MPS.
    """
    return (index * 2_654_435_769 % 2**32).float() / 2**32


def sampled(masks: Tensor) -> Tensor:
    """Gates of 0 and 1, each 1 with its mask's probability; gradients go straight through to the mask.

    The straight-through estimator (Bengio et al., 2013). Drawing evaluates the slope of the loss with a unit there
    and with it gone, whose mean is what its removal changes, curvature included (the trapezoidal rule).
    """
    return (torch.rand_like(masks) < masks).to(masks.dtype) + masks - masks.detach()


SPARSITY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cost": lambda masks, cost: (masks * cost).sum(1),
    "l1": lambda masks, cost: masks.sum(1),
    "l2": lambda masks, cost: masks.square().sum(1).sqrt(),
}
"""Sparsity of masks (rows, units) whose units cost (rows, units), one number a row; "l2" is the paper's equation 7.

Add your own under a new name, which `XPruner(sparsity=...)` then takes; the same holds for SMOOTHNESS.
"""

SMOOTHNESS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "classes": lambda masks, shared: (masks - shared).abs().mean(),
    "units": lambda masks, shared: masks.diff(dim=1).abs().mean(),
}
"""L1 norm of differences of masks (rows, units), the paper's equation 6, which leaves the axis open.

"classes" takes each class's difference from the row they share, or from the mean of those drawn: heads and neurons
have no order, so that the neighbours that "units" compares are neighbours by chance.
"""


def split(values: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Columns of all sites -> a tensor per site, float32 on the CPU."""
    return tuple(part.detach().float().cpu().contiguous() for part in values.split(list(sizes), dim=-1))

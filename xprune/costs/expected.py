"""Expected costs: what soft masks cost, and masks that are held at a budget while they learn."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xprune.core.budget import Budget
from xprune.core.costs import Costs, LinearCost

TEMPERATURE = 0.5
"""Of the sigmoid that turns logits into masks: the scale that learning rates of logits refer to."""


_HALVINGS = 24


_OPEN = 4.0  # logit, in temperatures, of a mask that nothing has pressed yet: 0.98


def remaining(progress: float) -> float:
    """The share of the way from the dense model's cost to the budget's that is left, at a progress in (0, 1).

    As in Zhu and Gupta (2017): the cost falls fast while there is much to spare, slowly at the end.
    """
    return (1 - min(progress, 1.0)) ** 3


@dataclass(frozen=True)
class UnitCosts:
    """What each unit adds to a model, as a share of the dense one, for each limit of a budget.

    unit    (limits, units);  base   (limits,);  allowed   (limits,), or (rows, limits) where rows differ, see `at`
    sizes   units of each site, of which `least` have to stay
    pairs   (limits, sites, sites): what a unit of one site costs for each unit of another, half on either side
    """

    unit: Tensor
    base: Tensor
    allowed: Tensor
    sizes: tuple[int, ...]
    least: tuple[int, ...]
    pairs: Tensor

    @staticmethod
    def of(costs: Costs, budget: Budget, device: torch.device) -> "UnitCosts":
        """What a site costs beside its units is shared out over them. Raises BudgetError for an impossible budget."""
        full = [site.size for site in costs.sites]
        limits = [(name, cost.linear(full), allowed) for name, cost, allowed in costs.limits(budget)]

        def shares(cost: LinearCost) -> Tensor:
            each = [(u * n + f) / n for n, u, f in zip(full, cost.unit, cost.fixed, strict=True)]
            return torch.cat([torch.full((n,), value) for n, value in zip(full, each, strict=True)]) / cost.total(full)

        pairs = torch.zeros(len(limits), len(full), len(full), device=device)
        for limit, (_, cost, _) in enumerate(limits):
            for i, j, each in cost.pairs:
                for a, b in ((i, j), (j, i)):
                    pairs[limit, a, b] += each / 2 / cost.total(full)
        return UnitCosts(
            torch.stack([shares(cost) for _, cost, _ in limits]).to(device),
            torch.tensor([cost.base / cost.total(full) for _, cost, _ in limits], device=device),
            torch.tensor([allowed / cost.total(full) for _, cost, allowed in limits], device=device),
            tuple(full),
            tuple(budget.floor(site) for site in costs.sites),
            pairs,
        )

    def at(self, shares: Tensor) -> "UnitCosts":
        """With a share (rows,) of all units allowed, and none that has to stay, whatever the budget."""
        return replace(self, allowed=self.base + shares[:, None] * (1 - self.base), least=(0,) * len(self.sizes))

    @property
    def budget(self) -> dict[str, list[float]]:
        """What is allowed, as plain data: a checkpoint of a run at another budget is not this one's."""
        return {"allowed": self.allowed.tolist(), "least": list(self.least)}

    def excess(self, masks: Tensor, progress: float = 1.0) -> Tensor:
        """(rows, limits): expected cost of masks (rows, units) over what is allowed by then, see `remaining`."""
        allowed = self.allowed + (1 - self.allowed) * remaining(progress)
        return self.base + self._paired(masks) + masks @ self.unit.T - allowed

    def _paired(self, masks: Tensor) -> Tensor:
        """(rows, limits): expected cost of what sites share, their units being drawn apart from each other."""
        if not self.pairs.any():
            return masks.new_zeros(())
        kept = self._kept_units(masks)
        return torch.einsum("ri,lij,rj->rl", kept, self.pairs, kept)

    def _kept_units(self, masks: Tensor) -> Tensor:
        """Expected units of each site (rows, sites)."""
        return torch.stack([part.sum(1) for part in masks.split(self.sizes, 1)], dim=1)

    @torch.no_grad()
    def _marginal(self, masks: Tensor, limit: Tensor) -> Tensor:
        """(rows, units): what a unit more costs each row beside its masks, by the limit (rows,) that binds it."""
        shared = 2 * torch.einsum("rij,rj->ri", self.pairs[limit], self._kept_units(masks))  # (rows, sites)
        return self.unit[limit] + shared.repeat_interleave(torch.tensor(self.sizes, device=masks.device), dim=1)

    def free(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """As `settle`, for masks that a penalty alone makes small: about 1 at logits of 0."""
        masks = torch.sigmoid(logits / TEMPERATURE + _OPEN)
        return masks, self._marginal(masks, torch.zeros(len(masks), dtype=torch.long, device=masks.device))

    def settle(self, logits: Tensor, progress: float = 1.0) -> tuple[Tensor, Tensor]:
        """(masks, costs): masks in (0, 1) that cost what is allowed, and what units cost by the binding limit.

        logits, masks, costs   (rows, units)

        masks = sigmoid((logits - shift) / TEMPERATURE), with the shift of each row found by bisection: the sparsity
        that a fixed weight on a penalty would have to be tuned for.
        """
        kept = self._kept(logits)
        with torch.no_grad():
            low, high = logits.min(1, keepdim=True).values - 10, logits.max(1, keepdim=True).values + 10
            for _ in range(_HALVINGS):
                middle = (low + high) / 2
                over = self.excess(self._held(logits, middle, kept), progress).amax(1, keepdim=True) > 0
                low, high = torch.where(over, middle, low), torch.where(over, high, middle)
            binding = self.excess(self._held(logits, high, kept), progress).argmax(1)
        masks = self._held(logits, high, kept)
        return masks, self._marginal(masks, binding)

    def _held(self, logits: Tensor, shift: Tensor, kept: Tensor) -> Tensor:
        return torch.sigmoid((logits - shift) / TEMPERATURE).masked_fill(kept, 1.0)

    @torch.no_grad()
    def _kept(self, logits: Tensor) -> Tensor:
        """The units (rows, units) that stay whatever the budget, being the best of a site that has to keep some."""
        kept = torch.zeros_like(logits, dtype=torch.bool)
        for part, whole, least in zip(logits.split(self.sizes, 1), kept.split(self.sizes, 1), self.least, strict=True):
            whole.scatter_(1, part.topk(least, dim=1).indices, True)
        return kept


def hold_cost(logits: Tensor, masks: Tensor, cost: Tensor, sparsity: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Adds to the gradient of logits as much of the sparsity term's as keeps the expected cost what it is.

    With g the gradient of the loss, r that of the term and a that of the cost, each by logits (rows, units):
    g + mu r, where mu solves (g + mu r) . a = 0. For sparsity = cost, that is the projection of g on the surface of
    equal cost, and mu the multiplier of the budget, estimated by least squares.
    """
    if not masks.requires_grad:
        return
    a = torch.autograd.grad((masks * cost).sum(), logits, retain_graph=True)[0]
    r = torch.autograd.grad(sparsity(masks, cost).sum(), logits, retain_graph=True)[0]
    scale = (r * a).sum(1, keepdim=True).clamp_min(torch.finfo(a.dtype).tiny)
    logits.register_hook(lambda g: g - (g * a).sum(1, keepdim=True) / scale * r)

"""Expected costs: what masks between 0 and 1 cost, and how masks are held at a budget while they learn.

A mask is the probability that a unit is kept. So a model with masks has an expected cost, by which gradients can flow.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xprune.core.budget import Budget
from xprune.core.costs import Costs, LinearCost

TEMPERATURE = 0.5
"""The temperature of the sigmoid that turns logits into masks. Learning rates of logits are chosen for it."""


_HALVINGS = 24
"""Steps of the bisection that finds the shift of logits. Each halves the error."""


_OPEN = 4.0
"""The sigmoid's argument for a mask whose logit is 0, if only a penalty makes masks small: the mask is 0.98."""


def remaining(progress: float) -> float:
    """Returns how much of the way from the dense model's cost to the budget is left at some progress of a run.

    The schedule is cubic, as in Zhu and Gupta (2017): the cost falls fast while there is much to spare, and slowly at
    the end.

    Args:
        progress: The progress, from 0 to 1. Larger values count as 1.

    Returns:
        (1 - progress)^3: 1 at the start, 0 at the end.
    """
    return (1 - min(progress, 1.0)) ** 3


@dataclass(frozen=True)
class UnitCosts:
    """The costs of all units of a model, as fractions of the dense model's cost, for each limit of a budget.

    Masks and logits are (rows, units): the units of all sites side by side, in the order of the sites. Each row is a
    model with masks of its own, for example the masks of one class.

    Attributes:
        unit: The cost that each unit adds alone, (limits, units). A cost that a site has beside its units is shared
            out over them.
        base: The cost of the model without any units, (limits,).
        allowed: The cost that the budget allows, (limits,). Or (rows, limits) if it differs between rows, see `at`.
        sizes: The number of units of each site.
        least: The number of units that each site has to keep.
        pairs: The cost of each pair of units of two sites, (limits, sites, sites). The entry [limit, i, j] holds one
            half of it, and [limit, j, i] the other half.

    Example:
        >>> from xprune import Site
        >>> costs = Costs((Site("mlp", "neuron", 9, 1, ("fc2",)),), {"macs": LinearCost(10.0, (0.0,), (10.0,))})
        >>> unit_costs = UnitCosts.of(costs, Budget(macs=0.5), torch.device("cpu"))
        >>> masks, _ = unit_costs.settle(torch.linspace(-1, 1, 9)[None])  # masks of 9 units that cost half
        >>> round(float(masks.sum() * 10 + 10), 3)
        50.0
    """

    unit: Tensor
    base: Tensor
    allowed: Tensor
    sizes: tuple[int, ...]
    least: tuple[int, ...]
    pairs: Tensor

    @staticmethod
    def of(costs: Costs, budget: Budget, device: torch.device) -> "UnitCosts":
        """Creates the unit costs from measured costs.

        Args:
            costs: The measured costs. One that is not linear is replaced by a linear one, see `Cost.linear`.
            budget: The budget, which says which resources are limited.
            device: The device of the masks.

        Raises:
            BudgetError: Even the smallest model costs more than the budget allows.
        """
        full = [site.size for site in costs.sites]
        limits = [(name, cost.linear(full), allowed) for name, cost, allowed in costs.limits(budget)]

        def shares(cost: LinearCost) -> Tensor:
            """Returns the cost of each unit with its share of the site's fixed cost, (units,)."""
            each = [(u * n + f) / n for n, u, f in zip(full, cost.unit, cost.fixed, strict=True)]
            return torch.cat([torch.full((n,), value) for n, value in zip(full, each, strict=True)]) / cost.total(full)

        pairs = torch.zeros(len(limits), len(full), len(full), device=device)
        for limit, (_, cost, _) in enumerate(limits):
            for i, j, each in cost.pairs:
                # A symmetric matrix, whose product with the kept units from both sides counts each pair once.
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
        """Returns the same costs with other limits: each row may keep units up to a fraction of their whole cost.

        Sites need not keep any unit then.

        Args:
            shares: The fraction for each row, (rows,).
        """
        return replace(self, allowed=self.base + shares[:, None] * (1 - self.base), least=(0,) * len(self.sizes))

    @property
    def budget(self) -> dict[str, list[float]]:
        """The limits as plain data, for the fingerprint of a checkpoint: a run at another budget must not resume it."""
        return {"allowed": self.allowed.tolist(), "least": list(self.least)}

    def excess(self, masks: Tensor, progress: float = 1.0) -> Tensor:
        """Returns how much the expected cost is over what is allowed by now.

        Args:
            masks: The probability that each unit is kept, (rows, units).
            progress: The progress of the run, from 0 to 1. Before the end, more is allowed, see `remaining`.

        Returns:
            (rows, limits), as fractions of the dense model's cost. Negative if there is room.
        """
        allowed = self.allowed + (1 - self.allowed) * remaining(progress)
        return self.base + self._of_pairs(masks) + masks @ self.unit.T - allowed

    def _of_pairs(self, masks: Tensor) -> Tensor:
        """Returns the expected cost of pairs of units, (rows, limits), as if all sites were drawn independently."""
        if not self.pairs.any():
            return masks.new_zeros(())
        kept = self._kept_units(masks)
        return torch.einsum("ri,lij,rj->rl", kept, self.pairs, kept)

    def _kept_units(self, masks: Tensor) -> Tensor:
        """Returns the expected number of units kept at each site, (rows, sites)."""
        return torch.stack([part.sum(1) for part in masks.split(self.sizes, 1)], dim=1)

    @torch.no_grad()
    def _cost_of_one_more(self, masks: Tensor, limit: Tensor) -> Tensor:
        """Returns what one more unit costs each row, beside the units that its masks keep, (rows, units).

        Args:
            masks: The probability that each unit is kept, (rows, units).
            limit: The index of the limit that binds each row, (rows,).
        """
        # The derivative of kept @ pairs @ kept is twice the product.
        shared = 2 * torch.einsum("rij,rj->ri", self.pairs[limit], self._kept_units(masks))  # (rows, sites)
        return self.unit[limit] + shared.repeat_interleave(torch.tensor(self.sizes, device=masks.device), dim=1)

    def free(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Turns logits into masks without holding them at a budget: a penalty in the loss has to make them small.

        Args:
            logits: (rows, units). A logit of 0 gives a mask of about 1.

        Returns:
            (masks, costs), both (rows, units): the masks, and what one more unit costs by the first limit.
        """
        masks = torch.sigmoid(logits / TEMPERATURE + _OPEN)
        first_limit = torch.zeros(len(masks), dtype=torch.long, device=masks.device)
        return masks, self._cost_of_one_more(masks, first_limit)

    def settle(self, logits: Tensor, progress: float = 1.0) -> tuple[Tensor, Tensor]:
        """Turns logits into masks whose expected cost is what is allowed by now.

        masks = sigmoid((logits - shift) / TEMPERATURE). Bisection finds the shift of each row. Without it, the weight
        of a sparsity penalty would have to be tuned until the cost is right.

        Args:
            logits: (rows, units). The scores of the units.
            progress: The progress of the run, from 0 to 1. Before the end, more is allowed, see `remaining`.

        Returns:
            (masks, costs), both (rows, units): masks in (0, 1), and 1 for units that always stay; and what one more
            unit costs by the limit that binds its row.
        """
        kept = self._always_kept(logits)
        with torch.no_grad():
            low, high = logits.min(1, keepdim=True).values - 10, logits.max(1, keepdim=True).values + 10
            for _ in range(_HALVINGS):
                middle = (low + high) / 2
                over = self.excess(self._shifted(logits, middle, kept), progress).amax(1, keepdim=True) > 0
                low, high = torch.where(over, middle, low), torch.where(over, high, middle)
            # `high` is the end of the interval that meets the limits.
            binding = self.excess(self._shifted(logits, high, kept), progress).argmax(1)
        masks = self._shifted(logits, high, kept)
        return masks, self._cost_of_one_more(masks, binding)

    def _shifted(self, logits: Tensor, shift: Tensor, kept: Tensor) -> Tensor:
        """Returns the masks of logits that are lowered by the shift of their row. Units that always stay have 1."""
        return torch.sigmoid((logits - shift) / TEMPERATURE).masked_fill(kept, 1.0)

    @torch.no_grad()
    def _always_kept(self, logits: Tensor) -> Tensor:
        """Returns which units stay in any case, bool (rows, units): the best ones of each site, as many as `least`."""
        kept = torch.zeros_like(logits, dtype=torch.bool)
        for part, of_site, least in zip(
            logits.split(self.sizes, 1), kept.split(self.sizes, 1), self.least, strict=True
        ):
            of_site.scatter_(1, part.topk(least, dim=1).indices, True)  # `split` gives views, so this fills `kept`
        return kept


def hold_cost(logits: Tensor, masks: Tensor, cost: Tensor, sparsity: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Adds the gradient of a sparsity term to that of the loss, so that a gradient step keeps the expected cost.

    Let g be the gradient of the loss by the logits, r that of the sparsity term and a that of the cost, each (rows,
    units). The logits get the gradient g + mu r. For each row, mu solves (g + mu r) . a = 0. If the sparsity term is
    the cost, this is the projection of g on the surface of equal cost. mu is then the multiplier of the budget,
    estimated by least squares.

    Args:
        logits: The logits, (rows, units). They get a hook that changes their gradient.
        masks: The masks made from these logits, (rows, units).
        cost: The cost of one more unit, (rows, units).
        sparsity: The sparsity term, a function of masks and cost.
    """
    if not masks.requires_grad:
        return
    a = torch.autograd.grad((masks * cost).sum(), logits, retain_graph=True)[0]
    r = torch.autograd.grad(sparsity(masks, cost).sum(), logits, retain_graph=True)[0]
    scale = (r * a).sum(1, keepdim=True).clamp_min(torch.finfo(a.dtype).tiny)
    logits.register_hook(lambda g: g - (g * a).sum(1, keepdim=True) / scale * r)

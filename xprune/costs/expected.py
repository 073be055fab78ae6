"""The expected cost of a model with learned masks, and two ways to keep this cost at a budget during learning.

A mask is the probability that a unit is kept, a number from 0 to 1. So a model with masks has an expected cost, and
gradients flow from this cost to the masks. Masks are computed from logits, one learned number for each unit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xprune.core.budget import Budget
from xprune.core.costs import Cost, Costs, LinearCost
from xprune.core.table_cost import TableCost
from xprune.costs.shift import points_and_rounds, solve_shift

TEMPERATURE = 0.5
"""The temperature of the sigmoid that turns logits into masks. The learning rates of logits are chosen to fit it."""


_OPEN = 4.0
"""The number that `UnitCosts.free` adds to the argument of the sigmoid, so that a logit of 0 gives a mask of 0.98."""


def remaining(progress: float) -> float:
    """Returns which part of the pruning is still to do at some time of a run, as a fraction from 1 to 0.

    Learning starts at the cost of the dense model and reaches the budget at the end. The schedule is cubic, as in Zhu
    and Gupta (2017): the cost falls fast at the start, when many units can be spared, and slowly at the end.

    Args:
        progress: The part of the run that is over, from 0 to 1. Larger values count as 1.

    Returns:
        (1 - progress)^3: 1 at the start, 0 at the end.
    """
    return (1 - min(progress, 1.0)) ** 3


@dataclass(frozen=True)
class _Tables:
    """Values that every step needs and that do not change. They are computed once, on the device of the masks.

    Attributes:
        site: The index of the site of each unit, int64 (units,).
        places: The indices of the units of each site, int64 (sites, units of the largest site). A smaller site has the
            number of all units in the entries that are left over.
        stays: True for the first entries of each site, as many as it has to keep, bool (sites, largest number to keep).
        paired: True if units have costs in pairs, see `UnitCosts.pairs`.
        full: The cost if all units stay, (limits,).
    """

    site: Tensor
    places: Tensor
    stays: Tensor
    paired: bool
    full: Tensor

    @staticmethod
    def of(unit: Tensor, base: Tensor, pairs: Tensor, sizes: Sequence[int], least: Sequence[int]) -> "_Tables":
        """Computes the values from those of `UnitCosts` with the same names."""
        site = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        places = torch.full((len(sizes), max(sizes)), sum(sizes))
        for row, part in zip(places, torch.arange(sum(sizes)).split(list(sizes)), strict=True):
            row[: len(part)] = part
        stays = torch.arange(max(least)) < torch.tensor(least)[:, None]
        counts = torch.tensor(sizes, dtype=unit.dtype, device=unit.device)
        full = base + unit.sum(1) + torch.einsum("i,lij,j->l", counts, pairs, counts)
        device = unit.device
        return _Tables(site.to(device), places.to(device), stays.to(device), bool(pairs.any()), full)


@dataclass(frozen=True)
class UnitCosts:
    """The costs of all units of a model, as fractions of the dense model's cost, for each limit of a budget.

    Masks and logits have the shape (rows, units). The units of all sites lie side by side, in the order of the sites.
    Each row of a mask tensor describes a different pruned model. For example, a row may hold the masks of one class.

    Attributes:
        unit: The cost of each unit alone, without the costs in `pairs`, (limits, units). A cost that a site has once,
            for all its units together, is divided equally among them.
        base: The cost of the model without any units, (limits,).
        allowed: The cost that the budget allows, (limits,). The method `at` gives each row its own limits. The shape is
            then (rows, limits).
        sizes: The number of units of each site.
        least: The number of units that each site has to keep.
        pairs: The cost of one unit of a site together with one unit of another site, (limits, sites, sites). The entry
            [limit, i, j] holds one half of this cost, and [limit, j, i] the other half.
        tables: Values that are computed from the others, once.

    Example:
        >>> from xprune import Site
        >>> costs = Costs((Site("mlp", "neuron", 9, 1, ("fc2",)),), {"macs": LinearCost(10.0, (0.0,), (10.0,))})
        >>> unit_costs = UnitCosts.of(costs, Budget(macs=0.5), torch.device("cpu"))
        >>> masks, _ = unit_costs.settle(torch.linspace(-1, 1, 9)[None])  # with them, the model costs half
        >>> round(float(masks.sum() * 10 + 10), 3)
        50.0
    """

    unit: Tensor
    base: Tensor
    allowed: Tensor
    sizes: tuple[int, ...]
    least: tuple[int, ...]
    pairs: Tensor
    tables: _Tables

    @staticmethod
    def of(costs: Costs, budget: Budget, device: torch.device) -> "UnitCosts":
        """Creates the unit costs from measured costs.

        Args:
            costs: The measured costs. A cost that is not linear is replaced by a linear one, see `Cost.linear`.
            budget: The budget, which says which resources are limited.
            device: The device of the masks.

        Raises:
            BudgetError: Even the smallest model costs more than the budget allows.
        """
        full = [site.size for site in costs.sites]
        limits = [(name, _linear(cost, full, allowed), allowed) for name, cost, allowed in costs.limits(budget)]

        def shares(cost: LinearCost) -> Tensor:
            """Returns the cost of each unit plus an equal part of the fixed cost of its site, (units of all sites,)."""
            each = [(u * n + f) / n for n, u, f in zip(full, cost.unit, cost.fixed, strict=True)]
            return torch.cat([torch.full((n,), value) for n, value in zip(full, each, strict=True)]) / cost.total(full)

        pairs = torch.zeros(len(limits), len(full), len(full), device=device)
        for limit, (_, cost, _) in enumerate(limits):
            for i, j, each in cost.pairs:
                # The matrix is symmetric. Its product with the numbers of kept units from both sides counts each pair
                # once.
                for a, b in ((i, j), (j, i)):
                    pairs[limit, a, b] += each / 2 / cost.total(full)
        unit = torch.stack([shares(cost) for _, cost, _ in limits]).to(device)
        base = torch.tensor([cost.base / cost.total(full) for _, cost, _ in limits], device=device)
        allowed = torch.tensor([allowed / cost.total(full) for _, cost, allowed in limits], device=device)
        least = tuple(budget.floor(site) for site in costs.sites)
        tables = _Tables.of(unit, base, pairs, full, least)
        return UnitCosts(unit, base, allowed, tuple(full), least, pairs, tables)

    def at(self, shares: Tensor, *, empty: bool = True) -> "UnitCosts":
        """Returns the same costs, where each row of masks has its own limit.

        The limit of a row is the cost of the model without units, plus a fraction of the cost of all units. The
        criterion `xpruner` learns, for each class, a mask that says which units to remove. The number of units to
        remove differs from step to step, so each of these masks needs its own limit. The same is true for the masks of
        all classes, if they are learned for any budget.

        Args:
            shares: The fraction for each row, (rows,).
            empty: If True, a site may lose all its units. If False, each site keeps as many units as before.
        """
        least = (0,) * len(self.sizes) if empty else self.least
        return replace(self, allowed=self.base + shares[:, None] * (1 - self.base), least=least)

    @property
    def least_share(self) -> float:
        """The share of the cost of all units, as in `at`, that a model with as few units as possible spends.

        It is the largest of the shares in all limits.
        """
        least = [
            torch.arange(size, device=self.unit.device) < few for size, few in zip(self.sizes, self.least, strict=True)
        ]
        smallest = torch.cat(least)[None].to(self.unit.dtype)
        cost = self._cost(smallest) - self.base
        return float((cost / (1 - self.base).clamp_min(torch.finfo(cost.dtype).tiny)).max())

    @property
    def budget(self) -> dict[str, list[float]]:
        """The limits as plain data. They are part of the fingerprint of a checkpoint, see `Loop.keep`.

        So a run at another budget cannot continue from the checkpoint.
        """
        return {"allowed": self.allowed.tolist(), "least": list(self.least)}

    def excess(self, masks: Tensor, progress: float = 1.0) -> Tensor:
        """Returns how much the expected cost of each row exceeds the cost that is allowed at this time of the run.

        Args:
            masks: The probability that each unit is kept, (rows, units).
            progress: The part of the run that is over, from 0 to 1. Before the end, a higher cost is allowed, see
                `remaining`.

        Returns:
            (rows, limits), as fractions of the dense model's cost. Negative if the cost is below the limit.
        """
        return self._cost(masks) - self._allowed(progress)

    def _allowed(self, progress: float) -> Tensor:
        """Returns the allowed cost at this time of the run, (limits,) or (rows, limits)."""
        return self.allowed + (1 - self.allowed) * remaining(progress)

    def _cost(self, masks: Tensor) -> Tensor:
        """Returns the expected cost of masks: from (..., units) to (..., limits).

        The numbers of kept units of two sites are treated as independent.
        """
        cost = self.base + masks @ self.unit.T
        if not self.tables.paired:
            return cost
        kept = self._kept_units(masks)
        return cost + torch.einsum("...i,lij,...j->...l", kept, self.pairs, kept)

    def _of_sites(self, values: Tensor, padding: float) -> Tensor:
        """Returns the values (..., units) of each site, (..., sites, units of the largest site), padded at the end."""
        padded = torch.cat([values, values.new_full((*values.shape[:-1], 1), padding)], dim=-1)
        return padded[..., self.tables.places]

    def _kept_units(self, masks: Tensor) -> Tensor:
        """Returns the expected number of units kept at each site: from (..., units) to (..., sites)."""
        return self._of_sites(masks, 0.0).sum(-1)

    @torch.no_grad()
    def _cost_of_one_more(self, masks: Tensor, limit: Tensor | int) -> Tensor:
        """Returns the cost of one more unit, in addition to the units that a row keeps, (rows, units).

        Args:
            masks: The probability that each unit is kept, (rows, units).
            limit: The index of the limit whose cost is meant: one number for all rows, or one for each row, (rows,).
        """
        cost = self.unit[limit].expand_as(masks)
        if not self.tables.paired:
            return cost
        # The derivative of kept @ pairs @ kept is twice the product.
        pairs = self.pairs[limit].expand(len(masks), -1, -1)
        shared = 2 * torch.einsum("rij,rj->ri", pairs, self._kept_units(masks))  # (rows, sites)
        return cost + shared[:, self.tables.site]

    def free(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Turns logits into masks without a budget. The caller adds a penalty to the loss, which makes masks small.

        Args:
            logits: (rows, units). A logit of 0 gives a mask of about 1.

        Returns:
            (masks, costs), both (rows, units). The costs are those of one more unit, in the first resource that the
            budget limits.
        """
        masks = torch.sigmoid(logits / TEMPERATURE + _OPEN)
        return masks, self._cost_of_one_more(masks, 0)

    def settle(self, logits: Tensor, progress: float = 1.0) -> tuple[Tensor, Tensor]:
        """Turns logits into masks whose expected cost is the cost that is allowed at this time of the run.

        masks = sigmoid((logits - shift) / TEMPERATURE). `solve_shift` finds the shift of each row. Without the shift,
        the weight of a sparsity penalty would have to be tuned until the cost is right.

        Args:
            logits: The learned scores of the units, (rows, units).
            progress: The part of the run that is over, from 0 to 1. Before the end, a higher cost is allowed, see
                `remaining`.

        Returns:
            (masks, costs), both (rows, units). A mask is in (0, 1), or 1 for a unit that always stays. The costs are
            those of one more unit, in the resource that is closest to its limit in that row.
        """
        kept = self._always_kept(logits)
        with torch.no_grad():
            scaled, least = logits / TEMPERATURE, self.base.expand(len(logits), -1)
            if kept is not None:
                scaled, least = scaled.masked_fill(kept, torch.inf), self._cost(kept.to(logits.dtype))
            allowed = self._allowed(progress).reshape(-1, len(self.unit))
            points, rounds = points_and_rounds(logits.device)
            shift = solve_shift(scaled, self._cost, allowed, least, self.tables.full, points, rounds)
        masks = torch.sigmoid(logits / TEMPERATURE - shift)
        if kept is not None:
            masks = masks.masked_fill(kept, 1.0)
        with torch.no_grad():
            binding = self.excess(masks, progress).argmax(1) if len(self.unit) > 1 else 0
        return masks, self._cost_of_one_more(masks, binding)

    @torch.no_grad()
    def _always_kept(self, logits: Tensor) -> Tensor | None:
        """Returns True for units that always stay, bool (rows, units). None if no site has to keep a unit.

        These are the best units of each site, as many as the site has to keep (`least`).
        """
        if not any(self.least):
            return None
        best = self._of_sites(logits, -torch.inf).topk(self.tables.stays.shape[1]).indices  # (rows, sites, most)
        units = self.tables.places.expand(len(logits), -1, -1).gather(2, best)
        # One more column takes what does not have to stay. It is cut off again.
        rows, count = logits.shape
        units = units.where(self.tables.stays, count).flatten(1)
        kept = torch.zeros(rows, count + 1, dtype=torch.bool, device=logits.device)
        return kept.scatter_(1, units, True)[:, :count]


def _linear(cost: Cost, full: Sequence[int], allowed: float) -> LinearCost:
    """Returns a linear cost of masks. For a measured cost, its slopes are those between the dense model and the limit.

    Args:
        cost: The cost.
        full: The number of units of each site.
        allowed: The largest cost that the budget allows.
    """
    if not isinstance(cost, TableCost):
        return cost.linear(full)
    # The numbers of units near the budget, if each site keeps the same fraction. Bisection finds the fraction.
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        fits = cost.total([max(1, round(middle * size)) for size in full]) <= allowed
        low, high = (middle, high) if fits else (low, middle)
    return cost.linear(full, [max(1, round(low * size)) for size in full])


def hold_cost(logits: Tensor, masks: Tensor, cost: Tensor, sparsity: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Changes the gradient of the logits, so that a gradient step does not change the expected cost.

    `UnitCosts.settle` computes its shift without gradients. So the gradient of the loss ignores that the cost is held.
    Here a sparsity term is added to the gradient of the loss, with the weight that keeps the cost equal. Let g be the
    gradient of the loss with respect to the logits, r that of the sparsity term and a that of the cost, each (rows,
    units). The logits get the gradient g + mu r. For each row, mu solves (g + mu r) . a = 0. If the sparsity term is
    the cost, this is the projection of g on the surface of equal cost. mu is then the multiplier of the budget,
    estimated by least squares.

    Args:
        logits: The logits, (rows, units). They get a hook that changes their gradient in the next backward pass.
        masks: The masks that `UnitCosts.settle` computed from these logits, (rows, units). If they need no gradient,
            nothing happens.
        cost: The cost of one more unit, (rows, units).
        sparsity: A function of (masks, cost) that returns the sparsity term.
    """
    if not masks.requires_grad:
        return
    fixed = masks.detach()
    # The derivative of a mask with respect to its logit, at a shift that does not change. It is 0 for a mask of 1.
    slope = (fixed - fixed * fixed) / TEMPERATURE
    a = cost * slope
    with torch.enable_grad():
        leaf = fixed.clone().requires_grad_()
        r = torch.autograd.grad(sparsity(leaf, cost).sum(), leaf)[0] * slope
    scale = (r * a).sum(1, keepdim=True).clamp_min(torch.finfo(a.dtype).tiny)
    logits.register_hook(lambda g: g - (g * a).sum(1, keepdim=True) / scale * r)

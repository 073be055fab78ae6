"""Allocation: decides how many units each site keeps, so that a plan meets a budget."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from xprune.core.budget import Budget
from xprune.core.costs import Cost, Costs
from xprune.core.plan import Plan
from xprune.core.scores import Scores

NORMALISATIONS = {"site": "mean", "loss": "cost", "plan": "none"}
"""Scale of the scores -> how they are made comparable across sites, see `normalise`."""


def normalise(scores: Scores, costs: Costs, budget: Budget, how: str | None = None) -> list[Tensor]:
    """Makes scores comparable across sites.

    Args:
        scores: The scores of a criterion.
        costs: The costs of the units.
        budget: The budget, for the resource that "cost" divides by.
        how: None to choose by `scores.scale`, see NORMALISATIONS. Otherwise one of these:

            - "mean": each score is divided by the mean absolute score of its site. The result says how a unit compares
              with the others of its site. It is not divided by the cost.
            - "cost": each score is divided by the cost of its unit, in the first resource that the budget limits, for
              example MACs.
            - "none": the scores stay as they are.

    Returns:
        For each site, float64 (units,).
    """
    how = how or NORMALISATIONS[scores.scale]
    values = [value.to(torch.float64) for value in scores.values]
    if how == "mean":
        return [value / value.abs().mean().clamp_min(torch.finfo(torch.float64).tiny) for value in values]
    if how == "cost":
        full = [site.size for site in costs.sites]
        cost = costs.of(next(iter(budget.shares)))
        least = 1e-9 * cost.total(full)  # a unit may cost nothing, and nothing can be divided by 0
        return [value / max(unit, least) for value, unit in zip(values, cost.units(full), strict=True)]
    return values


@dataclass(frozen=True)
class Allocation:
    """The sites of a model with their scores, and the limits that a plan has to meet. Selections build plans with it.

    The units of a site are kept in the order of their scores, best first. So a plan is given by a number of units for
    each site. A budget with `round_to` allows only some numbers. The way from one allowed number to the next is a step.

    Attributes:
        costs: The costs of the units.
        budget: The budget.
        values: For each site, scores that can be compared across sites, (units,). See `normalise`.
        counts: For each site, every number of units that it may keep, ascending.
        limits: For each resource that the budget limits, its name, its cost and the cost allowed.

    Example:
        >>> from xprune import LinearCost, Site
        >>> sites = (Site("a", "head", 3, 1, ("a.proj",)), Site("b", "head", 2, 1, ("b.proj",)))
        >>> costs = Costs(sites, {"macs": LinearCost(base=0.0, fixed=(0.0, 0.0), unit=(10.0, 10.0))})
        >>> scores = [torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0.5, 4.0])]
        >>> allocation = Allocation.on(costs, Budget(macs=0.6), scores)
        >>> kept = allocation.one_threshold()  # the three best units of all five
        >>> kept, allocation.plan(kept, "mine").keeps
        ([2, 1], ((0, 2), (1,)))
    """

    costs: Costs
    budget: Budget
    values: tuple[Tensor, ...]
    counts: tuple[tuple[int, ...], ...]
    limits: tuple[tuple[str, Cost, float], ...]

    @staticmethod
    def on(costs: Costs, budget: Budget, values: Sequence[Tensor]) -> "Allocation":
        """Creates an allocation.

        Args:
            costs: The costs of the units.
            budget: The budget to meet.
            values: For each site, scores that can be compared across sites, (units,).

        Raises:
            BudgetError: Even the smallest model costs more than the budget allows.
        """
        counts = tuple(tuple(budget.counts(site)) for site in costs.sites)
        return Allocation(costs, budget, tuple(values), counts, tuple(costs.limits(budget)))

    @property
    def full(self) -> list[int]:
        """The number of units of each site, if all are kept."""
        return [site.size for site in self.costs.sites]

    @property
    def least(self) -> list[int]:
        """The least number of units that each site may keep."""
        return [counts[0] for counts in self.counts]

    def fits(self, kept: Sequence[int], remaining: float = 0.0) -> bool:
        """Returns True if every limit is met, else False.

        Args:
            kept: The number of units kept at each site.
            remaining: Loosens the limits, for selections that approach the budget in steps. It is the fraction of the
                way from the dense model's cost to the limit that need not be done yet. 0 for the limits themselves, 1
                for the dense model's cost.
        """
        full = self.full
        return all(
            cost.total(kept) <= (allowed + (cost.total(full) - allowed) * remaining) * (1 + 1e-9)
            for _, cost, allowed in self.limits
        )

    def order(self, index: int) -> Tensor:
        """Returns the units of the site at `index`, best first, int64 (units,). Equal scores: the lower unit first."""
        return torch.argsort(self.values[index], descending=True, stable=True)

    def steps(self, index: int) -> list[tuple[float, int, int]]:
        """Lists the steps of the site at `index` from the least to the full number of units.

        Returns:
            For each step, (mean score of the units that it adds, number of units before, number of units after). The
            means fall, since better units are added first.
        """
        ordered = self.values[index][self.order(index)].tolist()
        counts = self.counts[index]
        sums = [0.0]
        for value in ordered:
            sums.append(sums[-1] + value)
        return [((sums[b] - sums[a]) / (b - a), a, b) for a, b in pairwise(counts)]

    @cached_property
    def _ascending(self) -> list[tuple[float, int, int]]:
        """The steps of all sites as (mean score, site, number of units before), worst first.

        Among equal scores, the site that keeps the largest fraction of its units comes first.
        """
        full = self.full
        return sorted(
            ((value, index, a) for index in range(len(self.counts)) for value, a, _ in self.steps(index)),
            key=lambda step: (step[0], -step[2] / full[step[1]], step[1]),
        )

    def one_threshold(self, remaining: float = 0.0) -> list[int]:
        """Finds the lowest threshold on the scores of all sites that meets the limits.

        Args:
            remaining: Loosens the limits, see `fits`.

        Returns:
            The number of units that each site keeps: those of all steps above the threshold.
        """
        steps = self._ascending
        # Bisection on the number of steps that are removed, worst first. All of them fit: `on` has checked it.
        low, high = 0, len(steps)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.fits(self._without(steps[:middle]), remaining) else (middle + 1, high)
        return self._without(steps[:low])

    def _without(self, removed: Sequence[tuple[float, int, int]]) -> list[int]:
        """Returns the number of units that each site keeps if these steps of `_ascending` are removed."""
        kept = self.full
        for _, index, count in removed:
            kept[index] = min(kept[index], count)
        return kept

    def fill(self, kept: Sequence[int], most: Sequence[int] | None = None) -> list[int]:
        """Spends what is left of the budget: adds steps, best first, as long as one fits.

        Args:
            kept: The number of units kept at each site so far.
            most: The largest number of units that each site may keep. None for all.

        Returns:
            The number of units kept at each site afterwards.
        """
        most, kept = list(most or self.full), list(kept)
        spent = {name: cost.total(kept) for name, cost, _ in self.limits}
        steps = [
            (value, index, a, b) for index in range(len(kept)) for value, a, b in self.steps(index) if a >= kept[index]
        ]
        full = self.full
        # Among equal scores, the site that keeps the smallest fraction of its units comes first.
        for _, index, a, b in sorted(steps, key=lambda step: (-step[0], step[2] / full[step[1]], step[1])):
            if a != kept[index] or b > most[index]:
                continue  # an earlier step of this site did not fit, so this one has nothing to build on
            after = {name: spent[name] + cost.step(kept, index, b) for name, cost, _ in self.limits}
            if all(after[name] <= allowed * (1 + 1e-9) for name, _, allowed in self.limits):
                kept[index], spent = b, after
        return kept

    def plan(self, kept: Sequence[int], selection: str) -> Plan:
        """Returns the plan that keeps the best units of each site.

        Args:
            kept: The number of units to keep at each site.
            selection: The name of the selection, for `Plan.info`. The costs that are predicted are added to it.
        """
        keeps = tuple(tuple(sorted(self.order(i)[:count].tolist())) for i, count in enumerate(kept))
        full = self.full
        achieved = {name: cost.total(kept) / cost.total(full) for name, cost, _ in self.limits}
        return Plan(self.costs.sites, keeps, {"selection": selection, "predicted": achieved})

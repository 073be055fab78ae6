"""Allocation: decides how many units each site keeps, so that a plan meets a budget. Selections use it."""

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
"""For each value of `Scores.scale`, how scores of different sites are made comparable, see `normalise`."""


def normalise(scores: Scores, costs: Costs, budget: Budget, how: str | None = None) -> list[Tensor]:
    """Makes the scores of different sites comparable, so that one threshold can be used for all sites.

    Args:
        scores: The scores of a criterion.
        costs: The costs of the units.
        budget: The budget. The method "cost" uses the first resource that it limits, for example MACs.
        how: The method. If None, NORMALISATIONS gives the method for `scores.scale`.

            - "mean": each score is divided by the mean absolute score of its site. The result compares a unit with the
              other units of its site. The cost of the unit is ignored.
            - "cost": each score is divided by the cost of its unit.
            - "none": the scores stay as they are.

    Returns:
        A list with one float64 tensor (units,) for each site.
    """
    how = how or NORMALISATIONS[scores.scale]
    values = [value.to(torch.float64) for value in scores.values]
    if how == "mean":
        return [value / value.abs().mean().clamp_min(torch.finfo(torch.float64).tiny) for value in values]
    if how == "cost":
        full = [site.size for site in costs.sites]
        cost = costs.of(budget.limited[0])
        # A unit may cost nothing, and a score cannot be divided by 0.
        least = 1e-9 * cost.total(full)
        return [value / max(unit, least) for value, unit in zip(values, cost.units(full), strict=True)]
    return values


@dataclass(frozen=True)
class Allocation:
    """The sites of a model with their scores, and the limits that a plan has to meet. Selections build plans with it.

    Each site keeps its units with the highest scores. So the numbers of kept units determine the plan. A budget with
    `round_to` allows only some numbers. A step adds to a site the units between one allowed number and the next.

    Attributes:
        costs: The costs of the units.
        budget: The budget.
        values: The scores of the units of each site, (units,). Scores of different sites have to be comparable, see
            `normalise`.
        counts: For each site, all numbers of units that it may keep, in ascending order.
        limits: (name, cost, allowed cost) of each resource that the budget limits.

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
            values: The scores of the units of each site, (units,). Scores of different sites have to be comparable.

        Raises:
            BudgetError: Even the smallest model costs more than the budget allows.
        """
        counts = tuple(tuple(budget.counts(site)) for site in costs.sites)
        return Allocation(costs, budget, tuple(values), counts, tuple(costs.limits(budget)))

    @property
    def full(self) -> list[int]:
        """The number of units of each site in the dense model."""
        return [site.size for site in self.costs.sites]

    @property
    def least(self) -> list[int]:
        """The smallest number of units that each site may keep."""
        return [counts[0] for counts in self.counts]

    def fits(self, kept: Sequence[int], remaining: float = 0.0) -> bool:
        """Returns True if every limit is met, else False.

        Args:
            kept: The number of units kept at each site.
            remaining: A selection that prunes little by little may exceed the budget until its end. `remaining` is the
                part of the pruning that is still to do. 0 means that the limits of the budget hold. 1 means that the
                cost of the dense model is allowed. Values between them give a limit between these costs.
        """
        full = self.full
        return all(
            cost.total(kept) <= (allowed + (cost.total(full) - allowed) * remaining) * (1 + 1e-9)
            for _, cost, allowed in self.limits
        )

    def order(self, index: int) -> Tensor:
        """Returns the indices of the units of the site at `index`, best score first, int64 (units,).

        Among equal scores, the unit with the lower index comes first.
        """
        return torch.argsort(self.values[index], descending=True, stable=True)

    def steps(self, index: int) -> list[tuple[float, int, int]]:
        """Lists the steps of the site at `index`, from the smallest allowed number of units to all units.

        Returns:
            For each step, (mean score of the units that it adds, number of units before, number of units after). The
            mean scores fall from step to step, since better units are added first.
        """
        ordered = self.values[index][self.order(index)].tolist()
        counts = self.counts[index]
        sums = [0.0]
        for value in ordered:
            sums.append(sums[-1] + value)
        return [((sums[b] - sums[a]) / (b - a), a, b) for a, b in pairwise(counts)]

    @cached_property
    def _ascending(self) -> list[tuple[float, int, int]]:
        """The steps of all sites as (mean score, site, number of units before). The worst step comes first.

        Among equal mean scores, the step of the site that keeps the largest fraction of its units comes first.
        """
        full = self.full
        return sorted(
            ((value, index, a) for index in range(len(self.counts)) for value, a, _ in self.steps(index)),
            key=lambda step: (step[0], -step[2] / full[step[1]], step[1]),
        )

    def one_threshold(self, remaining: float = 0.0) -> list[int]:
        """Finds the lowest threshold that meets the limits, if one threshold is used for all sites.

        Args:
            remaining: The part of the pruning that is still to do, see `fits`. 0 means that the limits of the budget
                hold.

        Returns:
            The number of units that each site keeps. A step is kept if its mean score is above the threshold.
        """
        steps = self._ascending
        # Bisection on the number of steps that are removed, the worst first. If all steps are removed, the limits are
        # met: `on` has checked this.
        low, high = 0, len(steps)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.fits(self._without(steps[:middle]), remaining) else (middle + 1, high)
        return self._without(steps[:low])

    def _without(self, removed: Sequence[tuple[float, int, int]]) -> list[int]:
        """Returns the number of units that each site keeps after these steps of `_ascending` are removed."""
        kept = self.full
        for _, index, count in removed:
            kept[index] = min(kept[index], count)
        return kept

    def fill(self, kept: Sequence[int], most: Sequence[int] | None = None) -> list[int]:
        """Spends the rest of the budget: adds steps, the best mean score first, and skips those that exceed a limit.

        Args:
            kept: The number of units that each site keeps so far.
            most: The largest number of units that each site may keep. If None, a site may keep all units.

        Returns:
            The number of units that each site keeps afterwards.
        """
        most, kept = list(most or self.full), list(kept)
        spent = {name: cost.total(kept) for name, cost, _ in self.limits}
        steps = [
            (value, index, a, b) for index in range(len(kept)) for value, a, b in self.steps(index) if a >= kept[index]
        ]
        full = self.full
        # Among steps with equal mean scores, the one whose site keeps the smallest fraction of its units comes first.
        for _, index, a, b in sorted(steps, key=lambda step: (-step[0], step[2] / full[step[1]], step[1])):
            if a != kept[index] or b > most[index]:
                # An earlier step of this site did not fit, so this step cannot follow it.
                continue
            after = {name: spent[name] + cost.step(kept, index, b) for name, cost, _ in self.limits}
            if all(after[name] <= allowed * (1 + 1e-9) for name, _, allowed in self.limits):
                kept[index], spent = b, after
        return kept

    def plan(self, kept: Sequence[int], selection: str) -> Plan:
        """Returns the plan in which each site keeps its best units.

        Args:
            kept: The number of units that each site keeps.
            selection: The name of the selection. `Plan.info` gets it, and also the predicted cost in each limited
                resource, as a fraction of the dense model's cost. With a budget of a part, it is a fraction of the
                cost of the part, and the entry "of" is "part".
        """
        keeps = tuple(tuple(sorted(self.order(i)[:count].tolist())) for i, count in enumerate(kept))
        achieved = {name: self.costs.fraction(self.budget, kept, name) for name, _, _ in self.limits}
        # Plans of a whole model have the same entries as in older releases.
        of = {"of": self.budget.of} if self.budget.of != "model" else {}
        return Plan(self.costs.sites, keeps, {"selection": selection, "predicted": achieved, **of})

"""Allocation on a budget: which numbers of units are allowed, what fits, and filling up what is left over."""

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
"""How scores of each scale are made comparable across sites."""


def normalise(scores: Scores, costs: Costs, budget: Budget, how: str | None = None) -> list[Tensor]:
    """Scores that can be compared across sites, float64 (units,) each; how=None: as their scale asks.

    mean   score over the mean score of its site: a unit's share of its site, and so already per share of cost
    cost   score per cost of the unit, of the first resource that the budget limits: per MAC where those are
    none   as the criterion gave them
    """
    how = how or NORMALISATIONS[scores.scale]
    values = [value.to(torch.float64) for value in scores.values]
    if how == "mean":
        return [value / value.abs().mean().clamp_min(torch.finfo(torch.float64).tiny) for value in values]
    if how == "cost":
        full = [site.size for site in costs.sites]
        cost = costs.of(next(iter(budget.shares)))
        least = 1e-9 * cost.total(full)  # a unit that costs nothing has a score all the same
        return [value / max(unit, least) for value, unit in zip(values, cost.units(full), strict=True)]
    return values


@dataclass(frozen=True)
class Allocation:
    """Sites with their units in order of score, and the limits that a plan has to meet.

    values   per site, comparable scores (units,)
    counts   per site, every number of units that may be kept, ascending
    """

    costs: Costs
    budget: Budget
    values: tuple[Tensor, ...]
    counts: tuple[tuple[int, ...], ...]
    limits: tuple[tuple[str, Cost, float], ...]

    @staticmethod
    def on(costs: Costs, budget: Budget, values: Sequence[Tensor]) -> "Allocation":
        """Raises BudgetError where the budget cannot be met."""
        counts = tuple(tuple(budget.counts(site)) for site in costs.sites)
        return Allocation(costs, budget, tuple(values), counts, tuple(costs.limits(budget)))

    @property
    def full(self) -> list[int]:
        """Every unit kept."""
        return [site.size for site in self.costs.sites]

    @property
    def least(self) -> list[int]:
        """As few units kept as the budget allows."""
        return [counts[0] for counts in self.counts]

    def fits(self, kept: Sequence[int], remaining: float = 0.0) -> bool:
        """True if every limit is met.

        Args:
            kept: Units kept at each site.
            remaining: Share of the way from the dense cost to the limit that may still lie ahead. 0: the limit holds.
        """
        full = self.full
        return all(
            cost.total(kept) <= (allowed + (cost.total(full) - allowed) * remaining) * (1 + 1e-9)
            for _, cost, allowed in self.limits
        )

    def order(self, index: int) -> Tensor:
        """Units of a site, best first; equal scores in order of index."""
        return torch.argsort(self.values[index], descending=True, stable=True)

    def steps(self, index: int) -> list[tuple[float, int, int]]:
        """(mean score, from count, to count) of each step between allowed counts, best first."""
        ordered = self.values[index][self.order(index)].tolist()
        counts = self.counts[index]
        sums = [0.0]
        for value in ordered:
            sums.append(sums[-1] + value)
        return [((sums[b] - sums[a]) / (b - a), a, b) for a, b in pairwise(counts)]

    @cached_property
    def _ascending(self) -> list[tuple[float, int, int]]:
        """(mean score, site, from count) of all steps, worst first; equal scores: the fullest site first."""
        full = self.full
        return sorted(
            ((value, index, a) for index in range(len(self.counts)) for value, a, _ in self.steps(index)),
            key=lambda step: (step[0], -step[2] / full[step[1]], step[1]),
        )

    def one_threshold(self, remaining: float = 0.0) -> list[int]:
        """Units kept at each site above the lowest threshold on all values that fits; remaining: see `fits`."""
        steps = self._ascending
        low, high = 0, len(steps)  # removing all steps fits: `on` has checked it
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.fits(self._without(steps[:middle]), remaining) else (middle + 1, high)
        return self._without(steps[:low])

    def _without(self, gone: Sequence[tuple[float, int, int]]) -> list[int]:
        """Units kept at each site once these steps have gone."""
        kept = self.full
        for _, index, count in gone:
            kept[index] = min(kept[index], count)
        return kept

    def fill(self, kept: Sequence[int], most: Sequence[int] | None = None) -> list[int]:
        """Adds the best step that fits, again and again, up to `most` units a site, until none fits."""
        most, kept = list(most or self.full), list(kept)
        spent = {name: cost.total(kept) for name, cost, _ in self.limits}
        steps = [
            (value, index, a, b) for index in range(len(kept)) for value, a, b in self.steps(index) if a >= kept[index]
        ]
        full = self.full
        for _, index, a, b in sorted(steps, key=lambda step: (-step[0], step[2] / full[step[1]], step[1])):
            if a != kept[index] or b > most[index]:
                continue  # a step before it did not fit
            after = {name: spent[name] + cost.step(kept, index, b) for name, cost, _ in self.limits}
            if all(after[name] <= allowed * (1 + 1e-9) for name, _, allowed in self.limits):
                kept[index], spent = b, after
        return kept

    def plan(self, kept: Sequence[int], selection: str) -> Plan:
        """The best units of each site, so many as `kept` says."""
        keeps = tuple(tuple(sorted(self.order(i)[:count].tolist())) for i, count in enumerate(kept))
        full = self.full
        achieved = {name: cost.total(kept) / cost.total(full) for name, cost, _ in self.limits}
        return Plan(self.costs.sites, keeps, {"selection": selection, "predicted": achieved})

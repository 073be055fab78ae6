"""Uniform: the same ratio of units at every site."""

from bisect import bisect_right
from dataclasses import dataclass
from typing import ClassVar

from xprune.core.budget import Budget
from xprune.core.costs import Costs
from xprune.core.interfaces import Context, Selection
from xprune.core.plan import Plan
from xprune.core.scores import Scores
from xprune.costs.allocation import Allocation, normalise


@dataclass(frozen=True)
class Uniform(Selection):
    """Each site keeps floor(ratio * units) of its best units, with the greatest ratio that meets the budget.

    What the floor leaves of the budget is filled unit by unit by score: first up to the ceiling of the ratio, then
    wherever a unit still fits.
    """

    name: ClassVar[str] = "uniform"

    def select(self, context: Context, scores: Scores, costs: Costs, budget: Budget) -> Plan:
        """See Selection.select."""
        allocation = Allocation.on(costs, budget, normalise(scores, costs, budget))
        ratios = sorted({count / counts[-1] for counts in allocation.counts for count in counts})
        low, high = 0, len(ratios)  # ratios[low] fits (or is below every floor), ratios[high] does not
        while high - low > 1:
            middle = (low + high) // 2
            fits = allocation.fits(self._kept(allocation, ratios[middle]))
            low, high = (middle, high) if fits else (low, middle)
        kept = self._kept(allocation, ratios[low])
        ceiling = self._kept(allocation, ratios[min(high, len(ratios) - 1)])
        return allocation.plan(allocation.fill(allocation.fill(kept, ceiling)), self.name)

    def _kept(self, allocation: Allocation, ratio: float) -> list[int]:
        """The largest allowed count that is at most ratio * units, at each site."""
        return [counts[max(bisect_right(counts, ratio * counts[-1] + 1e-9) - 1, 0)] for counts in allocation.counts]

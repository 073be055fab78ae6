"""The selection Uniform, which keeps the same fraction of the units at every site."""

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
    """A selection that keeps the same fraction of the units at every site.

    The fraction is the largest one that meets the budget. Each site keeps its floor(fraction * units) units with the
    highest scores. Because of the rounding down, a part of the budget is not used. So more units are kept, those with
    the highest scores first. At first, each site may only grow to its count at the next larger fraction. Then any unit
    that fits into the budget is kept.

    Example:
        >>> import torch, xprune
        >>> from torch import nn
        >>> mlps = [nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)) for _ in range(2)]
        >>> model, inputs = nn.Sequential(*mlps), torch.randn(3, 4)
        >>> sites = xprune.find_sites(model, inputs)
        >>> scores = xprune.Scores(sites, (torch.tensor([9.0, 8, 7, 1]), torch.tensor([6.0, 3, 2, 0])), "mine")
        >>> plan = xprune.select(model, scores, xprune.Budget(params=0.6), "uniform", example_inputs=inputs)
        >>> plan.keeps
        ((0, 1), (0, 1))
    """

    name: ClassVar[str] = "uniform"

    def select(self, context: Context, scores: Scores, costs: Costs, budget: Budget) -> Plan:
        """Selects the units that stay. See `Selection.select`."""
        allocation = Allocation.on(costs, budget, normalise(scores, costs, budget))
        # The count of a site changes only at these fractions, so no other fractions need to be tried.
        ratios = sorted({count / counts[-1] for counts in allocation.counts for count in counts})
        # Bisection: ratios[low] meets the budget, or is the smallest fraction. ratios[high] does not meet the budget.
        low, high = 0, len(ratios)
        while high - low > 1:
            middle = (low + high) // 2
            fits = allocation.fits(self._kept(allocation, ratios[middle]))
            low, high = (middle, high) if fits else (low, middle)
        kept = self._kept(allocation, ratios[low])
        ceiling = self._kept(allocation, ratios[min(high, len(ratios) - 1)])
        return allocation.plan(allocation.fill(allocation.fill(kept, ceiling)), self.name)

    def _kept(self, allocation: Allocation, ratio: float) -> list[int]:
        """Returns, for each site, the largest allowed count that is at most ratio * units."""
        # counts[-1] is the number of units of the site. The small number allows for rounding errors of `ratio`.
        return [counts[max(bisect_right(counts, ratio * counts[-1] + 1e-9) - 1, 0)] for counts in allocation.counts]

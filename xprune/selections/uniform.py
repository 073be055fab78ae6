"""The selection Uniform: every site keeps the same fraction of its units."""

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
    """A selection with one fraction: every site keeps the same fraction of its units.

    The fraction is the largest one that meets the budget. A site keeps its floor(fraction * units) best units. Rounding
    down leaves a part of the budget unused. So units are put back, best first: at first only up to the count of the
    next larger fraction, then at any site where one fits.

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
        # Only at these fractions does the count of some site change, so the search needs no others.
        ratios = sorted({count / counts[-1] for counts in allocation.counts for count in counts})
        # ratios[low] fits, or is so small that every site keeps its minimum. ratios[high] does not fit.
        low, high = 0, len(ratios)
        while high - low > 1:
            middle = (low + high) // 2
            fits = allocation.fits(self._kept(allocation, ratios[middle]))
            low, high = (middle, high) if fits else (low, middle)
        kept = self._kept(allocation, ratios[low])
        ceiling = self._kept(allocation, ratios[min(high, len(ratios) - 1)])
        return allocation.plan(allocation.fill(allocation.fill(kept, ceiling)), self.name)

    def _kept(self, allocation: Allocation, ratio: float) -> list[int]:
        """Returns for each site the largest allowed count that is at most ratio * units."""
        # counts[-1] is the number of units of the site. The small number is for rounding of count / units * units.
        return [counts[max(bisect_right(counts, ratio * counts[-1] + 1e-9) - 1, 0)] for counts in allocation.counts]

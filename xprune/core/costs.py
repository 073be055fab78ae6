"""Costs: what a model costs as a function of the units that each site keeps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from xprune.core.budget import Budget
from xprune.core.site import Site
from xprune.errors import BudgetError


@dataclass(frozen=True)
class LinearCost:
    """A cost that is linear in the kept units of each site while the site is there at all, and in pairs of sites.

    total(k) = base + sum over sites with k > 0 of (fixed + unit * k) + sum over pairs (i, j, each) of each * k_i * k_j

    Pairs are sites that meet in one layer, as a stream's channels and the heads that read them do, i = j where a layer
    reads and writes the same stream. Elsewhere there are none.
    """

    base: float
    fixed: tuple[float, ...]
    unit: tuple[float, ...]
    pairs: tuple[tuple[int, int, float], ...] = ()

    def site(self, index: int, count: int) -> float:
        """Cost of one site with `count` units, beside its pairs."""
        return self.fixed[index] + self.unit[index] * count if count else 0.0

    def total(self, counts: Sequence[int]) -> float:
        """Cost of the model with these numbers of units."""
        alone = self.base + sum(self.site(index, count) for index, count in enumerate(counts))
        return alone + sum(each * counts[i] * counts[j] for i, j, each in self.pairs)

    def step(self, counts: Sequence[int], index: int, count: int) -> float:
        """What it costs to keep `count` units at a site in place of as many as `counts` says."""
        now, pairs = counts[index], 0.0
        for i, j, each in self._of.get(index, ()):
            pairs += each * (count**2 - now**2 if i == j else counts[j if i == index else i] * (count - now))
        return self.site(index, count) - self.site(index, now) + pairs

    def units(self, counts: Sequence[int]) -> list[float]:
        """What one more unit of each site costs beside these numbers of units."""
        return [self.step(counts, index, count + 1) for index, count in enumerate(counts)]

    @cached_property
    def _of(self) -> dict[int, list[tuple[int, int, float]]]:
        """The pairs of each site."""
        found: dict[int, list[tuple[int, int, float]]] = {}
        for pair in self.pairs:
            for index in {pair[0], pair[1]}:
                found.setdefault(index, []).append(pair)
        return found


@dataclass(frozen=True)
class Costs:
    """MACs per sample and parameters, as functions of the kept units of each site."""

    sites: tuple[Site, ...]
    macs: LinearCost
    params: LinearCost

    def least(self, budget: Budget) -> float:
        """The MACs of the smallest model that the budget's min_units and round_to allow, as a share of the dense."""
        floor = [budget.floor(site) for site in self.sites]
        return self.macs.total(floor) / self.macs.total([site.size for site in self.sites])

    def limits(self, budget: Budget) -> list[tuple[str, LinearCost, float]]:
        """(name, cost, allowed) for each cost that the budget speaks of.

        Raises BudgetError, stating the least fraction, where even the smallest model costs more.
        """
        full = [site.size for site in self.sites]
        least = [budget.floor(site) for site in self.sites]
        limits = []
        for name, cost, share in (("macs", self.macs, budget.macs), ("params", self.params, budget.params)):
            if share is None:
                continue
            dense, smallest = cost.total(full), cost.total(least)
            if smallest > share * dense:
                reach = math.ceil(smallest / dense * 1e4) / 1e4
                raise BudgetError(
                    f"{name}={share} cannot be reached: with min_units={budget.min_units} and "
                    f"round_to={budget.round_to} the least is {reach}. Ask for more, lower "
                    "min_units, or let find_sites see more sites."
                )
            limits.append((name, cost, share * dense))
        return limits

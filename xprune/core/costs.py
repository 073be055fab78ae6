"""Costs: what a model costs as a function of the units that each site keeps."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from xprune.core.budget import Budget
from xprune.core.site import Site
from xprune.errors import BudgetError


class Cost(ABC):
    """What a model costs of one resource, as a function of the units that each site keeps.

    Counts are one whole number a site, in the order of the sites.
    """

    @abstractmethod
    def total(self, counts: Sequence[int]) -> float:
        """Cost of the model with these numbers of units."""

    def step(self, counts: Sequence[int], index: int, count: int) -> float:
        """What it costs to keep `count` units at the site `index` in place of as many as `counts` says."""
        changed = [*counts[:index], count, *counts[index + 1 :]]
        return self.total(changed) - self.total(counts)

    def units(self, counts: Sequence[int]) -> list[float]:
        """What one unit of each site costs beside these numbers of units, which are at least 1: here, its last one."""
        return [-self.step(counts, index, count - 1) for index, count in enumerate(counts)]

    def linear(self, sizes: Sequence[int]) -> "LinearCost":
        """A linear cost that is the same for the whole model, for masks that learn between 0 and 1.

        Here: each unit of a site costs the mean of what all units but one cost, beside all units of the other sites.
        """
        unit = [-self.step(sizes, i, min(1, n - 1)) / max(1, n - 1) for i, n in enumerate(sizes)]
        base = self.total(sizes) - sum(each * n for each, n in zip(unit, sizes, strict=True))
        return LinearCost(base, (0.0,) * len(sizes), tuple(unit))


@dataclass(frozen=True)
class LinearCost(Cost):
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

    def linear(self, sizes: Sequence[int]) -> "LinearCost":
        """See Cost.linear."""
        return self

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
    """Costs by resource, each a function of the kept units of each site.

    Attributes:
        sites: The sites.
        by_resource: Name of a resource -> its cost.
    """

    sites: tuple[Site, ...]
    by_resource: Mapping[str, Cost]

    def of(self, resource: str) -> Cost:
        """The cost of one resource; BudgetError where it was not measured."""
        if resource not in self.by_resource:
            raise BudgetError(
                f"the cost of {resource} was not measured, only {', '.join(self.by_resource)}: "
                f"give measure_costs(..., resources=[{resource!r}])."
            )
        return self.by_resource[resource]

    @property
    def macs(self) -> Any:
        """The cost in MACs of one sample, a `LinearCost`."""
        return self.of("macs")

    @property
    def params(self) -> Any:
        """The cost in parameters, a `LinearCost`."""
        return self.of("params")

    def least(self, budget: Budget, resource: str = "macs") -> float:
        """What the smallest model costs that the budget's min_units and round_to allow, as a share of the dense one."""
        cost = self.of(resource)
        floor, dense = [budget.floor(site) for site in self.sites], cost.total([site.size for site in self.sites])
        if dense <= 0:
            raise BudgetError(f"the model costs nothing in {resource}, so that no fraction of it can be asked for.")
        return cost.total(floor) / dense

    def limits(self, budget: Budget) -> list[tuple[str, Cost, float]]:
        """(name, cost, allowed) for each resource that the budget limits.

        Raises:
            BudgetError: Even the smallest model costs more. The message states the least fraction.
        """
        full = [site.size for site in self.sites]
        limits = []
        for name, share in budget.shares.items():
            least = self.least(budget, name)
            if least > share:
                reach = math.ceil(least * 1e4) / 1e4
                raise BudgetError(
                    f"{name}={share} cannot be reached: with min_units={budget.min_units} and "
                    f"round_to={budget.round_to} the least is {reach}. Ask for more, lower "
                    "min_units, or let find_sites see more sites."
                )
            limits.append((name, self.of(name), share * self.of(name).total(full)))
        return limits

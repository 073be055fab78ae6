"""Costs: how the cost of a model depends on the number of units that each site keeps."""

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
    """The cost of a model in one resource, as a function of the number of units that each site keeps.

    In every method `counts` holds one whole number for each site, in the order of the sites. A subclass has to give
    `total`. The other methods have defaults that call `total`.

    Example:
        A kernel that works on blocks of 8 units costs the same for 1 unit and for 8:

        >>> class Blocks(Cost):
        ...     def total(self, counts):
        ...         return sum(-(-count // 8) for count in counts)
        >>> Blocks().total([16, 9])
        4
        >>> Blocks().step([16, 9], index=1, count=8)
        -1
    """

    @abstractmethod
    def total(self, counts: Sequence[int]) -> float:
        """Returns the cost of the model with these numbers of kept units."""

    def step(self, counts: Sequence[int], index: int, count: int) -> float:
        """Returns how much the cost changes if the site at `index` keeps `count` units instead of `counts[index]`."""
        changed = [*counts[:index], count, *counts[index + 1 :]]
        return self.total(changed) - self.total(counts)

    def units(self, counts: Sequence[int]) -> list[float]:
        """Returns the cost of one unit of each site, while the other sites keep `counts`.

        The default is the cost of the last unit: how much is saved if the site keeps one unit less. So every count has
        to be at least 1.
        """
        return [-self.step(counts, index, count - 1) for index, count in enumerate(counts)]

    def linear(self, sizes: Sequence[int]) -> "LinearCost":
        """Returns a linear cost that equals this one for the dense model.

        Masks between 0 and 1 need it while they are learned: they have no whole number of units.

        By default, the cost of a unit is a mean: how much is saved when the site shrinks from all units to one, divided
        by the number of removed units. All other sites keep all units.

        Args:
            sizes: Number of units of each site in the dense model.
        """
        unit = [-self.step(sizes, i, min(1, n - 1)) / max(1, n - 1) for i, n in enumerate(sizes)]
        base = self.total(sizes) - sum(each * n for each, n in zip(unit, sizes, strict=True))
        return LinearCost(base, (0.0,) * len(sizes), tuple(unit))


@dataclass(frozen=True)
class LinearCost(Cost):
    """A cost that is linear in the units of each site, plus products of the units of two sites.

    With k_i units kept at site i:

        total(k) = base
                   + sum over sites i with k_i > 0 of (fixed_i + unit_i * k_i)
                   + sum over pairs (i, j, each) of each * k_i * k_j

    A pair is needed where two sites cut the same layer, such as the channels of a stream and the heads that read them.
    If a layer reads and writes the same stream, its pair has i = j. Without channels there are no pairs.

    Args:
        base: Cost of the parts of the model that stay without any units.
        fixed: For each site, the cost that is added once the site keeps at least one unit.
        unit: For each site, the cost of one unit.
        pairs: (i, j, each): indices of two sites, and the cost of one unit of i together with one unit of j.

    Example:
        >>> cost = LinearCost(base=100.0, fixed=(5.0, 0.0), unit=(10.0, 2.0))
        >>> cost.total([3, 4])
        143.0
        >>> cost.total([0, 4])
        108.0
    """

    base: float
    fixed: tuple[float, ...]
    unit: tuple[float, ...]
    pairs: tuple[tuple[int, int, float], ...] = ()

    def site(self, index: int, count: int) -> float:
        """Returns the cost of one site with `count` units, without its pairs."""
        return self.fixed[index] + self.unit[index] * count if count else 0.0

    def total(self, counts: Sequence[int]) -> float:
        """Returns the cost of the model with these numbers of kept units."""
        without_pairs = self.base + sum(self.site(index, count) for index, count in enumerate(counts))
        return without_pairs + sum(each * counts[i] * counts[j] for i, j, each in self.pairs)

    def step(self, counts: Sequence[int], index: int, count: int) -> float:
        """See `Cost.step`. Computes the change from the site and its pairs, without two totals of the whole model."""
        now = counts[index]
        in_pairs = 0.0
        for i, j, each in self._pairs_of_site.get(index, ()):
            if i == j:
                in_pairs += each * (count**2 - now**2)
            else:
                other = j if i == index else i
                in_pairs += each * (counts[other] * (count - now))
        return self.site(index, count) - self.site(index, now) + in_pairs

    def units(self, counts: Sequence[int]) -> list[float]:
        """Returns the cost of one more unit of each site, while the other sites keep `counts`."""
        return [self.step(counts, index, count + 1) for index, count in enumerate(counts)]

    def linear(self, sizes: Sequence[int]) -> "LinearCost":
        """Returns this cost itself."""
        return self

    @cached_property
    def _pairs_of_site(self) -> dict[int, list[tuple[int, int, float]]]:
        """The pairs that each site is in, by the index of the site."""
        found: dict[int, list[tuple[int, int, float]]] = {}
        for pair in self.pairs:
            # A set, so that a site that is paired with itself gets the pair once.
            for index in {pair[0], pair[1]}:
                found.setdefault(index, []).append(pair)
        return found


@dataclass(frozen=True)
class Costs:
    """The costs of a model in each resource, as functions of the number of units that each site keeps.

    `xprune.measure_costs` makes it. Selections get it.

    Args:
        sites: The sites. Every list of counts is in their order.
        by_resource: The cost of each resource by its name, such as "macs".

    Example:
        >>> site = Site("mlp", "neuron", size=16, width=1, consumers=("mlp.fc2",), module="mlp")
        >>> costs = Costs((site,), {"macs": LinearCost(base=200.0, fixed=(0.0,), unit=(50.0,))})
        >>> costs.macs.total([16])
        1000.0
        >>> costs.least(Budget(macs=0.5))
        0.25
    """

    sites: tuple[Site, ...]
    by_resource: Mapping[str, Cost]

    def of(self, resource: str) -> Cost:
        """Returns the cost in one resource. Raises BudgetError if it was not measured."""
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
        """Returns the least fraction of the dense model's cost that `min_units` and `round_to` allow.

        Raises:
            BudgetError: The resource was not measured, or the dense model costs nothing in it.
        """
        cost = self.of(resource)
        floor = [budget.floor(site) for site in self.sites]
        dense = cost.total([site.size for site in self.sites])
        if dense <= 0:
            raise BudgetError(
                f"the model costs nothing in {resource}, so no fraction of it can be asked for. Leave {resource} out "
                "of the budget."
            )
        return cost.total(floor) / dense

    def limits(self, budget: Budget) -> list[tuple[str, Cost, float]]:
        """Returns (name, cost, allowed) of each resource that the budget limits. `allowed` is in the unit of the cost.

        Raises:
            BudgetError: Even the smallest model costs more. The message states the least fraction.
        """
        full = [site.size for site in self.sites]
        limits = []
        for name, share in budget.shares.items():
            least = self.least(budget, name)
            if least > share:
                # Rounded up: a user who asks for the number in the message has to succeed.
                reach = math.ceil(least * 1e4) / 1e4
                raise BudgetError(
                    f"{name}={share} cannot be reached: with min_units={budget.min_units} and "
                    f"round_to={budget.round_to} the least is {reach}. Ask for a larger fraction, lower "
                    "min_units, or find more sites with find_sites(..., units=[...])."
                )
            limits.append((name, self.of(name), share * self.of(name).total(full)))
        return limits

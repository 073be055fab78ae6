"""The classes `Cost` and `Costs`: how the cost of a model depends on the number of units that each site keeps."""

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

    In every method, `counts` holds the number of units that each site keeps, in the order of the sites. A subclass has
    to implement `total`. The other methods compute their results with `total`, and a subclass may override them.

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
        """Returns the cost of a model whose sites keep these numbers of units."""

    def step(self, counts: Sequence[int], index: int, count: int) -> float:
        """Returns how much the cost changes if one site keeps another number of units.

        Args:
            counts: The number of units that each site keeps now.
            index: The index of the site whose number changes.
            count: The number of units that this site keeps after the change.
        """
        changed = [*counts[:index], count, *counts[index + 1 :]]
        return self.total(changed) - self.total(counts)

    def units(self, counts: Sequence[int]) -> list[float]:
        """Returns, for each site, the cost of one unit of the site while the other sites keep `counts`.

        This implementation returns the cost of the last unit: how much is saved if the site keeps one unit less. So
        each entry of `counts` has to be at least 1.
        """
        return [-self.step(counts, index, count - 1) for index, count in enumerate(counts)]

    def linear(self, sizes: Sequence[int]) -> "LinearCost":
        """Returns a linear cost that equals this cost for the dense model.

        A criterion that learns masks between 0 and 1 calls this method. Its masks give no whole number of units, but a
        linear cost can be computed for any number.

        In this implementation, the cost of a unit is an average: the saving when the site shrinks from all its units to
        one unit, divided by the number of removed units. The other sites keep all their units.

        Args:
            sizes: The number of units of each site in the dense model.
        """
        unit = [-self.step(sizes, i, min(1, n - 1)) / max(1, n - 1) for i, n in enumerate(sizes)]
        base = self.total(sizes) - sum(each * n for each, n in zip(unit, sizes, strict=True))
        return LinearCost(base, (0.0,) * len(sizes), tuple(unit))


@dataclass(frozen=True)
class LinearCost(Cost):
    """A cost with a term for the units of each site, and a term for each pair of sites that cut the same layer.

    With k_i units kept at site i:

        total(k) = base
                   + sum over sites i with k_i > 0 of (fixed_i + unit_i * k_i)
                   + sum over pairs (i, j, each) of each * k_i * k_j

    A pair is needed if two sites cut the same layer along different axes. For example, the channels of a stream and the
    heads of an attention both cut the weights of q, k and v. If a layer reads and writes the same stream, its pair has
    i = j. If no site holds channels, there are no pairs.

    Args:
        base: The cost of the parts of the model that no site can cut.
        fixed: For each site, the cost that is added if the site keeps at least one unit.
        unit: For each site, the cost of one unit.
        pairs: Tuples (i, j, each). i and j are the indices of two sites. `each` is the cost for one unit of site i and
            one unit of site j together.

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
        """Returns the cost of the site at `index` with `count` units. The costs of pairs are not included."""
        return self.fixed[index] + self.unit[index] * count if count else 0.0

    def total(self, counts: Sequence[int]) -> float:
        """Returns the cost of a model whose sites keep these numbers of units."""
        without_pairs = self.base + sum(self.site(index, count) for index, count in enumerate(counts))
        return without_pairs + sum(each * counts[i] * counts[j] for i, j, each in self.pairs)

    def step(self, counts: Sequence[int], index: int, count: int) -> float:
        """See `Cost.step`. Uses the terms of this site only, which is faster than two calls of `total`."""
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
        """Returns, for each site, the cost of one more unit of the site while the other sites keep `counts`."""
        return [self.step(counts, index, count + 1) for index, count in enumerate(counts)]

    def linear(self, sizes: Sequence[int]) -> "LinearCost":
        """Returns this cost, which is linear already."""
        return self

    @cached_property
    def _pairs_of_site(self) -> dict[int, list[tuple[int, int, float]]]:
        """The pairs as a dict from the index of a site to all pairs that contain this site."""
        found: dict[int, list[tuple[int, int, float]]] = {}
        for pair in self.pairs:
            # The set holds one index if i = j. Otherwise such a pair would be counted twice.
            for index in {pair[0], pair[1]}:
                found.setdefault(index, []).append(pair)
        return found


@dataclass(frozen=True)
class Costs:
    """The costs of a model in each resource, as functions of the number of units that each site keeps.

    `xprune.measure_costs` returns an object of this class. Selections get the object as an argument.

    Args:
        sites: The sites. Every list of counts is in the order of these sites.
        by_resource: The cost in each resource, by the name of the resource, such as "macs".
        part: The cost of a part of the dense model, by the name of the resource. All sites lie in this part. Resources
            that are not counted by module are missing. None if the sites lie anywhere in the model.

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
    part: Mapping[str, float] | None = None

    def of(self, resource: str) -> Cost:
        """Returns the `Cost` object of one resource. Raises BudgetError if this resource was not measured."""
        if resource not in self.by_resource:
            raise BudgetError(
                f"the cost of {resource} was not measured, only {', '.join(self.by_resource)}: "
                f"give measure_costs(..., resources=[{resource!r}])."
            )
        return self.by_resource[resource]

    @property
    def macs(self) -> Any:
        """The cost in MACs for one sample. It is a `LinearCost`."""
        return self.of("macs")

    @property
    def params(self) -> Any:
        """The cost in parameters. It is a `LinearCost`."""
        return self.of("params")

    def least(self, budget: Budget, resource: str = "macs") -> float:
        """Returns the smallest fraction of the dense cost that a plan can reach.

        It is a fraction of the cost of the dense model, or of the part of it if the budget says `of="part"`. The
        smallest model keeps at each site only the units that `min_units` and `round_to` of the budget demand.

        Args:
            budget: Gives `min_units`, `round_to` and `of`. Its fractions are not used.
            resource: The name of the resource in which the cost is computed.

        Raises:
            BudgetError: The resource was not measured, or the dense model or its part has a cost of 0 in this resource.
        """
        return self.fraction(budget, [budget.floor(site) for site in self.sites], resource)

    def fraction(self, budget: Budget, counts: Sequence[int], resource: str = "macs") -> float:
        """Returns the cost of a plan as the fraction that the budget compares with its limit.

        Args:
            budget: Gives `of`: a fraction of the dense model's cost, or of the cost of its part. The fractions of the
                budget are not used.
            counts: The number of units that each site keeps.
            resource: The name of the resource in which the cost is computed.

        Raises:
            BudgetError: The resource was not measured, or the dense model or its part has a cost of 0 in this resource.

        Example:
            >>> site = Site("mlp", "neuron", size=16, width=1, consumers=("mlp.fc2",), module="mlp")
            >>> cost = LinearCost(base=200.0, fixed=(0.0,), unit=(50.0,))
            >>> costs = Costs((site,), {"macs": cost}, part={"macs": 800.0})
            >>> costs.fraction(Budget(macs=0.5), [8]), costs.fraction(Budget(macs=0.5, of="part"), [8])
            (0.6, 0.5)
        """
        outside, dense = self._reference(budget, resource)
        return (self.of(resource).total(counts) - outside) / dense

    def _reference(self, budget: Budget, resource: str) -> tuple[float, float]:
        """Returns (cost that the fraction leaves out, dense cost that it is a fraction of), see `Budget.of`."""
        outside, dense = 0.0, self.of(resource).total([site.size for site in self.sites])
        if budget.of == "part":
            if self.part is None:
                raise BudgetError(
                    'a budget with of="part" needs a part of the model: give inside=, for example '
                    'inside=["vision_model.*"], to Pruner, Case or find_sites. Or leave of= out.'
                )
            if resource not in self.part:
                raise BudgetError(
                    f"{resource} is not counted by module, so the cost of a part of the model is not known. Leave "
                    f'{resource} out of the budget, or give of="model".'
                )
            outside, dense = dense - self.part[resource], self.part[resource]
        if dense <= 0:
            raise BudgetError(
                f"the {budget.of} costs nothing in {resource}, so a budget cannot ask for a fraction of this cost. "
                f"Leave {resource} out of the budget."
            )
        return outside, dense

    def limits(self, budget: Budget) -> list[tuple[str, Cost, float]]:
        """Returns the limits of a budget as numbers that the cost of a plan can be compared with.

        Returns:
            A list of (name, cost, allowed), one for each resource that the budget limits. `name` is the name of the
            resource. `cost` computes the cost of a plan. `allowed` is the largest cost that the budget allows, for
            example a number of MACs.

        Raises:
            BudgetError: Even the smallest possible model costs more than the budget allows. The message says the
                smallest fraction that can be reached.
        """
        limits = []
        for name in budget.limited:
            share = self.share(budget, name)
            least = self.least(budget, name)
            if least > share:
                # The number is rounded up, so that a budget with the number in the message can be met.
                reach = math.ceil(least * 1e4) / 1e4
                rounding = f" and round_to={budget.round_to}" if budget.round_to not in ("auto", 1) else ""
                raise BudgetError(
                    f"{name}={share:.12g} cannot be reached: with min_units={budget.min_units}{rounding} the least is "
                    f"{reach}{self._of_part(budget, name)}. Ask for a larger fraction, lower min_units, or find more "
                    "sites with find_sites(..., units=[...])."
                )
            outside, dense = self._reference(budget, name)
            limits.append((name, self.of(name), outside + share * dense))
        return limits

    def share(self, budget: Budget, name: str) -> float:
        """Returns the limit of a budget in one resource as a fraction of the dense cost.

        A limit in milliseconds becomes a fraction of the dense model's time. A time above it becomes 1.
        """
        if name in budget.shares:
            return budget.shares[name]
        assert budget.latency_ms is not None  # `Budget.limited` names no other resource without a fraction
        return min(1.0, budget.latency_ms / self.of(name).total([site.size for site in self.sites]))

    def _of_part(self, budget: Budget, name: str) -> str:
        """Returns a text for an error: what the fractions refer to, if only a part of the model is pruned. Else ""."""
        if self.part is None or name not in self.part:
            return ""
        if budget.of == "part":
            return f" of the {name} of the part that inside= names"
        share = self.part[name] / self._reference(budget, name)[1]
        return (
            f" of the {name} of the whole model. Only the part that inside= names is pruned, and it has {share:.1%} of "
            'them. With of="part" in the budget, fractions are those of the part'
        )

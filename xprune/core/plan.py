"""The class `Plan`, which says which units stay at each site."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from xprune.core.site import Site
from xprune.errors import PlanError


@dataclass(frozen=True)
class Plan:
    """Says which units stay at each site of a model.

    A plan cannot be changed. It holds no weights, so it can be applied to any model of the same architecture. Two plans
    with the same sites and the same kept units are equal, even if their `info` differs.

    Args:
        sites: The sites, in the order of the model.
        keeps: For each site, the indices of the units that stay, in ascending order. An empty tuple removes all units
            of the site.
        info: Notes of the selection about the plan, such as its thresholds and its cost. They are numbers, strings,
            lists and dicts.

    Raises:
        PlanError: Indices are out of range, not in ascending order or given twice, or a site is given twice.

    Example:
        >>> site = Site("mlp", "neuron", size=4, width=1, consumers=("mlp.fc2",), module="mlp")
        >>> plan = Plan((site,), keeps=((0, 2, 3),))
        >>> plan.counts, plan.removed
        ((3,), 1)
        >>> Plan.from_json(plan.to_json()) == plan
        True
    """

    sites: tuple[Site, ...]
    keeps: tuple[tuple[int, ...], ...]
    info: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if len(self.sites) != len(self.keeps):
            raise PlanError(
                f"{len(self.sites)} sites but {len(self.keeps)} lists of kept units. Give one list for each "
                "site, in the same order."
            )
        names = [site.name for site in self.sites]
        if len(set(names)) != len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise PlanError(f"sites are in the plan twice: {', '.join(twice)}. Names of sites have to be unique.")
        for site, keep in zip(self.sites, self.keeps, strict=True):
            # `isinstance` would accept True, which is an int in Python. numpy's integers are refused because JSON
            # cannot hold them.
            if any(type(unit) is not int for unit in keep):
                raise PlanError(f"{site.name}: kept units have to be integers. Convert tensors with .tolist().")
            if any(a >= b for a, b in pairwise(keep)):
                raise PlanError(f"{site.name}: kept units have to be sorted and distinct. Give sorted(set(units)).")
            if keep and (keep[0] < 0 or keep[-1] >= site.size):
                raise PlanError(
                    f"{site.name}: kept units have to lie in 0 to {site.size - 1}, got {keep[0]} to {keep[-1]}."
                )
            if not keep and not site.module:
                raise PlanError(
                    f"{site.name}: the module that holds its units also does other things, so at least one has to "
                    "stay. Keep one unit of this site."
                )

    @staticmethod
    def full(sites: Sequence[Site]) -> "Plan":
        """Returns the plan that keeps every unit of these sites."""
        return Plan(tuple(sites), tuple(tuple(range(site.size)) for site in sites))

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of kept units of each site, in the order of `sites`."""
        return tuple(len(keep) for keep in self.keeps)

    @property
    def removed(self) -> int:
        """The number of removed units, summed over all sites."""
        return sum(site.size - count for site, count in zip(self.sites, self.counts, strict=True))

    def then(self, later: "Plan") -> "Plan":
        """Joins this plan with a second plan, which is for the model that was pruned with this plan.

        If a model is pruned twice, the joined plan describes both steps as one.

        Args:
            later: The plan of the second step. Its indices count the units of the model that was pruned with this plan.

        Returns:
            One plan for the model that this plan was made for. Its `info` is the `info` of `later`.

        Raises:
            PlanError: The number of units of a site in `later` is not the number that this plan keeps.

        Example:
            >>> dense = Site("mlp", "neuron", size=4, width=1, consumers=("mlp.fc2",), module="mlp")
            >>> pruned = Site("mlp", "neuron", size=3, width=1, consumers=("mlp.fc2",), module="mlp")
            >>> Plan((dense,), ((0, 2, 3),)).then(Plan((pruned,), ((1, 2),))).keeps
            ((2, 3),)
        """
        first = {site.name: (site, keep) for site, keep in zip(self.sites, self.keeps, strict=True)}
        sites, keeps = list(self.sites), list(self.keeps)
        for site, keep in zip(later.sites, later.keeps, strict=True):
            if site.name not in first:
                # This plan removes no unit of the site, so the indices in the later plan are indices of the dense
                # model.
                sites.append(site)
                keeps.append(keep)
                continue
            _, before = first[site.name]
            if len(before) != site.size:
                raise PlanError(
                    f"{site.name}: the first plan keeps {len(before)} units, but the second plan was made for "
                    f"{site.size}. Make the second plan for the model that was pruned with the first plan."
                )
            keeps[list(first).index(site.name)] = tuple(before[unit] for unit in keep)
        return Plan(tuple(sites), tuple(keeps), later.info)

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as a dict of lists, strings and numbers, which JSON can hold. See `Plan.from_json`."""
        return {
            "sites": [site.to_json() for site in self.sites],
            "keeps": [list(keep) for keep in self.keeps],
            "info": dict(self.info),
        }

    @staticmethod
    def from_json(data: Any) -> "Plan":
        """Makes a plan from the dict that `to_json` returned. It also reads plans of older releases.

        Raises:
            PlanError: The data do not have the form that `to_json` returns.
        """
        try:
            sites = tuple(Site.from_json(site) for site in data["sites"])
            keeps = tuple(tuple(keep) for keep in data["keeps"])
            info = dict(data.get("info", {}))
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise PlanError(
                f"not a plan: {type(error).__name__}: {error}. Give what Plan.to_json returned: a dict with 'sites' "
                "and 'keeps'."
            ) from error
        return Plan(sites, keeps, info)

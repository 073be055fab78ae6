"""Plan: which units stay, per site. Immutable, JSON, applies to a fresh copy of the architecture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from xprune.core.site import Site
from xprune.errors import PlanError


@dataclass(frozen=True)
class Plan:
    """Kept unit indices per site.

    sites   the sites, in the model's order
    keeps   for each site, in the same order, the kept unit indices, sorted
    info    what the selection has to say (thresholds, achieved cost), plain data

    Raises PlanError for indices that are out of range, duplicated or unsorted.
    """

    sites: tuple[Site, ...]
    keeps: tuple[tuple[int, ...], ...]
    info: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if len(self.sites) != len(self.keeps):
            raise PlanError(f"{len(self.sites)} sites but {len(self.keeps)} lists of kept units; give one list a site.")
        names = [site.name for site in self.sites]
        if len(set(names)) != len(names):
            raise PlanError("a site stands in the plan twice; site names are unique.")
        for site, keep in zip(self.sites, self.keeps, strict=True):
            if any(type(unit) is not int for unit in keep):
                raise PlanError(f"{site.name}: kept units have to be integers.")
            if any(a >= b for a, b in pairwise(keep)):
                raise PlanError(f"{site.name}: kept units have to be sorted and distinct.")
            if keep and (keep[0] < 0 or keep[-1] >= site.size):
                raise PlanError(
                    f"{site.name}: kept units have to lie in 0 to {site.size - 1}, got {keep[0]} to {keep[-1]}."
                )
            if not keep and not site.module:
                raise PlanError(
                    f"{site.name}: its units share a module with other things, so that at least one has to stay."
                )

    @staticmethod
    def full(sites: Sequence[Site]) -> "Plan":
        """The plan that keeps every unit."""
        return Plan(tuple(sites), tuple(tuple(range(site.size)) for site in sites))

    @property
    def counts(self) -> tuple[int, ...]:
        """Kept units per site."""
        return tuple(len(keep) for keep in self.keeps)

    @property
    def removed(self) -> int:
        """Units that go, over all sites."""
        return sum(site.size - count for site, count in zip(self.sites, self.counts, strict=True))

    def then(self, later: "Plan") -> "Plan":
        """This plan followed by `later`, which was made for the model that this plan leaves.

        The result is relative to the model that this plan is relative to. Raises PlanError where the two do not fit.
        """
        first = {site.name: (site, keep) for site, keep in zip(self.sites, self.keeps, strict=True)}
        sites, keeps = list(self.sites), list(self.keeps)
        for site, keep in zip(later.sites, later.keeps, strict=True):
            if site.name not in first:
                sites.append(site)
                keeps.append(keep)
                continue
            _, before = first[site.name]
            if len(before) != site.size:
                raise PlanError(
                    f"{site.name}: {len(before)} units are left but the second plan was made for {site.size}."
                )
            keeps[list(first).index(site.name)] = tuple(before[unit] for unit in keep)
        return Plan(tuple(sites), tuple(keeps), later.info)

    def to_json(self) -> dict[str, Any]:
        """Plain data, `Plan.from_json` is its inverse."""
        return {
            "sites": [s.to_json() for s in self.sites],
            "keeps": [list(k) for k in self.keeps],
            "info": dict(self.info),
        }

    @staticmethod
    def from_json(data: Any) -> "Plan":
        """A plan from plain data; PlanError where it is not one."""
        try:
            sites = tuple(Site.from_json(site) for site in data["sites"])
            keeps = tuple(tuple(keep) for keep in data["keeps"])
            info = dict(data.get("info", {}))
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise PlanError(f"not a plan: {type(error).__name__}: {error}.") from error
        return Plan(sites, keeps, info)

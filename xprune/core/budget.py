"""Budget: what the pruned model may cost."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from xprune.core.registry import named
from xprune.core.site import Site
from xprune.errors import BudgetError


@dataclass(frozen=True)
class Budget:
    """What the pruned model may cost, as fractions of the model given. Where several are given, all of them are met.

    Args:
        macs: Fraction of the MACs, in (0, 1]; None for no limit.
        params: Fraction of the parameters, in (0, 1]; None for no limit.
        min_units: Units that stay at every site; 0 lets a whole attention or MLP go.
        round_to: Kept features of a site (units x width) are a multiple of this, or all of them.
        resources: Fractions of other resources by their names in RESOURCES, such as {"activations": 0.5}. It is kept as
            a tuple of pairs, so that a budget can be hashed.

    Raises:
        BudgetError: A value is out of range or of the wrong type, a resource is unknown, or nothing is limited.

    Example:
        >>> Budget(macs=0.5).shares
        {'macs': 0.5}
        >>> Budget(0.5, resources={"params": 0.7}).shares
        {'macs': 0.5, 'params': 0.7}
    """

    macs: float | None = None
    params: float | None = None
    min_units: int = 1
    round_to: int = 1
    resources: Mapping[str, float] | tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        given: dict[str, Any] = {name: getattr(self, name) for name in _OWN if getattr(self, name) is not None}
        for name, share in _pairs(self.resources):
            named("resources", name, "resource", BudgetError)
            if name in given:
                raise BudgetError(f"the fraction of {name} is given twice: {given[name]} and {share}.")
            given[name] = share
        if not given:
            raise BudgetError(
                "a budget needs macs= or params=, or resources=: a fraction in (0, 1] of the dense model's."
            )
        shares = {name: _share(name, share) for name, share in given.items()}
        for name in _OWN:
            object.__setattr__(self, name, shares.pop(name, None))
        object.__setattr__(self, "resources", tuple(shares.items()))
        for name, least in (("min_units", 0), ("round_to", 1)):
            object.__setattr__(self, name, _whole(name, getattr(self, name), least))

    @property
    def shares(self) -> dict[str, float]:
        """The fraction of each resource that is limited, by name."""
        own = {name: getattr(self, name) for name in _OWN}
        return {name: share for name, share in {**own, **dict(self.resources)}.items() if share is not None}

    @property
    def name(self) -> str:
        """What the budget asks for, in short: "macs 0.5", "params 0.3, round_to 8"."""
        counts = {name: value for name in ("min_units", "round_to") if (value := getattr(self, name)) != 1}
        return ", ".join(f"{name} {value:.12g}" for name, value in {**self.shares, **counts}.items())

    def step(self, site: Site) -> int:
        """Units that have to come and go together so that the kept features stay a multiple of `round_to`."""
        return self.round_to // math.gcd(self.round_to, site.width)

    def floor(self, site: Site) -> int:
        """Least units the site may keep."""
        least = max(self.min_units, 0 if site.module else 1)
        return min(site.size, math.ceil(least / self.step(site)) * self.step(site))

    def counts(self, site: Site) -> list[int]:
        """Every number of units the site may keep, ascending."""
        step = self.step(site)
        return sorted({*range(self.floor(site), site.size, step), site.size})


_OWN = ("macs", "params")
"""Resources that have a field of their own."""


def _pairs(resources: Any) -> list[tuple[str, Any]]:
    try:
        return [(str(name), share) for name, share in dict(resources).items()]
    except (TypeError, ValueError) as error:
        raise BudgetError(
            f'resources={resources!r} is not a mapping of names to fractions, such as {{"params": 0.5}}.'
        ) from error


def _share(name: str, share: Any) -> float:
    fraction = float(share) if isinstance(share, Real) and not isinstance(share, bool) else math.nan
    if not 0 < fraction <= 1:  # nor is NaN
        raise BudgetError(f"{name}={share!r} is not in (0, 1]; 0.5 asks for half of the dense model's.")
    return fraction


def _whole(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise BudgetError(f"{name}={value!r} has to be a whole number, at least {least}.")
    return int(value)

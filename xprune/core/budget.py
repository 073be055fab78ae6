"""The budget: how much the pruned model may cost, as fractions of the dense model."""

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
    """How much the pruned model may cost, as fractions of the dense model.

    If several fractions are given, the pruned model meets all of them. At least one has to be given.

    Args:
        macs: Fraction of the MACs, in (0, 1]. None for no limit.
        params: Fraction of the parameters, in (0, 1]. None for no limit.
        min_units: Least number of units that each site keeps. 0 allows that a whole attention or MLP is removed.
        round_to: The kept features of a site, units * width, are a multiple of this number, unless all units stay. Use
            it where the hardware is faster with multiples of 8 or 16.
        resources: Fractions of other resources by their names in RESOURCES, such as {"activations": 0.5}. The names
            "macs" and "params" work here too. The budget keeps them as a tuple of pairs, so it can be hashed.

    Raises:
        BudgetError: A value is out of range or of the wrong type, a resource is unknown, or nothing is limited.

    Example:
        >>> Budget(macs=0.5).shares
        {'macs': 0.5}
        >>> Budget(0.5, resources={"params": 0.7}, min_units=2).name
        'macs 0.5, params 0.7, min_units 2'
    """

    macs: float | None = None
    params: float | None = None
    min_units: int = 1
    round_to: int = 1
    resources: Mapping[str, float] | tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        given: dict[str, Any] = {name: getattr(self, name) for name in _FIELDS if getattr(self, name) is not None}
        for name, share in _pairs(self.resources):
            named("resources", name, "resource", BudgetError)
            if name in given:
                raise BudgetError(
                    f"the fraction of {name} is given twice: {given[name]} and {share}. Give it once, either as "
                    f"{name}= or in resources=."
                )
            given[name] = share
        if not given:
            raise BudgetError(
                "a budget limits at least one resource: it needs macs= or params=, or resources=, each with a fraction "
                "in (0, 1] of the dense model. For example: Budget(macs=0.5)."
            )
        shares = {name: _fraction(name, share) for name, share in given.items()}
        # Two budgets that ask for the same are equal: "macs" and "params" move from `resources` to their fields. The
        # class is frozen, so fields are set through `object`.
        for name in _FIELDS:
            object.__setattr__(self, name, shares.pop(name, None))
        object.__setattr__(self, "resources", tuple(shares.items()))
        for name, least in (("min_units", 0), ("round_to", 1)):
            object.__setattr__(self, name, _whole_number(name, getattr(self, name), least))

    @property
    def shares(self) -> dict[str, float]:
        """The fraction of each resource that is limited, by the name of the resource."""
        fields = {name: getattr(self, name) for name in _FIELDS}
        return {name: share for name, share in {**fields, **dict(self.resources)}.items() if share is not None}

    @property
    def name(self) -> str:
        """A short text of the budget: "macs 0.5", "params 0.3, round_to 8"."""
        numbers = {name: value for name in ("min_units", "round_to") if (value := getattr(self, name)) != 1}
        return ", ".join(f"{name} {value:.12g}" for name, value in {**self.shares, **numbers}.items())

    def step(self, site: Site) -> int:
        """Returns the smallest number of units whose features are a multiple of `round_to`.

        Units of the site are kept in multiples of this number.
        """
        return self.round_to // math.gcd(self.round_to, site.width)

    def floor(self, site: Site) -> int:
        """Returns the smallest number of units that the site may keep."""
        # A site whose `module` is empty has to keep one unit, even if min_units is 0.
        least = max(self.min_units, 0 if site.module else 1)
        return min(site.size, math.ceil(least / self.step(site)) * self.step(site))

    def counts(self, site: Site) -> list[int]:
        """Returns every number of units that the site may keep, in ascending order.

        Example:
            >>> site = Site("mlp", "neuron", size=20, width=1, consumers=("mlp.fc2",), module="mlp")
            >>> Budget(macs=0.5, round_to=8).counts(site)
            [8, 16, 20]
        """
        step = self.step(site)
        return sorted({*range(self.floor(site), site.size, step), site.size})


_FIELDS = ("macs", "params")
"""Resources that are fields of `Budget`. Other resources are kept in its field `resources`."""


def _pairs(resources: Any) -> list[tuple[str, Any]]:
    """Returns (name, fraction) of each entry of `resources`, which is a mapping or an iterable of pairs.

    Raises:
        BudgetError: `resources` is neither.
    """
    try:
        return [(str(name), share) for name, share in dict(resources).items()]
    except (TypeError, ValueError) as error:
        raise BudgetError(
            f'resources={resources!r} is not a mapping of names to fractions, such as {{"params": 0.5}}.'
        ) from error


def _fraction(name: str, share: Any) -> float:
    """Returns the fraction as a float. Raises BudgetError if it is not a real number in (0, 1]."""
    fraction = float(share) if isinstance(share, Real) and not isinstance(share, bool) else math.nan
    # Written as `not (a < b)`, the check refuses NaN too.
    if not 0 < fraction <= 1:
        raise BudgetError(
            f"{name}={share!r} is not in (0, 1]. Give a fraction of the dense model: {name}=0.5 asks for half of it."
        )
    return fraction


def _whole_number(name: str, value: Any, least: int) -> int:
    """Returns the value as an int. Raises BudgetError if it is not a whole number, or less than `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise BudgetError(f"{name}={value!r} has to be a whole number, at least {least}.")
    return int(value)

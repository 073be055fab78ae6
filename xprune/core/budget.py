"""The class `Budget`, which says how much the pruned model may cost."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any

from xprune.core.registry import named
from xprune.core.site import Site
from xprune.core.target import Target
from xprune.errors import BudgetError
from xprune.modules.digest import OPTIONAL

OF = ("model", "part")
"""The allowed values of `Budget.of`."""


@dataclass(frozen=True)
class Budget:
    """How much the pruned model may cost, as fractions of the cost of the dense model.

    A budget has to limit at least one resource. If it limits several, the pruned model meets all the limits.

    Args:
        macs: Fraction of the dense model's MACs, in (0, 1]. None means that MACs are not limited.
        params: Fraction of the dense model's parameters, in (0, 1]. None means that parameters are not limited.
        min_units: The smallest number of units that a site may keep. With 0, a whole attention or MLP may be removed.
        round_to: The number of features that a site keeps, which is units * width, is a multiple of this number. A site
            that keeps all its units is not rounded. "auto": a multiple for each site, which depends on the device and
            the dtype, see `xprune.costs.widths`. On a CPU in float32 it is 1. On a GPU it is 8 to 64.
        resources: Fractions of any resources by their names in `xprune.RESOURCES`, such as {"activations": 0.5}. The
            names "macs" and "params" work here too. The budget stores the fractions as a tuple of pairs, because a
            tuple can be hashed.
        of: What the fractions are fractions of. "model": the cost of the whole dense model. "part": the cost of the
            part of the dense model that `inside=` of `Pruner` or `find_sites` names.
        latency: Fraction of the dense model's time for a forward pass, in (0, 1]. The time of the pruned model is
            measured, and the plan is corrected until it fits. None means that the time is not limited by a fraction.
        latency_ms: The time that a forward pass of the pruned model may take, in milliseconds. Give `latency` or
            `latency_ms`, not both.
        target: The device, the batch and so on for which the latency is meant, as a `Target` or as a text such as
            "batch=1,threads=2". None means the first training batch, where the model is.

    Raises:
        BudgetError: A value is out of range or of the wrong type, a resource is unknown, or no resource is limited.

    Example:
        >>> Budget(macs=0.5).shares
        {'macs': 0.5}
        >>> Budget(0.5, resources={"params": 0.7}, min_units=2).name
        'macs 0.5, params 0.7, min_units 2'
        >>> Budget(macs=0.5, of="part").name  # half of the MACs of the vision tower, for example
        'macs 0.5 of part'
        >>> Budget(latency=0.6, params=0.8, target="batch=1").name  # 60 % of the time for one sample
        'params 0.8, latency 0.6, on batch=1'
    """

    macs: float | None = None
    params: float | None = None
    min_units: int = 1
    round_to: int | str | tuple[tuple[str, int], ...] = "auto"
    resources: Mapping[str, float] | tuple[tuple[str, float], ...] = ()
    of: str = field(default="model", metadata=OPTIONAL)
    latency: float | None = field(default=None, metadata=OPTIONAL)
    latency_ms: float | None = field(default=None, metadata=OPTIONAL)
    target: Target | str | None = field(default=None, metadata=OPTIONAL)

    def __post_init__(self) -> None:
        if self.of not in OF:
            raise BudgetError(
                f'of={self.of!r} is not known. Give of="model" for fractions of the dense model, or of="part" for '
                "fractions of the part of it that inside= names."
            )
        given: dict[str, Any] = {name: getattr(self, name) for name in _FIELDS if getattr(self, name) is not None}
        for name, share in _pairs(self.resources):
            named("resources", name, "resource", BudgetError)
            if name in given:
                raise BudgetError(
                    f"the fraction of {name} is given twice: {given[name]} and {share}. Give it once, either as "
                    f"{name}= or in resources=."
                )
            given[name] = share
        self._check_time(given)
        if not given and self.latency_ms is None:
            raise BudgetError(
                "a budget limits at least one resource: it needs macs=, params= or latency=, or resources=, each with "
                "a fraction in (0, 1] of the dense model. For example: Budget(macs=0.5)."
            )
        shares = {name: _fraction(name, share) for name, share in given.items()}
        # "macs" and "params" move from `resources` to their fields, so that two budgets with the same limits are equal.
        # A frozen dataclass refuses plain assignment, so `object.__setattr__` is called.
        for name in _FIELDS:
            object.__setattr__(self, name, shares.pop(name, None))
        object.__setattr__(self, "resources", tuple(shares.items()))
        object.__setattr__(self, "min_units", _whole_number("min_units", self.min_units, 0))
        object.__setattr__(self, "round_to", _multiples(self.round_to))
        if isinstance(self.target, str):
            object.__setattr__(self, "target", Target.of(self.target))

    def _check_time(self, given: Mapping[str, Any]) -> None:
        """Checks `latency_ms`, and that the budget limits the time if it has a target.

        Args:
            given: The fractions that the user gave, by the names of the resources.
        """
        if self.latency_ms is not None:
            if "latency" in given:
                raise BudgetError(
                    f"the time is limited twice: latency={given['latency']} and latency_ms={self.latency_ms}. Give one "
                    "of the two."
                )
            time = self.latency_ms
            if isinstance(time, bool) or not isinstance(time, Real) or not 0 < time < math.inf:
                raise BudgetError(f"latency_ms={time!r} is not a time: give a number of milliseconds above 0.")
        elif self.target is not None and "latency" not in given:
            raise BudgetError(
                "target= says on what device the time is meant, but the budget does not limit the time. Give latency= "
                "or latency_ms= too, or leave target= out."
            )
        if self.of == "part" and (self.latency_ms is not None or "latency" in given):
            raise BudgetError(
                'of="part" does not work with a latency: the time of a part of a model is not measured. Give the '
                "fraction of the time of the whole model."
            )

    @property
    def limited(self) -> tuple[str, ...]:
        """The names of the resources that this budget limits. "latency" is one of them if `latency_ms` is given."""
        return (*self.shares, *(() if self.latency_ms is None else ("latency",)))

    @property
    def shares(self) -> dict[str, float]:
        """The limited resources as a dict from the name of the resource to its fraction, such as {"macs": 0.5}."""
        fields = {name: getattr(self, name) for name in _FIELDS}
        return {name: share for name, share in {**fields, **dict(self.resources)}.items() if share is not None}

    @property
    def name(self) -> str:
        """The budget as a short text for tables and messages, such as "macs 0.5" or "params 0.3, round_to 8"."""
        of = "" if self.of == "model" else f" of {self.of}"
        parts = [f"{name} {value:.12g}{of}" for name, value in self.shares.items()]
        if self.latency_ms is not None:
            parts.append(f"latency {self.latency_ms:.12g} ms")
        if isinstance(self.target, Target):
            parts.append(f"on {self.target.name}")
        if self.min_units != 1:
            parts.append(f"min_units {self.min_units}")
        # "auto" is the default. What it became for each site is a matter of the device.
        if isinstance(self.round_to, int):
            parts.append(f"round_to {self.round_to}")
        return ", ".join(parts)

    def at(self, share: float) -> "Budget":
        """Returns a budget that limits the same resources to another fraction. Everything else stays.

        Args:
            share: The fraction of the dense model's cost in each resource, in (0, 1].

        Example:
            >>> Budget(0.5, params=0.7, min_units=2).at(0.3).name
            'macs 0.3, params 0.3, min_units 2'
        """
        fields: dict[str, Any] = {name: share for name in _FIELDS if name in self.limited}
        # A time in milliseconds becomes a fraction too, since the budget may have only one of the two.
        return replace(self, **fields, latency_ms=None, resources=dict.fromkeys(dict(self.resources), share))

    def step(self, site: Site) -> int:
        """Returns the step in which a site may lose units, so that its kept features are a multiple of `round_to`.

        The step is the smallest number of units whose features are a multiple of `round_to`. With round_to=8 and a site
        of width 2, the step is 4 units. The counts that a site may keep are multiples of the step, and the full size.
        With round_to="auto", the step is 1 until `xprune.costs.widths.rounded` has chosen a multiple for each site.
        """
        multiple = self.round_to
        if not isinstance(multiple, int):
            multiple = 1 if isinstance(multiple, str) else dict(multiple).get(site.name, 1)
        return multiple // math.gcd(multiple, site.width)

    def floor(self, site: Site) -> int:
        """Returns the smallest number of units that a site may keep under this budget.

        The number is `min_units`, rounded up to a multiple of `step`. It is at most the size of the site.
        """
        # If `Site.module` is "", the site has no module that could be replaced. So it has to keep one unit even if
        # min_units is 0.
        least = max(self.min_units, 0 if site.module else 1)
        return min(site.size, math.ceil(least / self.step(site)) * self.step(site))

    def counts(self, site: Site) -> list[int]:
        """Returns every number of units that a site may keep under this budget, in ascending order.

        Example:
            >>> site = Site("mlp", "neuron", size=20, width=1, consumers=("mlp.fc2",), module="mlp")
            >>> Budget(macs=0.5, round_to=8).counts(site)
            [8, 16, 20]
        """
        step = self.step(site)
        return sorted({*range(self.floor(site), site.size, step), site.size})


_FIELDS = ("macs", "params", "latency")
"""Names of the resources that are fields of `Budget`. The field `resources` holds all other resources."""


def _pairs(resources: Any) -> list[tuple[str, Any]]:
    """Returns `resources` as a list of (name, fraction).

    Args:
        resources: The argument of `Budget`: a mapping from names to fractions, or an iterable of (name, fraction).

    Raises:
        BudgetError: `resources` is neither a mapping nor an iterable of pairs.
    """
    try:
        return [(str(name), share) for name, share in dict(resources).items()]
    except (TypeError, ValueError) as error:
        raise BudgetError(
            f'resources={resources!r} is not a mapping of names to fractions, such as {{"params": 0.5}}.'
        ) from error


def _fraction(name: str, share: Any) -> float:
    """Returns a fraction of the budget as a float. Raises BudgetError if it is not a real number in (0, 1]."""
    fraction = float(share) if isinstance(share, Real) and not isinstance(share, bool) else math.nan
    # Each comparison with NaN is False. So this form of the check refuses NaN too.
    if not 0 < fraction <= 1:
        raise BudgetError(
            f"{name}={share!r} is not in (0, 1]. Give a fraction of the dense model: {name}=0.5 asks for half of it."
        )
    return fraction


def _whole_number(name: str, value: Any, least: int) -> int:
    """Returns a setting as an int. Raises BudgetError if it is not a whole number or is less than `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise BudgetError(f"{name}={value!r} has to be a whole number, at least {least}.")
    return int(value)


def _multiples(round_to: Any) -> Any:
    """Returns `round_to` as an int, as "auto", or as a tuple of (name of a site, multiple).

    Raises:
        BudgetError: It is none of these.
    """
    if round_to == "auto":
        return "auto"
    if isinstance(round_to, (tuple, list, Mapping)):
        pairs = round_to.items() if isinstance(round_to, Mapping) else round_to
        return tuple((str(name), _whole_number("round_to", multiple, 1)) for name, multiple in pairs)
    if isinstance(round_to, str):
        raise BudgetError(f'round_to={round_to!r} is not known. Give a whole number of at least 1, or "auto".')
    return _whole_number("round_to", round_to, 1)

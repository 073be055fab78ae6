"""Budget: what the pruned model may cost."""

import math
from dataclasses import dataclass

from xprune.core.site import Site
from xprune.errors import BudgetError


@dataclass(frozen=True)
class Budget:
    """What the pruned model may cost, as a fraction of the model given.

    macs, params   fractions in (0, 1]; at least one is given, and where both are, both are met
    min_units      units that stay at every site; 0 lets a whole attention or MLP go
    round_to       kept features of a site (units x width) are a multiple of this, or all of them

    Raises BudgetError for values out of range.
    """

    macs: float | None = None
    params: float | None = None
    min_units: int = 1
    round_to: int = 1

    def __post_init__(self) -> None:
        if self.macs is None and self.params is None:
            raise BudgetError("a budget needs macs= or params=, a fraction in (0, 1] of the dense model's.")
        for name, value in (("macs", self.macs), ("params", self.params)):
            if value is not None and not 0 < value <= 1:
                raise BudgetError(f"{name}={value} is not in (0, 1]; 0.5 asks for half of the dense model's.")
        if self.min_units < 0:
            raise BudgetError(f"min_units={self.min_units} has to be at least 0.")
        if self.round_to < 1:
            raise BudgetError(f"round_to={self.round_to} has to be at least 1.")

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

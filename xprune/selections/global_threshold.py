"""Global: one threshold over the units of all sites."""

from dataclasses import dataclass
from typing import ClassVar

from xprune.core.budget import Budget
from xprune.core.costs import Costs
from xprune.core.interfaces import Context, Selection
from xprune.core.plan import Plan
from xprune.core.scores import Scores
from xprune.costs.allocation import NORMALISATIONS, Allocation, normalise
from xprune.errors import PluginError


@dataclass(frozen=True)
class Global(Selection):
    """Units go in ascending order of their normalised score, whatever their site, until the budget is met.

    What the last unit freed too much is filled up again with the best units that fit.

    normalise   "mean": score over its site's mean; "cost": score per MAC; "none"; None: as `Scores.scale` asks, "mean"
                for scores of one site's scale, "cost" for estimates of the loss, "none" where cost is in the score
    """

    normalise: str | None = None
    name: ClassVar[str] = "global"

    def __post_init__(self) -> None:
        allowed = tuple(NORMALISATIONS.values())
        if self.normalise not in (None, *allowed):
            raise PluginError(f"global: normalise={self.normalise!r}, allowed are None, {', '.join(allowed)}.")

    def select(self, context: Context, scores: Scores, costs: Costs, budget: Budget) -> Plan:
        """See Selection.select."""
        allocation = Allocation.on(costs, budget, normalise(scores, costs, budget, self.normalise))
        return allocation.plan(allocation.fill(allocation.one_threshold()), self.name)

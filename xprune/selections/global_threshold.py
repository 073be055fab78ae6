"""Global: one threshold over the units of all sites."""

from dataclasses import dataclass
from typing import ClassVar

from xprune.budget import Budget, Costs
from xprune.errors import PluginError
from xprune.interfaces import Context, Selection
from xprune.landing import NORMALISATIONS, Landing, normalise
from xprune.plan import Plan
from xprune.scores import Scores


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
        landing = Landing.on(costs, budget, normalise(scores, costs, budget, self.normalise))
        return landing.plan(landing.fill(landing.one_threshold()), self.name)

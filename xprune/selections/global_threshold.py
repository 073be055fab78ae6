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

    normalise   "mean": score over its site's mean; "cost": score per MAC; "none"
    """

    normalise: str = "mean"
    name: ClassVar[str] = "global"

    def __post_init__(self) -> None:
        if self.normalise not in NORMALISATIONS:
            raise PluginError(f"global: normalise={self.normalise!r}, allowed are {', '.join(NORMALISATIONS)}.")

    def select(self, context: Context, scores: Scores, costs: Costs, budget: Budget) -> Plan:
        """See Selection.select."""
        landing = Landing.on(costs, budget, normalise(scores, costs, self.normalise))
        steps = sorted(
            ((value, index, a) for index in range(len(costs.sites)) for value, a, _ in landing.steps(index)),
            key=lambda step: (
                step[0],
                -step[2] / landing.full[step[1]],
                step[1],
            ),  # equal scores: the fullest site first
        )
        low, high = 0, len(steps)  # removing all steps fits: Landing.on has checked it
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if landing.fits(self._after(landing, steps[:middle])) else (middle + 1, high)
        return landing.plan(landing.fill(self._after(landing, steps[:low])), self.name)

    def _after(self, landing: Landing, gone: list[tuple[float, int, int]]) -> list[int]:
        """Units kept at each site once these steps have gone."""
        kept = landing.full
        for _, index, count in gone:
            kept[index] = min(kept[index], count)
        return kept

"""The selection Global: one threshold for the units of all sites."""

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
    """A selection with one threshold: removes the units with the lowest scores of the whole model.

    Scores are normalised first. This makes scores of different sites comparable. Units are removed, the lowest score
    first, until the budget is met. Removing the last unit may free more than needed. Units that were removed are then
    put back, best first, as long as they fit.

    Args:
        normalise: How scores of different sites are made comparable. "mean": divided by the mean absolute score of the
            site. "cost": divided by the cost of the unit, in the first resource that the budget limits. "none":
            unchanged. None: as `Scores.scale` asks: "mean" for the scale "site", "cost" for "loss", "none" for "plan".

    Raises:
        PluginError: `normalise` is unknown.

    Example:
        >>> import torch, xprune
        >>> from torch import nn
        >>> mlps = [nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)) for _ in range(2)]
        >>> model, inputs = nn.Sequential(*mlps), torch.randn(3, 4)
        >>> sites = xprune.find_sites(model, inputs)
        >>> scores = xprune.Scores(sites, (torch.tensor([9.0, 8, 7, 1]), torch.tensor([6.0, 3, 2, 0])), "mine")
        >>> choice, budget = xprune.SELECTIONS["global"](normalise="none"), xprune.Budget(params=0.6)
        >>> plan = xprune.select(model, scores, budget, choice, example_inputs=inputs)
        >>> plan.keeps
        ((0, 1, 2), (0,))
    """

    normalise: str | None = None
    name: ClassVar[str] = "global"

    def __post_init__(self) -> None:
        allowed = tuple(NORMALISATIONS.values())
        if self.normalise not in (None, *allowed):
            raise PluginError(f"global: normalise={self.normalise!r}, allowed are None, {', '.join(allowed)}.")

    def select(self, context: Context, scores: Scores, costs: Costs, budget: Budget) -> Plan:
        """Selects the units that stay. See `Selection.select`."""
        allocation = Allocation.on(costs, budget, normalise(scores, costs, budget, self.normalise))
        return allocation.plan(allocation.fill(allocation.one_threshold()), self.name)

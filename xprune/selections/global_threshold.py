"""The selection Global, which uses one threshold for the units of all sites."""

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
    """A selection that removes the units with the lowest scores of the whole model.

    First, the scores are normalised, which makes scores of different sites comparable. Then units are removed in
    ascending order of their scores, until the budget is met. The last removal may free more of the budget than needed.
    So removed units that still fit into the budget are kept after all, those with the highest scores first.

    Args:
        normalise: How scores of different sites are made comparable. "mean": each score is divided by the mean absolute
            score of its site. "cost": each score is divided by the cost of its unit, in the first resource that the
            budget limits. "none": scores are not changed. None means that `Scores.scale` decides: "mean" for the scale
            "site", "cost" for "loss", and "none" for "plan".

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

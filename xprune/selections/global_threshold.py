"""The selection Global, which uses one threshold for the units of all sites."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from xprune.core.budget import Budget
from xprune.core.costs import Costs, LinearCost
from xprune.core.interfaces import Context, Selection
from xprune.core.plan import Plan
from xprune.core.scores import Scores
from xprune.costs.allocation import NORMALISATIONS, Allocation, normalise
from xprune.costs.expected import TEMPERATURE
from xprune.costs.knapsack import knapsack
from xprune.errors import PluginError


@dataclass(frozen=True)
class Global(Selection):
    """A selection that removes the units with the lowest scores of the whole model.

    If the cost of a unit depends on how many units its site keeps, as a measured latency does, one threshold is not the
    best choice. Then the plan is the one with the largest kept score that meets the budget, see
    `xprune.costs.knapsack`.

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
        if all(isinstance(cost, LinearCost) for _, cost, _ in allocation.limits):
            return allocation.plan(allocation.fill(allocation.one_threshold()), self.name)
        return allocation.plan(knapsack(allocation, self._worth(allocation, scores)), self.name)

    def _worth(self, allocation: Allocation, scores: Scores) -> list[Tensor]:
        """Returns the value of each unit for a knapsack, (units,) for each site. No value is below 0.

        A threshold keeps a unit if its normalised score is high. A knapsack keeps it if its value is high for its cost.
        So the value is the normalised score times the mean cost of a unit of the site. The two then make the same
        choice if all units of a site cost the same. Scores that were learned for a plan are logits, and the sigmoid of
        their distance from the threshold is a probability. Negative scores count as 0.
        """
        how = self.normalise or NORMALISATIONS[scores.scale]
        _, cost, _ = allocation.limits[0]
        each = cost.linear(allocation.full).units(allocation.full)
        floor = 1e-9 * cost.total(allocation.full)
        values = list(allocation.values)
        if how == "none" and scores.scale == "plan":
            threshold = self._threshold(allocation)
            values = [torch.sigmoid((value - threshold) / TEMPERATURE) for value in values]
        return [value.clamp_min(0) * max(unit, floor) for value, unit in zip(values, each, strict=True)]

    def _threshold(self, allocation: Allocation) -> float:
        """Returns the threshold that meets the limits, between the best removed and the worst kept unit."""
        kept = allocation.one_threshold()
        ordered = [allocation.values[index][allocation.order(index)] for index in range(len(kept))]
        stay = [float(each[count - 1]) for each, count in zip(ordered, kept, strict=True) if count]
        go = [float(each[count]) for each, count in zip(ordered, kept, strict=True) if count < len(each)]
        worst, best = min(stay, default=math.inf), max(go, default=-math.inf)
        ends = [end for end in (worst, best) if math.isfinite(end)]
        return sum(ends) / len(ends) if ends else 0.0

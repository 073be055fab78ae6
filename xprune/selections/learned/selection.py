"""LearnedThresholds: a threshold per site on the ranks of any criterion's scores, learned by gradient."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from xprune.core.budget import Budget
from xprune.core.costs import Costs
from xprune.core.interfaces import Context, Selected, Selection
from xprune.core.plan import Plan
from xprune.core.scores import Scores
from xprune.costs.allocation import Allocation, normalise
from xprune.costs.expected import remaining
from xprune.errors import PluginError
from xprune.selections.learned.learner import ThresholdLearner, ThresholdSettings

WEIGHTS = (None, "joint", "frozen")
FROZEN_STEPS = 300
POINTS = 65


@dataclass(frozen=True)
class LearnedThresholds(ThresholdSettings, Selection):
    """Layer-wise thresholds and pruning rates that learn (Yu and Xiang, "X-Pruner", CVPR 2023, section 3.3).

    A unit's rank within its site, in (0, 1), is compared with the site's threshold by a smooth step of a slope n,
    (1 + tanh(n (rank - threshold))) / 2, the tanh form of equation 9. The loss is the task's and an augmented
    Lagrangian of the cost, penalty / 2 (R - target)^2 + multiplier (R - target), with the multiplier ascended
    (equations 10 and 11, which leave open that it is). The target falls from 1 to the budget, and what is learned is
    each site's distance from where the global selection's threshold lies at the target. At the end, one shift common
    to all thresholds meets the budget.

    weights      "joint": the model's weights learn along, in updates that are taken off fine-tuning's; "frozen": they
                 stay as they are; None: "joint" where the run fine-tunes, else "frozen"
    steps        of gradient; None: half of fine-tuning's updates where weights learn along, else 300
    lr           of Adam on thresholds, falling to 0 by a cosine
    weights_lr   of AdamW on weights
    slope        n at the first and at the last step
    anneal       share of the steps over which the target falls
    penalty      weight of the squared excess, and pace of the multiplier

    Deviations from the paper: ranks in place of mask values, so that one scale serves every criterion, and the global
    selection's path to start from, which keeps what scores say across sites; the step is hard in the forward pass,
    drawn with the probability that the smooth one says; the cost is that of all MACs or parameters, in place of a
    count of units.
    """

    name: ClassVar[str] = "learned"

    def __post_init__(self) -> None:
        checks = {
            "weights": self.weights in WEIGHTS,
            "steps": self.steps is None or self.steps >= 1,
            "lr": self.lr > 0,
            "weights_lr": self.weights_lr > 0,
            "slope": len(self.slope) == 2 and min(self.slope) > 0,
            "anneal": 0 < self.anneal <= 1,
            "penalty": self.penalty > 0,
        }
        for field in (field for field, fine in checks.items() if not fine):
            raise PluginError(
                f"learned: {field}={getattr(self, field)!r} is out of range; see the docstring of LearnedThresholds."
            )

    def updates(self, available: int) -> int:
        """See Selection.updates. Raises PluginError where weights cannot learn along."""
        if self.weights == "frozen" or (self.weights is None and not available):
            return 0
        steps = self.steps or max(1, available // 2)
        if steps > available:
            raise PluginError(
                f"learned: weights='joint' takes {self.steps or 'half of'} updates off fine-tuning's {available}; "
                "fine-tune for more epochs, take fewer steps=, or leave weights='frozen'."
            )
        return steps

    def select(self, context: Context, scores: Scores, costs: Costs, budget: Budget) -> Selected:
        """See Selection.select. The plan's info tells of thresholds, updates, and rates and multipliers over time."""
        updates = self.updates(context.updates)
        ranks = [within_site(values) for values in scores.values]
        allocation = Allocation.on(costs, budget, ranks)  # an impossible budget is refused before anything learns
        learner = ThresholdLearner(context, ranks, costs, budget, self, path(scores, costs, budget))
        learner.run(updates or self.steps or FROZEN_STEPS, joint=updates > 0)
        margins = [rank - float(theta) for rank, theta in zip(ranks, learner.thresholds, strict=True)]
        allocation = Allocation.on(costs, budget, margins)
        plan = allocation.plan(allocation.fill(allocation.one_threshold()), self.name)
        info = {
            **plan.info,
            "weights": "joint" if updates else "frozen",
            "updates": updates,
            "thresholds": learner.thresholds.tolist(),
            "history": learner.history.records,
        }
        return Selected(Plan(plan.sites, plan.keeps, info), context.model if updates else None, updates)


def path(scores: Scores, costs: Costs, budget: Budget) -> Tensor:
    """Thresholds on ranks (points, sites) of the global selection, from the dense model's cost to the budget's."""
    allocation = Allocation.on(costs, budget, normalise(scores, costs, budget))
    full = torch.tensor(allocation.full, dtype=torch.float64)
    kept = [allocation.one_threshold(remaining(point / (POINTS - 1))) for point in range(POINTS)]
    return 1 - torch.tensor(kept) / full


def within_site(values: Tensor) -> Tensor:
    """Ranks of scores (units,) in (0, 1), highest score highest, float64; equal scores: the lower index higher."""
    order = torch.argsort(values, descending=True, stable=True)
    ranks = torch.empty(len(values), dtype=torch.float64)
    ranks[order] = (len(values) - torch.arange(len(values), dtype=torch.float64) - 0.5) / len(values)
    return ranks

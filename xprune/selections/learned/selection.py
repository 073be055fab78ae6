"""The selection LearnedThresholds, which learns by gradient descent how many units each site keeps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

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
"""The allowed values of `LearnedThresholds.weights`, which says whether the model's weights are trained too."""
FROZEN_STEPS = 300
"""The default number of steps if the weights are not trained."""
POINTS = 65
"""The number of costs, from the dense model's cost to the budget, for which starting thresholds are computed."""


@dataclass(frozen=True)
class LearnedThresholds(ThresholdSettings, Selection):
    """A selection that learns a threshold for each site. The threshold decides how many units the site keeps.

    Source: Yu and Xiang, "X-Pruner", CVPR 2023, section 3.3 (layer-wise thresholds and pruning rates).

    **Thresholds on ranks.** At each site, units get ranks from 0 to 1 by their scores. The unit with the highest score
    has the highest rank. A unit is removed if its rank is below the threshold of its site. So a threshold of 0.3
    removes the 30 % of the units with the lowest scores. The scores decide which units of a site are removed, and the
    threshold decides how many.

    **Learning.** The comparison of a rank with a threshold has no useful gradient. So the gate of a unit is 1 with the
    probability `(1 + tanh(n (rank - threshold))) / 2`, the tanh form of equation 9. The gradient is that of this
    probability. The slope n grows during training, until almost no gate is random.

    **Budget.** Let R be the expected cost, and target the allowed cost, both as fractions of the dense model's cost. We
    add `penalty / 2 * (R - target)^2 + multiplier * (R - target)` to the loss of the task. This is an augmented
    Lagrangian (equations 10 and 11 of the paper). The thresholds descend on this loss. The multiplier grows as long as
    the cost is above the target, which the paper does not say. The target falls from 1 to the budget.

    **Start and end.** At each target, the starting thresholds are those that the selection `global` would use. Training
    learns a change of each threshold. At the end, the same number is added to all thresholds, so that the budget is
    met.

    **Deviations from the paper.** Thresholds are compared with ranks and not with mask values, so they work with every
    criterion. Training starts from the thresholds of the selection `global`, which compares scores of different sites.
    Gates are 0 or 1 in the forward pass. The cost is that of the limited resources, such as MACs, and not the number of
    units.

    Args:
        weights: "joint": the weights of the model are trained together with the thresholds. This uses updates of
            fine-tuning. "frozen": the weights do not change. None means "joint" if the run fine-tunes, else "frozen".
        steps: The number of gradient steps. None means half of fine-tuning's updates if the weights are trained, else
            300.
        lr: The learning rate of Adam for the thresholds. It falls to 0 along a cosine.
        weights_lr: The learning rate of AdamW for the weights.
        slope: A tuple with the slope n at the first step and at the last step.
        anneal: The fraction of the steps after which the target has fallen to the budget.
        penalty: The weight of the squared difference between the cost and the target. It also sets how fast the
            multiplier changes.
        accumulate: The number of batches for one step. Their gradients are added up, as in `Finetune`.

    Raises:
        PluginError: A setting is out of range.

    Example:
        >>> import torch, xprune
        >>> from torch import nn
        >>> block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = nn.Sequential(block, nn.Flatten(), nn.Linear(4 * 8, 3))
        >>> batches = [(torch.randn(6, 4, 8), torch.tensor([0, 1, 2, 0, 1, 2]))]
        >>> scores = xprune.score(model, xprune.find_sites(model, batches[0][0]), criterion="magnitude")
        >>> choice = LearnedThresholds(weights="frozen", steps=4)
        >>> plan = xprune.select(model, scores, xprune.Budget(macs=0.6), choice, loader=batches)
        >>> len(plan.info["thresholds"]), [record["step"] for record in plan.info["history"]]
        (2, [0, 1, 2, 3])
    """

    name: ClassVar[str] = "learned"

    def __post_init__(self) -> None:
        # For each field: whether its value is allowed, and a text that says which values are allowed.
        checks = {
            "weights": (self.weights in WEIGHTS, '"joint", "frozen" and None'),
            "steps": (self.steps is None or self.steps >= 1, "None and numbers of at least 1"),
            "lr": (self.lr > 0, "numbers above 0"),
            "weights_lr": (self.weights_lr > 0, "numbers above 0"),
            "slope": (len(self.slope) == 2 and min(self.slope) > 0, "two numbers above 0"),
            "anneal": (0 < self.anneal <= 1, "numbers above 0, up to 1"),
            "penalty": (self.penalty > 0, "numbers above 0"),
            "accumulate": (self.accumulate >= 1, "numbers of at least 1"),
        }
        for field, (in_range, what) in checks.items():
            if not in_range:
                raise PluginError(f"learned: {field}={getattr(self, field)!r}, allowed are {what}.")

    def updates(self, available: int) -> int:
        """Returns how many of fine-tuning's updates are used to train the weights together with the thresholds.

        Args:
            available: The number of updates that fine-tuning makes. 0 if the run does not fine-tune.

        Returns:
            The number of updates. 0 if the weights are not trained.

        Raises:
            PluginError: The settings ask for more updates than fine-tuning makes.
        """
        if self.weights == "frozen" or (self.weights is None and not available):
            return 0
        steps = self.steps or max(1, available // 2)
        if steps > available:
            raise PluginError(
                f"learned: weights='joint' needs {steps} updates, but fine-tuning makes only {available}. Fine-tune "
                "for more epochs, give fewer steps=, or give weights='frozen'."
            )
        return steps

    def select(self, context: Context, scores: Scores, costs: Costs, budget: Budget) -> Selected:
        """Learns the thresholds, and selects the units that stay. See `Selection.select`.

        Returns:
            A `Selected` object with the plan. If the weights were trained, it also holds the trained model and the
            number of updates. `plan.info` contains the thresholds, the number of updates, and the history of the
            training.
        """
        # Without data, the error comes before any work.
        context.data(self.name)
        updates = self.updates(context.updates)
        ranks = [within_site(values) for values in scores.values]
        # Raises BudgetError if the budget is impossible, before the training starts.
        Allocation.on(costs, budget, ranks)
        learner = ThresholdLearner(context, ranks, costs, budget, self, starting_thresholds(scores, costs, budget))
        learner.run(updates or self.steps or FROZEN_STEPS, joint=updates > 0)
        learned = {
            "weights": "joint" if updates else "frozen",
            "updates": updates,
            "thresholds": learner.thresholds.tolist(),
            "history": learner.history.records,
        }
        plan = self._plan(ranks, costs, budget, learned)
        return Selected(plan, context.model if updates else None, updates)

    def again(self, context: Context, scores: Scores, costs: Costs, budget: Budget, before: Plan) -> Plan:
        """Makes a plan for another budget from the thresholds that were learned before. See `Selection.again`."""
        ranks = [within_site(values) for values in scores.values]
        learned = {name: before.info[name] for name in ("weights", "updates", "thresholds", "history")}
        return self._plan(ranks, costs, budget, learned)

    def _plan(self, ranks: Sequence[Tensor], costs: Costs, budget: Budget, learned: Mapping[str, Any]) -> Plan:
        """Returns the plan of learned thresholds, to which one number is added so that the budget is met.

        Args:
            ranks: The rank of each unit, (units,) for each site.
            costs: The costs of the units.
            budget: The budget.
            learned: What the training has found: the entries of `Plan.info`. The entry "thresholds" is used.
        """
        # A common threshold for these differences is the same as one number that is added to all thresholds.
        margins = [rank - theta for rank, theta in zip(ranks, learned["thresholds"], strict=True)]
        allocation = Allocation.on(costs, budget, margins)
        plan = allocation.plan(allocation.fill(allocation.one_threshold()), self.name)
        return Plan(plan.sites, plan.keeps, {**plan.info, **learned})


def starting_thresholds(scores: Scores, costs: Costs, budget: Budget) -> Tensor:
    """Returns the thresholds that the selection `global` would use at several costs.

    The costs go from that of the dense model down to the budget.

    Returns:
        Thresholds on ranks, float64 (points, sites). The first row is 0, which removes no unit.
    """
    allocation = Allocation.on(costs, budget, normalise(scores, costs, budget))
    full = torch.tensor(allocation.full, dtype=torch.float64)
    kept = [allocation.one_threshold(remaining(point / (POINTS - 1))) for point in range(POINTS)]
    # If a site keeps 70 % of its units, its threshold on ranks is 0.3.
    return 1 - torch.tensor(kept) / full


def within_site(values: Tensor) -> Tensor:
    """Turns the scores of a site into ranks between 0 and 1.

    Args:
        values: The scores, (units,).

    Returns:
        Ranks, float64 (units,). The ranks are (1/2, 3/2, ...) / units, from the lowest to the highest score. If two
        units have equal scores, the unit with the lower index has the higher rank.
    """
    order = torch.argsort(values, descending=True, stable=True)
    ranks = torch.empty(len(values), dtype=torch.float64)
    ranks[order] = (len(values) - torch.arange(len(values), dtype=torch.float64) - 0.5) / len(values)
    return ranks

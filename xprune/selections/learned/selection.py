"""The selection LearnedThresholds: learns how many units each site keeps, by gradient descent."""

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
"""Whether the model's weights are trained together with the thresholds, see `LearnedThresholds`."""
FROZEN_STEPS = 300
"""The default number of steps if the weights are frozen."""
POINTS = 65
"""At how many costs between the dense model's and the budget the starting thresholds are computed."""


@dataclass(frozen=True)
class LearnedThresholds(ThresholdSettings, Selection):
    """A selection that learns a threshold for each site, which decides how many units the site keeps.

    Source: Yu and Xiang, "X-Pruner", CVPR 2023, section 3.3 (layer-wise thresholds and pruning rates).

    **Thresholds on ranks.** Within each site, units get ranks from 0 to 1 by their scores, the best unit the highest.
    A unit is removed if its rank is below the site's threshold. So a threshold of 0.3 removes the worst 30 % of the
    units: the threshold is the pruning rate. Scores decide which units of a site are removed. The thresholds decide how
    many.

    **Learning.** A comparison has no gradient. So the gate of a unit is a smooth step (1 + tanh(n (rank - threshold)))
    / 2, the tanh form of equation 9. Its slope n grows during training, and the step becomes sharp. In the forward pass
    each gate is 0 or 1, drawn with the smooth step as the probability.

    **Budget.** Let R be the expected cost as a share of the dense model's, and target the allowed share. To the task's
    loss we add penalty / 2 * (R - target)^2 + multiplier * (R - target), an augmented Lagrangian. While the thresholds
    descend on the loss, the multiplier ascends: it grows as long as the cost is too high. These are equations 10 and
    11, which do not say that the multiplier ascends. The target falls from 1 to the budget.

    **Start and end.** At each target, the starting thresholds are those of the selection `global`. Learning changes
    the distance of each threshold from its start. At the end, one number is added to all thresholds to meet the budget.

    **Deviations from the paper.** Thresholds are compared with ranks, not with mask values, so they work with every
    criterion. Learning starts from the thresholds of the selection `global`, which compares scores of units of
    different sites. Gates are 0 or 1 in the forward pass. The cost is that of the limited resources, such as MACs, not
    a count of units.

    Args:
        weights: "joint": the model's weights are trained together with the thresholds. This uses updates of
            fine-tuning. "frozen": the weights do not change. None: "joint" if the run fine-tunes, else "frozen".
        steps: The number of gradient steps. None: half of fine-tuning's updates for joint weights, else 300.
        lr: The learning rate of Adam on the thresholds. It falls to 0 by a cosine.
        weights_lr: The learning rate of AdamW on the weights.
        slope: The slope n at the first and at the last step.
        anneal: The share of the steps over which the target falls to the budget.
        penalty: The weight of the squared excess of the cost. It also sets how fast the multiplier ascends.

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
        # Name of a field -> whether its value is in range, and the values that are.
        checks = {
            "weights": (self.weights in WEIGHTS, '"joint", "frozen" and None'),
            "steps": (self.steps is None or self.steps >= 1, "None and numbers of at least 1"),
            "lr": (self.lr > 0, "numbers above 0"),
            "weights_lr": (self.weights_lr > 0, "numbers above 0"),
            "slope": (len(self.slope) == 2 and min(self.slope) > 0, "two numbers above 0"),
            "anneal": (0 < self.anneal <= 1, "numbers above 0, up to 1"),
            "penalty": (self.penalty > 0, "numbers above 0"),
        }
        for field, (in_range, what) in checks.items():
            if not in_range:
                raise PluginError(f"learned: {field}={getattr(self, field)!r}, allowed are {what}.")

    def updates(self, available: int) -> int:
        """Returns how many of fine-tuning's updates the weights use while the thresholds learn.

        Args:
            available: The number of updates of fine-tuning. 0 if there is none.

        Returns:
            The number of updates, 0 if the weights are frozen.

        Raises:
            PluginError: More updates are wanted than fine-tuning has.
        """
        if self.weights == "frozen" or (self.weights is None and not available):
            return 0
        steps = self.steps or max(1, available // 2)
        if steps > available:
            raise PluginError(
                f"learned: weights='joint' takes {steps} updates off fine-tuning's {available}, which are too few. "
                "Fine-tune for more epochs, take fewer steps=, or give weights='frozen'."
            )
        return steps

    def select(self, context: Context, scores: Scores, costs: Costs, budget: Budget) -> Selected:
        """Learns the thresholds, and selects the units that stay. See `Selection.select`.

        Returns:
            The plan, with the trained model and the number of updates if the weights were trained. `plan.info` holds
            the thresholds, the number of updates, and a history of rates, thresholds and multipliers.
        """
        updates = self.updates(context.updates)
        ranks = [within_site(values) for values in scores.values]
        # Raises BudgetError for an impossible budget, before anything learns.
        allocation = Allocation.on(costs, budget, ranks)
        learner = ThresholdLearner(context, ranks, costs, budget, self, starting_thresholds(scores, costs, budget))
        learner.run(updates or self.steps or FROZEN_STEPS, joint=updates > 0)
        # One threshold on these margins is the same as one number added to all thresholds.
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


def starting_thresholds(scores: Scores, costs: Costs, budget: Budget) -> Tensor:
    """Computes the thresholds that the selection `global` would give, from the dense model's cost down to the budget.

    Returns:
        Thresholds on ranks, float64 (points, sites). The first row is 0: nothing is removed.
    """
    allocation = Allocation.on(costs, budget, normalise(scores, costs, budget))
    full = torch.tensor(allocation.full, dtype=torch.float64)
    kept = [allocation.one_threshold(remaining(point / (POINTS - 1))) for point in range(POINTS)]
    # A site that keeps 70 % of its units has a threshold of 0.3 on ranks.
    return 1 - torch.tensor(kept) / full


def within_site(values: Tensor) -> Tensor:
    """Turns the scores of a site into ranks between 0 and 1.

    Args:
        values: Scores (units,).

    Returns:
        Ranks, float64 (units,): (1/2, 3/2, ...) / units from the lowest to the highest score. Of units with equal
        scores, the one with the lower index has the higher rank.
    """
    order = torch.argsort(values, descending=True, stable=True)
    ranks = torch.empty(len(values), dtype=torch.float64)
    ranks[order] = (len(values) - torch.arange(len(values), dtype=torch.float64) - 0.5) / len(values)
    return ranks

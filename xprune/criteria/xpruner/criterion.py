"""The criterion X-Pruner. Its scores come from masks that are learned while the model's weights do not change."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from xprune.core.budget import Budget
from xprune.core.interfaces import Context, Criterion
from xprune.core.registry import registered, resolve
from xprune.core.scores import LowRank, Scores
from xprune.core.site import Site
from xprune.criteria.xpruner.learner import OBJECTIVES, MaskLearner, MaskSettings
from xprune.criteria.xpruner.masks import SMOOTHNESS, SPARSITY, split
from xprune.errors import PluginError

AGGREGATES = ("shared", "mean", "max")
"""The allowed values of `XPruner.aggregate`, which says how the logits become one score for each unit."""
BUDGETS = ("one", "any")
"""The allowed values of `XPruner.budgets`, which says for which budgets the masks are learned."""

_TIMED = 4
"""The number of steps that `XPruner.estimate` makes. The first one is not measured, as it allocates memory."""


@dataclass(frozen=True)
class XPruner(MaskSettings, Criterion):
    """A criterion that learns masks. They show which units the model needs, and which units each class needs.

    Source: Yu and Xiang, "X-Pruner: eXplainable Pruning for Vision Transformers", CVPR 2023, arXiv 2303.04935, section
    3.2.

    **Masks.** A mask is a number from 0 to 1 for each unit. In each forward pass, a 0 or a 1 is sampled for the unit,
    and the mask is the probability of the 1. Masks are learned by gradient descent, and the model's weights do not
    change. Masks are stored in a table with one row for each class, and one more row that all classes share. A row
    holds one logit for each unit, and a sigmoid turns the logit into the mask. All logits are 0 at the start, so no
    unit is preferred. After the last step, the logits are the scores.

    **Shared row and class rows.** The shared row shows which units the model needs. It is trained with cross-entropy on
    samples of all classes, and the plan is made from it. The row of a class shows which units this class needs. These
    rows are the class-wise scores. They explain the plan but do not change it.

    **One-vs-rest.** By default, the row of a class c is trained as follows. The units for which the row gives a 1 are
    removed from the model. Then samples of class c should be misclassified, so their loss is `-log(1 - p_c)`, where p_c
    is the probability that the model gives to c. Samples of other classes should not be affected, so their loss is the
    cross-entropy. As a result, the row gets high masks for units that c needs and other classes do not need. Units that
    every class needs get low masks in it.

    **Budget.** The expected cost of a row is the sum over all units of the unit's cost times its mask. Before every
    step, the same number is subtracted from all logits of the shared row. The number is chosen so that the expected
    cost equals the allowed cost. During training, the allowed cost falls from the dense model's cost to the budget. So
    a user gives a budget, and need not tune the weight of a penalty. If `xprune.score` is called without a budget, the
    allowed cost falls to the middle between the dense model's MACs and the smallest possible MACs.

    **Any budget.** With `budgets="any"`, one learning serves all budgets. The allowed cost is drawn anew at each step,
    evenly from a range of costs. The range grows during learning, from the dense model's cost down to a tenth of the
    cost of all units. So the logits learn an order of the units that is good at each cost, and `select` makes a plan
    from it for any budget. The scores depend on which resources the budget limits, but not on the fractions. The idea
    of one scoring for all budgets is that of SnapViT (arXiv 2510.17700).

    **Deviations from the paper.** We deviate where the paper leaves something open, and where its method failed in our
    trials. A setting in parentheses selects the paper's method. The thresholds of section 3.3 of the paper are a
    selection, called `LearnedThresholds`.

    - The paper trains the row of a sample's own class with cross-entropy (`objective="label"`). The row then tells the
      model the correct class. Training accuracy rises to 100 % and the scores say little. One-vs-rest avoids this.
    - The paper has no shared row (`shared=0.0` with `aggregate="mean"` or `"max"`).
    - The paper multiplies the unit by the mask itself (section 3.2), and many masks end between 0 and 1. Here each gate
      is sampled as 0 or 1, with the mask as the probability of 1. So the masks are trained with models in which units
      are present or absent, as after surgery. There is no setting for the paper's method.
    - The paper adds a penalty for large masks (equation 7: `sparsity="l2"`, `lambda_sparse`) and a penalty for
      differences between masks (equation 6: `lambda_smooth`). The weights of both have to be tuned. Here the budget is
      met at every step.

    Args:
        objective: Which row gives the gates of a sample, how its units are used, and the loss.
            "one-vs-rest": as described above. For half of the samples, the row is that of the sample's own class. For
            the other half, it is that of another class. How many units the row removes changes from step to step,
            between none and half of all units by cost. So the row learns an order of the units. The row does not depend
            on the shared row. "one-vs-rest-kept": the row is chosen in the same way, but only the units for which the
            row gives a 1 are kept. The loss is `-log(p_c)` for samples of c, and `-log(1 - p_c)` for other samples.
            "label": the method of the paper. The row is that of the sample's own class, its units are kept, and the
            loss is the cross-entropy. "random-row": the row is that of a random class, its units are kept, and the loss
            is the cross-entropy. These masks cannot learn anything about classes. Use them as a baseline in
            experiments.
        steps: The number of steps of Adam on the logits.
        lr: The learning rate of Adam. It falls to 0 along a cosine.
        shared: The fraction of the steps that train the shared row. The other steps train rows of classes. If the task
            has no classes, all steps train the shared row. With 0, no step trains the shared row, as in the paper.
        budgets: "one": the masks are learned for the budget of the run. "any": they are learned for all budgets.
        anneal: The fraction of the steps after which the allowed cost has fallen to the budget. With `budgets="any"`,
            the fraction of the steps after which the range of costs has its full size.
        sparsity: The penalty for large masks: "cost" (the expected cost), "l1", or "l2" (equation 7).
        lambda_sparse: The weight of this penalty in the loss. None means that there is no fixed weight. The logits are
            then shifted as described under Budget, and only as much of the penalty's gradient is added as keeps the
            expected cost constant.
        smoothness: The penalty for differences between masks (equation 6): "classes" compares the rows of classes with
            a common row, "units" compares neighbouring units.
        lambda_smooth: The weight of this penalty in the loss. With 0, there is no such penalty.
        rank: If None, the rows of all classes are one table (classes, units). If a number r, they are the product of
            two matrices (classes, r) and (r, units), which needs less memory if there are many classes.
        sparse: If True, gradients are computed only for the rows that are used in a step. If False, gradients are
            tensors for all rows. None means True if there are more than 1,000 classes and one process on the CPU or on
            CUDA, else False.
        warm_start: The name of another criterion, such as "taylor". At the start, the shared row then has the same
            order of units as the scores of this criterion. None means that all units are equal at the start.
        accumulate: The number of batches for one step. Their gradients are added up, as in `Finetune`.
        aggregate: How the logits become one score for each unit. "shared": the logit in the shared row. "mean" or
            "max": the mean or the maximum of the logits in the rows of all classes that were trained.

    Raises:
        PluginError: A setting is out of range or unknown, or no step trains the row that `aggregate` uses.

    Example:
        >>> import torch, xprune
        >>> from torch import nn
        >>> block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = nn.Sequential(block, nn.Flatten(), nn.Linear(4 * 8, 3))
        >>> batches = [(torch.randn(6, 4, 8), torch.tensor([0, 1, 2, 0, 1, 2]))]
        >>> sites = xprune.find_sites(model, batches[0][0])
        >>> masks = XPruner(steps=6)  # 600 by default
        >>> scores = xprune.score(model, sites, batches, masks, budget=xprune.Budget(macs=0.6))
        >>> scores.values[1].shape, scores.classwise[1].shape  # 16 neurons, 3 classes
        (torch.Size([16]), torch.Size([3, 16]))
    """

    aggregate: str = "shared"
    name: ClassVar[str] = "xpruner"
    at_budget: ClassVar[bool] = True

    def __post_init__(self) -> None:
        # If the name of the criterion is unknown, this line raises the error now and not after hours of other work.
        self._warm_start_criterion()
        choices = {
            "objective": OBJECTIVES,
            "sparsity": SPARSITY,
            "smoothness": SMOOTHNESS,
            "aggregate": AGGREGATES,
            "budgets": BUDGETS,
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise PluginError(f"xpruner: {field}={getattr(self, field)!r}, allowed are {', '.join(allowed)}.")
        # For each field: whether its value is allowed, and a text that says which values are allowed.
        checks = {
            "steps": (self.steps >= 1, "numbers of at least 1"),
            "lr": (self.lr > 0, "numbers above 0"),
            "shared": (0 <= self.shared <= 1, "numbers from 0 to 1"),
            "anneal": (0 < self.anneal <= 1, "numbers above 0, up to 1"),
            "lambda_sparse": (
                self.lambda_sparse is None or self.lambda_sparse >= 0,
                "None and numbers of at least 0",
            ),
            "lambda_smooth": (self.lambda_smooth >= 0, "numbers of at least 0"),
            "accumulate": (self.accumulate >= 1, "numbers of at least 1"),
            "rank": (self.rank is None or self.rank >= 1, "None and numbers of at least 1"),
        }
        for field, (in_range, what) in checks.items():
            if not in_range:
                raise PluginError(f"xpruner: {field}={getattr(self, field)!r}, allowed are {what}.")
        if self.budgets == "any" and self.lambda_sparse is not None:
            raise PluginError(
                f'xpruner: budgets="any" holds a cost at each step, but lambda_sparse={self.lambda_sparse} '
                "makes masks small without a fixed cost. Leave lambda_sparse out, or learn for one budget."
            )
        if self.aggregate == "shared" and int(self.steps * self.shared) < 1:
            raise PluginError(
                'xpruner: aggregate="shared" scores units by the row that all classes share, but no step trains it: '
                f"shared={self.shared:g} of steps={self.steps} is less than one step. Use a larger shared=, or "
                'aggregate="mean" or "max".'
            )

    def budget_key(self, budget: Budget) -> str:
        """Returns what the scores read of a budget. With `budgets="any"`, they do not read its fractions."""
        return budget.at(1.0).name if self.budgets == "any" else super().budget_key(budget)

    def _warm_start_criterion(self) -> Criterion | None:
        """Returns the criterion that `warm_start` names. Returns None if `warm_start` is not set."""
        return resolve(self.warm_start, registered("criteria"), Criterion, "criterion") if self.warm_start else None

    def estimate(self, context: Context, sites: Sequence[Site]) -> float:
        """Estimates how long `score` will take, in seconds. It makes a few steps and measures them."""
        few = replace(self, steps=_TIMED) if self.shared * _TIMED >= 1 else replace(self, steps=_TIMED, shared=1.0)
        # Without a checkpoint folder, so that the few steps leave nothing behind.
        learner = MaskLearner(replace(context, checkpoint_dir=None, checkpoint=None), sites, few).run()
        return learner.step_seconds * self.steps

    def score(self, context: Context, sites: Sequence[Site]) -> Scores:
        """Learns the masks, and returns their logits as scores.

        Args:
            context: The inputs of a criterion. The model, the loader, the task, the seed, the budget and the checkpoint
                folder are used.
            sites: The sites to score.

        Returns:
            The scores, with the scale "plan": the masks have already been learned with the costs of the units, so one
            threshold for all sites gives the plan. If the task has at least two classes, there are also class-wise
            scores. They are NaN for a class whose row was never trained.

        Raises:
            DataError: There is no loader, it is empty, or it does not fit the task.
            BudgetError: No plan can meet the budget.
            TrainingError: The loss is not finite, or the checkpoint folder belongs to another run.
        """
        start = time.perf_counter()
        first = self._warm_start_criterion()
        first_scores = first.score(context, sites) if first else None
        learner = MaskLearner(context, sites, self, first_scores).run()
        table, sizes = learner.table, [site.size for site in sites]
        undrawn = learner.undrawn
        values = table.aggregate(self.aggregate, undrawn)
        info = {**asdict(self), "seconds": time.perf_counter() - start}
        classwise: tuple[Tensor | LowRank, ...] | None = None
        deviations = table.deviations.weight.detach().clone()
        # The logits of a class that was never trained are still 0. With NaN, they cannot be mistaken for learned
        # scores.
        deviations[undrawn] = torch.nan
        if learner.classes and table.basis is None:
            classwise = split(table.base + deviations, sizes)
        elif learner.classes and table.basis is not None:
            # The two matrices are not multiplied, because the table of all classes may be too large for memory.
            parts = zip(split(table.basis, sizes), split(table.base, sizes), strict=True)
            classwise = tuple(LowRank(deviations.cpu(), basis, base) for basis, base in parts)
        return Scores(tuple(sites), split(values, sizes), self.name, classwise, info, "plan")

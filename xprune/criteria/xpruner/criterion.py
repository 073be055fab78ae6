"""The criterion X-Pruner: scores from masks that are learned for each class, with the model's weights frozen."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from xprune.core.interfaces import Context, Criterion
from xprune.core.registry import registered, resolve
from xprune.core.scores import LowRank, Scores
from xprune.core.site import Site
from xprune.criteria.xpruner.learner import OBJECTIVES, MaskLearner, MaskSettings
from xprune.criteria.xpruner.masks import SMOOTHNESS, SPARSITY, split
from xprune.errors import PluginError

AGGREGATES = ("shared", "mean", "max")
"""How the logits of a table become one score for each unit, see `MaskTable.aggregate`."""


@dataclass(frozen=True)
class XPruner(MaskSettings, Criterion):
    """A criterion that learns masks: they show which units the model needs, and which units each class needs.

    Source: Yu and Xiang, "X-Pruner: eXplainable Pruning for Vision Transformers", CVPR 2023, arXiv 2303.04935,
    section 3.2.

    **Masks.** A mask holds a number from 0 to 1 for each unit, which multiplies the unit's output. Masks are learned by
    gradient descent, and the model's weights do not change. There is a table of masks with a row for each class, and
    one more row that all classes share. A row is stored as logits, and a sigmoid turns logits into masks. All logits
    are 0 at the start, so no unit is preferred. After the last step, the logits are the scores.

    **Two questions, two kinds of rows.** Which units can the model do without? The shared row answers: it is trained
    with cross-entropy on samples of all classes, and the plan is made from it. Which units does one class need? The row
    of that class answers. Class-wise scores explain the plan, and do not change it.

    **One-vs-rest.** This is how the row of a class c is trained by default. We remove the units that the row holds.
    Samples of c should then be misclassified: their loss is -log(1 - p_c). Samples of other classes should not be
    affected: their loss is the cross-entropy. So the row comes to hold the units that c needs and other classes do not.
    Units that every class needs are not in it.

    **Budget.** A row has an expected cost: the sum over the units of cost times mask. Before every step, one number is
    subtracted from all logits of the shared row. We choose the number such that the expected cost equals the allowed
    cost. The allowed cost falls from the dense model's cost to the budget. So a user gives a budget, and does not tune
    the weight of a penalty. If `xprune.score` is called without a budget, masks learn at a cost halfway between the
    dense model's MACs and the smallest possible MACs.

    **Deviations from the paper.** They concern points that the paper leaves open, and points that failed in our trials.
    The settings in parentheses bring the paper's way back. The thresholds of section 3.3 are a selection, called
    `LearnedThresholds`.

    - The paper trains the row of a sample's own class with cross-entropy (`objective="label"`). The row then tells the
      model the answer: training accuracy rises to 100 % and the scores say little. One-vs-rest avoids this.
    - The paper has no shared row (`shared=0.0` with `aggregate="mean"` or `"max"`).
    - The paper multiplies by the mask itself (section 3.2), and many masks end between 0 and 1. Here each mask is drawn
      as 0 or 1 with its value as the probability. So the model is trained in the form that will be cut. There is no
      setting for the paper's way.
    - The paper adds a penalty for large masks (equation 7: `sparsity="l2"`, `lambda_sparse`) and one for differences
      between masks (equation 6: `lambda_smooth`). Both weights have to be tuned. Here the budget is met at every step.

    Args:
        objective: Which row gates a sample, how the gates use the row, and the loss.
            "one-vs-rest": see above. The row is that of the sample's own class for half of the samples, else that of
            another class c. The number of units that the row holds changes from step to step, between none and half of
            all units by cost. This puts the units of the row in an order. The row is learned independently of the
            shared row.
            "one-vs-rest-kept": the same choice of rows, but only the units of the row are kept. The loss is -log p_c
            for samples of c, and -log(1 - p_c) for others.
            "label": the row of the sample's own class, whose units are kept, and cross-entropy. This is the paper's.
            "random-row": the row of a random class, whose units are kept, and cross-entropy. These masks know nothing
            of classes. Use it as a control.
        steps: The number of steps of Adam on the logits.
        lr: The learning rate of the logits. It falls to 0 by a cosine.
        shared: The share of the steps that train the shared row. The other steps train rows of classes. A task without
            classes trains the shared row in all steps. 0: no step trains the shared row, as in the paper.
        anneal: The share of the steps over which the allowed cost falls to the budget.
        sparsity: The term that makes masks small: "cost" (their expected cost), "l1", or "l2" (equation 7).
        lambda_sparse: The weight of the sparsity term in the loss. None: no fixed weight. The logits are shifted as
            described under Budget, and the gradient gets as much of the term as keeps the expected cost constant.
        smoothness: The term that makes masks similar (equation 6): "classes" compares the rows of classes, "units"
            compares neighbouring units.
        lambda_smooth: The weight of the smoothness term in the loss. 0: there is no such term.
        rank: None: the rows of classes are one table (classes, units). r: they are the product of two factors,
            (classes, r) and (r, units). This saves memory for many classes.
        sparse: True: gradients of the table hold only the rows that were drawn. False: they hold all rows. None: True
            for more than 1,000 classes on one process on the CPU or on CUDA.
        warm_start: Name of another criterion, such as "taylor". The shared row starts in the order of its scores.
            None: all units start equal.
        aggregate: How logits become one score for each unit: the logit in the "shared" row, or the "mean" or "max" of
            the logits over all classes that were drawn.

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
        # An unknown criterion is refused here, not after hours of other work.
        self._warm_start_criterion()
        choices = {"objective": OBJECTIVES, "sparsity": SPARSITY, "smoothness": SMOOTHNESS, "aggregate": AGGREGATES}
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise PluginError(f"xpruner: {field}={getattr(self, field)!r}, allowed are {', '.join(allowed)}.")
        # Name of a field -> whether its value is in range, and the values that are.
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
            "rank": (self.rank is None or self.rank >= 1, "None and numbers of at least 1"),
        }
        for field, (in_range, what) in checks.items():
            if not in_range:
                raise PluginError(f"xpruner: {field}={getattr(self, field)!r}, allowed are {what}.")
        if self.aggregate == "shared" and int(self.steps * self.shared) < 1:
            raise PluginError(
                'xpruner: aggregate="shared" scores units by the row that all classes share, but no step trains it: '
                f"shared={self.shared:g} of steps={self.steps} is less than one step. Use a larger shared=, or "
                'aggregate="mean" or "max".'
            )

    def _warm_start_criterion(self) -> Criterion | None:
        """Returns the criterion whose order of units the shared row starts in. None if there is none."""
        return resolve(self.warm_start, registered("criteria"), Criterion, "criterion") if self.warm_start else None

    def score(self, context: Context, sites: Sequence[Site]) -> Scores:
        """Learns the masks, and returns their logits as scores.

        Args:
            context: All of it is used: model, loader, task, seed, budget and checkpoint folder.
            sites: The sites to score.

        Returns:
            The scores, on the scale "plan": one threshold on all of them gives the plan, because the masks have learned
            at the cost of the units already. If the task has at least two classes, also class-wise scores. A class that
            was never drawn has NaN there.

        Raises:
            DataError: There is no loader, it has no length, or it does not fit the task.
            BudgetError: The budget cannot be met.
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
        # The logits of a class that was never drawn are still 0. A reader must not take them for learned scores.
        deviations[undrawn] = torch.nan
        if learner.classes and table.basis is None:
            classwise = split(table.base + deviations, sizes)
        elif learner.classes and table.basis is not None:
            # Factors stay factors: the product for all classes may be too large for memory.
            parts = zip(split(table.basis, sizes), split(table.base, sizes), strict=True)
            classwise = tuple(LowRank(deviations.cpu(), basis, base) for basis, base in parts)
        return Scores(tuple(sites), split(values, sizes), self.name, classwise, info, "plan")

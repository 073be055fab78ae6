"""X-Pruner: class-wise explainability masks, learned at the budget with the model's weights frozen."""

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


@dataclass(frozen=True)
class XPruner(MaskSettings, Criterion):
    """Explainability-aware masks (Yu and Xiang, "X-Pruner", CVPR 2023, arXiv 2303.04935, section 3.2).

    A mask for each class and unit, in [0, 1] and about 1 at the start, gates the unit's output; a sample is gated by
    the row of one class. Weights stay as they are. What the paper leaves open or what failed when tried is different
    here, and can be had back by the settings named:

    objective       whose row gates a sample, how, and the loss.
                    "one-vs-rest": its own class half of the time, else another, c. The units that the row holds are
                    TAKEN AWAY: -log(1 - p_c) for samples of c, cross-entropy for the others, so that the row holds
                    the units that c would miss and others would not; now few, now half of what may go. It stands
                    alone, whatever the classes share.
                    "one-vs-rest-kept": the same rows, whose units alone are kept: -log p_c or -log(1 - p_c).
                    "label": its own class, cross-entropy: the paper's. The mask can then tell the model the answer:
                    training accuracy goes to 100 % and the scores say little.
                    "random-row": any class, cross-entropy: masks that know nothing of classes, a control
    shared          share of the steps that train, by plain cross-entropy, a row that all classes share, and that
                    their rows deviate from where they do not stand alone: what the plan keeps is learned together,
                    for all classes. The other steps train the classes' rows, for the explanation. 0: the paper's
    steps, lr       of Adam, on the masks' logits; lr falls to 0 by a cosine
    anneal          share of the steps over which the allowed cost falls from the dense model's to the budget
    sparsity        the term that makes masks small: "cost" (expected MACs or parameters), "l1", "l2" (equation 7)
    lambda_sparse   its weight; None: what holds the masks' expected cost at what is allowed, at every step
    smoothness      the term that makes masks alike (equation 6): across "classes", or along "units"
    lambda_smooth   its weight
    aggregate       a unit's score: its logit in the "shared" row, or the "mean" or "max" over classes
    rank            None: a table (classes, units); r: factors (classes, r) and (r, units), for many classes
    warm_start      a criterion whose order the shared row starts in ("taylor"); None: all units start alike
    sparse          gradients of the table by the rows drawn alone; None: from 1,001 classes on, on one process

    Gates are 0 or 1 in the forward pass, drawn with the mask's probability, so that what is trained is what will be
    cut; the paper's are the masks themselves (section 3.2), which end between 0 and 1. Scores are logits: one
    threshold on them is the plan. Without a budget (`score` alone), masks are learned halfway between the
    dense model's MACs and the least that can be reached.
    """

    aggregate: str = "shared"
    name: ClassVar[str] = "xpruner"
    at_budget: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._first()  # an unknown one is refused now
        choices = {"objective": OBJECTIVES, "sparsity": SPARSITY, "smoothness": SMOOTHNESS, "aggregate": AGGREGATES}
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise PluginError(f"xpruner: {field}={getattr(self, field)!r}, allowed are {', '.join(allowed)}.")
        checks = {
            "steps": self.steps >= 1,
            "lr": self.lr > 0,
            "shared": 0 <= self.shared <= 1,
            "anneal": 0 < self.anneal <= 1,
            "lambda_sparse": self.lambda_sparse is None or self.lambda_sparse >= 0,
            "lambda_smooth": self.lambda_smooth >= 0,
            "rank": self.rank is None or self.rank >= 1,
        }
        for field in (field for field, fine in checks.items() if not fine):
            raise PluginError(
                f"xpruner: {field}={getattr(self, field)!r} is out of range; see the docstring of XPruner."
            )
        if self.aggregate == "shared" and int(self.steps * self.shared) < 1:
            raise PluginError(
                f"xpruner: shared={self.shared:g} of steps={self.steps} trains no row that all classes share, which "
                'aggregate="shared" would score units by; use aggregate="mean" or "max", or a larger shared=.'
            )

    def _first(self) -> Criterion | None:
        return resolve(self.warm_start, registered("criteria"), Criterion, "criterion") if self.warm_start else None

    def score(self, context: Context, sites: Sequence[Site]) -> Scores:
        """Logits of masks learned at `context.budget`; class-wise where the task has classes."""
        start = time.perf_counter()
        first = self._first()
        learner = MaskLearner(context, sites, self, first.score(context, sites) if first else None).run()
        table, sizes = learner.table, [site.size for site in sites]
        undrawn = learner.undrawn
        values = table.aggregate(self.aggregate, undrawn)
        info = {**asdict(self), "seconds": time.perf_counter() - start}
        classwise: tuple[Tensor | LowRank, ...] | None = None
        deviations = table.deviations.weight.detach().clone()
        deviations[undrawn] = torch.nan
        if learner.classes and table.basis is None:
            classwise = split(table.base + deviations, sizes)
        elif learner.classes and table.basis is not None:
            parts = zip(split(table.basis, sizes), split(table.base, sizes), strict=True)
            classwise = tuple(LowRank(deviations.cpu(), basis, base) for basis, base in parts)
        return Scores(tuple(sites), split(values, sizes), self.name, classwise, info, "plan")

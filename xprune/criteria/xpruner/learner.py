"""Trains the masks of X-Pruner: gradient steps on their logits, with the model's weights frozen."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from xprune.core.budget import Budget
from xprune.core.interfaces import Context
from xprune.core.scores import Scores
from xprune.core.site import Site
from xprune.core.task import batch_axis_of
from xprune.costs.allocation import normalise
from xprune.costs.expected import UnitCosts, hold_cost
from xprune.costs.measure import measure_costs
from xprune.criteria.xpruner.masks import SMOOTHNESS, SPARSITY, MaskTable, from_scores, sampled, spread
from xprune.modules.undisturbed import seeded
from xprune.surgery.gates import Gated
from xprune.training.loop import Loop, Stateful, Weights, length
from xprune.training.runtime import accelerator, reduced


@dataclass(frozen=True)
class Objective:
    """The question that a step asks about the row of a class.

    Args:
        draw: Chooses the class whose row gates each sample. It is called with the own classes of the samples, int64
            (samples,), with a function that draws another class for each sample, and with the number of classes. It
            returns the chosen classes, int64 (samples,).
        one_vs_rest: True: the loss is `Task.one_vs_rest`. False: it is `Task.loss`.
        gone: True: the units that the row holds are removed, and the row is independent of the shared row, because
            units that every class needs say nothing about this class. False: only the units that the row holds are
            kept, and the row is a deviation from the shared row.

    Example:
        >>> import torch
        >>> paper = Objective(draw=lambda own, other, classes: own)
        >>> paper.draw(torch.tensor([2, 0]), lambda: torch.tensor([1, 1]), 3)
        tensor([2, 0])
    """

    draw: Callable[[Tensor, Callable[[], Tensor], int], Tensor]
    one_vs_rest: bool = False
    gone: bool = False


TAKEN = 0.5
"""The largest share of all units, by cost, that the row of a class holds if its units are removed.

The share changes from step to step and covers the range from 0 to this value evenly. So the logits learn an order of
units: those that the class misses first, then those that it misses next. The budget and the plan do not depend on it.
"""

OBJECTIVES: Mapping[str, Objective] = {
    "one-vs-rest": Objective(lambda own, other, classes: _either(other(), own), one_vs_rest=True, gone=True),
    "one-vs-rest-kept": Objective(lambda own, other, classes: _either(other(), own), one_vs_rest=True),
    "label": Objective(lambda own, other, classes: own),
    "random-row": Objective(lambda own, other, classes: torch.randint_like(own, classes)),
}
"""Name -> objective. A script may add one under a new name. `XPruner(objective=...)` then accepts this name."""


def _either(other: Tensor, own: Tensor) -> Tensor:
    """Returns one of the two classes for each sample, int64 (samples,), each with probability 1/2."""
    return torch.where(torch.rand(own.shape, device=own.device) < 0.5, own, other)


@dataclass(frozen=True)
class MaskSettings:
    """Settings of the training of masks. They are fields of the criterion, and `XPruner` describes them."""

    objective: str = "one-vs-rest"
    steps: int = 600
    lr: float = 0.1
    shared: float = 2 / 3
    anneal: float = 0.7
    sparsity: str = "cost"
    lambda_sparse: float | None = None
    smoothness: str = "classes"
    lambda_smooth: float = 0.0
    rank: int | None = None
    sparse: bool | None = None
    warm_start: str | None = None


class MaskLearner:
    """The training of the masks of one model, for one task and one budget.

    Args:
        context: The model, the data, the task, the seed, the budget and the checkpoint folder.
        sites: The sites whose units have masks.
        settings: How the masks learn.
        start: Scores of another criterion, in whose order the shared row starts. None: all units start equal.

    Attributes:
        table: The logits of the masks.
        classes: The number of classes. 0 if the task has none, or only one.
    """

    def __init__(
        self, context: Context, sites: Sequence[Site], settings: MaskSettings, start: Scores | None = None
    ) -> None:
        self.context, self.settings, self.sites = context, settings, tuple(sites)
        self.objective = OBJECTIVES[settings.objective]
        # A step of the shared row gives rows of classes no gradient, which several processes have to look for.
        self.runner = accelerator(unused=True)
        device = self.runner.device
        self.classes, self._first_outputs = self._count_classes()
        units = sum(site.size for site in sites)
        with seeded(context.seed):
            table = MaskTable(max(self.classes, 1), units, settings.rank, self._is_sparse(), self.objective.gone)
            self.table = table.to(device)
        asked = context.budget.shares if context.budget else ()
        axis = batch_axis_of(context.task)
        costs = context.measured(sites) or measure_costs(
            context.model, sites, context.example_inputs, asked, batch_axis=axis
        )
        # Without a budget: halfway between the dense model's MACs and the smallest MACs that can be reached.
        budget = context.budget or Budget(macs=(1 + costs.least(Budget(macs=1.0))) / 2)
        if start is not None:
            self.table.shared.data = from_scores(torch.cat(normalise(start, costs, budget))).to(device)
        self.source = _GateSource(self.table, UnitCosts.of(costs, budget, device), settings)
        # 1 for each class that was drawn. A buffer of a module, because checkpoints save modules.
        self.seen = nn.Module()
        self.seen.register_buffer("classes", torch.zeros(max(self.classes, 1), device=device))

    def run(self) -> "MaskLearner":
        """Takes all steps. A run that was killed continues from its last checkpoint.

        Returns:
            The learner itself.
        """
        context, settings = self.context, self.settings
        with seeded(context.seed):
            loop = Loop(self.runner, context.task, context.data("xpruner"), "masks", settings.steps, context.seed)
            gated = Gated(context.model, self.sites, self.source, context.task.forward, context.task.rows)
            deviations = self.table.deviations
            dense = [p for p in self.table.parameters() if not (deviations.sparse and p is deviations.weight)]
            optimizers: list[torch.optim.Optimizer] = [torch.optim.Adam(dense, lr=settings.lr, betas=(0.9, 0.99))]
            if deviations.sparse:
                # Adam refuses sparse gradients, and SparseAdam refuses dense ones.
                optimizers.append(torch.optim.SparseAdam([deviations.weight], lr=settings.lr, betas=(0.9, 0.99)))
            self.model, *self.optimizers = self.runner.prepare(gated, *optimizers)
            parts: dict[str, Stateful] = {"table": Weights(self.table), "seen": Weights(self.seen)}
            parts |= {f"optimizer {i}": optimizer for i, optimizer in enumerate(self.optimizers)}
            start = Weights(context.model).digest()
            loop.keep(context.checkpoint_dir, parts, **asdict(settings), **self.source.costs.budget, start=start)
            self.loop = loop
            with gated.gates.attached(context.model):
                loop.run(self._step)
        return self

    @property
    def undrawn(self) -> list[int]:
        """The classes whose rows were never drawn, on any process. Their rows have learned nothing."""
        drawn = reduced(self.runner, self.seen.get_buffer("classes"))
        return (drawn == 0).nonzero().flatten().tolist() if self.classes else []

    def _step(self, inputs: Any, targets: Any) -> None:
        """Takes one step, which trains either the shared row or rows of classes."""
        task, settings, step = self.context.task, self.settings, self.loop.step
        samples = task.size(targets)
        # Spreads the steps of the shared row evenly: with shared=2/3, two steps of every three.
        trains_shared = int((step + 1) * settings.shared) > int(step * settings.shared)
        drawn = None if trains_shared or not self.classes else self._draw(targets)
        with self.runner.autocast():
            outputs = self.model(inputs, drawn, samples, step)
        task.check(outputs, targets)
        if drawn is not None and self.objective.one_vs_rest:
            loss = task.one_vs_rest(outputs, targets, drawn, self.objective.gone)
        else:
            loss = task.loss(outputs, targets)
        # The rate is set by hand: it depends on the number of the step alone, so a checkpoint need not save it.
        rate = settings.lr * 0.5 * (1 + math.cos(math.pi * step / self.loop.steps))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad(set_to_none=True)
        self.loop.backward(loss + self.source.penalty())
        for optimizer in self.optimizers:
            optimizer.step()

    def _draw(self, targets: Any) -> Tensor:
        """Chooses the class whose row gates each sample, int64 (samples,)."""
        task, classes = self.context.task, self.classes
        # The classes are needed before the forward pass. A task reads the number of classes from outputs, so it gets
        # those of the first batch.
        found = task.classes(self._first_outputs, targets)
        assert found is not None  # `_count_classes` has seen that the task has classes
        own = found[0]
        drawn = self.objective.draw(own, lambda: task.other(targets, own, classes), classes)
        self.seen.get_buffer("classes")[drawn] = 1
        return drawn

    def _count_classes(self) -> tuple[int, Any]:
        """Returns the number of classes, 0 if there are fewer than two, and the model's outputs for the first batch."""
        # Raises DataError now if the loader has no length, which the loop needs for its schedule.
        length(self.context.data("xpruner"), "xpruner")
        inputs, targets = send_to_device(self.context.first("xpruner"), self.runner.device)
        with torch.no_grad():
            outputs = self.context.task.forward(self.context.model, inputs)
        self.context.task.check(outputs, targets)
        found = self.context.task.classes(outputs, targets)
        return (found[1] if found and found[1] > 1 else 0), outputs

    def _is_sparse(self) -> bool:
        """Returns whether gradients of the table hold only the rows that were drawn, see `XPruner(sparse=...)`."""
        if self.settings.sparse is not None:
            return self.settings.sparse
        # Dense gradients of a large table cost more than the rest of a step. Not all backends have sparse gradients.
        return self.classes > 1000 and self.runner.num_processes == 1 and self.runner.device.type in ("cpu", "cuda")


class _GateSource(nn.Module):
    """A module that computes the gates of each sample: it looks up rows, holds them to a cost, and draws 0 or 1.

    Args:
        table: The logits of the masks.
        costs: The costs of the units, and the allowed cost.
        settings: How the masks learn.
    """

    def __init__(self, table: MaskTable, costs: UnitCosts, settings: MaskSettings) -> None:
        super().__init__()
        self.table, self.costs, self.settings = table, costs, settings
        self.gone = OBJECTIVES[settings.objective].gone
        self._penalty: Tensor | None = None

    def forward(self, drawn: Tensor | None, samples: int, step: int) -> Tensor:
        """Computes the gates of one batch, and keeps the terms for the loss until `penalty` is called.

        Args:
            drawn: The class whose row gates each sample, int64 (samples,). None: the shared row gates all samples.
            samples: The number of samples.
            step: The number of the step.

        Returns:
            Gates (samples, units) of 0 and 1.
        """
        sparsity = SPARSITY[self.settings.sparsity]
        # Each row is computed once, also if many samples have it. `inverse` maps samples to rows.
        rows, inverse = (None, None) if drawn is None else drawn.unique(return_inverse=True)
        logits = self.table(rows)  # (rows, units)
        masks, cost = self._masks(logits, step, rows)
        if self.settings.lambda_sparse is None:
            hold_cost(logits, masks, cost, sparsity)
            penalty = masks.new_zeros(())
        else:
            penalty = self.settings.lambda_sparse * sparsity(masks, cost).mean()
        if self.settings.lambda_smooth:
            common = self._common_masks(logits, step, rows)
            penalty = penalty + self.settings.lambda_smooth * SMOOTHNESS[self.settings.smoothness](masks, common)
        self._penalty = penalty
        if inverse is None:
            return sampled(masks.expand(samples, -1))
        gates = sampled(masks[inverse])
        return 1 - gates if self.gone else gates

    def _common_masks(self, logits: Tensor, step: int, rows: Tensor | None) -> Tensor:
        """Computes the masks that the smoothness term compares the rows of classes with. They get no gradient.

        Returns:
            The masks of the shared row, (1, units). If rows of classes are independent of the shared row, the masks of
            the mean of the rows that were drawn, (rows, units).
        """
        with torch.no_grad():
            if rows is None or not self.table.alone:
                return self._masks(self.table(None), step, None)[0]
            return self._masks(logits.mean(0).expand_as(logits), step, rows)[0]

    def _masks(self, logits: Tensor, step: int, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """Turns logits into masks whose expected cost is the allowed cost at this step.

        Args:
            logits: Logits (rows, units).
            step: The number of the step.
            rows: The classes of the rows, int64 (rows,). None: the shared row.

        Returns:
            The masks (rows, units), and the cost of each unit (rows, units).
        """
        # A fixed weight of the sparsity term makes masks small. Nothing else holds them to a cost.
        if self.settings.lambda_sparse is not None:
            return self.costs.free(logits)
        if rows is not None and self.gone:
            # Adding the class gives rows of one step different shares.
            return self.costs.at(TAKEN * spread(step + rows)).settle(logits)
        return self.costs.settle(logits, (step + 1) / (self.settings.anneal * self.settings.steps))

    def penalty(self) -> Tensor:
        """Returns the sparsity and smoothness terms of the last batch, which are added to the loss."""
        assert self._penalty is not None
        return self._penalty

"""Trains the masks of X-Pruner by gradient descent on their logits. The weights of the model do not change."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
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
from xprune.criteria.xpruner.masks import (
    LOWEST,
    SMOOTHNESS,
    SPARSITY,
    MaskTable,
    any_share,
    from_scores,
    sampled,
    spread,
)
from xprune.modules.digest import OPTIONAL
from xprune.modules.undisturbed import seeded
from xprune.surgery.gates import Gated
from xprune.training.loop import Loop, Stateful, Weights
from xprune.training.runtime import accelerator, reduced
from xprune.training.sharding import average_gradients, refuse_sharding, shard


@dataclass(frozen=True)
class Objective:
    """A way to train the row of a class: which row a sample gets, how its units are used, and which loss.

    Args:
        draw: A function that chooses the class whose row gives the gates of each sample. Its arguments are the own
            class of each sample, int64 (samples,), a function that returns another class for each sample, and the
            number of classes. It returns the chosen classes, int64 (samples,).
        one_vs_rest: If True, the loss is `Task.one_vs_rest`. If False, it is `Task.loss`.
        gone: If True, the units in the row are removed. The row is then independent of the shared row, because units
            that every class needs say nothing about this class. If False, only the units in the row are kept, and the
            row is stored as a difference from the shared row.

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
"""The largest fraction of all units, by cost, that is removed to train the row of a class.

The fraction changes from step to step and covers the range from 0 to this value evenly. So the logits learn an order:
first the unit that the class needs most, then the next one, and so on. The budget and the plan do not depend on this
value.
"""

OBJECTIVES: Mapping[str, Objective] = {
    "one-vs-rest": Objective(lambda own, other, classes: _either(other(), own), one_vs_rest=True, gone=True),
    "one-vs-rest-kept": Objective(lambda own, other, classes: _either(other(), own), one_vs_rest=True),
    "label": Objective(lambda own, other, classes: own),
    "random-row": Objective(lambda own, other, classes: torch.randint_like(own, classes)),
}
"""The objectives by name. If a script adds one under a new name, `XPruner(objective=...)` accepts this name."""


def _either(other: Tensor, own: Tensor) -> Tensor:
    """Returns one of two classes for each sample, int64 (samples,). Each of the two has the probability 1/2."""
    return torch.where(torch.rand(own.shape, device=own.device) < 0.5, own, other)


@dataclass(frozen=True)
class MaskSettings:
    """The settings of the training of masks. They are fields of the criterion `XPruner`, which describes them."""

    objective: str = "one-vs-rest"
    steps: int = 600
    lr: float = 0.1
    shared: float = 2 / 3
    budgets: str = field(default="one", metadata=OPTIONAL)
    anneal: float = 0.7
    sparsity: str = "cost"
    lambda_sparse: float | None = None
    smoothness: str = "classes"
    lambda_smooth: float = 0.0
    rank: int | None = None
    sparse: bool | None = None
    warm_start: str | None = None
    accumulate: int = field(default=1, metadata=OPTIONAL)


class MaskLearner:
    """The training of the masks of one model, for one task and one budget.

    Args:
        context: The context with the model, the data, the task, the seed, the budget and the checkpoint folder.
        sites: The sites whose units get masks.
        settings: The settings of the training.
        start: Scores of another criterion. The shared row starts with the same order of units. None means that all
            units are equal at the start.

    Attributes:
        table: The logits of the masks.
        classes: The number of classes. It is 0 if the task has no classes or only one.
        step_seconds: The mean time of a step with the reading of its batch, in seconds. The first step does not count.
    """

    def __init__(
        self, context: Context, sites: Sequence[Site], settings: MaskSettings, start: Scores | None = None
    ) -> None:
        self.context, self.settings, self.sites = context, settings, tuple(sites)
        self.objective = OBJECTIVES[settings.objective]
        # A step that trains the shared row gives no gradient to rows of classes. With several processes, torch has to
        # know that some parameters get no gradient.
        # The last batch of an epoch is split evenly, so that all processes make the same updates.
        self.runner = accelerator(even_batches=True, unused=True)
        if start is not None:
            refuse_sharding(self.runner, f"xpruner,warm_start={settings.warm_start}", "Give warm_start=None.")
        asked = context.budget.limited if context.budget else ()
        axis = batch_axis_of(context.task)
        costs = context.measured(sites) or measure_costs(
            context.model, sites, context.example_inputs, asked, batch_axis=axis
        )
        self._start = Weights(context.model).digest()
        shard(self.runner, context.model, sites)
        device = self.runner.device
        self.classes, self._first_outputs = self._count_classes()
        units = sum(site.size for site in sites)
        with seeded(context.seed):
            table = MaskTable(max(self.classes, 1), units, settings.rank, self._is_sparse(), self.objective.gone)
            self.table = table.to(device)
        if settings.budgets == "any":
            # The budget says only which resource counts. Its fraction is drawn anew at each step.
            budget = (context.budget or Budget(macs=1.0)).at(1.0)
        else:
            # Without a budget, the target is halfway between the dense model's MACs and the smallest possible MACs.
            budget = context.budget or Budget(macs=(1 + costs.least(Budget(macs=1.0))) / 2)
        if start is not None:
            self.table.shared.data = from_scores(torch.cat(normalise(start, costs, budget))).to(device)
        self.source = _GateSource(self.table, UnitCosts.of(costs, budget, device), settings)
        # The entry of a class is 1 if its row was trained. It is a buffer of a module because checkpoints save modules.
        self.seen = nn.Module()
        self.seen.register_buffer("classes", torch.zeros(max(self.classes, 1), device=device))

    def run(self) -> "MaskLearner":
        """Trains for all steps. If the program was killed, the training continues from its last checkpoint.

        Returns:
            The learner itself.
        """
        context, settings = self.context, self.settings
        with seeded(context.seed):
            data, accumulate = context.data("xpruner"), settings.accumulate
            loop = Loop(self.runner, context.task, data, "masks", settings.steps, context.seed, accumulate)
            gated = Gated(context.model, self.sites, self.source, context.task.forward, context.task.rows)
            deviations = self.table.deviations
            dense = [p for p in self.table.parameters() if not (deviations.sparse and p is deviations.weight)]
            # One call for all numbers of the table. torch has it on these devices.
            fused = self.runner.device.type in ("cpu", "cuda")
            adam = torch.optim.Adam(dense, lr=settings.lr, betas=(0.9, 0.99), fused=fused)
            optimizers: list[torch.optim.Optimizer] = [adam]
            if deviations.sparse:
                # Adam refuses sparse gradients, and SparseAdam refuses dense ones.
                optimizers.append(torch.optim.SparseAdam([deviations.weight], lr=settings.lr, betas=(0.9, 0.99)))
            if self.runner.is_fsdp2:
                # The model is sharded already. Each process holds all masks, because they are few.
                self.model, self.optimizers = gated, [self.runner.prepare_optimizer(each) for each in optimizers]
            else:
                self.model, *self.optimizers = self.runner.prepare(gated, *optimizers)
            parts: dict[str, Stateful] = {"table": Weights(self.table), "seen": Weights(self.seen)}
            parts |= {f"optimizer {i}": optimizer for i, optimizer in enumerate(self.optimizers)}
            fingerprint = {**asdict(settings), **self.source.costs.budget, "start": self._start}
            loop.keep(context.keeping, parts, **fingerprint)
            self.loop = loop
            self._ends: list[float] = []
            with gated.gates.attached(context.model):
                loop.run(self._step, None if self.runner.is_fsdp2 else self.model)
        return self

    @property
    def step_seconds(self) -> float:
        """See the attributes of the class."""
        ends = self._ends
        return (ends[-1] - ends[0]) / (len(ends) - 1) if len(ends) > 1 else math.nan

    @property
    def undrawn(self) -> list[int]:
        """The classes whose rows were never trained on any process. It is an empty list if there are no classes."""
        drawn = reduced(self.runner, self.seen.get_buffer("classes"))
        return (drawn == 0).nonzero().flatten().tolist() if self.classes else []

    def _step(self, inputs: Any, targets: Any) -> None:
        """Trains with one batch of an update. The update trains either the shared row or rows of classes."""
        task, settings, step = self.context.task, self.settings, self.loop.step
        samples = task.size(targets)
        # Distributes the steps for the shared row evenly. With shared=2/3, these are two of every three steps.
        trains_shared = int((step + 1) * settings.shared) > int(step * settings.shared)
        drawn = None if trains_shared or not self.classes else self._draw(targets)
        with self.runner.autocast():
            outputs = self.model(inputs, drawn, samples, step)
        self.loop.check(outputs, targets)
        if drawn is not None and self.objective.one_vs_rest:
            loss = task.one_vs_rest(outputs, targets, drawn, self.objective.gone)
        else:
            loss = task.loss(outputs, targets)
        # The learning rate depends only on the number of the step. So no scheduler is needed that a checkpoint would
        # have to save.
        rate = settings.lr * 0.5 * (1 + math.cos(math.pi * step / self.loop.steps))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            if self.loop.first:
                optimizer.zero_grad(set_to_none=True)
        self.loop.backward(loss + self.source.penalty())
        if self.loop.last:
            average_gradients(self.runner, self.table.parameters())
            for optimizer in self.optimizers:
                optimizer.step()
            self._ends.append(time.perf_counter())

    def _draw(self, targets: Any) -> Tensor:
        """Chooses the class whose row gives the gates of each sample. Returns int64 (samples,)."""
        task, classes = self.context.task, self.classes
        # The classes are needed before the forward pass. A task may read the number of classes from the outputs, so it
        # gets the outputs for the first batch.
        found = task.classes(self._first_outputs, targets)
        assert found is not None  # `_count_classes` has seen that the task has classes
        own = found[0]
        drawn = self.objective.draw(own, lambda: task.other(targets, own, classes), classes)
        self.seen.get_buffer("classes").index_fill_(0, drawn, 1.0)
        return drawn

    def _count_classes(self) -> tuple[int, Any]:
        """Returns the number of classes, and the model's outputs for the first batch.

        The number is 0 if the task has no classes or only one.
        """
        inputs, targets = send_to_device(self.context.first("xpruner"), self.runner.device)
        with torch.no_grad():
            outputs = self.context.task.forward(self.context.model, inputs)
        self.context.task.check(outputs, targets)
        found = self.context.task.classes(outputs, targets)
        return (found[1] if found and found[1] > 1 else 0), outputs

    def _is_sparse(self) -> bool:
        """Returns True if gradients are computed only for the rows that a step uses, else False.

        The criterion `XPruner` describes the setting `sparse`.
        """
        if self.settings.sparse is not None:
            return self.settings.sparse
        # For a large table, gradients of all rows take more time than the rest of a step. Not all backends have sparse
        # gradients.
        return self.classes > 1000 and self.runner.num_processes == 1 and self.runner.device.type in ("cpu", "cuda")


class _GateSource(nn.Module):
    """A module that computes the gates of each sample of a batch from the table of masks.

    It looks up the row of each sample, shifts its logits to the allowed cost, and samples gates of 0 and 1 from the
    masks.

    Args:
        table: The logits of the masks.
        costs: The costs of the units, and the allowed cost.
        settings: The settings of the training.
    """

    def __init__(self, table: MaskTable, costs: UnitCosts, settings: MaskSettings) -> None:
        super().__init__()
        self.table, self.costs, self.settings = table, costs, settings
        self.gone = OBJECTIVES[settings.objective].gone
        # Below the least, all masks that can change are 0, and there is nothing to learn.
        self.lowest = max(LOWEST, costs.least_share)
        self._penalty: Tensor | None = None

    def forward(self, drawn: Tensor | None, samples: int, step: int) -> Tensor:
        """Computes the gates for one batch. The penalties for this batch are stored until `penalty` is called.

        Args:
            drawn: The class whose row gives the gates of each sample, int64 (samples,). None means that all samples use
                the shared row.
            samples: The number of samples.
            step: The number of the training step.

        Returns:
            Gates (samples, units) of 0 and 1.
        """
        sparsity = SPARSITY[self.settings.sparsity]
        # `inverse` holds the position of each sample's row. It is None if samples and rows are in the same order.
        rows, inverse = self._rows(drawn)
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
        if rows is None:
            return sampled(masks.expand(samples, -1))
        gates = sampled(masks if inverse is None else masks[inverse])
        return 1 - gates if self.gone else gates

    def _rows(self, drawn: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Returns the classes of the rows to compute, and the position of each sample's row among them.

        Args:
            drawn: The class whose row gives the gates of each sample, int64 (samples,), or None for the shared row.
        """
        if drawn is None:
            return None, None
        # An accelerator would have to tell Python how many different classes there are, and Python would wait for it.
        # So there, a row is computed for each sample, also if another sample has the same row. Their gradients add up
        # to the same. Penalties with a fixed weight are means over different rows, so they need these.
        penalised = self.settings.lambda_sparse is not None or self.settings.lambda_smooth
        if drawn.device.type != "cpu" and not penalised:
            return drawn, None
        return drawn.unique(return_inverse=True)

    def _common_masks(self, logits: Tensor, step: int, rows: Tensor | None) -> Tensor:
        """Computes the masks that the smoothness penalty "classes" compares the rows of classes with.

        These masks get no gradient, so the penalty changes only the rows of classes.

        Returns:
            The masks of the shared row, (1, units). If the rows of classes are independent of the shared row, the masks
            of the mean of the rows in this batch, (rows, units).
        """
        with torch.no_grad():
            if rows is None or not self.table.alone:
                return self._masks(self.table(None), step, None)[0]
            return self._masks(logits.mean(0).expand_as(logits), step, rows)[0]

    def _masks(self, logits: Tensor, step: int, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """Turns logits into masks whose expected cost is the allowed cost at this step.

        Args:
            logits: The logits, (rows, units).
            step: The number of the training step.
            rows: The classes of the rows, int64 (rows,). None if the row is the shared row.

        Returns:
            The masks, (rows, units), and the cost of each unit in each row, (rows, units).
        """
        # If the sparsity penalty has a fixed weight, only the penalty makes masks small, and no cost is enforced.
        if self.settings.lambda_sparse is not None:
            return self.costs.free(logits)
        if rows is not None and self.gone:
            # The class is added so that rows of different classes remove different fractions in the same step.
            return self.costs.at(TAKEN * spread(step + rows)).settle(logits)
        progress = (step + 1) / (self.settings.anneal * self.settings.steps)
        if self.settings.budgets == "any":
            share = any_share(torch.tensor([step], device=logits.device), progress, self.lowest)
            return self.costs.at(share.expand(len(logits)), empty=False).settle(logits)
        return self.costs.settle(logits, progress)

    def penalty(self) -> Tensor:
        """Returns the sum of the sparsity and smoothness penalties for the last batch, which is added to the loss."""
        assert self._penalty is not None
        return self._penalty

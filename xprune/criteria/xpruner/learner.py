"""MaskLearner: gradient steps on class-wise masks, the model's weights frozen, the budget met at every step."""

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
    """What a step asks of a class's row.

    draw         the class whose row gates a sample, from the samples' own classes int64 (samples,), others, and how
                 many there are
    one_vs_rest  the loss is Task.one_vs_rest, not Task.loss
    gone         the row's units are taken away, and it stands alone: what all classes need is no news of this one.
                 False: the units of the row, which deviates from the shared one, are all that is kept
    """

    draw: Callable[[Tensor, Callable[[], Tensor], int], Tensor]
    one_vs_rest: bool = False
    gone: bool = False


TAKEN = 0.5
"""Share of the units, by their cost, that a class's row holds at most where its units are taken away.

How much it holds goes evenly from nothing to this, from step to step, so that its units are in order all along: which
the class misses first, and which next. The budget, and the plan, know nothing of it.
"""

OBJECTIVES: Mapping[str, Objective] = {
    "one-vs-rest": Objective(lambda own, other, classes: _either(other(), own), one_vs_rest=True, gone=True),
    "one-vs-rest-kept": Objective(lambda own, other, classes: _either(other(), own), one_vs_rest=True),
    "label": Objective(lambda own, other, classes: own),
    "random-row": Objective(lambda own, other, classes: torch.randint_like(own, classes)),
}
"""Add your own under a new name, which `XPruner(objective=...)` then takes."""


def _either(other: Tensor, own: Tensor) -> Tensor:
    return torch.where(torch.rand(own.shape, device=own.device) < 0.5, own, other)


@dataclass(frozen=True)
class MaskSettings:
    """How masks learn; the fields are those of the criterion that owns them, see `XPruner`."""

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
    """Learns the masks of one model, task and budget, from equal ones or from another criterion's scores."""

    def __init__(
        self, context: Context, sites: Sequence[Site], settings: MaskSettings, start: Scores | None = None
    ) -> None:
        self.context, self.settings, self.sites = context, settings, tuple(sites)
        self.objective = OBJECTIVES[settings.objective]
        self.runner = accelerator(unused=True)  # a step of the shared row leaves the classes' rows without a gradient
        device = self.runner.device
        self.classes, self._template = self._look()
        units = sum(site.size for site in sites)
        with seeded(context.seed):
            table = MaskTable(max(self.classes, 1), units, settings.rank, self._sparse(), self.objective.gone)
            self.table = table.to(device)
        asked = context.budget.shares if context.budget else ()
        axis = batch_axis_of(context.task)
        costs = context.measured(sites) or measure_costs(
            context.model, sites, context.example_inputs, asked, batch_axis=axis
        )
        budget = context.budget or Budget(macs=(1 + costs.least(Budget(macs=1.0))) / 2)
        if start is not None:
            self.table.shared.data = from_scores(torch.cat(normalise(start, costs, budget))).to(device)
        self.source = _Source(self.table, UnitCosts.of(costs, budget, device), settings)
        self.seen = nn.Module()
        self.seen.register_buffer("classes", torch.zeros(max(self.classes, 1), device=device))

    def run(self) -> "MaskLearner":
        """Takes the steps; a run that was killed goes on where its state was last kept."""
        context, settings = self.context, self.settings
        with seeded(context.seed):
            loop = Loop(self.runner, context.task, context.data("xpruner"), "masks", settings.steps, context.seed)
            gated = Gated(context.model, self.sites, self.source, context.task.forward, context.task.rows)
            deviations = self.table.deviations
            dense = [p for p in self.table.parameters() if not (deviations.sparse and p is deviations.weight)]
            optimizers: list[torch.optim.Optimizer] = [torch.optim.Adam(dense, lr=settings.lr, betas=(0.9, 0.99))]
            if deviations.sparse:
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
        """Classes that no sample was gated for, on any process."""
        drawn = reduced(self.runner, self.seen.get_buffer("classes"))
        return (drawn == 0).nonzero().flatten().tolist() if self.classes else []

    def _step(self, inputs: Any, targets: Any) -> None:
        task, settings, step = self.context.task, self.settings, self.loop.step
        samples, turn = task.size(targets), int((step + 1) * settings.shared) > int(step * settings.shared)
        drawn = None if turn or not self.classes else self._draw(targets)
        with self.runner.autocast():
            outputs = self.model(inputs, drawn, samples, step)
        task.check(outputs, targets)
        if drawn is not None and self.objective.one_vs_rest:
            loss = task.one_vs_rest(outputs, targets, drawn, self.objective.gone)
        else:
            loss = task.loss(outputs, targets)
        rate = settings.lr * 0.5 * (1 + math.cos(math.pi * step / self.loop.steps))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad(set_to_none=True)
        self.loop.backward(loss + self.source.penalty())
        for optimizer in self.optimizers:
            optimizer.step()

    def _draw(self, targets: Any) -> Tensor:
        task, classes = self.context.task, self.classes
        found = task.classes(self._template, targets)
        assert found is not None  # the template had classes
        own = found[0]
        drawn = self.objective.draw(own, lambda: task.other(targets, own, classes), classes)
        self.seen.get_buffer("classes")[drawn] = 1
        return drawn

    def _look(self) -> tuple[int, Any]:
        """(classes, 0 where there are none to tell apart; outputs of the first batch)."""
        length(self.context.data("xpruner"), "xpruner")
        inputs, targets = send_to_device(self.context.first("xpruner"), self.runner.device)
        with torch.no_grad():
            outputs = self.context.task.forward(self.context.model, inputs)
        self.context.task.check(outputs, targets)
        found = self.context.task.classes(outputs, targets)
        return (found[1] if found and found[1] > 1 else 0), outputs

    def _sparse(self) -> bool:
        if self.settings.sparse is not None:
            return self.settings.sparse
        return self.classes > 1000 and self.runner.num_processes == 1 and self.runner.device.type in ("cpu", "cuda")


class _Source(nn.Module):
    """Gates of each sample, from the table, the budget and chance."""

    def __init__(self, table: MaskTable, costs: UnitCosts, settings: MaskSettings) -> None:
        super().__init__()
        self.table, self.costs, self.settings = table, costs, settings
        self.gone = OBJECTIVES[settings.objective].gone
        self._penalty: Tensor | None = None

    def forward(self, drawn: Tensor | None, samples: int, step: int) -> Tensor:
        """(samples, units) of 0 and 1."""
        sparsity = SPARSITY[self.settings.sparsity]
        rows, inverse = (None, None) if drawn is None else drawn.unique(return_inverse=True)
        logits = self.table(rows)  # (rows, units)
        masks, cost = self._masks(logits, step, rows)
        if self.settings.lambda_sparse is None:
            hold_cost(logits, masks, cost, sparsity)
            penalty = masks.new_zeros(())
        else:
            penalty = self.settings.lambda_sparse * sparsity(masks, cost).mean()
        if self.settings.lambda_smooth:
            alike = self._alike(logits, step, rows)
            penalty = penalty + self.settings.lambda_smooth * SMOOTHNESS[self.settings.smoothness](masks, alike)
        self._penalty = penalty
        if inverse is None:
            return sampled(masks.expand(samples, -1))
        gates = sampled(masks[inverse])
        return 1 - gates if self.gone else gates

    def _alike(self, logits: Tensor, step: int, rows: Tensor | None) -> Tensor:
        """What smoothness across classes takes differences from: masks of the shared row (1, units), untrained by it.

        Rows that stand alone share nothing with that: theirs is the mean of the rows drawn, (rows, units).
        """
        with torch.no_grad():
            if rows is None or not self.table.alone:
                return self._masks(self.table(None), step, None)[0]
            return self._masks(logits.mean(0).expand_as(logits), step, rows)[0]

    def _masks(self, logits: Tensor, step: int, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.settings.lambda_sparse is not None:
            return self.costs.free(logits)
        if rows is not None and self.gone:
            return self.costs.at(TAKEN * spread(step + rows)).settle(logits)
        return self.costs.settle(logits, (step + 1) / (self.settings.anneal * self.settings.steps))

    def penalty(self) -> Tensor:
        """The terms of the last batch's masks that are added to the loss."""
        assert self._penalty is not None
        return self._penalty

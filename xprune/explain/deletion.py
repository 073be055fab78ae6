"""Faithfulness: does a class lose what its scores say it needs, and do the others keep what theirs say they do?"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from xprune.core.interfaces import Context
from xprune.core.scores import LowRank, Scores
from xprune.core.task import Task
from xprune.errors import DataError, PluginError
from xprune.explain.curves import Curves, Faithfulness
from xprune.pipeline import make_context
from xprune.surgery.gates import Gates
from xprune.training.runtime import accelerator, batches, check_loader, prepared, reduced, stage

ORDERS = ("scores", "contrast")
FRACTIONS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
Order = Sequence[Tensor | LowRank]
"""Per site a number per class and unit, (classes, units); the largest goes first."""


@stage()
def faithfulness(
    model: nn.Module,
    scores: Scores,
    loader: Iterable[Any],
    *,
    order: str = "scores",
    fractions: Sequence[float] = FRACTIONS,
    insertion: bool = True,
    chance: int = 3,
    agnostic: bool = True,
    others: int = 1,
    batches: int | None = None,
    task: Task | None = None,
    seed: int = 0,
) -> Faithfulness:
    """Deletes units in the order in which class c needs them, and compares what c loses with what the others lose.

    scores      with class-wise scores, of any criterion
    loader      held-out batches: nothing may have learned from them
    order       "scores": S[c]; "contrast": S[c] less its mean over classes, what c needs more than classes do
    fractions   of the units of each site, in (0, 1); within sites, so that criteria differ in nothing but the order
    insertion   keep these units alone, too
    chance      random orders
    agnostic    delete in the order of `scores.values`, too
    others      rows of other classes, drawn at random, behind which each sample is measured
    batches     of the loader that are looked at, None: all

    Each sample has the gates of its class in one pass and those of another in the next, so that all classes share the
    passes: 1 + others for each point of a curve. Raises PluginError where there are no class-wise scores.
    """
    if order not in ORDERS:
        raise PluginError(f"faithfulness: order={order!r}, allowed are {', '.join(ORDERS)}.")
    if not fractions or not all(0 < fraction < 1 for fraction in fractions) or others < 1 or chance < 0:
        raise PluginError("faithfulness: fractions lie in (0, 1), others is at least 1, chance at least 0.")
    own = _classwise(scores)
    check_loader(loader)
    context, shape = make_context(model, task=task, seed=seed), (own[0].shape[0], sum(t.shape[1] for t in own))
    plans: list[tuple[Order, bool]] = [(own if order == "scores" else [contrast(table) for table in own], False)]
    plans += [(plans[0][0], True)] * insertion
    for index in range(chance):
        random = torch.rand(shape, generator=torch.Generator().manual_seed(seed + index))
        plans.append((random.split([site.size for site in scores.sites], dim=1), False))
    plans += [([value.expand(shape[0], -1) for value in scores.values], False)] * agnostic
    curves, samples = _Measure(context, scores, plans, fractions, others, shape[0]).run(loader, batches)
    name, after = context.task.metric_name, 1 + insertion + chance
    return Faithfulness(
        scores.criterion,
        order,
        name,
        samples,
        tuple(fractions),
        curves[0],
        curves[1] if insertion else None,
        tuple(curves[1 + insertion : after]),
        curves[after] if agnostic else None,
    )


def contrast(table: Tensor | LowRank) -> Tensor | LowRank:
    """Class-wise scores (classes, units) less their mean over the classes that were seen."""
    if isinstance(table, LowRank):
        mean = table.left[~table.left.isnan().any(1)].mean(0) @ table.right
        return replace(table, offset=-mean)
    return table - table.nanmean(0)


def agreement(first: Scores, second: Scores, order: str = "scores") -> dict[str, tuple[float, ...]]:
    """Spearman's rank correlation of two criteria, site -> one for each class; NaN where a class has no scores.

    Raises PluginError where the two are not of the same sites and classes.
    """
    if first.sites != second.sites:
        raise PluginError(f"{first.criterion} and {second.criterion} have scores of different sites.")
    found = {}
    for site, *tables in zip(first.sites, _classwise(first), _classwise(second), strict=True):
        if tables[0].shape != tables[1].shape:
            raise PluginError(f"{site.name}: class-wise scores {tables[0].shape} and {tables[1].shape} do not compare.")
        a, b = ((contrast(t) if order == "contrast" else t)[:].double() for t in tables)
        x, y = (ranks - ranks.mean(1, keepdim=True) for ranks in (_average_ranks(a), _average_ranks(b)))
        found[site.name] = tuple(((x * y).sum(1) / (x.square().sum(1) * y.square().sum(1)).sqrt()).tolist())
    return found


class _Measure:
    """Sums of the metric for every order, fraction and class, in one pass over the data."""

    def __init__(
        self,
        context: Context,
        scores: Scores,
        plans: Sequence[tuple[Order, bool]],
        fractions: Sequence[float],
        others: int,
        classes: int,
    ) -> None:
        self.context, self.plans, self.fractions, self.others = context, plans, fractions, others
        self.gates = Gates(scores.sites, rows=context.task.rows)
        self.seen = torch.ones(classes, dtype=torch.bool)
        self.seen[list(scores.unseen)] = False
        if not self.seen.any():
            raise DataError(f"{scores.criterion}: no class has scores.")

    @torch.no_grad()
    def run(self, loader: Iterable[Any], limit: int | None) -> tuple[list[Curves], int]:
        """(curves of each plan, samples)."""
        runner, task, classes = accelerator(), self.context.task, len(self.seen)
        model, points = self.context.model, len(self.plans) * len(self.fractions)
        sums = torch.zeros(points + 2, 2, classes, device=runner.device)  # + dense, samples; own and others
        draw = torch.Generator().manual_seed(self.context.seed)
        for inputs, targets in batches(runner, prepared(runner, loader), task, "faithfulness", limit):
            outputs = task.forward(model, inputs)
            task.check(outputs, targets)
            found = task.classes(outputs, targets)
            if found is None or found[1] != classes:
                raise DataError(f"scores are of {classes} classes, the task has {found[1] if found else 'none'}.")
            figures = task.metric(outputs, targets)
            if figures is None:
                raise DataError(f"{type(task).__name__} has no metric of a sample: faithfulness needs Task.metric.")
            dense, start = figures.float(), torch.randint(classes, targets.shape, generator=draw)
            for turn in range(1 + min(self.others, classes - 1)):
                shift = 1 + (start + turn) % (classes - 1) if turn else torch.zeros_like(start)
                rows = (found[0] + shift.to(found[0])) % classes
                fine = (self.seen.to(rows.device)[rows]).float()
                columns = [*self._gated(inputs, targets, rows.cpu()), dense, torch.ones_like(dense)]
                sums[:, min(turn, 1)].index_add_(1, rows, torch.stack(columns) * fine)
        sums = reduced(runner, sums).cpu()
        metric = sums[:-1] / sums[-1]  # 0 / 0 is NaN: not seen
        parts = metric[:-1].split(len(self.fractions))
        curves = [Curves(_rows(part[:, 0]), _rows(part[:, 1]), *_rows(metric[-1])) for part in parts]
        return curves, int(sums[-1, 0].sum())

    def _gated(self, inputs: Any, targets: Any, rows: Tensor) -> Iterator[Tensor]:
        """The metric of each sample behind the gates of its row's class, for each plan and fraction."""
        task, model = self.context.task, self.context.model
        with self.gates.attached(model):
            for order, insert in self.plans:
                ranks = [_ranks(table[rows]) for table in order]
                for fraction in self.fractions:
                    self.gates.values = [((rank < fraction) == insert).float() for rank in ranks]
                    figures = task.metric(task.forward(model, inputs), targets)
                    assert figures is not None  # `run` has looked
                    yield figures.float()


def _classwise(scores: Scores) -> Order:
    if scores.classwise is None:
        raise PluginError(f"{scores.criterion} has no class-wise scores: xpruner, taylor and captum:* do.")
    return scores.classwise


def _average_ranks(values: Tensor) -> Tensor:
    """Rank of each value in its row, smallest first; equal values share the mean of their ranks.

    Args:
        values: (classes, units).

    Returns:
        (classes, units), float. A row that holds a NaN is NaN throughout.
    """
    ordered = values.sort(dim=1).values
    smaller, smaller_or_equal = (torch.searchsorted(ordered, values, side=side) for side in ("left", "right"))
    ranks = (smaller + smaller_or_equal + 1).to(values.dtype) / 2
    return ranks.where(~values.isnan().any(dim=1, keepdim=True), torch.nan)


def _ranks(values: Tensor) -> Tensor:
    """(samples, units): the place of each unit in its row, largest first, as a share of the units in (0, 1)."""
    places = values.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (places + 0.5) / values.shape[1]


def _rows(values: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in values.tolist())

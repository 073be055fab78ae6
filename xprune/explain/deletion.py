"""Measures faithfulness: does a class lose more than other classes if the units are removed that it is said to need?"""

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
"""The allowed values of the argument `order` of `faithfulness`, which says how the units of a class are ordered."""
FRACTIONS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
"""The default fractions of the units of each site that are removed."""
Order = Sequence[Tensor | LowRank]
"""For each site, a table (classes, units) of numbers. For each class, the units with the largest numbers come first."""


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
    """Measures whether class-wise scores are right about which units a class needs.

    Gates remove units in the order in which a class needs them according to its scores. If the scores are right, this
    class loses more of the metric than other classes do. If the scores say nothing about the class, all classes lose
    the same.

    For each point of a curve, there are 1 + `others` forward passes for each batch. In the first pass, each sample gets
    the gates of its own class. In the others, it gets the gates of another class. So all classes are measured in the
    same passes.

    Args:
        model: The dense model. It is not changed.
        scores: Class-wise scores of any criterion.
        loader: Held-out batches. Neither the model nor the criterion should have learned from them.
        order: "scores": the units of a class are ordered by the scores of the class. "contrast": they are ordered by
            the scores of the class minus the mean of these scores over all classes. Then units come first that the
            class needs more than other classes do.
        fractions: The fractions of the units of each site that are removed, in (0, 1). Every site loses the same
            fraction. So the results of criteria differ only by the order of units within a site.
        insertion: If True, the metric is also measured with only these units kept. If False, it is not.
        chance: The number of random orders that are measured for comparison.
        agnostic: If True, the metric is also measured with units removed in the order of `scores.values`, which is the
            same for all classes. If False, it is not.
        others: The number of other classes whose gates each sample gets. They are chosen at random.
        batches: The number of batches of the loader to use. None means all batches.
        task: Reads batches and computes the metric. None means classification of (inputs, labels).
        seed: The seed of all random choices.

    Returns:
        The curves. Their attribute `gap` says how much more of the metric a class loses than other classes, on average.

    Raises:
        PluginError: The criterion has no class-wise scores, or an argument is out of range.
        DataError: The loader does not fit the task, the task has another number of classes than the scores, or
            `Task.metric` returns None.

    Example:
        >>> import torch, xprune
        >>> from torch import nn
        >>> block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = nn.Sequential(block, nn.Flatten(), nn.Linear(4 * 8, 3))
        >>> batches = [(torch.randn(6, 4, 8), torch.tensor([0, 1, 2, 0, 1, 2]))]
        >>> scores = xprune.score(model, xprune.find_sites(model, batches[0][0]), batches, "taylor")
        >>> curves = faithfulness(model, scores, batches, fractions=(0.25, 0.5), insertion=False, chance=1)
        >>> curves.samples, len(curves.deletion.own)  # two fractions
        (6, 2)
    """
    if order not in ORDERS:
        raise PluginError(f"faithfulness: order={order!r}, allowed are {', '.join(ORDERS)}.")
    if not fractions or not all(0 < fraction < 1 for fraction in fractions) or others < 1 or chance < 0:
        raise PluginError(
            f"faithfulness: fractions={fractions!r}, others={others}, chance={chance}. Give at least one fraction, all "
            "of them in (0, 1), others of at least 1, and chance of at least 0."
        )
    own = _classwise(scores)
    check_loader(loader)
    context = make_context(model, task=task, seed=seed)
    classes, units = own[0].shape[0], sum(table.shape[1] for table in own)
    needed: Order = own if order == "scores" else [contrast(table) for table in own]
    sweeps: list[_Sweep] = [(needed, False)]
    if insertion:
        sweeps.append((needed, True))
    for index in range(chance):
        random = torch.rand((classes, units), generator=torch.Generator().manual_seed(seed + index))
        sweeps.append((random.split([site.size for site in scores.sites], dim=1), False))
    if agnostic:
        sweeps.append(([value.expand(classes, -1) for value in scores.values], False))
    curves, samples = _Measure(context, scores, sweeps, fractions, others, classes).run(loader, batches)
    # The curves are in the order of `sweeps`.
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
        context.task.higher_is_better,
    )


def contrast(table: Tensor | LowRank) -> Tensor | LowRank:
    """Subtracts the mean over all classes from class-wise scores.

    In the result, a unit has a positive number if the class needs the unit more than an average class does.

    Args:
        table: Class-wise scores (classes, units) of one site.

    Returns:
        A table of the same type and shape. Classes without scores are not part of the mean.

    Example:
        >>> import torch
        >>> contrast(torch.tensor([[3.0, 1.0], [1.0, 1.0]]))
        tensor([[ 1.,  0.],
                [-1.,  0.]])
    """
    if isinstance(table, LowRank):
        # Row c is offset + left[c] @ right, so the mean row is offset + mean(left) @ right. The difference of the two
        # has the offset -mean(left) @ right.
        mean = table.left[~table.left.isnan().any(1)].mean(0) @ table.right
        return replace(table, offset=-mean)
    return table - table.nanmean(0)


def agreement(first: Scores, second: Scores, order: str = "scores") -> dict[str, tuple[float, ...]]:
    """Compares the class-wise scores of two criteria by Spearman's rank correlation.

    Two criteria can agree although both are wrong. `faithfulness` measures whether one of them is right.

    Args:
        first: Class-wise scores of one criterion.
        second: Class-wise scores of the other criterion, for the same sites and classes.
        order: "scores": the scores of each class are compared. "contrast": their mean over all classes is subtracted
            before the comparison.

    Returns:
        For each site, by its name, a tuple with one correlation for each class, from -1 to 1. NaN if a class has no
        scores.

    Raises:
        PluginError: The two criteria scored different sites or classes, one of them has no class-wise scores, or
            `order` is not known.

    Example:
        >>> import torch, xprune
        >>> from torch import nn
        >>> block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = nn.Sequential(block, nn.Flatten(), nn.Linear(4 * 8, 3))
        >>> batches = [(torch.randn(6, 4, 8), torch.tensor([0, 1, 2, 0, 1, 2]))]
        >>> scores = xprune.score(model, xprune.find_sites(model, batches[0][0]), batches, "taylor")
        >>> agreement(scores, scores)["0.self_attn"]
        (1.0, 1.0, 1.0)
    """
    if order not in ORDERS:
        raise PluginError(f"agreement: order={order!r}, allowed are {', '.join(ORDERS)}.")
    if first.sites != second.sites:
        raise PluginError(
            f"{first.criterion} and {second.criterion} have scores of different sites. Score the same sites with both."
        )
    found = {}
    for site, *tables in zip(first.sites, _classwise(first), _classwise(second), strict=True):
        if tables[0].shape != tables[1].shape:
            raise PluginError(
                f"{site.name}: class-wise scores {tables[0].shape} and {tables[1].shape} have different shapes."
            )
        a, b = ((contrast(t) if order == "contrast" else t)[:].double() for t in tables)
        # Spearman's correlation is Pearson's correlation of the ranks.
        x, y = (ranks - ranks.mean(1, keepdim=True) for ranks in (_average_ranks(a), _average_ranks(b)))
        found[site.name] = tuple(((x * y).sum(1) / (x.square().sum(1) * y.square().sum(1)).sqrt()).tolist())
    return found


_Sweep = tuple[Order, bool]
"""An order of units, and a bool for what happens to its first units. False: they are removed. True: only they are kept.

A sweep is measured at all fractions. The result is one `Curves` object.
"""


class _Measure:
    """One measurement of the metric for every sweep, fraction and class, in one pass over the data.

    Args:
        context: The context with the model, the task and the seed.
        scores: Class-wise scores.
        sweeps: The orders to measure.
        fractions: The fractions of the units that are removed or kept.
        others: The number of other classes whose gates each sample gets.
        classes: The number of classes.

    Raises:
        DataError: No class has scores.
    """

    def __init__(
        self,
        context: Context,
        scores: Scores,
        sweeps: Sequence[_Sweep],
        fractions: Sequence[float],
        others: int,
        classes: int,
    ) -> None:
        self.context, self.sweeps, self.fractions, self.others = context, sweeps, fractions, others
        self.gates = Gates(scores.sites, rows=context.task.rows)
        self.seen = torch.ones(classes, dtype=torch.bool)
        self.seen[list(scores.unseen)] = False
        if not self.seen.any():
            raise DataError(
                f"{scores.criterion}: no class has scores. Score again with data that has samples of the classes."
            )

    @torch.no_grad()
    def run(self, loader: Iterable[Any], limit: int | None) -> tuple[list[Curves], int]:
        """Reads the batches and measures the metric.

        Args:
            loader: The batches.
            limit: The number of batches to read. None means all batches.

        Returns:
            A list with the curves of each sweep, and the number of samples.

        Raises:
            DataError: The task has another number of classes than the scores, or `Task.metric` returns None.
        """
        runner, task, classes = accelerator(), self.context.task, len(self.seen)
        model, points = self.context.model, len(self.sweeps) * len(self.fractions)
        # Axis 0: the sum of the metric for each point of each curve, then the sum of the metric of the dense model,
        # then the number of samples. Axis 1: samples of the class, then samples of other classes. Axis 2: the class
        # whose gates were used.
        sums = torch.zeros(points + 2, 2, classes, device=runner.device)
        draw = torch.Generator().manual_seed(self.context.seed)
        for inputs, targets in batches(runner, prepared(runner, loader), task, "faithfulness", limit):
            outputs = task.forward(model, inputs)
            task.check(outputs, targets)
            found = task.classes(outputs, targets)
            if found is None or found[1] != classes:
                raise DataError(
                    f"the scores are for {classes} classes, but the task has {found[1] if found else 'none'}. "
                    "Give the model and the task that the scores were computed with."
                )
            figures = task.metric(outputs, targets)
            if figures is None:
                raise DataError(
                    f"{type(task).__name__} has no metric for each sample, which faithfulness needs: implement "
                    "Task.metric."
                )
            dense, start = figures.float(), torch.randint(classes, targets.shape, generator=draw)
            # In turn 0, each sample gets the gates of its own class. In later turns, it gets those of another class.
            # The first of these is chosen at random, and each turn takes the next class. So a sample gets different
            # classes, and never its own.
            for turn in range(1 + min(self.others, classes - 1)):
                shift = 1 + (start + turn) % (classes - 1) if turn else torch.zeros_like(start)
                gate_classes = (found[0] + shift.to(found[0])) % classes
                # A class without scores has no order of units. So samples with the gates of such a class are not
                # counted.
                scored = (self.seen.to(gate_classes.device)[gate_classes]).float()
                columns = [*self._gated(inputs, targets, gate_classes.cpu()), dense, torch.ones_like(dense)]
                sums[:, min(turn, 1)].index_add_(1, gate_classes, torch.stack(columns) * scored)
        sums = reduced(runner, sums).cpu()
        # If no sample was measured, the result is 0 / 0, which is NaN.
        metric = sums[:-1] / sums[-1]
        parts = metric[:-1].split(len(self.fractions))
        curves = [Curves(_rows(part[:, 0]), _rows(part[:, 1]), *_rows(metric[-1])) for part in parts]
        return curves, int(sums[-1, 0].sum())

    def _gated(self, inputs: Any, targets: Any, gate_classes: Tensor) -> Iterator[Tensor]:
        """Yields the metric of each sample, (samples,), for each sweep and each fraction. See `_Sweep`.

        Args:
            inputs: The inputs of a batch.
            targets: The targets of the batch.
            gate_classes: The class whose gates each sample gets, int64 (samples,), on the CPU.
        """
        task, model = self.context.task, self.context.model
        with self.gates.attached(model):
            for order, insert in self.sweeps:
                ranks = [_ranks(table[gate_classes]) for table in order]
                for fraction in self.fractions:
                    self.gates.values = [((rank < fraction) == insert).float() for rank in ranks]
                    figures = task.metric(task.forward(model, inputs), targets)
                    assert figures is not None  # `run` has checked this with the dense model's outputs
                    yield figures.float()


def _classwise(scores: Scores) -> Order:
    """Returns the class-wise scores. Raises PluginError if there are none."""
    if scores.classwise is None:
        raise PluginError(
            f"{scores.criterion} has no class-wise scores. The criteria xpruner, taylor and captum:* have them."
        )
    return scores.classwise


def _average_ranks(values: Tensor) -> Tensor:
    """Returns the rank of each value in its row. The smallest value has the lowest rank.

    Equal values get the mean of the ranks that they would have in some order.

    Args:
        values: Values (classes, units).

    Returns:
        Ranks (classes, units), float. If a row of `values` contains NaN, its ranks are all NaN.
    """
    # Two binary searches give the first and the last position of equal values. The mean of both is their rank.
    ordered = values.sort(dim=1).values
    smaller, smaller_or_equal = (torch.searchsorted(ordered, values, side=side) for side in ("left", "right"))
    ranks = (smaller + smaller_or_equal + 1).to(values.dtype) / 2
    return ranks.where(~values.isnan().any(dim=1, keepdim=True), torch.nan)


def _ranks(values: Tensor) -> Tensor:
    """Returns the position of each unit in its row, as a fraction in (0, 1). The largest value comes first.

    Args:
        values: Values (samples, units).
    """
    places = values.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (places + 0.5) / values.shape[1]


def _rows(values: Tensor) -> tuple[tuple[float, ...], ...]:
    """Returns the rows of a matrix as a tuple of tuples."""
    return tuple(tuple(row) for row in values.tolist())

"""Faithfulness: if units are removed that a class is said to need, does this class lose more than the others?"""

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
"""How units of a class are ordered, see `faithfulness`."""
FRACTIONS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
"""The fractions of the units of each site that are removed by default."""
Order = Sequence[Tensor | LowRank]
"""For each site a table (classes, units). The units with the largest numbers of a class are removed first."""


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
    """Measures whether class-wise scores are true of the model.

    Units are removed by gates, in the order in which a class needs them according to its scores. If the scores are
    true, this class loses more than the other classes. If they know nothing of the class, all classes lose alike.

    In one forward pass, each sample gets the gates of its own class. In the next, it gets those of another class. So
    all classes are measured in the same passes: 1 + `others` passes for each point of a curve.

    Args:
        model: The dense model. It is not changed.
        scores: Class-wise scores of any criterion.
        loader: Held-out batches, from which neither the model nor the criterion has learned.
        order: "scores": by the scores of the class. "contrast": by the scores of the class less their mean over all
            classes. Units that the class needs more than other classes come first.
        fractions: The fractions of each site's units to remove, in (0, 1). Every site loses the same fraction, so
            criteria differ only in the order of units within a site.
        insertion: True: also measures with only these units kept. False: does not.
        chance: The number of random orders to measure for comparison.
        agnostic: True: also measures deletion in the order of `scores.values`, which is the same for all classes.
        others: The number of other classes whose gates each sample gets. They are drawn at random.
        batches: The number of batches of the loader to use. None: all.
        task: Reads a batch, and computes the metric. None: classification of (inputs, labels).
        seed: Seeds all random choices.

    Returns:
        The curves. `gap` says how much more a class loses than the others, on average.

    Raises:
        PluginError: The criterion has no class-wise scores, or an argument is out of range.
        DataError: The loader does not fit the task, the task has other classes than the scores, or it has no metric of
            a single sample.

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
    # The curves come back in the order of the sweeps.
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
    """Subtracts from class-wise scores their mean over all classes.

    Units that a class needs more than classes do on average have positive numbers then.

    Args:
        table: Class-wise scores (classes, units) of one site.

    Returns:
        A table of the same form and shape. Classes without scores do not count for the mean.

    Example:
        >>> import torch
        >>> contrast(torch.tensor([[3.0, 1.0], [1.0, 1.0]]))
        tensor([[ 1.,  0.],
                [-1.,  0.]])
    """
    if isinstance(table, LowRank):
        # Row c is offset + left[c] @ right. Without the mean, only the offset differs: it is then -mean(left) @ right.
        mean = table.left[~table.left.isnan().any(1)].mean(0) @ table.right
        return replace(table, offset=-mean)
    return table - table.nanmean(0)


def agreement(first: Scores, second: Scores, order: str = "scores") -> dict[str, tuple[float, ...]]:
    """Compares the class-wise scores of two criteria by Spearman's rank correlation.

    Two criteria can agree and both be wrong. `faithfulness` measures whether a criterion is right.

    Args:
        first: Class-wise scores of one criterion.
        second: Class-wise scores of the other, for the same sites and classes.
        order: "scores": compares the scores of each class. "contrast": compares them less their mean over classes.

    Returns:
        Name of a site -> the correlation for each class, from -1 to 1. NaN if a class has no scores.

    Raises:
        PluginError: The two have different sites or classes, one has no class-wise scores, or `order` is not known.

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
"""An order of units, and what happens to its first units. False: they are removed. True: only they are kept.

A sweep is measured at all fractions, which gives one `Curves`.
"""


class _Measure:
    """One measurement: the metric for every sweep, fraction and class, in one pass over the data.

    Args:
        context: The model, the task and the seed.
        scores: Class-wise scores.
        sweeps: The orders to measure.
        fractions: The fractions of units to remove or to keep.
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
        """Reads the batches and measures.

        Args:
            loader: The batches.
            limit: The number of batches to read. None: all.

        Returns:
            The curves of each sweep, and the number of samples.

        Raises:
            DataError: The task has another number of classes than the scores, or no metric of a single sample.
        """
        runner, task, classes = accelerator(), self.context.task, len(self.seen)
        model, points = self.context.model, len(self.sweeps) * len(self.fractions)
        # Axis 0: a sum of the metric for each point of each curve, then its sum with all units, then the number of
        # samples. Axis 1: samples of the class, samples of other classes. Axis 2: the class whose gates were used.
        sums = torch.zeros(points + 2, 2, classes, device=runner.device)
        draw = torch.Generator().manual_seed(self.context.seed)
        for inputs, targets in batches(runner, prepared(runner, loader), task, "faithfulness", limit):
            outputs = task.forward(model, inputs)
            task.check(outputs, targets)
            found = task.classes(outputs, targets)
            if found is None or found[1] != classes:
                raise DataError(
                    f"scores are of {classes} classes, the task has {found[1] if found else 'none'}. "
                    "Give the model and the task that the scores were made with."
                )
            figures = task.metric(outputs, targets)
            if figures is None:
                raise DataError(f"{type(task).__name__} has no metric of a sample: faithfulness needs Task.metric.")
            dense, start = figures.float(), torch.randint(classes, targets.shape, generator=draw)
            # Turn 0: each sample gets the gates of its own class. Later turns: those of other classes. A random start
            # that moves on by one at each turn gives a sample different classes, and never its own.
            for turn in range(1 + min(self.others, classes - 1)):
                shift = 1 + (start + turn) % (classes - 1) if turn else torch.zeros_like(start)
                gate_classes = (found[0] + shift.to(found[0])) % classes
                # A class without scores has no order of units, so nothing is counted for its gates.
                scored = (self.seen.to(gate_classes.device)[gate_classes]).float()
                columns = [*self._gated(inputs, targets, gate_classes.cpu()), dense, torch.ones_like(dense)]
                sums[:, min(turn, 1)].index_add_(1, gate_classes, torch.stack(columns) * scored)
        sums = reduced(runner, sums).cpu()
        # 0 / 0 is NaN: no sample was measured.
        metric = sums[:-1] / sums[-1]
        parts = metric[:-1].split(len(self.fractions))
        curves = [Curves(_rows(part[:, 0]), _rows(part[:, 1]), *_rows(metric[-1])) for part in parts]
        return curves, int(sums[-1, 0].sum())

    def _gated(self, inputs: Any, targets: Any, gate_classes: Tensor) -> Iterator[Tensor]:
        """Yields the metric of each sample (samples,), for each sweep and each fraction.

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
            f"{scores.criterion} has no class-wise scores. Criteria that have them are xpruner, taylor and captum:*."
        )
    return scores.classwise


def _average_ranks(values: Tensor) -> Tensor:
    """Ranks the values of each row, the smallest first. Equal values get the mean of their ranks.

    Args:
        values: Values (classes, units).

    Returns:
        Ranks (classes, units), float. A row with a NaN is NaN in all places.
    """
    # Two binary searches give the first and the last place of equal values, from which their mean follows.
    ordered = values.sort(dim=1).values
    smaller, smaller_or_equal = (torch.searchsorted(ordered, values, side=side) for side in ("left", "right"))
    ranks = (smaller + smaller_or_equal + 1).to(values.dtype) / 2
    return ranks.where(~values.isnan().any(dim=1, keepdim=True), torch.nan)


def _ranks(values: Tensor) -> Tensor:
    """Returns the place of each unit in its row (samples, units), largest value first, as a fraction in (0, 1)."""
    places = values.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (places + 0.5) / values.shape[1]


def _rows(values: Tensor) -> tuple[tuple[float, ...], ...]:
    """Returns a matrix as a tuple of rows."""
    return tuple(tuple(row) for row in values.tolist())

"""frontier: scores a model once, cuts it at many budgets, and measures accuracy and cost of each pruned model."""

import math
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Any, cast

from torch import nn

from xprune.core.budget import Budget
from xprune.core.interfaces import Criterion, Selection
from xprune.core.plan import Plan
from xprune.core.record import Metrics
from xprune.core.registry import plain_settings, resolve
from xprune.core.scores import Scores
from xprune.core.site import Site
from xprune.core.target import Target
from xprune.core.task import Task, batch_axis_of
from xprune.costs.count import count_resources
from xprune.costs.stopwatch import Stopwatch
from xprune.costs.widths import rounded
from xprune.criteria import CRITERIA
from xprune.environment import hardware, versions
from xprune.errors import BudgetError
from xprune.pipeline import Run
from xprune.report.measure import Measure
from xprune.selections import SELECTIONS
from xprune.tasks import TASKS
from xprune.tradeoff.estimate import Progress, announce, duration, say, seconds_of_measuring
from xprune.tradeoff.frontier import Frontier
from xprune.tradeoff.points import LATENCY, Point, name_of, number
from xprune.training.runtime import stage

SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
"""The fractions that `frontier` measures by default. Those that cannot be reached are left out."""
ELASTIC = "xpruner,budgets=any"
"""The default criterion of `frontier`. Its masks are learned once, for all budgets."""
_SECONDS = 0.5
"""How long the dense model and a pruned model are timed in turn, in seconds."""


@stage()
def frontier(
    model: nn.Module,
    train: Iterable[Any],
    val: Iterable[Any] | None = None,
    *,
    resource: str = "macs",
    criterion: str | Criterion = ELASTIC,
    selection: str | Selection = "global",
    points: int | Sequence[float] | None = None,
    chance: bool = True,
    task: str | Task | None = None,
    sites: Sequence[Site] | None = None,
    units: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    inside: str | Sequence[str] = (),
    min_units: int = 1,
    round_to: int | str = "auto",
    of: str = "model",
    seed: int = 0,
    checkpoint_dir: str | Path | None = None,
    latency: bool = True,
    target: Target | str | None = None,
) -> Frontier:
    """Measures the accuracy of a model against its cost, so that you see the trade before you choose a budget.

    The units are scored once. Then, for each budget, a plan is made from the scores, a copy of the model is cut, and
    its metric is measured without fine-tuning. The dense model is measured too, and so are models with random scores:
    a criterion that is no better than chance is of no use.

    Before the work, the estimated time is printed. During the work, a line is printed for each model.

    Args:
        model: The dense model. It is not changed.
        train: Training batches. The criterion uses them. Nothing else is learned from data.
        val: Batches on which the loss and the metric are measured. Give other batches than those of the final test, if
            you choose the budget by the result. None means that the metric is measured on the training batches.
        resource: The name of the resource that the budgets limit: "macs", "params", "latency", or another name from
            `xprune.RESOURCES`.
        criterion: The criterion. A name from `xprune.CRITERIA`, which may be followed by settings, or an instance. The
            default is a criterion whose scores serve all budgets. If the scores depend on the budget, as those of
            "xpruner" do, they are computed anew for each budget.
        selection: The selection. A name from `xprune.SELECTIONS`, which may be followed by settings, or an instance.
        points: The budgets. Either a list of fractions of the dense model's cost in (0, 1]. Or the number of budgets,
            which are then spaced evenly down to the least that can be reached. None means 0.9, 0.8 and so on down to
            0.1, as far as they can be reached.
        chance: If True, models with random scores are measured at the same budgets.
        task: Reads batches and computes the loss and the metric. An instance of `xprune.Task`, or a name from
            `xprune.TASKS`. None means classification of (inputs, labels).
        sites: The sites that may lose units. None means the sites that `find_sites` finds with the first training
            batch.
        units: The unit kinds to find, such as ["head"]. This argument is used only if `sites` is None.
        exclude: Patterns of the names of sites that keep all units. This argument is used only if `sites` is None.
        inside: Patterns of the part of the model to prune, see `find_sites`.
        min_units: The smallest number of units that a site may keep, see `Budget`.
        round_to: The number of features that a site keeps is a multiple of this number, or "auto", see `Budget`.
        of: What the fractions are fractions of, see `Budget`.
        seed: The seed of all random choices.
        checkpoint_dir: The folder where the criterion saves its progress. If the program was killed, the next call with
            the same folder continues from there. None means that nothing is saved.
        latency: If True, the time of a forward pass is measured for the dense model and each pruned model, in turn.
            With `resource="latency"`, it is always measured.
        target: The device, the dtype and the batch on which times are measured, as a `Target` or a text such as
            "batch=1,threads=2". None means the device and the dtype of the model, and the first training batch.

    Returns:
        The frontier: a point for each budget.

    Raises:
        BudgetError: A fraction in `points` is not in (0, 1] or cannot be reached, or the resource is unknown.
        DataError: A loader is empty, can be read only once, or does not fit the task.
        ModelError: The model has no sites, or its forward fails.
        PluginError: The criterion or the selection is unknown.

    Example:
        >>> import torch, xprune
        >>> from torch import nn
        >>> block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = nn.Sequential(block, nn.Flatten(), nn.Linear(4 * 8, 3))
        >>> batches = [(torch.randn(6, 4, 8), torch.tensor([0, 1, 2, 0, 1, 2]))]
        >>> found = xprune.frontier(model, batches, criterion="taylor", points=[0.8, 0.6], latency=False, chance=False)
        ... # doctest: +ELLIPSIS
        Units cover 96 % of the model's MACs (2 sites). No module was left alone.
        Estimated time: not known in full (scoring: not known, 3 models ... s).
        1 of 3: dense: accuracy ...
        Scored with taylor in ... s.
        2 of 3: 80 %: accuracy ... left)
        3 of 3: 60 %: accuracy ...
        >>> [point.metrics.macs <= point.asked * found.dense.macs for point in found.points]
        [True, True]
    """
    chosen: Criterion = resolve(criterion, CRITERIA, Criterion, "criterion")
    by: Selection = resolve(selection, SELECTIONS, Selection, "selection")
    where = Target.of(target) if isinstance(target, str) else target
    # An empty target says the same as none.
    where = None if where == Target() else where
    like = Budget(
        resources={resource: 1.0},
        min_units=min_units,
        round_to=round_to,
        of=of,
        # A budget has a target only if it limits the time. Times are measured on the target in any case.
        target=where if resource == LATENCY else None,
    )
    # Wrong fractions are an error now, before any batch is read.
    _ = [like.at(share) for share in _listed(points)]
    run = Run(
        model,
        train,
        val,
        task=resolve(task or "classification", TASKS, Task, "task"),
        sites=sites,
        units=units,
        exclude=exclude,
        inside=inside,
        # The time is measured here, in turn with that of the dense model.
        latency=False,
        resources=(resource,),
    )
    run.tell_coverage()
    budgets = _budgets(run, like, resource, points)
    run.check(budgets[0], by)
    watch: Stopwatch | None = None
    # If the budgets limit the time, it is measured in any case.
    if latency or resource == LATENCY:
        watch = run.on_target(where or Target()).watch
    folder = Path(checkpoint_dir) / "score" if checkpoint_dir is not None else None
    models = 1 + len(budgets) * (2 if chance else 1)
    _announce(run, chosen, budgets, models, watch is not None, seed)
    start = time.perf_counter()
    work = _Work(run, by, resource, seed, Progress(models))
    dense = work.dense(watch)
    points_found, plans, scores = work.cut(chosen, budgets, watch, folder)
    by_chance = work.cut(CRITERIA["random"](), budgets, None, None, "chance, ")[0] if chance else ()
    settings = {
        "criterion": plain_settings(chosen),
        "selection": plain_settings(by),
        "budget": {
            "min_units": min_units,
            "round_to": round_to,
            "of": of,
            "target": where.name if where is not None and like.target is not None else None,
        },
        "inside": list(run.inside),
        "least": _least(run, like, resource),
        "refused": work.refused,
        "coverage": run.coverage.text,
        "task": run.task.name,
        "target": None if watch is None else watch.target.name,
        "seed": seed,
        "score_seconds": work.score_seconds,
        "seconds": time.perf_counter() - start,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "hardware": hardware(),
        "versions": versions(),
    }
    of_sites = tuple({"name": site.name, "kind": site.kind, "size": site.size} for site in run.sites)
    return Frontier(resource, dense, points_found, by_chance, of_sites, settings, scores, plans)


class _Work:
    """Cuts and measures the models of a frontier.

    Args:
        run: The model and the data.
        selection: Makes the plans.
        resource: The name of the resource that the budgets limit.
        seed: The seed of all random choices.
        progress: Prints a line for each model.

    Attributes:
        score_seconds: How long the scoring took.
        refused: (fraction, reason) for each budget for which no plan was found.
    """

    def __init__(self, run: Run, selection: Selection, resource: str, seed: int, progress: Progress) -> None:
        self.run, self.selection, self.resource, self.seed, self.progress = run, selection, resource, seed, progress
        self.score_seconds = 0.0
        self.refused: list[tuple[float, str]] = []

    def dense(self, watch: Stopwatch | None) -> Metrics:
        """Measures the dense model."""
        metrics = self.run.dense
        if watch is not None:
            metrics = self._timed(metrics, watch, watch.alone(_SECONDS).median(0))
        # The scoring comes next, so this model does not tell the time that is left.
        self.progress.done(f"dense: {_text(metrics)}", rest_known=False)
        return metrics

    def cut(
        self,
        criterion: Criterion,
        budgets: Sequence[Budget],
        watch: Stopwatch | None,
        folder: Path | None,
        by: str = "",
    ) -> tuple[tuple[Point, ...], tuple[Plan, ...], Scores]:
        """Scores the units, and cuts and measures a model at each budget.

        Args:
            criterion: Scores the units. It does so once, unless its scores depend on the budget.
            budgets: The budgets.
            watch: Measures times. None means that no times are measured.
            folder: The folder where the criterion saves its progress.
            by: The first words of the printed lines.

        Returns:
            (points, plans, scores). The scores are those of the last budget.
        """
        found: list[tuple[Point, Plan]] = []
        scores: dict[str, Scores] = {}
        for budget in budgets:
            share, key = budget.shares[self.resource], criterion.budget_key(budget)
            if key not in scores:
                start = time.perf_counter()
                # Scores for one budget must not continue from the checkpoint of another one.
                own = None if folder is None else folder / key.replace(" ", "-") if key else folder
                # Only the last scores are kept, as those of a large model with many classes need much memory.
                scores = {key: self.run.score(criterion, budget, seed=self.seed, checkpoint_dir=own)}
                if not by:
                    self.score_seconds += time.perf_counter() - start
                    say(f"Scored with {criterion.name} in {duration(time.perf_counter() - start)}.")
                    self.progress.restart()
            try:
                point, plan = self._point(scores[key], budget, watch)
            except BudgetError as error:
                # A cost that is not linear can be predicted wrongly. The other budgets do not depend on it.
                self.refused.append((share, str(error)))
                self.progress.done(f"{by}{100 * share:.3g} %: {error}")
                continue
            found.append((point, plan))
            self.progress.done(f"{by}{name_of(point)}: {_text(point.metrics)}")
        return tuple(point for point, _ in found), tuple(plan for _, plan in found), next(iter(scores.values()))

    def _point(self, scores: Scores, budget: Budget, watch: Stopwatch | None) -> tuple[Point, Plan]:
        """Cuts a model to a budget, and measures it."""
        selected = self.run.select(scores, budget, self.selection, seed=self.seed)
        model = self.run.cut(selected)
        metrics, relative = self.run.measure(model), None
        if watch is not None:
            times = watch.compare(model, _SECONDS)
            relative = times.relative(1)
            metrics = self._timed(metrics, watch, times.median(1))
        predicted = self.run.costs_for(budget).fraction(budget, selected.plan.counts, self.resource)
        share = budget.shares[self.resource]
        return Point(share, predicted, selected.plan.counts, metrics, relative), selected.plan

    def _timed(self, metrics: Metrics, watch: Stopwatch, milliseconds: float) -> Metrics:
        """Returns metrics with a measured time."""
        samples = watch.target.batch or self.run.task.size(self.run.first[1])
        return replace(metrics, latency_ms=milliseconds, latency_rows=samples)


def _listed(points: int | Sequence[float] | None) -> Sequence[float]:
    """Returns the fractions that the caller listed. Empty if the caller gave a number of budgets, or nothing.

    Raises:
        BudgetError: The number of budgets is less than 1, or the list is empty.
    """
    if points is None:
        return ()
    if isinstance(points, Integral) and not isinstance(points, bool) and int(points) >= 1:
        return ()
    if isinstance(points, (Integral, str)) or not isinstance(points, Iterable) or not list(points):
        raise BudgetError(
            f"points={points!r}: give fractions of the dense model's cost, such as points=[0.5, 0.3], or the number of "
            "budgets, at least 1."
        )
    return list(points)


def _budgets(run: Run, like: Budget, resource: str, points: int | Sequence[float] | None) -> list[Budget]:
    """Returns the budgets to measure, the largest first.

    Args:
        run: The model, whose costs say what can be reached.
        like: The budget of which only the fraction changes.
        resource: The name of the resource.
        points: The argument of `frontier`.

    Raises:
        BudgetError: A listed fraction cannot be reached, or none of the default ones.
    """
    listed = _listed(points)
    if listed:
        budgets = [like.at(share) for share in sorted(set(listed), reverse=True)]
        # Raises BudgetError for a budget that cannot be reached. The smallest one is the first to fail.
        run.check(budgets[-1])
        return budgets
    # Rounded up, so that the least can be reached.
    least = math.ceil(_least(run, like, resource) * 1e4) / 1e4
    if points is None:
        shares = [share for share in SHARES if share >= least] or [least]
    else:
        # `_listed` has seen that it is a number.
        count = cast(int, points)
        shares = [1 - (1 - least) * step / count for step in range(1, count + 1)]
        shares = [max(least, math.ceil(share * 1e4) / 1e4) for share in shares]
    return [like.at(share) for share in shares]


def _least(run: Run, like: Budget, resource: str) -> float:
    """Returns the smallest fraction that can be reached."""
    costs = run.costs_for(like)
    return costs.least(rounded(like, costs, run.model), resource)


def _announce(run: Run, criterion: Criterion, budgets: Sequence[Budget], models: int, timed: bool, seed: int) -> None:
    """Prints the estimated time of the scoring and of the measurements."""
    scorings = len({criterion.budget_key(budget) for budget in budgets})
    scoring = run.estimate(criterion, budgets[0], seed=seed)
    measuring = seconds_of_measuring(run)
    # A model is cut from random scores, to see how long it takes. The scores cost nothing, and nor does the selection
    # "global", while another one may train for minutes.
    scores = run.score("random", budgets[0], seed=seed)
    start = time.perf_counter()
    # If no plan is found for this budget, it is reported later, together with those of the other budgets.
    with suppress(BudgetError):
        model = run.cut(run.select(scores, budgets[0], seed=seed))
        count_resources(model, run.example, batch_axis=batch_axis_of(run.task))
    cutting = time.perf_counter() - start
    each = None if measuring is None else measuring + cutting + _SECONDS * timed
    announce(None if scoring is None else scoring * scorings, each, models)


def _text(metrics: Metrics) -> str:
    """Returns the metric, and the time if it was measured, as a text."""
    shown = Measure.of(metrics)
    timed = "" if metrics.latency_ms is None else f", {metrics.latency_ms:.1f} ms"
    return f"{shown.name} {number(metrics.metric, shown)}{' %' * (shown.factor == 100)}{timed}"

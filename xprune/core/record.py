"""Measured figures of one model, and the record of one run. Reports, plots and files are made from them."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn

from xprune.core.plan import Plan
from xprune.core.scores import Scores
from xprune.core.task import Task


@dataclass(frozen=True)
class Metrics:
    """The measured figures of one model: its metric, its loss and its costs.

    `xprune.evaluate` gives one without costs. A result holds one for each stage of the run: `result.metrics["pruned"]`.

    Args:
        metric: The task's metric: for classification the accuracy, in [0, 1].
        loss: The mean loss over the samples.
        samples: Number of samples that were measured.
        metric_name: Name of the metric.
        data: The data that were measured: "validation" or "training".
        macs: MACs of one sample. None if they were not counted.
        params: Number of parameters. None if they were not counted.
        latency_ms: Median time of a forward pass on the first batch, in milliseconds. None if it was not timed.
        latency_rows: Number of samples in that batch. None if it was not timed.
        by_class: (mean metric, number of samples) of each class, in the order of the class indices. () if the task has
            no classes.
        resources: Cost in each further resource, by its name in RESOURCES.

    Example:
        >>> metrics = Metrics(metric=0.9, loss=0.3, samples=100).with_costs(macs=5e6, params=2e4)
        >>> metrics.accuracy
        0.9
        >>> metrics.costs
        {'macs': 5000000, 'params': 20000}
    """

    metric: float
    loss: float
    samples: int
    metric_name: str = "accuracy"
    data: str = "validation"
    macs: int | None = None
    params: int | None = None
    latency_ms: float | None = None
    latency_rows: int | None = None
    by_class: tuple[tuple[float, int], ...] = ()
    resources: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # JSON files hold lists, whose entries may be whole numbers. Tuples of (float, int) make results comparable.
        object.__setattr__(self, "by_class", tuple((float(metric), int(n)) for metric, n in self.by_class))

    @property
    def accuracy(self) -> float:
        """The metric, if it is the accuracy. Raises AttributeError if it is another metric."""
        if self.metric_name != "accuracy":
            raise AttributeError(f"the metric of this task is {self.metric_name}: read .metric")
        return self.metric

    @property
    def costs(self) -> dict[str, float]:
        """The cost in each resource that was measured, by the name of the resource."""
        fields = {"macs": self.macs, "params": self.params}
        return {**{name: cost for name, cost in fields.items() if cost is not None}, **self.resources}

    def with_costs(
        self,
        *,
        macs: float,
        params: float,
        latency_ms: float | None = None,
        latency_rows: int | None = None,
        **resources: float,
    ) -> "Metrics":
        """Returns the same figures with costs.

        Args:
            macs: MACs of one sample.
            params: Number of parameters.
            latency_ms: See `Metrics`. None if it was not timed.
            latency_rows: See `Metrics`. None if it was not timed.
            **resources: Cost in further resources, by their names in RESOURCES.
        """
        return replace(
            self,
            macs=int(macs),
            params=int(params),
            latency_ms=latency_ms,
            latency_rows=latency_rows,
            resources=resources,
        )

    def to_json(self) -> dict[str, Any]:
        """Returns the figures as a dict of numbers, strings, lists and dicts."""
        return asdict(self)


@dataclass(frozen=True)
class Record:
    """The result of one run, with the settings of the run: everything that a report shows.

    `xprune.PruneResult` is a record that can save itself and make its report.

    Attributes:
        model: The pruned model, an ordinary module in eval mode.
        plan: The units that stay, for the model that was given.
        scores: Scores of every unit of the model that was given.
        metrics: Figures by stage: "dense", "pruned" (after surgery), and "finetuned" if the run fine-tuned.
        settings: Settings of the run, hardware and versions: numbers, strings, lists and dicts.
        dense: The model that was given, not a copy. Reports draw pictures with it. None in a result that was read from
            a folder.
        data: The loader of the data that figures were measured on. None in a result that was read from a folder.
        task: The task of the run. None in a result that was read from a folder.
    """

    model: nn.Module
    plan: Plan
    scores: Scores
    metrics: Mapping[str, Metrics]
    settings: Mapping[str, Any] = field(default_factory=dict)
    dense: nn.Module | None = None
    data: Iterable[Any] | None = None
    task: Task | None = None

"""Metrics of one model, and the record of one run: plain values that reports, plots and files are made from."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn

from xprune.core.plan import Plan
from xprune.core.scores import Scores
from xprune.core.task import Task


@dataclass(frozen=True)
class Metrics:
    """Figures of one model.

    metric, metric_name   the task's, for classification the accuracy in [0, 1]
    loss                  mean over the samples
    data                  what metric and loss were measured on: "validation" or "training"
    samples               how many
    macs                  per sample
    params                parameters
    latency_ms            median of a forward pass on the first batch, and its number of rows; None: not timed
    by_class              (mean metric, samples) of each class, by index; empty where the task has none
    resources             what the model costs of further resources, by their names in RESOURCES
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
        object.__setattr__(self, "by_class", tuple((float(metric), int(n)) for metric, n in self.by_class))

    @property
    def accuracy(self) -> float:
        """The metric, where it is the accuracy; AttributeError otherwise."""
        if self.metric_name != "accuracy":
            raise AttributeError(f"the metric of this task is {self.metric_name}: read .metric")
        return self.metric

    @property
    def costs(self) -> dict[str, float]:
        """What the model costs of each resource that was measured, by name."""
        own = {"macs": self.macs, "params": self.params}
        return {**{name: cost for name, cost in own.items() if cost is not None}, **self.resources}

    def with_costs(
        self,
        *,
        macs: float,
        params: float,
        latency_ms: float | None = None,
        latency_rows: int | None = None,
        **resources: float,
    ) -> "Metrics":
        """The same figures with what the model costs, by the names of resources; no latency where it was not timed."""
        return replace(
            self,
            macs=int(macs),
            params=int(params),
            latency_ms=latency_ms,
            latency_rows=latency_rows,
            resources=resources,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Record:
    """What a run made, and what it was made with: everything that a report tells of.

    model     an ordinary module, physically smaller, in eval mode
    plan      the units that stayed, relative to the model that was given
    scores    of every unit of that model
    metrics   "dense", "pruned" (after surgery) and, where it was asked for, "finetuned"
    settings  of the run, with hardware and versions, plain data
    dense     the model that was given, data that figures were measured on, and the task: what a report looks at for
              pictures. References, not copies; None in a result that was read from a directory
    """

    model: nn.Module
    plan: Plan
    scores: Scores
    metrics: Mapping[str, Metrics]
    settings: Mapping[str, Any] = field(default_factory=dict)
    dense: nn.Module | None = None
    data: Iterable[Any] | None = None
    task: Task | None = None

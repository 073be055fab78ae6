"""The classes `Metrics` and `Record`: the measured values of one model, and the result of one run.

Reports, plots and result files are made from them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn

from xprune.core.coverage import Coverage
from xprune.core.plan import Plan
from xprune.core.scores import Scores
from xprune.core.target import Target
from xprune.core.task import Task
from xprune.core.times import Ratio


@dataclass(frozen=True)
class Metrics:
    """The measured values of one model: its metric, its loss and its costs.

    `xprune.evaluate` returns an object of this class without costs. The result of a run holds one object for the dense
    model, one for the pruned model and one for the fine-tuned model, such as `result.metrics["pruned"]`.

    Args:
        metric: The value of the task's metric. For classification it is the accuracy, from 0 to 1.
        loss: The mean loss over the samples.
        samples: The number of samples that were measured.
        metric_name: The name of the metric.
        data: Which data were measured: "validation" or "training".
        macs: The MACs for one sample. None if they were not counted.
        params: The number of parameters. None if they were not counted.
        latency_ms: The median time of a forward pass on the first batch, in milliseconds. None if it was not measured.
        latency_rows: The number of samples in the batch of `latency_ms`. None if the time was not measured.
        by_class: One tuple (mean metric, number of samples) for each class, in the order of the class indices. Empty if
            the task has no classes.
        resources: The cost in each resource other than MACs and parameters, by the name of the resource in
            `xprune.RESOURCES`.
        higher_is_better: True if a larger metric is better, as with the accuracy. False if a smaller metric is better,
            as with an error.
        speedup: How many times as fast as the dense model the model is, with the spread. Both models ran in turn on the
            same inputs. None for the dense model, and if the time was not measured.
        dense_ms: The median time of the dense model in the measurement of `speedup`, in milliseconds. None if `speedup`
            is None.
        target: Where and how the models ran when the time was measured. None if the time was not measured, or by an
            older release, which did not save it.

    Example:
        >>> metrics = Metrics(metric=0.9, loss=0.3, samples=100).with_costs(macs=5e6, params=2e4)
        >>> metrics.accuracy
        0.9
        >>> metrics.costs
        {'macs': 5000000, 'params': 20000}
        >>> pruned = replace(metrics, macs=2_500_000, speedup=Ratio(1.5, 1.4, 1.6))
        >>> pruned.gain(metrics)  # half of the MACs, but only 1.5 times as fast
        0.75
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
    higher_is_better: bool = True
    speedup: Ratio | None = None
    dense_ms: float | None = None
    target: Target | None = None

    def __post_init__(self) -> None:
        # A JSON file may contain lists instead of tuples, and 1 instead of 1.0. The conversion makes metrics that were
        # read from a file equal to the saved ones.
        object.__setattr__(self, "by_class", tuple((float(metric), int(n)) for metric, n in self.by_class))
        # In a JSON file, these two are dicts.
        if isinstance(self.speedup, Mapping):
            object.__setattr__(self, "speedup", Ratio(**{key: float(value) for key, value in self.speedup.items()}))
        if isinstance(self.target, Mapping):
            object.__setattr__(self, "target", Target(**self.target))

    @property
    def accuracy(self) -> float:
        """The value of the metric if the metric is the accuracy. Raises AttributeError if it is another metric."""
        if self.metric_name != "accuracy":
            raise AttributeError(f"the metric of this task is {self.metric_name}: read .metric")
        return self.metric

    @property
    def costs(self) -> dict[str, float]:
        """The cost in each resource that was measured, by the name of the resource, such as {"macs": 5000000}."""
        fields = {"macs": self.macs, "params": self.params}
        return {**{name: cost for name, cost in fields.items() if cost is not None}, **self.resources}

    def gain(self, dense: "Metrics") -> float | None:
        """Returns the gain: the speed-up times the fraction of the MACs that the model still has.

        The gain is 1 if the time falls as much as the MACs do: half of the MACs at twice the speed.

        Args:
            dense: The metrics of the dense model.

        Returns:
            The gain. None if the speed-up or the MACs of one of the models were not measured.
        """
        if self.speedup is None or not self.macs or not dense.macs:
            return None
        return self.speedup.median * self.macs / dense.macs

    def with_costs(
        self,
        *,
        macs: float,
        params: float,
        latency_ms: float | None = None,
        latency_rows: int | None = None,
        **resources: float,
    ) -> "Metrics":
        """Returns a copy of these metrics with the given costs.

        Args:
            macs: The MACs for one sample.
            params: The number of parameters.
            latency_ms: The time of a forward pass in milliseconds, see `Metrics`. None if it was not measured.
            latency_rows: The number of samples in that forward pass. None if the time was not measured.
            **resources: The cost in each further resource, by the name of the resource in `xprune.RESOURCES`.
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
        """Returns the metrics as a dict that JSON can hold. `Metrics(**data)` makes an equal object from the dict."""
        return asdict(self)


@dataclass(frozen=True)
class Record:
    """The result of one run, together with the settings of the run. Reports show what a record contains.

    `xprune.PruneResult` is a record that can also save itself and write its report.

    Attributes:
        model: The pruned model in eval mode. It is an ordinary PyTorch module.
        plan: The units of the dense model that stay.
        scores: The scores of all units of the dense model.
        metrics: The metrics after each stage, by the name of the stage: "dense" (before pruning), "pruned" (after
            surgery), and "finetuned" if the run fine-tuned the model.
        settings: The settings of the run, the hardware and the versions, as numbers, strings, lists and dicts.
        dense: The dense model that the caller gave, not a copy. Reports run it to draw pictures. None if the result was
            loaded from a folder.
        data: The loader of the data that the metrics were measured on. None if the result was loaded from a folder.
        task: The task of the run. None if the result was loaded from a folder.
        coverage: The share of the dense model's MACs that the units cover, and the modules that were left alone. None
            if the result was saved by an older release, which did not save it.
    """

    model: nn.Module
    plan: Plan
    scores: Scores
    metrics: Mapping[str, Metrics]
    settings: Mapping[str, Any] = field(default_factory=dict)
    dense: nn.Module | None = None
    data: Iterable[Any] | None = None
    task: Task | None = None
    coverage: Coverage | None = None

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The names of the classes that the task of the run has. None if it has none.

        They are part of the settings, so a result that was loaded from a folder has them too.
        """
        names = self.settings.get("classes")
        # A file may hold anything, so other values are not used.
        fits = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
        return tuple(names) if fits and names else None

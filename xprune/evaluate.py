"""evaluate: loss and metric of a model on a loader."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from xprune.runtime import accelerator, batches, check_loader, prepared, reduced
from xprune.structure import alias, unwrap
from xprune.task import Classification, Task


@dataclass(frozen=True)
class Metrics:
    """Figures of one model.

    metric, metric_name   the task's, for classification the accuracy in [0, 1]
    loss                  mean over the samples
    data                  what metric and loss were measured on: "validation" or "training"
    samples               how many
    macs                  per sample
    params                parameters
    latency_ms            median of a forward pass on the example inputs, and their number of rows
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

    @property
    def accuracy(self) -> float:
        """The metric, where it is the accuracy; AttributeError otherwise."""
        if self.metric_name != "accuracy":
            raise AttributeError(f"the metric of this task is {self.metric_name}: read .metric")
        return self.metric

    def with_costs(self, *, macs: int, params: int, latency_ms: float, latency_rows: int) -> "Metrics":
        """The same figures with what the model costs."""
        return replace(self, macs=macs, params=params, latency_ms=latency_ms, latency_rows=latency_rows)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@torch.no_grad()
def evaluate(model: nn.Module, loader: Iterable[Any], *, task: Task | None = None, data: str = "validation") -> Metrics:
    """Loss and metric over a loader, eval mode, on the device that Accelerate picks; the model is not changed.

    Raises DataError for a loader that is empty or does not fit the task.
    """
    task = task or Classification()
    check_loader(loader, task)
    runner = accelerator()
    copy = alias(unwrap(model)).to(runner.device)
    sums: torch.Tensor | None = None  # loss, samples, and what the metric sums up
    shape = torch.Size()
    for inputs, targets in batches(runner, prepared(runner, loader), task, f"evaluating ({data})"):
        outputs = task.forward(copy, inputs)
        task.check(outputs, targets)
        figures = task.metric(outputs, targets)
        samples, shape = len(figures), figures.shape[1:]
        loss = torch.tensor([float(task.loss(outputs, targets)) * samples, samples], dtype=torch.float64)
        batch = torch.cat([loss, figures.sum(0).flatten().cpu().double()])
        sums = batch if sums is None else sums + batch
    assert sums is not None  # the loader was checked
    sums = reduced(runner, sums.float().to(runner.device)).cpu() if runner.num_processes > 1 else sums
    samples = int(sums[1])
    metric = task.summarise(sums[2:].view(shape), samples)
    return Metrics(metric, float(sums[0]) / samples, samples, task.metric_name, data)

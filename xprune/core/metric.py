"""Metrics of torchmetrics that tasks share. Imported where a metric is made, since torchmetrics takes a second."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric

from xprune.modules.calls import tensors_in

M = TypeVar("M", bound=Metric)


def mean_of_samples(outputs: Any) -> Metric:
    """The mean over a data set of numbers (batch,), one for each sample. A number that is NaN makes the mean NaN."""
    keep_nan = float("nan")  # torchmetrics would leave such samples out, or puts a number in their place: this one
    return in_double(MeanMetric(nan_strategy=keep_nan), outputs)


def in_double(metric: M, outputs: Any) -> M:
    """The metric with sums in float64, which are exact, where the device of the outputs has it."""
    if all(tensor.device.type != "mps" for tensor in tensors_in(outputs)):
        metric.set_dtype(torch.float64)
    return metric


class Summarised(Metric):
    """The old way, for one release: sums of what `Task.metric` gives, (batch, ...), and what `summarise` makes of them.

    Args:
        summarise: The task's, from (sums, samples) to the metric.
    """

    full_state_update = False
    total: Tensor
    samples: Tensor

    def __init__(self, summarise: Callable[[Tensor, int], float]) -> None:
        super().__init__()
        self.summarise = summarise
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("samples", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, figures: Tensor) -> None:
        """Adds the figures of a batch."""
        self.total = self.total + figures.sum(0)
        self.samples += len(figures)

    def compute(self) -> Tensor:
        """What the task makes of the sums."""
        return torch.tensor(self.summarise(self.total.cpu(), int(self.samples)), dtype=torch.float64)

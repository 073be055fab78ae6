"""Metrics of torchmetrics that tasks share. Imported where a metric is made, since torchmetrics takes a second."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torchmetrics import Metric

from xprune.modules.calls import tensors_in

M = TypeVar("M", bound=Metric)


def in_double(metric: M, outputs: Any) -> M:
    """The metric with its sums in float64, which keeps every bit, where the device of the outputs has that dtype."""
    if all(tensor.device.type != "mps" for tensor in tensors_in(outputs)):
        metric.set_dtype(torch.float64)
    return metric


class MeanOfSamples(Metric):
    """The mean over a data set of numbers (batch,), one for each sample.

    torchmetrics' own MeanMetric leaves out NaN, and rounds to the default dtype.

    Args:
        summarise: What tasks of 0.1 have, for one more release: numbers are (batch, ...) then, and it makes the metric
            of their sum over the samples and of how many samples there were.
    """

    full_state_update = False
    total: Tensor
    samples: Tensor

    def __init__(self, summarise: Callable[[Tensor, int], float] | None = None) -> None:
        super().__init__()
        self.summarise = summarise
        self.add_state("total", torch.zeros((), dtype=torch.float32), dist_reduce_fx="sum")
        self.add_state("samples", torch.tensor(0.0, dtype=torch.float32), dist_reduce_fx="sum")

    def update(self, figures: Tensor) -> None:
        """Adds the numbers of a batch."""
        self.total = self.total + figures.sum(0, dtype=self.total.dtype)
        self.samples += len(figures)

    def compute(self) -> Tensor:
        """The mean, or what `summarise` makes of the sums."""
        if self.summarise is None:
            return self.total / self.samples
        return torch.as_tensor(self.summarise(self.total.cpu(), int(self.samples)), dtype=torch.float64)

"""Metrics that several tasks use.

This file imports torchmetrics, which takes a second. So other files import it only inside functions that make a metric.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torchmetrics import Metric

from xprune.modules.calls import tensors_in

M = TypeVar("M", bound=Metric)


def in_double(metric: M, outputs: Any) -> M:
    """Makes a metric sum in float64, which loses no sample in long sums.

    Args:
        metric: The metric. It is changed.
        outputs: Outputs of the model. If one of them is on an MPS device, which has no float64, the metric stays as it
            is.

    Returns:
        The same metric.
    """
    if all(tensor.device.type != "mps" for tensor in tensors_in(outputs)):
        metric.set_dtype(torch.float64)
    return metric


class MeanOfSamples(Metric):
    """The mean of numbers over a data set, where each sample has one number.

    It differs from `torchmetrics.MeanMetric` in two ways. A NaN makes the mean NaN, and is not left out. Sums keep the
    dtype of the metric, and are not rounded to the default dtype.

    Args:
        summarise: For tasks written for xprune 0.1, until the next release. Numbers are then (batch, ...), and
            `summarise(sum over samples, number of samples)` returns the metric. None: the metric is the mean.

    Example:
        >>> metric = MeanOfSamples()
        >>> metric.update(torch.tensor([1.0, 0.0]))
        >>> metric.update(torch.tensor([1.0, 1.0]))
        >>> metric.compute()
        tensor(0.7500)
    """

    # torchmetrics would otherwise call `update` twice for each batch in `forward`.
    full_state_update = False
    total: Tensor
    samples: Tensor

    def __init__(self, summarise: Callable[[Tensor, int], float] | None = None) -> None:
        super().__init__()
        self.summarise = summarise
        # States are float32 and not of the default dtype, which the caller may have set. `in_double` widens them.
        self.add_state("total", torch.zeros((), dtype=torch.float32), dist_reduce_fx="sum")
        self.add_state("samples", torch.tensor(0.0, dtype=torch.float32), dist_reduce_fx="sum")

    def update(self, figures: Tensor) -> None:
        """Adds the numbers of a batch, (batch,)."""
        # Not in place: with `summarise` the sum has more axes than the state starts with.
        self.total = self.total + figures.sum(0, dtype=self.total.dtype)
        self.samples += len(figures)

    def compute(self) -> Tensor:
        """Returns the mean over all samples so far, or what `summarise` makes of the sums."""
        if self.summarise is None:
            return self.total / self.samples
        return torch.as_tensor(self.summarise(self.total.cpu(), int(self.samples)), dtype=torch.float64)

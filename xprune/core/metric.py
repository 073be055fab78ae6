"""The metrics `MeanOfSamples` and `MeanAveragePrecision`, and the function `in_double`, with which tasks make metrics.

This file imports torchmetrics, and that import takes a second. So other files import this file only inside the
functions that make a metric.
"""

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MultilabelAveragePrecision

from xprune.modules.calls import tensors_in

M = TypeVar("M", bound=Metric)


def in_double(metric: M, outputs: Any) -> M:
    """Sets a metric to float64, so that sums over many samples are precise.

    Args:
        metric: The metric. Its dtype is changed.
        outputs: The outputs of the model. If one of their tensors is on an MPS device, which has no float64, the dtype
            of the metric is not changed.

    Returns:
        The same metric object.
    """
    if all(tensor.device.type != "mps" for tensor in tensors_in(outputs)):
        metric.set_dtype(torch.float64)
    return metric


class MeanOfSamples(Metric):
    """A metric that returns the mean of one number for each sample of a data set, such as 1 for a correct answer.

    It differs from `torchmetrics.MeanMetric` in two ways. If one number is NaN, the mean is NaN, while `MeanMetric`
    ignores NaN. Sums have the dtype of the metric, see `in_double`, while `MeanMetric` converts numbers to the default
    dtype.

    Args:
        summarise: A function for tasks that were written for xprune 0.1. The next release drops this argument. With it,
            `update` accepts numbers of shape (batch, ...), and `compute` returns
            `summarise(sum over samples, number of samples)`. None means that `compute` returns the mean.

    Example:
        >>> metric = MeanOfSamples()
        >>> metric.update(torch.tensor([1.0, 0.0]))
        >>> metric.update(torch.tensor([1.0, 1.0]))
        >>> metric.compute()
        tensor(0.7500)
    """

    # With True, torchmetrics calls `update` twice for each batch in `forward`. With False, it calls `update` once.
    full_state_update = False
    total: Tensor
    samples: Tensor

    def __init__(self, summarise: Callable[[Tensor, int], float] | None = None) -> None:
        super().__init__()
        self.summarise = summarise
        # The dtype is given because the caller may have changed torch's default dtype. `in_double` can change it to
        # float64.
        self.add_state("total", torch.zeros((), dtype=torch.float32), dist_reduce_fx="sum")
        self.add_state("samples", torch.tensor(0.0, dtype=torch.float32), dist_reduce_fx="sum")

    def update(self, figures: Tensor) -> None:
        """Adds the numbers of one batch.

        Args:
            figures: One number for each sample, (batch,).
        """
        # `+=` would fail with `summarise`: the sum may have more axes than the state, which starts with none.
        self.total = self.total + figures.sum(0, dtype=self.total.dtype)
        self.samples += len(figures)

    def compute(self) -> Tensor:
        """Returns the mean over all samples so far, or the result of `summarise` if that function was given.

        The mean of no samples is NaN.
        """
        if self.summarise is None:
            return self.total / self.samples
        return torch.as_tensor(self.summarise(self.total.cpu(), int(self.samples)), dtype=torch.float64)


class MeanAveragePrecision(MultilabelAveragePrecision):
    """The average precision of each class, as the mean over the classes that at least one sample has.

    The metric of torchmetrics counts a class that no sample has with an average precision of 0. Then the mean would
    depend on which classes happen to be in the data.

    Args:
        classes: The number of classes.

    Example:
        >>> metric = MeanAveragePrecision(2)
        >>> metric.update(torch.tensor([[0.9, 0.1], [0.2, 0.3]]), torch.tensor([[1, 0], [0, 0]]))
        >>> metric.compute()  # no sample has the second class
        tensor(1.)
    """

    positives: Tensor

    def __init__(self, classes: int) -> None:
        with warnings.catch_warnings():
            # torchmetrics warns that it stores a probability for each sample and class, which need little memory.
            warnings.filterwarnings("ignore", message=".*will save all targets and predictions")
            super().__init__(classes, average="none", validate_args=False)
        self.add_state("positives", torch.zeros(classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Adds a batch.

        Args:
            preds: Probabilities, float (batch, classes).
            target: Labels of 0 and 1, int64 (batch, classes).
        """
        super().update(preds, target)
        self.positives += target.sum(0)

    def compute(self) -> Tensor:  # type: ignore[override]
        """Returns the mean over the classes that some sample has. It is NaN if there is no such class."""
        with warnings.catch_warnings():
            # The warning is about classes without samples, which are left out here.
            warnings.filterwarnings("ignore", message="No positive samples")
            of_classes = super().compute()
        return torch.as_tensor(of_classes)[self.positives > 0].mean()

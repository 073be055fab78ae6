"""Tasks as a user writes them: one as of now, and one as of xprune 0.1."""

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from torchmetrics import SpearmanCorrCoef

import xprune


def pairs(rows: int) -> TensorDataset:
    """Returns inputs (rows, 4) and targets (rows,). A target is the sum of its inputs, with noise."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 4, generator=generator)
    return TensorDataset(x, x.sum(1) + 0.1 * torch.randn(rows, generator=generator))


class Rank(xprune.Task):
    """Regression, measured by rank correlation, which is not a mean over samples."""

    metric_name = "rank correlation"

    def unpack(self, batch: Any) -> tuple[Any, Any]:
        """Returns (inputs, targets)."""
        return batch[0], batch[1]

    def loss(self, outputs: Any, targets: Any, label_smoothing: float = 0.0) -> Tensor:
        """Returns the mean squared error."""
        return F.mse_loss(outputs.flatten(), targets)

    def new_metric(self, outputs: Any) -> SpearmanCorrCoef:
        """Returns the rank correlation of Spearman."""
        return SpearmanCorrCoef()

    def update(self, metric: Any, outputs: Any, targets: Any) -> None:
        """Adds a batch of numbers (batch,)."""
        metric.update(outputs.flatten(), targets)


with warnings.catch_warnings():
    # tests/tasks/test_task.py tests the warning.
    warnings.simplefilter("ignore", DeprecationWarning)

    class OldMeanSquare(xprune.Task):
        """A task with the methods of xprune 0.1: `summarise`, and `example` and `rows` with fewer arguments."""

        metric_name = "root of the mean square"

        def unpack(self, batch: Any) -> tuple[Any, Any]:
            """Returns (inputs, targets)."""
            return batch[0], batch[1]

        def loss(self, outputs: Any, targets: Any, label_smoothing: float = 0.0) -> Tensor:
            """Returns the mean squared error."""
            return F.mse_loss(outputs.flatten(), targets)

        def metric(self, outputs: Any, targets: Any) -> Tensor:
            """Returns (batch, 2): the squares of the errors, and ones."""
            error = outputs.flatten() - targets
            return torch.stack([error.square(), torch.ones_like(error)], 1)

        def summarise(self, total: Tensor, samples: int) -> float:
            """Returns the root of the mean square."""
            assert float(total[1]) == samples
            return float((total[0] / total[1]).sqrt())

        def example(self, inputs: Any) -> Any:
            """Returns the first two samples."""
            return inputs[:2]

        def rows(self, site: xprune.Site, inputs: Tensor, samples: int) -> Tensor | None:
            """Returns the sample of each row. Each row is a sample."""
            return torch.arange(samples)

"""Tasks as somebody outside the package writes them, one class each."""

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from torchmetrics import SpearmanCorrCoef

import xprune


def pairs(rows: int) -> TensorDataset:
    """Inputs (rows, 4) and what they sum to, nearly, (rows,)."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 4, generator=generator)
    return TensorDataset(x, x.sum(1) + 0.1 * torch.randn(rows, generator=generator))


class Rank(xprune.Task):
    """A number for each sample, measured by rank correlation, which is no mean of anything."""

    metric_name = "rank correlation"

    def unpack(self, batch: Any) -> tuple[Any, Any]:
        """A pair (inputs, numbers)."""
        return batch[0], batch[1]

    def loss(self, outputs: Any, targets: Any, label_smoothing: float = 0.0) -> Tensor:
        """Mean squared error."""
        return F.mse_loss(outputs.flatten(), targets)

    def new_metric(self, outputs: Any) -> SpearmanCorrCoef:
        """Spearman's."""
        return SpearmanCorrCoef()

    def update(self, metric: Any, outputs: Any, targets: Any) -> None:
        """Numbers (batch,)."""
        metric.update(outputs.flatten(), targets)


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # tests/tasks/test_task.py looks for it

    class OldMeanSquare(xprune.Task):
        """As tasks were written for 0.1: counts, and `summarise`; `example` and `rows` with fewer arguments."""

        metric_name = "root of the mean square"

        def unpack(self, batch: Any) -> tuple[Any, Any]:
            """A pair (inputs, numbers)."""
            return batch[0], batch[1]

        def loss(self, outputs: Any, targets: Any, label_smoothing: float = 0.0) -> Tensor:
            """Mean squared error."""
            return F.mse_loss(outputs.flatten(), targets)

        def metric(self, outputs: Any, targets: Any) -> Tensor:
            """(batch, 2): squares of the errors, and ones."""
            error = outputs.flatten() - targets
            return torch.stack([error.square(), torch.ones_like(error)], 1)

        def summarise(self, total: Tensor, samples: int) -> float:
            """The root of their mean."""
            assert float(total[1]) == samples
            return float((total[0] / total[1]).sqrt())

        def example(self, inputs: Any) -> Any:
            """Two rows."""
            return inputs[:2]

        def rows(self, site: xprune.Site, inputs: Tensor, samples: int) -> Tensor | None:
            """Each row is a sample."""
            return torch.arange(samples)

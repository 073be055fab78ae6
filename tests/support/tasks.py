"""Tasks as a user writes them: one as of now, and one as of xprune 0.1. Also images with boxes, and a detector."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
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


def box_of(index: int) -> tuple[Tensor, dict[str, Tensor]]:
    """An image and its target: one object, whose class and box depend on the index."""
    centre = 0.3 + 0.01 * index
    target = {"class_labels": torch.tensor([index % 2]), "boxes": torch.tensor([[centre, 0.5, 0.2, 0.4]])}
    return torch.full((3, 8, 8), centre), target


def collated(rows: Sequence[tuple[Tensor, dict[str, Tensor]]]) -> tuple[Any, ...]:
    """A batch as the reference scripts of torchvision make it: (images, targets)."""
    return tuple(zip(*rows, strict=True))


class Boxes(nn.Module):
    """Finds the object of each image of `box_of`, the less exactly the larger its index is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, images: list[Tensor], labels: Any = None) -> dict[str, Tensor]:
        centres = torch.stack([image.mean() for image in images]) * self.weight
        index = (centres - 0.3) * 100
        # Two classes and "no object". Scores differ, because the mAP of equal scores depends on the order of images.
        logits = torch.stack([0.1 * index, index.sin(), -0.1 * index], 1)[:, None]
        boxes = torch.stack([centres + 0.003 * index, *(torch.full_like(centres, x) for x in (0.5, 0.2, 0.4))], 1)
        return {"logits": logits, "pred_boxes": boxes[:, None], "loss": self.weight.sum()}

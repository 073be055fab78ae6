"""The task of segmentation: a class for each pixel."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from xprune.core.task import checked_batch_axis, unpacked
from xprune.errors import DataError
from xprune.tasks.pointwise import Pointwise

if TYPE_CHECKING:
    from torchmetrics import Metric


@dataclass(frozen=True)
class Segmentation(Pointwise):
    """A class for each pixel. The metric is the mean intersection over union (mIoU).

    A batch is as for `Classification`. Labels are int64 (batch, height, width). The model returns logits
    (batch, classes, h, w). Logits of another size than the labels are resized to it bilinearly. The intersection over
    union of each class is counted over the whole data set, and then the mean is taken over classes. Classes that are
    neither in the labels nor predicted are left out.

    Args:
        ignore_index: The label of pixels without a class. They count neither in the loss nor in the metric.
        batch_axis: The axis of the samples in the model's inputs. Labels and logits have their samples along axis 0.

    Raises:
        DataError: `batch_axis` is not a whole number from 0.

    Example:
        >>> import torch
        >>> task = Segmentation(ignore_index=255)
        >>> labels = torch.tensor([[[0, 1], [1, 255]]])  # an image of 2 x 2 pixels
        >>> logits = torch.zeros(1, 3, 1, 1)  # 3 classes, at half the size
        >>> round(float(task.loss(logits, labels)), 4)  # log 3
        1.0986
    """

    ignore_index: int = 255
    batch_axis: int = 0
    metric_name: ClassVar[str] = "mIoU"

    def __post_init__(self) -> None:
        checked_batch_axis(self.batch_axis)

    def unpack(self, batch: Any) -> tuple[Any, Any]:
        """Returns (images, labels). Raises DataError if the batch has another form. See Task.unpack."""
        images, labels = unpacked(batch)
        if not isinstance(labels, Tensor) or labels.dim() != 3 or labels.is_floating_point():
            shape = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
            raise DataError(f"labels have to be integers of shape (batch, height, width), got {shape}.")
        return images, labels.long()

    def check(self, outputs: Any, targets: Any) -> None:
        """Raises DataError if outputs are not (batch, classes, h, w), or a label is no class. See Task.check."""
        if not isinstance(outputs, Tensor) or outputs.dim() != 4:
            raise DataError(
                "the model does not return logits of shape (batch, classes, height, width). Wrap it, or give a task of "
                "your own whose `forward` picks them."
            )
        super().check(outputs, targets)

    def points(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Returns logits, labels and samples of the pixels that have a class. See Pointwise.points."""
        labels, samples = self.labels(targets)
        logits = _resized(outputs, targets).movedim(1, -1)  # (batch, height, width, classes)
        return logits[targets != self.ignore_index], labels, samples

    def labels(self, targets: Any) -> tuple[Tensor, Tensor]:
        """Returns labels and samples of the pixels that have a class. See Pointwise.labels."""
        has_class = targets != self.ignore_index
        return targets[has_class], has_class.nonzero()[:, 0]

    def width(self, outputs: Any) -> int:
        """Returns the number of classes. See Pointwise.width."""
        return int(outputs.shape[1])

    def new_metric(self, outputs: Any) -> "Metric":
        """Returns an empty mIoU, which keeps the confusion matrix of all pixels. See Task.new_metric."""
        from torchmetrics.classification import MulticlassJaccardIndex

        return MulticlassJaccardIndex(self.width(outputs), average="macro", validate_args=False)

    def update(self, metric: "Metric", outputs: Any, targets: Any) -> None:
        """Adds the pixels of a batch that have a class to the metric. See Task.update."""
        # Not by torchmetrics' own `ignore_index`: if that is an index of the head, it leaves out the class itself.
        found = _resized(outputs, targets).argmax(1)[targets != self.ignore_index]
        labels, _ = self.labels(targets)
        metric.update(found, labels)

    def distillation(self, outputs: Any, teacher: Any, temperature: float) -> Tensor:
        """Returns the mean divergence over all pixels of the outputs, ignored ones too. See Task.distillation."""
        student, target = (logits.movedim(1, -1).flatten(0, 2) for logits in (outputs, teacher))
        return super().distillation(student, target, temperature)


def _resized(outputs: Tensor, targets: Tensor) -> Tensor:
    """Returns logits (batch, classes, height, width) of the size of the labels."""
    size = targets.shape[-2:]
    if outputs.shape[-2:] == size:
        return outputs
    return F.interpolate(outputs.float(), size=size, mode="bilinear", align_corners=False)

"""The task of segmentation: one class for each pixel."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from xprune.core.task import checked_batch_axis, checked_class_names, unpacked
from xprune.errors import DataError
from xprune.tasks.pointwise import Pointwise

if TYPE_CHECKING:
    from torchmetrics import Metric


@dataclass(frozen=True)
class Segmentation(Pointwise):
    """Classification of pixels. The metric is the mean intersection over union (mIoU).

    A batch is a pair (images, labels), or a mapping with the key "labels", see `Classification`. Labels are int64
    (batch, height, width). The model returns logits (batch, classes, h, w). If their size is not that of the labels,
    they are resized bilinearly. The intersection over union of a class is computed from all pixels of the data set.
    mIoU is its mean over the classes. A class that is neither in the labels nor predicted is left out.

    Args:
        ignore_index: The label of pixels without a class. These pixels count neither in the loss nor in the metric.
        batch_axis: The axis of the model's inputs along which samples lie. Samples of labels and logits lie along axis
            0.
        class_names: The names of the classes, in the order of the class indices, see `Task`.

    Raises:
        DataError: `batch_axis` is negative or not an integer, or `class_names` is not a list of texts.

    Example:
        >>> import torch
        >>> task = Segmentation(ignore_index=255)
        >>> labels = torch.tensor([[[0, 1], [1, 255]]])  # an image of 2 x 2 pixels
        >>> logits = torch.zeros(1, 3, 1, 1)  # 3 equal logits, at half the size of the labels
        >>> round(float(task.loss(logits, labels)), 4)  # log 3
        1.0986
    """

    ignore_index: int = 255
    batch_axis: int = 0
    class_names: Sequence[str] | None = None
    name: ClassVar[str] = "segmentation"
    metric_name: ClassVar[str] = "mIoU"

    def __post_init__(self) -> None:
        checked_batch_axis(self.batch_axis)
        if self.class_names is not None:
            object.__setattr__(self, "class_names", checked_class_names(self.class_names))

    def unpack(self, batch: Any) -> tuple[Any, Any]:
        """Returns (images, labels int64). Raises DataError if the batch has another form. See Task.unpack."""
        images, labels = unpacked(batch)
        if not isinstance(labels, Tensor) or labels.dim() != 3 or labels.is_floating_point():
            shape = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
            raise DataError(f"labels have to be integers of shape (batch, height, width), got {shape}.")
        return images, labels.long()

    def check(self, outputs: Any, targets: Any) -> None:
        """Raises DataError if outputs are not (batch, classes, h, w), or a label is not a class. See Task.check."""
        if not isinstance(outputs, Tensor) or outputs.dim() != 4:
            raise DataError(
                "the model does not return logits of shape (batch, classes, height, width). Wrap the model, or give a "
                "task of your own whose `forward` returns them."
            )
        super().check(outputs, targets)

    def points(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the logits, labels and samples of the pixels that have a class. See Pointwise.points."""
        labels, samples = self.labels(targets)
        logits = _resized(outputs, targets).movedim(1, -1)  # (batch, height, width, classes)
        return logits[targets != self.ignore_index], labels, samples

    def labels(self, targets: Any) -> tuple[Tensor, Tensor]:
        """Returns the labels and samples of the pixels that have a class. See Pointwise.labels."""
        has_class = targets != self.ignore_index
        return targets[has_class], has_class.nonzero()[:, 0]

    def width(self, outputs: Any) -> int:
        """Returns the number of classes. See Pointwise.width."""
        return int(outputs.shape[1])

    def new_metric(self, outputs: Any) -> "Metric":
        """Returns an mIoU without pixels yet. It counts pixels in a confusion matrix. See Task.new_metric."""
        from torchmetrics.classification import MulticlassJaccardIndex

        return MulticlassJaccardIndex(self.width(outputs), average="macro", validate_args=False)

    def update(self, metric: "Metric", outputs: Any, targets: Any) -> None:
        """Adds the pixels of a batch that have a class to the metric. See Task.update."""
        # torchmetrics has an `ignore_index` too. It is not used, since an index that is also a class would leave out
        # this class.
        found = _resized(outputs, targets).argmax(1)[targets != self.ignore_index]
        labels, _ = self.labels(targets)
        metric.update(found, labels)

    def distillation(self, outputs: Any, teacher: Any, temperature: float) -> Tensor:
        """Returns the mean divergence from the teacher over all pixels of the outputs, also those without a class.

        See Task.distillation.
        """
        student, target = (logits.movedim(1, -1).flatten(0, 2) for logits in (outputs, teacher))
        return super().distillation(student, target, temperature)


def _resized(outputs: Tensor, targets: Tensor) -> Tensor:
    """Returns logits (batch, classes, height, width) that are resized to the height and width of the labels."""
    size = targets.shape[-2:]
    if outputs.shape[-2:] == size:
        return outputs
    return F.interpolate(outputs.float(), size=size, mode="bilinear", align_corners=False)

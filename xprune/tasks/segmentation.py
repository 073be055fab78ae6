"""Segmentation: a class for each pixel."""

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
    """A class for each pixel: labels int64 (batch, height, width), outputs (batch, classes, h, w).

    Batches as for `Classification`.
    Outputs of another size than the labels are resized to it, bilinearly. The metric is the mean over classes of
    intersection over union, counted over the whole data set; classes that are neither there nor predicted are left out.

    ignore_index   label of pixels that are of no class; they enter neither loss nor metric
    batch_axis     the axis of the samples in the model's inputs
    """

    ignore_index: int = 255
    batch_axis: int = 0
    metric_name: ClassVar[str] = "mIoU"

    def __post_init__(self) -> None:
        checked_batch_axis(self.batch_axis)

    def unpack(self, batch: Any) -> tuple[Any, Any]:
        """(images, labels); DataError where the batch is something else."""
        images, labels = unpacked(batch)
        if not isinstance(labels, Tensor) or labels.dim() != 3 or labels.is_floating_point():
            shape = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
            raise DataError(f"labels have to be integers of shape (batch, height, width), got {shape}.")
        return images, labels.long()

    def check(self, outputs: Any, targets: Any) -> None:
        """DataError where outputs are not (batch, classes, h, w), or a label is neither a class nor ignore_index."""
        if not isinstance(outputs, Tensor) or outputs.dim() != 4:
            raise DataError(
                "the model does not return logits of shape (batch, classes, height, width); wrap it, or give a task "
                "of your own whose `forward` picks them."
            )
        super().check(outputs, targets)

    def points(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor, Tensor]:
        """See Pointwise.points: the pixels that have a class."""
        labels, samples = self.labels(targets)
        logits = _resized(outputs, targets).movedim(1, -1)  # (batch, height, width, classes)
        return logits[targets != self.ignore_index], labels, samples

    def labels(self, targets: Any) -> tuple[Tensor, Tensor]:
        """See Pointwise.labels."""
        there = targets != self.ignore_index
        return targets[there], there.nonzero()[:, 0]

    def width(self, outputs: Any) -> int:
        """See Pointwise.width."""
        return int(outputs.shape[1])

    def new_metric(self, outputs: Any) -> "Metric":
        """Mean intersection over union, from the confusion matrix of all pixels."""
        from torchmetrics.classification import MulticlassJaccardIndex

        return MulticlassJaccardIndex(self.width(outputs), average="macro", validate_args=False)

    def update(self, metric: "Metric", outputs: Any, targets: Any) -> None:
        """Adds the pixels that have a class: torchmetrics' own `ignore_index` would leave out a class of the head."""
        found = _resized(outputs, targets).argmax(1)[targets != self.ignore_index]
        labels, _ = self.labels(targets)
        metric.update(found, labels)

    def distillation(self, outputs: Any, teacher: Any, temperature: float) -> Tensor:
        """See Task.distillation; the mean over all pixels of the outputs."""
        student, target = (logits.movedim(1, -1).flatten(0, 2) for logits in (outputs, teacher))
        return super().distillation(student, target, temperature)


def _resized(outputs: Tensor, targets: Tensor) -> Tensor:
    size = targets.shape[-2:]
    if outputs.shape[-2:] == size:
        return outputs
    return F.interpolate(outputs.float(), size=size, mode="bilinear", align_corners=False)

"""Classification: one label for each sample."""

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import functional as F

from xprune.core.task import Task, unpacked
from xprune.errors import DataError

if TYPE_CHECKING:
    from torchmetrics import Metric


class Classification(Task):
    """Single-label classification: labels int64 (batch,), logits (batch, classes). The metric is the accuracy.

    A batch is (inputs, labels), or a mapping of what the model's forward takes and "labels", as Hugging Face has it.

    Args:
        batch_axis: The axis of the samples in the inputs, 1 for sequence-first models. Logits and labels have them
            along axis 0 all the same.
    """

    def unpack(self, batch: Any) -> tuple[Any, Any]:
        """(inputs, labels); DataError where the batch is something else."""
        inputs, labels = unpacked(batch)
        if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.is_floating_point():
            raise DataError(
                "labels have to be an integer tensor of shape (batch,); for other targets give a task=xprune.Task."
            )
        return inputs, labels.long()

    def check(self, outputs: Any, targets: Any) -> None:
        """DataError where outputs are not (batch, classes) or a label is out of range."""
        if not isinstance(outputs, Tensor) or outputs.dim() != 2:
            raise DataError(
                "the model does not return logits of shape (batch, classes); give a task=xprune.Task that reads it."
            )
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= outputs.shape[1]:
            raise DataError(
                f"labels go from {low} to {high}, but the model's head has {outputs.shape[1]} classes: "
                f"0 to {outputs.shape[1] - 1}. Remap the labels, or give the model a head of the right size."
            )

    def loss(self, outputs: Any, targets: Any, label_smoothing: float = 0.0) -> Tensor:
        """Cross-entropy in float32."""
        return F.cross_entropy(outputs.float(), targets, label_smoothing=label_smoothing)

    def metric(self, outputs: Any, targets: Any) -> Tensor:
        """1 where the largest logit is the label's."""
        return (outputs.argmax(-1) == targets).float()

    def new_metric(self, outputs: Any) -> "Metric":
        """The accuracy: correct samples over all."""
        from torchmetrics.classification import MulticlassAccuracy

        from xprune.core.metric import in_double

        # `check` has looked at the labels, and a head of one class is one that torchmetrics refuses
        return in_double(MulticlassAccuracy(outputs.shape[-1], average="micro", validate_args=False), outputs)

    def classes(self, outputs: Any, targets: Any) -> tuple[Tensor, int] | None:
        """The labels, and the width of the head."""
        return targets, outputs.shape[-1]

"""Classification: one label for each sample."""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from xprune.core.task import Task, unpacked
from xprune.errors import DataError


class Classification(Task):
    """Single-label classification: labels int64 (batch,), logits (batch, classes).

    A batch is (inputs, labels), or a mapping of what the model's forward takes and "labels", as Hugging Face has it.
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

    def classes(self, outputs: Any, targets: Any) -> tuple[Tensor, int] | None:
        """The labels, and the width of the head."""
        return targets, outputs.shape[-1]

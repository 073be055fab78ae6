"""The task of classification: one label for each sample."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from xprune.core.late_check import LateCheck
from xprune.core.task import Task, check_class_count, softmax_divergence, unpacked
from xprune.errors import DataError

if TYPE_CHECKING:
    from torchmetrics import Metric


class Classification(Task):
    """Classification with one label for each sample. The metric is the accuracy.

    A batch is a pair (inputs, labels), or a mapping with the key "labels", as in Hugging Face libraries. The other
    entries of the mapping are the keyword arguments of the model. Labels are int64 (batch,). The model returns logits
    (batch, classes).

    Args:
        batch_axis: The axis of the inputs along which samples lie: 0, or 1 for models whose inputs have tokens first.
            Samples of logits and labels lie along axis 0 in both cases.
        class_names: The names of the classes, in the order of the class indices, see `Task`.

    Example:
        >>> import torch
        >>> task = Classification()
        >>> inputs, labels = task.unpack((torch.randn(2, 4), torch.tensor([0, 2])))
        >>> logits = torch.tensor([[5.0, 0.0, 0.0], [5.0, 0.0, 0.0]])
        >>> task.metric(logits, labels)  # 1 for the first sample, which is right
        tensor([1., 0.])
    """

    name: ClassVar[str] = "classification"

    def unpack(self, batch: Any) -> tuple[Any, Any]:
        """Returns (inputs, labels int64 (batch,)). Raises DataError if the batch has another form. See Task.unpack."""
        inputs, labels = unpacked(batch)
        if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.is_floating_point():
            raise DataError(
                "labels have to be an integer tensor of shape (batch,). For other targets, give task=, an instance of "
                "a subclass of xprune.Task."
            )
        return inputs, labels.long()

    def late_check(self, outputs: Any, targets: Any) -> LateCheck | None:
        """Checks that the outputs are (batch, classes), and returns a check that each label is a class.

        See Task.late_check. Raises DataError if the outputs have another shape.
        """
        if not isinstance(outputs, Tensor) or outputs.dim() != 2:
            raise DataError(
                "the model does not return logits of shape (batch, classes). Give task=, an instance of a subclass of "
                "xprune.Task that reads the outputs of this model."
            )
        classes = outputs.shape[1]
        check_class_count(self, classes)

        def judge(ends: Sequence[float]) -> DataError | None:
            low, high = ends
            if low >= 0 and high < classes:
                return None
            return DataError(
                f"labels go from {low} to {high}, but the model's head has {classes} classes: 0 to {classes - 1}. "
                "Remap the labels, or give the model a head of the right size."
            )

        return LateCheck(torch.stack(targets.aminmax()), judge)

    def loss(self, outputs: Any, targets: Any, label_smoothing: float = 0.0) -> Tensor:
        """Returns the mean cross-entropy of the samples, in float32. See Task.loss."""
        return F.cross_entropy(outputs.float(), _bounded(targets, outputs), label_smoothing=label_smoothing)

    def metric(self, outputs: Any, targets: Any) -> Tensor:
        """Returns 1 for each sample whose largest logit is that of its label, else 0, float (batch,).

        See Task.metric.
        """
        return (outputs.argmax(-1) == targets).float()

    def new_metric(self, outputs: Any) -> "Metric":
        """Returns an accuracy without samples yet: the fraction of all samples that are right. See Task.new_metric."""
        from torchmetrics.classification import MulticlassAccuracy

        from xprune.core.metric import in_double

        # torchmetrics does not validate here: `check` has tested the labels already, and torchmetrics refuses a model
        # with a single class.
        return in_double(MulticlassAccuracy(outputs.shape[-1], average="micro", validate_args=False), outputs)

    def classes(self, outputs: Any, targets: Any) -> tuple[Tensor, int] | None:
        """Returns (labels, number of classes that the model has logits for). See Task.classes."""
        return _bounded(targets, outputs), outputs.shape[-1]

    def distillation(self, outputs: Any, teacher: Any, temperature: float) -> Tensor:
        """Returns the divergence of the softmaxes, see `softmax_divergence`. See Task.distillation."""
        return softmax_divergence(outputs, teacher, temperature)


def _bounded(labels: Tensor, outputs: Tensor) -> Tensor:
    """Returns the labels, where labels that are no classes are replaced by the nearest class.

    `late_check` reports such labels. Until its result is read, they must not be used as an index: a GPU would stop the
    whole process.
    """
    return labels.clamp(0, outputs.shape[-1] - 1)

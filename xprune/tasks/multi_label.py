"""The task of multi-label classification: each sample has any number of classes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from xprune.core.task import Task, check_class_count, checked_batch_axis, checked_class_names, unpacked
from xprune.errors import DataError
from xprune.tasks.pointwise import one_of

if TYPE_CHECKING:
    from torchmetrics import Metric

MEASURES = ("mAP", "F1")
"""The allowed values of `MultiLabel.measure`."""


@dataclass(frozen=True)
class MultiLabel(Task):
    """Classification with any number of classes for each sample. The metric is mAP or F1.

    A batch is a pair (inputs, labels), or a mapping with the key "labels", see `Classification`. Labels are
    (batch, classes), with 1 for each class that the sample has and 0 for any other class. The dtype is bool, integer or
    float. The model returns logits (batch, classes). A sigmoid turns each logit into a probability. The loss is the
    binary cross-entropy, as the mean over samples and classes.

    Criteria with class-wise scores need one class for each sample. The task samples one of the classes that the sample
    has at random. For a sample without classes, it samples one of all classes.

    Args:
        measure: The metric. "mAP" is the average precision of each class over the whole data set, as the mean over the
            classes. A class that no sample has is left out. "F1" is the F1 score of each class at a probability of 0.5,
            as the mean over the classes.
        batch_axis: The axis of the model's inputs along which samples lie. Samples of labels and logits lie along axis
            0.
        class_names: The names of the classes, in the order of the class indices, see `Task`.

    Raises:
        DataError: `measure` is unknown, `batch_axis` is negative or not an integer, or `class_names` is not a list of
            texts.

    Example:
        >>> task = MultiLabel()
        >>> inputs, labels = task.unpack((torch.randn(2, 4), torch.tensor([[1, 0, 1], [0, 0, 0]])))
        >>> round(float(task.loss(torch.zeros(2, 3), labels)), 4)  # log 2
        0.6931
        >>> task.metric_name, MultiLabel(measure="F1").metric_name
        ('mAP', 'F1')
    """

    measure: str = "mAP"
    batch_axis: int = 0
    class_names: Sequence[str] | None = None
    name: ClassVar[str] = "multi-label"

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise DataError(f"measure={self.measure!r} is unknown: MultiLabel measures one of {', '.join(MEASURES)}.")
        checked_batch_axis(self.batch_axis)
        # The class is frozen, so attributes are set in this way.
        object.__setattr__(self, "metric_name", self.measure)
        if self.class_names is not None:
            object.__setattr__(self, "class_names", checked_class_names(self.class_names))

    def unpack(self, batch: Any) -> tuple[Any, Any]:
        """Returns (inputs, labels float32 (batch, classes)).

        Raises DataError if the batch has another form, or if a label is neither 0 nor 1. See Task.unpack.
        """
        inputs, labels = unpacked(batch)
        if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.is_complex():
            what = f"a tensor {tuple(labels.shape)}" if isinstance(labels, Tensor) else f"a {type(labels).__name__}"
            raise DataError(
                f"labels are {what}, wanted a tensor of shape (batch, classes) with a 1 for each class of the sample, "
                "else 0. If each sample has one class, give task=xprune.Classification()."
            )
        wrong = labels[(labels != 0) & (labels != 1)]
        if len(wrong):
            raise DataError(f"a label is {wrong[0].item():g}, wanted 0 or 1: 1 if the sample has the class, else 0.")
        return inputs, labels.float()

    def check(self, outputs: Any, targets: Any) -> None:
        """Raises DataError if the outputs do not have the shape of the labels. See Task.check."""
        if not isinstance(outputs, Tensor) or outputs.shape != targets.shape:
            raise DataError(
                f"the model does not return logits of shape {tuple(targets.shape)}, a logit for each sample and class "
                "in the labels. Give the model a head of the right size, or a task of your own that reads its outputs."
            )
        check_class_count(self, outputs.shape[1])

    def loss(self, outputs: Any, targets: Any, label_smoothing: float = 0.0) -> Tensor:
        """Returns the binary cross-entropy in float32, as the mean over samples and classes.

        With label smoothing s, the label 1 becomes 1 - s / 2 and the label 0 becomes s / 2. See Task.loss.
        """
        smoothed = targets * (1 - label_smoothing) + label_smoothing / 2
        return F.binary_cross_entropy_with_logits(outputs.float(), smoothed)

    def new_metric(self, outputs: Any) -> "Metric":
        """Returns an mAP or F1 without samples yet. See Task.new_metric."""
        from torchmetrics.classification import MultilabelF1Score

        from xprune.core.metric import MeanAveragePrecision

        if self.measure == "mAP":
            return MeanAveragePrecision(outputs.shape[1])
        # `check` has tested the labels already. Without validation, a model with a single class works too.
        return MultilabelF1Score(outputs.shape[1], average="macro", validate_args=False)

    def update(self, metric: "Metric", outputs: Any, targets: Any) -> None:
        """Adds the probabilities and labels of a batch to the metric. See Task.update."""
        # torchmetrics applies a sigmoid only if it sees a number outside of 0 to 1 in the batch. A batch whose logits
        # all lie between 0 and 1 would be read as probabilities.
        metric.update(outputs.float().sigmoid(), targets.long())

    def classes(self, outputs: Any, targets: Any) -> tuple[Tensor, int] | None:
        """Returns (one class of each sample, number of classes). The class is sampled at random. See Task.classes."""
        return one_of(targets.bool()), targets.shape[1]

    def other(self, targets: Any, own: Tensor, classes: int) -> Tensor:
        """Returns a random class that a sample does not have, for each sample, int64 (batch,). See Task.other.

        If a sample has all classes, the class is any one except `own`.
        """
        rest = ~F.one_hot(own, classes).bool()
        # The class of a sample without classes was sampled from all classes, so it is absent too.
        absent = ~targets.bool() & rest
        return one_of(torch.where(absent.any(1, keepdim=True), absent, rest))

    def class_scores(self, outputs: Any, targets: Any, own: Tensor) -> Tensor:
        """Returns the log probability of the class `own` of each sample, (batch,). See Task.class_scores."""
        return F.logsigmoid(outputs.float()).gather(1, own[:, None])[:, 0]

    def one_vs_rest(self, outputs: Any, targets: Any, drawn: Tensor, gone: bool = False) -> Tensor:
        """Returns the one-vs-rest loss with sigmoids in place of softmaxes. See Task.one_vs_rest.

        Here, p_c is the sigmoid of the logit of the drawn class c. For a sample that does not have c, and with the
        units of c removed, the loss is the binary cross-entropy of all classes.
        """
        logits, chosen = outputs.float(), drawn[:, None]
        of_drawn = logits.gather(1, chosen)[:, 0]
        has_class = targets.gather(1, chosen)[:, 0].bool()
        if gone:
            if_own = F.softplus(of_drawn)  # -log(1 - p_c)
            if_other = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)
        else:
            if_own, if_other = F.softplus(-of_drawn), F.softplus(of_drawn)  # -log(p_c), -log(1 - p_c)
        return torch.where(has_class, if_own, if_other).mean()

    def distillation(self, outputs: Any, teacher: Any, temperature: float) -> Tensor:
        """Returns the divergence of the probabilities of each class, as the mean over samples and classes.

        For each class, the model and its teacher give the probabilities of two events: the sample has the class, or
        not. The divergence is KL(teacher || student) of these two, multiplied by temperature squared. See
        Task.distillation.
        """
        student, target = outputs.float() / temperature, teacher.float() / temperature
        chances = target.sigmoid()
        # The second term is the entropy of the teacher. With it, the divergence of equal logits is exactly 0.
        crossed, least = (F.binary_cross_entropy_with_logits(logits, chances) for logits in (student, target))
        return (crossed - least) * temperature**2

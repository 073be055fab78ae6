"""The base of tasks that label each point of a sample: the nodes of a graph, or the pixels of an image."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from xprune.core.task import Task, check_class_count, one_vs_rest, softmax_divergence
from xprune.errors import DataError


class Pointwise(Task):
    """A task with a label for each point of a sample, such as each pixel of an image.

    Learned masks depend on one class for each sample, not on the class of each point. The output for a point also
    depends on the points around it. If the masks of a point depended on its label, the outputs of the points around it
    would contain that label.

    A subclass implements `points`, `labels` and `width`. A point counts if it has a label and is not masked or ignored.

    Example:
        >>> from xprune import Segmentation
        >>> targets = torch.tensor([[[0, 2], [2, 255]]])  # an image of 4 pixels, one of them ignored
        >>> Segmentation().labels(targets)
        (tensor([0, 2, 2]), tensor([0, 0, 0]))
        >>> Segmentation().present(targets, classes=3)
        tensor([[ True, False,  True]])
    """

    @abstractmethod
    def points(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the logits, labels and samples of the points that count.

        Args:
            outputs: The outputs of the model.
            targets: The targets, as `unpack` returns them.

        Returns:
            (logits (points, classes), labels int64 (points,), index of the sample of each point, int64 (points,)).
        """

    @abstractmethod
    def labels(self, targets: Any) -> tuple[Tensor, Tensor]:
        """Returns (labels, index of the sample of each label) of the points that count, both int64 (points,)."""

    @abstractmethod
    def width(self, outputs: Any) -> int:
        """Returns the number of classes that the outputs have logits for."""

    def check(self, outputs: Any, targets: Any) -> None:
        """Raises DataError if no point counts, or if a label is not a class. See Task.check."""
        labels, _ = self.labels(targets)
        if not len(labels):
            raise DataError("no point of the batch has a label: all of them are masked or ignored.")
        low, high, classes = int(labels.min()), int(labels.max()), self.width(outputs)
        check_class_count(self, classes)
        if low < 0 or high >= classes:
            raise DataError(
                f"labels go from {low} to {high}, but the model's head has {classes} classes: 0 to {classes - 1}. "
                "Remap the labels, mark points without a class by ignore_index or a mask, or give the model a head of "
                "the right size."
            )

    def loss(self, outputs: Any, targets: Any, label_smoothing: float = 0.0) -> Tensor:
        """Returns the mean cross-entropy of all points that count, in float32. See Task.loss."""
        logits, labels, _ = self.points(outputs, targets)
        return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)

    def present(self, targets: Any, classes: int) -> Tensor:
        """Returns True for each class that a sample has points of, bool (batch, classes)."""
        labels, samples = self.labels(targets)
        found = torch.zeros(self.size(targets), classes, dtype=torch.bool, device=labels.device)
        found[samples, labels] = True
        return found

    def classes(self, outputs: Any, targets: Any) -> tuple[Tensor, int] | None:
        """Returns (one class for each sample, number of classes). See Task.classes.

        The class is sampled at random from the classes that the sample has points of, int64 (batch,).
        """
        classes = self.width(outputs)
        return one_of(self.present(targets, classes)), classes

    def other(self, targets: Any, own: Tensor, classes: int) -> Tensor:
        """Returns a random class that a sample has no points of, for each sample, int64 (batch,). See Task.other.

        If a sample has points of all classes, the class is any one except `own`.
        """
        absent = ~self.present(targets, classes)
        rest = ~F.one_hot(own, classes).bool()
        return one_of(torch.where(absent.any(1, keepdim=True), absent, rest))

    def one_vs_rest(self, outputs: Any, targets: Any, drawn: Tensor, gone: bool = False) -> Tensor:
        """Returns the mean loss of the points that count. The drawn class of a point is that of its sample.

        See Task.one_vs_rest.
        """
        logits, labels, samples = self.points(outputs, targets)
        return one_vs_rest(logits, labels, drawn[samples], gone)

    def class_scores(self, outputs: Any, targets: Any, own: Tensor) -> Tensor:
        """Returns the mean log probability of the class `own` over the points of that class, for each sample, (batch,).

        See Task.class_scores.
        """
        logits, labels, samples = self.points(outputs, targets)
        here = labels == own[samples]
        logs = logits[here].float().log_softmax(-1).gather(1, labels[here][:, None])[:, 0]
        sums = logs.new_zeros(len(own)).index_add(0, samples[here], logs)
        return sums / torch.bincount(samples[here], minlength=len(own)).clamp_min(1)

    def distillation(self, outputs: Any, teacher: Any, temperature: float) -> Tensor:
        """Returns the mean divergence of the softmaxes over all points, also those that do not count.

        This implementation reads logits (points, classes). A task with logits of another shape overrides it. See
        Task.distillation.
        """
        return softmax_divergence(outputs, teacher, temperature)


def one_of(allowed: Tensor) -> Tensor:
    """Returns a random index for each row, among those that are allowed.

    Args:
        allowed: True for each index that is allowed, bool (batch, classes).

    Returns:
        int64 (batch,). For a row in which no index is allowed, any index.
    """
    # Each index gets a random number from 0 to 1, and an allowed index gets 1 more. So the largest number is that of an
    # allowed index.
    return torch.rand(allowed.shape, device=allowed.device).add(allowed).argmax(1)

"""Pointwise: tasks that label every point of a sample, the nodes of a graph or the pixels of an image."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from xprune.core.task import Task, one_vs_rest
from xprune.errors import DataError


class Pointwise(Task):
    """A label for each point. ONE class is drawn for each sample, never one for each point.

    A point sees its neighbours, so that a row of masks picked by the labels of points would tell them their labels.
    """

    @abstractmethod
    def points(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Of the points that count: logits (points, classes), labels int64 (points,), samples int64 (points,)."""

    @abstractmethod
    def labels(self, targets: Any) -> tuple[Tensor, Tensor]:
        """Of the points that count: labels int64 (points,), samples int64 (points,)."""

    @abstractmethod
    def width(self, outputs: Any) -> int:
        """Classes that the outputs tell apart."""

    def check(self, outputs: Any, targets: Any) -> None:
        """DataError where no point counts, or a label is out of range."""
        labels, _ = self.labels(targets)
        if not len(labels):
            raise DataError("no point of the batch has a label: every one is masked or to be ignored.")
        low, high, classes = int(labels.min()), int(labels.max()), self.width(outputs)
        if low < 0 or high >= classes:
            raise DataError(
                f"labels go from {low} to {high}, but the model's head has {classes} classes: 0 to {classes - 1}. "
                "Remap the labels, mark what is no class by ignore_index or a mask, or give the head the right size."
            )

    def loss(self, outputs: Any, targets: Any, label_smoothing: float = 0.0) -> Tensor:
        """Cross-entropy in float32, the mean over points."""
        logits, labels, _ = self.points(outputs, targets)
        return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)

    def present(self, targets: Any, classes: int) -> Tensor:
        """Which classes are in each sample, bool (batch, classes)."""
        labels, samples = self.labels(targets)
        found = torch.zeros(self.size(targets), classes, dtype=torch.bool, device=labels.device)
        found[samples, labels] = True
        return found

    def classes(self, outputs: Any, targets: Any) -> tuple[Tensor, int] | None:
        """(a class that is in the sample, by chance, int64 (batch,); how many there are)."""
        classes = self.width(outputs)
        return _one_of(self.present(targets, classes)), classes

    def other(self, targets: Any, own: Tensor, classes: int) -> Tensor:
        """A class that is not in the sample, by chance; where all are, any but `own`."""
        absent = ~self.present(targets, classes)
        rest = ~F.one_hot(own, classes).bool()
        return _one_of(torch.where(absent.any(1, keepdim=True), absent, rest))

    def one_vs_rest(self, outputs: Any, targets: Any, drawn: Tensor, gone: bool = False) -> Tensor:
        """See Task.one_vs_rest, the mean over points, each with the class drawn for its sample."""
        logits, labels, samples = self.points(outputs, targets)
        return one_vs_rest(logits, labels, drawn[samples], gone)

    def class_scores(self, outputs: Any, targets: Any, own: Tensor) -> Tensor:
        """Mean of log p of the class over the sample's points of that class, (batch,)."""
        logits, labels, samples = self.points(outputs, targets)
        here = labels == own[samples]
        logs = logits[here].float().log_softmax(-1).gather(1, labels[here][:, None])[:, 0]
        sums = logs.new_zeros(len(own)).index_add(0, samples[here], logs)
        return sums / torch.bincount(samples[here], minlength=len(own)).clamp_min(1)


def _one_of(allowed: Tensor) -> Tensor:
    """An index by chance among those allowed, int64 (batch,), for bool (batch, classes); of none: any."""
    return torch.rand(allowed.shape, device=allowed.device).add(allowed).argmax(1)

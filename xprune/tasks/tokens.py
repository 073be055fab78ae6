"""The tasks of models that return logits for each token: token classification and language models."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xprune.core.late_check import LateCheck
from xprune.core.task import Task, softmax_divergence, unpacked
from xprune.errors import DataError

if TYPE_CHECKING:
    from torchmetrics import Metric

IGNORED = -100
"""The label of a token that does not count, as in torch and transformers."""


class TokenClassification(Task):
    """Classification of tokens. The metric is the token accuracy: the fraction of right tokens, averaged over samples.

    A batch is a pair (inputs, labels), or a mapping with the key "labels", see `Classification`. Labels are int64
    (batch, tokens), with -100 for tokens that do not count. The model returns logits (batch, tokens, classes). The task
    also fits masked language models, and batches that are pairs (tokens, next tokens). For the loss and the metric,
    first the mean over the labelled tokens of each sample is taken, and then the mean over the samples. So a long
    sample does not weigh more than a short one. A sample without a labelled token is skipped: it counts neither in the
    loss nor in the metric. A masked language model has such samples if no token of a short sentence was masked.

    Args:
        batch_axis: The axis of inputs, labels and logits along which samples lie. 0, or 1 for models with tokens first,
            whose inputs and labels are (tokens, batch) and whose logits are (tokens, batch, classes).
        class_names: The names of the classes of tokens, see `Task`.

    Example:
        >>> import torch
        >>> task = TokenClassification()
        >>> inputs, labels = task.unpack((torch.tensor([[7, 8, 9]]), torch.tensor([[1, 0, -100]])))
        >>> logits = torch.tensor([[[0.0, 5.0], [0.0, 5.0], [0.0, 5.0]]])
        >>> task.metric(logits, labels)  # one of the two labelled tokens is right
        tensor([0.5000])
    """

    name: ClassVar[str] = "tokens"
    metric_name: ClassVar[str] = "token accuracy"
    shift: ClassVar[int] = 0
    """The logits at a token are compared with the label this many tokens later."""

    def unpack(self, batch: Any) -> tuple[Any, Any]:
        """Returns (inputs, labels int64 (batch, tokens)).

        Raises DataError if the batch has another form. See Task.unpack.
        """
        inputs, labels = unpacked(batch)
        if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.is_floating_point():
            raise DataError(
                "labels have to be an integer tensor of shape (batch, tokens), with -100 for tokens that do not count."
            )
        return inputs, labels.long().movedim(self.batch_axis, 0)

    def forward(self, model: nn.Module, inputs: Any) -> Any:
        """Calls the model, and returns its logits with samples first: (batch, tokens, classes). See Task.forward."""
        outputs = super().forward(model, inputs)
        # Without this axis, the outputs are returned as they are, and `check` raises an error that explains it.
        has_axis = isinstance(outputs, Tensor) and outputs.dim() > self.batch_axis
        return outputs.movedim(self.batch_axis, 0) if has_axis else outputs

    def late_check(self, outputs: Any, targets: Any) -> LateCheck | None:
        """Checks that the outputs are (batch, tokens, classes), and returns a check that each label is a class.

        A sample may have no labelled token. See Task.late_check. Raises DataError if the outputs have another shape.
        """
        if not isinstance(outputs, Tensor) or outputs.dim() != 3 or outputs.shape[:2] != targets.shape:
            raise DataError(
                f"the model does not return logits of shape {(*targets.shape, 'classes')}, one row for each label. "
                "Give task=, an instance of a subclass of xprune.Task that reads the outputs of this model."
            )
        labels, classes = targets[:, self.shift :], outputs.shape[2]

        def judge(ends: Sequence[float]) -> DataError | None:
            wrong = [label for label in ends if not 0 <= label < classes]
            if not wrong:
                return None
            return DataError(
                f"the label {wrong[0]} is out of range: the model has {classes} classes, 0 to {classes - 1}. Use "
                f"{IGNORED} for tokens that do not count."
            )

        # A token that does not count is read as class 0, which is never out of range. So is an empty batch of tokens.
        counted = F.pad(labels.where(labels != IGNORED, 0), (0, 1))
        return LateCheck(torch.stack(counted.aminmax()), judge)

    def loss(self, outputs: Any, targets: Any, label_smoothing: float = 0.0) -> Tensor:
        """Returns the cross-entropy in float32: the mean over a sample's labelled tokens, then over samples.

        Samples without a labelled token are skipped. If all samples of the batch are skipped, the loss is 0. See
        Task.loss.
        """
        losses = self._losses(outputs, targets, label_smoothing)
        # The loss of a sample without labels is 0, so it adds nothing to the sum. With no sample at all, the sum is 0,
        # and it still has gradients, which are 0 too.
        return losses.sum() / self._has_labels(targets).sum().clamp_min(1)

    def counted(self, targets: Any) -> int:
        """Returns the number of samples with at least one labelled token. See Task.counted."""
        return int(self._has_labels(targets).sum())

    def _has_labels(self, targets: Tensor) -> Tensor:
        """Returns True for each sample with at least one labelled token, bool (batch,)."""
        return (targets[:, self.shift :] != IGNORED).any(1)

    def sample_scores(self, outputs: Any, targets: Any, dense: Any) -> Tensor | None:
        """Returns the mean log probability of the labels of each sample, (batch,). See Task.sample_scores."""
        return -self._losses(outputs, targets, 0.0)

    def _losses(self, outputs: Any, targets: Any, label_smoothing: float) -> Tensor:
        """Returns the mean cross-entropy over the labelled tokens of each sample, (batch,). 0 without such tokens."""
        logits, labels = self._aligned(outputs, targets)
        of_tokens = F.cross_entropy(
            logits.float().transpose(1, 2),  # cross_entropy wants (batch, classes, tokens)
            # Until `late_check` is read, a label out of range must not be used as an index.
            labels.clamp(0, logits.shape[2] - 1).where(labels != IGNORED, IGNORED),
            ignore_index=IGNORED,
            label_smoothing=label_smoothing,
            reduction="none",
        )
        return _means(of_tokens, labels)

    def metric(self, outputs: Any, targets: Any) -> Tensor:
        """Returns the fraction of right tokens among the labelled tokens of each sample, float (batch,).

        It is 0 for a sample without a labelled token. `update` leaves these samples out. See Task.metric.
        """
        logits, labels = self._aligned(outputs, targets)
        return _means((logits.argmax(-1) == labels).float(), labels)

    def update(self, metric: "Metric", outputs: Any, targets: Any) -> None:
        """Adds the samples of a batch that have a labelled token to the metric. See Task.update."""
        values = self.metric(outputs, targets)
        # A subclass may have another metric of the whole data set. It gets the outputs as they are.
        if values is None or type(self).new_metric is not Task.new_metric:
            return super().update(metric, outputs, targets)
        return metric.update(values[self._has_labels(targets)])

    def distillation(self, outputs: Any, teacher: Any, temperature: float) -> Tensor:
        """Returns the mean divergence from the teacher over all tokens, also those without a label.

        See Task.distillation.
        """
        return softmax_divergence(outputs.flatten(0, 1), teacher.flatten(0, 1), temperature)

    def _aligned(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the logits and the labels that are compared with each other.

        If the task has a shift, the last logits of a sample have no label and are left out.
        """
        return outputs[:, : outputs.shape[1] - self.shift], targets[:, self.shift :]


class LanguageModel(TokenClassification):
    """Prediction of the next token. The metric is the fraction of right tokens, averaged over samples.

    A batch is a mapping with "input_ids", int64 (batch, tokens), and other keyword arguments of the model. If the
    mapping has "labels", these are used. As in transformers, labels are not shifted: `labels[:, 1]` is compared with
    the logits at the first token. Without "labels", the tokens of the input are the labels, except tokens whose
    "attention_mask" is 0.

    Args:
        batch_axis: The axis of inputs, labels and logits along which samples lie, see `TokenClassification`.

    Example:
        >>> import torch
        >>> ids, mask = torch.tensor([[5, 6, 0]]), torch.tensor([[1, 1, 0]])
        >>> inputs, labels = LanguageModel().unpack({"input_ids": ids, "attention_mask": mask})
        >>> labels
        tensor([[   5,    6, -100]])
    """

    name: ClassVar[str] = "language-model"
    shift: ClassVar[int] = 1

    def late_check(self, outputs: Any, targets: Any) -> LateCheck | None:
        """Returns the check of `TokenClassification`, see there."""
        # Training looks for this method in the class itself, see Task.late_check.
        return super().late_check(outputs, targets)

    def unpack(self, batch: Any) -> tuple[Any, Any]:
        """Returns (inputs, labels int64 (batch, tokens)).

        Raises DataError if the batch has another form. See Task.unpack.
        """
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            raise DataError(
                f"a batch is a {type(batch).__name__}, but a language model needs a mapping with 'input_ids'. For "
                "pairs (tokens, next tokens) give task=xprune.TokenClassification()."
            )
        labels = batch.get("labels", batch["input_ids"])
        if "labels" not in batch and "attention_mask" in batch:
            labels = torch.where(batch["attention_mask"].bool(), labels, IGNORED)
        return super().unpack({**batch, "labels": labels})


def _means(values: Tensor, targets: Tensor) -> Tensor:
    """Returns the mean of some values over the labelled tokens of each sample: from (batch, tokens) to (batch,)."""
    labelled = targets != IGNORED
    return (values * labelled).sum(1) / labelled.sum(1).clamp_min(1)

"""Tasks of models that give logits for every token."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xprune.core.task import Task, unpacked
from xprune.errors import DataError

IGNORED = -100
"""The label of a token that has none, as in torch and transformers."""


class TokenClassification(Task):
    """A label for each token, int64 (batch, tokens), -100 for none; logits (batch, tokens, classes).

    Batches as for `Classification`. Masked language models are served too, and pairs (tokens, next tokens). Loss and
    metric are means over each sample's labelled tokens, then over samples: no sample weighs more for being longer.

    Args:
        batch_axis: The axis of the samples in inputs, labels and logits: 1 for sequence-first models, where they are
            (tokens, batch), (tokens, batch) and (tokens, batch, classes).
    """

    metric_name: ClassVar[str] = "token accuracy"
    shift: ClassVar[int] = 0
    """How many tokens ahead of its logits a label stands."""

    def unpack(self, batch: Any) -> tuple[Any, Any]:
        """(inputs, labels (batch, tokens)); DataError where the batch is something else."""
        inputs, labels = unpacked(batch)
        if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.is_floating_point():
            raise DataError("labels have to be an integer tensor of shape (batch, tokens), -100 where there is none.")
        return inputs, labels.long().movedim(self.batch_axis, 0)

    def forward(self, model: nn.Module, inputs: Any) -> Any:
        """The model's logits (batch, tokens, classes)."""
        outputs = super().forward(model, inputs)
        fits = isinstance(outputs, Tensor) and outputs.dim() > self.batch_axis  # else `check` says what is wrong
        return outputs.movedim(self.batch_axis, 0) if fits else outputs

    def check(self, outputs: Any, targets: Any) -> None:
        """DataError where outputs are not (batch, tokens, classes), a label is out of range or a sample has none."""
        if not isinstance(outputs, Tensor) or outputs.dim() != 3 or outputs.shape[:2] != targets.shape:
            raise DataError(
                f"the model does not return logits of shape {(*targets.shape, 'classes')}, one row for each label; "
                "give a task=xprune.Task that reads it."
            )
        found = targets[:, self.shift :]
        if not bool((found != IGNORED).any(1).all()):
            raise DataError(f"a sample has no labels to score: all of them are {IGNORED}, or it is too short.")
        wrong = (found != IGNORED) & ((found < 0) | (found >= outputs.shape[2]))
        if bool(wrong.any()):
            raise DataError(
                f"the label {int(found[wrong][0])} is out of range: the model has {outputs.shape[2]} classes, "
                f"0 to {outputs.shape[2] - 1}; {IGNORED} stands for no label."
            )

    def loss(self, outputs: Any, targets: Any, label_smoothing: float = 0.0) -> Tensor:
        """Cross-entropy in float32."""
        made, wanted = self._aligned(outputs, targets)
        each = F.cross_entropy(
            made.float().transpose(1, 2),
            wanted,
            ignore_index=IGNORED,
            label_smoothing=label_smoothing,
            reduction="none",
        )
        return _means(each, wanted).mean()

    def metric(self, outputs: Any, targets: Any) -> Tensor:
        """The share of a sample's labelled tokens whose largest logit is the label's."""
        made, wanted = self._aligned(outputs, targets)
        return _means((made.argmax(-1) == wanted).float(), wanted)

    def distillation(self, outputs: Any, teacher: Any, temperature: float) -> Tensor:
        """See Task.distillation; mean over all tokens."""
        return super().distillation(outputs.flatten(0, 1), teacher.flatten(0, 1), temperature)

    def _aligned(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return outputs[:, : outputs.shape[1] - self.shift], targets[:, self.shift :]


class LanguageModel(TokenClassification):
    """The next token. A batch is a mapping of what the model's forward takes, with "input_ids" (batch, tokens).

    Labels are "labels" where the batch has them, not shifted, as transformers has it; else the input's own tokens
    where "attention_mask" is not 0.
    """

    shift: ClassVar[int] = 1

    def unpack(self, batch: Any) -> tuple[Any, Any]:
        """(inputs, labels); DataError where the batch is something else."""
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            raise DataError(
                f"a batch is a {type(batch).__name__}, wanted a mapping with 'input_ids'; for pairs (tokens, next "
                "tokens) give task=xprune.TokenClassification()."
            )
        labels = batch.get("labels", batch["input_ids"])
        if "labels" not in batch and "attention_mask" in batch:
            labels = torch.where(batch["attention_mask"].bool(), labels, IGNORED)
        return super().unpack({**batch, "labels": labels})


def _means(values: Tensor, targets: Tensor) -> Tensor:
    """Means over each sample's labelled tokens: (batch, tokens) to (batch,)."""
    labelled = targets != IGNORED
    return (values * labelled).sum(1) / labelled.sum(1).clamp_min(1)

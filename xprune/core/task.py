"""Task: how to read a batch, the loss, the metric, and which sample each row of a layer's input belongs to."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xprune.core.site import Site
from xprune.errors import DataError
from xprune.modules.calls import call, first_rows, logits


class Task(ABC):
    """What a model is for. One instance serves scoring, fine-tuning and evaluation."""

    metric_name: ClassVar[str] = "accuracy"

    @abstractmethod
    def unpack(self, batch: Any) -> tuple[Any, Any]:
        """(inputs, targets) of a batch. Inputs: a tensor, a tuple of arguments, or a dict of keyword arguments."""

    @abstractmethod
    def loss(self, outputs: Any, targets: Any, label_smoothing: float = 0.0) -> Tensor:
        """The mean loss over the batch, a scalar."""

    @abstractmethod
    def metric(self, outputs: Any, targets: Any) -> Tensor:
        """The metric of each sample, float (batch,); its mean over the data is reported as `metric_name`.

        For a metric that is no mean over samples: counts (batch, ...), of which `summarise` gets the sum over the data.
        """

    def summarise(self, total: Tensor, samples: int) -> float:
        """The metric of a data set, from the sum of what `metric` gave and the number of samples; here the mean."""
        return float(total) / samples

    def forward(self, model: nn.Module, inputs: Any) -> Any:
        """The model's output for inputs as `unpack` gives them: its logits, where it returns them among others."""
        return logits(call(model, inputs))

    def check(self, outputs: Any, targets: Any) -> None:  # noqa: B027 - a task without checks is a task
        """Raises DataError where targets do not fit outputs. Called on every batch before the loss."""

    def size(self, targets: Any) -> int:
        """Samples in the batch."""
        return len(targets)

    def example(self, inputs: Any) -> Any:
        """What of a batch's inputs is enough to trace, verify and count on: its first two rows."""
        return first_rows(inputs, 2)

    def classes(self, outputs: Any, targets: Any) -> tuple[Tensor, int] | None:
        """(class of each sample, int64 (batch,); number of classes), or None where the task has no classes.

        Where several classes are in a sample, one of them by chance.
        """
        return None

    def other(self, targets: Any, own: Tensor, classes: int) -> Tensor:
        """A class by chance for each sample, int64 (batch,), that is not in it; `own` is what `classes` gave."""
        return (own + torch.randint_like(own, 1, classes)) % classes

    def class_scores(self, outputs: Any, targets: Any, own: Tensor) -> Tensor:
        """log p of the class `own` of each sample, (batch,): what attributions explain."""
        return outputs.float().log_softmax(-1).gather(1, own[:, None])[:, 0]

    def one_vs_rest(self, outputs: Any, targets: Any, drawn: Tensor, gone: bool = False) -> Tensor:
        """What tells whether the units of the drawn class serve that class and no other, the mean over samples.

        drawn   int64 (batch,)
        gone    False: those units alone were kept. -log p_c where the drawn class c is the sample's own, -log(1 - p_c)
                where not. True: they were taken away. -log(1 - p_c), which is small where c is missed, for samples of
                c, and cross-entropy for those of other classes, which are to miss nothing

        p is the softmax of outputs (batch, classes); a task with other outputs says what it means there.
        """
        found = self.classes(outputs, targets)
        if found is None:
            raise DataError(f"{type(self).__name__} has no classes to tell from the rest: implement Task.classes.")
        return one_vs_rest(outputs, found[0], drawn, gone)

    def rows(self, site: Site, inputs: Tensor, samples: int) -> Tensor | None:
        """For each row (index along the first axis) of the input of the site's layer, the sample it belongs to.

        int64 (rows,), or None for the default: rows / samples contiguous rows a sample, which is right for plain
        batches and for windows folded into the batch.
        """
        return None

    def distillation(self, outputs: Any, teacher: Any, temperature: float) -> Tensor:
        """Mean divergence of outputs from the teacher's, scaled by temperature squared (Hinton et al., 2015)."""
        student, target = (F.log_softmax(logits / temperature, dim=-1) for logits in (outputs, teacher))
        return F.kl_div(student, target, log_target=True, reduction="batchmean") * temperature**2


def unpacked(batch: Any) -> tuple[Any, Any]:
    """(inputs, labels) of a pair, or of a mapping with "labels"; DataError where the batch is something else."""
    if isinstance(batch, Mapping) and "labels" in batch:
        return {name: value for name, value in batch.items() if name != "labels"}, batch["labels"]
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    what = type(batch).__name__
    if isinstance(batch, (tuple, list, Mapping)):
        what += f" of {', '.join(map(str, batch)) if isinstance(batch, Mapping) else len(batch)}"
    raise DataError(
        f"a batch is a {what}, wanted (inputs, labels) or a mapping with 'labels'; for anything else give a "
        "task=xprune.Task."
    )


def one_vs_rest(logits: Tensor, labels: Tensor, drawn: Tensor, gone: bool) -> Tensor:
    """See `Task.one_vs_rest`, for logits (points, classes), labels and drawn int64 (points,)."""
    logs, chosen = logits.float().log_softmax(-1), drawn[:, None]
    here = logs.gather(1, chosen)[:, 0]
    rest = logs.scatter(1, chosen, -torch.inf).logsumexp(-1)  # log(1 - p_c), exact where p_c is about 1
    if gone:
        here, rest = rest, logs.gather(1, labels[:, None])[:, 0]
    return -torch.where(drawn == labels, here, rest).mean()

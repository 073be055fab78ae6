"""Task: how to read a batch, the loss, the metric, and which sample each row of a layer's input belongs to."""

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xprune.core.site import Site
from xprune.errors import DataError
from xprune.modules.calls import Given, call, first_rows, lengths, logits, takes, tensors_in
from xprune.modules.samples import find_samples

if TYPE_CHECKING:  # importing torchmetrics takes a second: it is imported where a metric is made
    from torchmetrics import Metric


class Task(ABC):
    """What a model is for. One instance serves scoring, fine-tuning and evaluation.

    A subclass says at least how a batch is read (`unpack`), what the loss is (`loss`), and what is measured: a number
    for each sample (`metric`), or a state that torchmetrics keeps over the data set (`new_metric`).

    Args:
        batch_axis: The axis of the samples in the model's inputs: 1 for sequence-first models, whose inputs are
            (tokens, batch, features).
    """

    metric_name: ClassVar[str] = "accuracy"
    batch_axis: int = 0

    def __init__(self, *, batch_axis: int = 0) -> None:
        self.batch_axis = checked_batch_axis(batch_axis)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Of `metric` and `new_metric`, what a class gives replaces both: the inherited one measures something else."""
        super().__init_subclass__(**kwargs)
        places = {name: _place(cls, name) for name in ("metric", "new_metric", "update")}
        if places["metric"] < places["new_metric"]:
            cls.new_metric = Task.new_metric  # type: ignore[method-assign]
            if places["metric"] < places["update"]:
                cls.update = Task.update  # type: ignore[method-assign]
        elif places["new_metric"] < places["metric"]:
            cls.metric = Task.metric  # type: ignore[method-assign]
        if "summarise" in vars(cls):
            warnings.warn(
                f"{cls.__name__}.summarise goes after this release: give `new_metric`, a metric of torchmetrics.",
                DeprecationWarning,
                stacklevel=3,
            )

    @abstractmethod
    def unpack(self, batch: Any) -> tuple[Any, Any]:
        """Reads a batch.

        Returns:
            The inputs that the model is called with, and the targets. Inputs are a tensor, a tuple of arguments, or a
            dict of keyword arguments. A list is one argument that holds a tensor for each sample.

        Raises:
            DataError: The batch is something else.
        """

    @abstractmethod
    def loss(self, outputs: Any, targets: Any, label_smoothing: float = 0.0) -> Tensor:
        """The mean loss over the batch, a scalar."""

    def metric(self, outputs: Any, targets: Any) -> Tensor | None:
        """The metric of each sample, float (batch,): figures by class and faithfulness need it.

        None for a task whose metric is of a whole data set and says nothing of one sample.
        """
        return None

    def new_metric(self, outputs: Any) -> "Metric":
        """An empty metric of torchmetrics, which collects batches; here the mean of what `metric` gives.

        Args:
            outputs: What the model gave for the first batch, of which e.g. the number of classes can be read.
        """
        from xprune.core.metric import MeanOfSamples, in_double

        if type(self).metric is Task.metric:
            raise DataError(f"{type(self).__name__} measures nothing: give it a `metric`, or a `new_metric`.")
        return in_double(MeanOfSamples(getattr(self, "summarise", None)), outputs)

    def update(self, metric: "Metric", outputs: Any, targets: Any) -> None:
        """Adds a batch to what `new_metric` made: its outputs and targets."""
        if type(self).new_metric is Task.new_metric:
            metric.update(self.metric(outputs, targets))
        else:
            metric.update(outputs, targets)

    def forward(self, model: nn.Module, inputs: Any) -> Any:
        """The model's output for inputs as `unpack` gives them: its logits, where it returns them among others."""
        return logits(call(model, inputs))

    def check(self, outputs: Any, targets: Any) -> None:  # noqa: B027 - a task without checks is a task
        """Raises DataError where targets do not fit outputs. Called on every batch before the loss."""

    def size(self, targets: Any) -> int:
        """Samples in the batch."""
        return len(targets)

    def example(self, inputs: Any, samples: int | None = None) -> Any:
        """What of a batch's inputs is enough to trace, verify and count on: its first two samples.

        Args:
            inputs: What the model is called with.
            samples: The number of samples in the batch; None: the first input tells it.

        Raises:
            DataError: The samples are along another axis than `batch_axis`.
        """
        if samples is not None:
            self._check_axis(inputs, samples)
        return first_rows(inputs, 2, samples, self.batch_axis)

    def _check_axis(self, inputs: Any, samples: int) -> None:
        if samples == 1 or samples in lengths(inputs, self.batch_axis):  # an axis of length 1 may be any
            return
        for tensor in tensors_in(inputs):
            if samples in tensor.shape:
                axis = list(tensor.shape).index(samples)
                raise DataError(
                    f"the batch has {samples} samples, but no input has {samples} rows along axis {self.batch_axis}. "
                    f"An input of shape {tuple(tensor.shape)} has them along axis {axis}: give the task "
                    f"batch_axis={axis}, as in Classification(batch_axis={axis}), or an `example` of its own."
                )

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

    def rows(self, site: Site, inputs: Tensor, samples: int, given: Given) -> Tensor | None:
        """For each row of the input of the site's layer, the sample that it belongs to.

        Args:
            site: Whose layer it is.
            inputs: What the layer is called with. A row is an index along the site's axis of samples.
            samples: The number of samples in the batch.
            given: What the model was called with, for the batch at hand.

        Returns:
            int64 (rows,), or None for the default: rows / samples contiguous rows a sample. That is right for plain
            batches and for windows folded into the batch.
        """
        return None

    def distillation(self, outputs: Any, teacher: Any, temperature: float) -> Tensor:
        """Mean divergence of outputs from the teacher's, scaled by temperature squared (Hinton et al., 2015)."""
        student, target = (F.log_softmax(logits / temperature, dim=-1) for logits in (outputs, teacher))
        return F.kl_div(student, target, log_target=True, reduction="batchmean") * temperature**2


def with_batch_axis(task: Task, model: nn.Module, inputs: Any, targets: Any) -> Task:
    """The task, told along which axis of the inputs the samples lie, where it was not told and the first is not it.

    Looks at the model where the shapes of the inputs do not show that samples come first: a batch may be square, with
    as many tokens as samples.

    Args:
        task: The task. It is not changed.
        model: The model. It is not changed.
        inputs: What the model is called with.
        targets: The targets of the same batch, which say how many samples it has.

    Returns:
        The task itself where samples come first or where the axis is given, else a copy that knows the axis.
    """
    first, samples = next(iter(tensors_in(inputs)), None), task.size(targets)
    own = task.batch_axis != 0 or type(task).example is not Task.example  # it knows by itself
    if own or first is None or first.dim() < 2 or samples < 2:
        return task
    if first.shape[0] == samples != first.shape[1]:
        return task
    found = find_samples(model, inputs)
    if found is None or found.axis == 0 or first.shape[found.axis] != samples:
        return task
    told = copy.copy(task)
    object.__setattr__(told, "batch_axis", found.axis)  # a task may be a frozen dataclass
    return told


def batch_axis_of(task: Task) -> int | None:
    """The axis of the samples in the inputs, where the task was told; None where samples come first, as is usual.

    None lets whoever needs the axis look at the model too: a graph's rows, for example, are nodes and not samples.
    """
    return task.batch_axis or None


def example_of(task: Task, inputs: Any, targets: Any) -> Any:
    """`task.example` of a batch, also of a task whose `example` takes the inputs alone."""
    return task.example(inputs, task.size(targets)) if takes(task.example, 2) else task.example(inputs)


def checked_batch_axis(batch_axis: int) -> int:
    """The axis itself; DataError where it is none."""
    if type(batch_axis) is not int or batch_axis < 0:
        raise DataError(f"batch_axis={batch_axis!r}, wanted a whole number: axes are counted from 0.")
    return batch_axis


def _place(task: type[Task], name: str) -> int:
    """How far up among its classes a task finds the name: 0 for its own."""
    return next(place for place, kind in enumerate(task.__mro__) if name in vars(kind))


def unpacked(batch: Any) -> tuple[Any, Any]:
    """(inputs, labels) of a pair, or of a mapping with "labels"; DataError where the batch is something else.

    torch's default collation makes lists of tuples: in a pair that is a list, a list of inputs is a tuple of arguments.
    """
    if isinstance(batch, Mapping) and "labels" in batch:
        return {name: value for name, value in batch.items() if name != "labels"}, batch["labels"]
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        inputs, labels = batch
        return tuple(inputs) if isinstance(batch, list) and isinstance(inputs, list) else inputs, labels
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

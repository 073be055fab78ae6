"""Tasks: how a batch is read, the loss, the metric, and the sample that each row of a layer's input belongs to."""

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

# Importing torchmetrics takes a second, so it is imported only when a metric is made.
if TYPE_CHECKING:
    from torchmetrics import Metric


class Task(ABC):
    """What a model is for: how a batch is read, what the loss is, and what is measured.

    One instance serves scoring, fine-tuning and evaluation. A subclass gives at least `unpack`, `loss`, and one of two
    methods: `metric`, which returns a number for each sample, or `new_metric`, which returns a metric of torchmetrics
    for the whole data set.

    Args:
        batch_axis: Sample axis of the model's inputs. 0, or 1 for models that take (tokens, batch, features).

    Attributes:
        metric_name: Name of the metric in tables and results.

    Example:
        >>> class Regression(Task):
        ...     metric_name = "negative squared error"
        ...
        ...     def unpack(self, batch):
        ...         inputs, numbers = batch
        ...         return inputs, numbers
        ...
        ...     def loss(self, outputs, targets, label_smoothing=0.0):
        ...         return F.mse_loss(outputs[:, 0], targets)
        ...
        ...     def metric(self, outputs, targets):
        ...         return -((outputs[:, 0] - targets) ** 2)
        >>> inputs, targets = Regression().unpack((torch.zeros(4, 8), torch.ones(4)))
        >>> Regression().loss(torch.zeros(4, 1), targets).item()
        1.0
    """

    metric_name: ClassVar[str] = "accuracy"
    batch_axis: int = 0

    def __init__(self, *, batch_axis: int = 0) -> None:
        self.batch_axis = checked_batch_axis(batch_axis)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Drops the inherited one of `metric` and `new_metric` if a subclass overrides only the other.

        The inherited method measures something else than the new one, so the two would contradict each other.
        """
        super().__init_subclass__(**kwargs)
        places = {name: _place(cls, name) for name in ("metric", "new_metric", "update")}
        if places["metric"] < places["new_metric"]:
            cls.new_metric = Task.new_metric  # type: ignore[method-assign]
            # An inherited `update` belongs to the inherited `new_metric`.
            if places["metric"] < places["update"]:
                cls.update = Task.update  # type: ignore[method-assign]
        elif places["new_metric"] < places["metric"]:
            cls.metric = Task.metric  # type: ignore[method-assign]
        if "summarise" in vars(cls):
            # Level 3 is the line of the class: between it and this line there is the metaclass.
            warnings.warn(
                f"{cls.__name__}.summarise will be removed after this release: give `new_metric`, which returns a "
                "metric of "
                "torchmetrics.",
                DeprecationWarning,
                stacklevel=3,
            )

    @abstractmethod
    def unpack(self, batch: Any) -> tuple[Any, Any]:
        """Splits a batch of the loader into inputs and targets.

        Returns:
            The inputs that the model is called with, and the targets. Inputs are a tensor, a tuple of arguments, or a
            dict of keyword arguments. A list is one argument, which holds a tensor for each sample.

        Raises:
            DataError: The batch has another form.
        """

    @abstractmethod
    def loss(self, outputs: Any, targets: Any, label_smoothing: float = 0.0) -> Tensor:
        """Returns the mean loss over the batch, a scalar.

        Args:
            outputs: What `forward` returned.
            targets: What `unpack` returned.
            label_smoothing: As in torch's cross_entropy. A task without classes may ignore it.
        """

    def metric(self, outputs: Any, targets: Any) -> Tensor | None:
        """Returns the metric of each sample, float (batch,). Figures by class and faithfulness need it.

        None for a task whose metric is defined for a whole data set only.
        """
        return None

    def new_metric(self, outputs: Any) -> "Metric":
        """Returns an empty metric of torchmetrics, which `update` adds batches to.

        By default it is the mean of what `metric` returns.

        Args:
            outputs: The outputs of the model for the first batch. They show, for example, the number of classes.

        Raises:
            DataError: The task has neither `metric` nor `new_metric`.
        """
        from xprune.core.metric import MeanOfSamples, in_double

        if type(self).metric is Task.metric:
            raise DataError(
                f"{type(self).__name__} measures nothing: give it a `metric`, or a `new_metric`. The page "
                "docs/tasks.md shows both."
            )
        return in_double(MeanOfSamples(getattr(self, "summarise", None)), outputs)

    def update(self, metric: "Metric", outputs: Any, targets: Any) -> None:
        """Adds the outputs and targets of a batch to the metric that `new_metric` returned."""
        if type(self).new_metric is Task.new_metric:
            metric.update(self.metric(outputs, targets))
        else:
            metric.update(outputs, targets)

    def forward(self, model: nn.Module, inputs: Any) -> Any:
        """Calls the model. If its output has `logits`, returns these, else the output.

        Args:
            model: The model.
            inputs: Inputs as `unpack` returns them.
        """
        return logits(call(model, inputs))

    def check(self, outputs: Any, targets: Any) -> None:  # noqa: B027 - a task without checks is allowed
        """Raises DataError if the targets do not fit the outputs. It is called on every batch before the loss."""

    def size(self, targets: Any) -> int:
        """Returns the number of samples in the batch that these targets belong to."""
        return len(targets)

    def example(self, inputs: Any, samples: int | None = None) -> Any:
        """Returns a small part of a batch's inputs, on which the model is traced, proved and counted.

        By default it is the first two samples.

        Args:
            inputs: Inputs as `unpack` returns them.
            samples: Number of samples in the batch. None: read from the first input.

        Raises:
            DataError: The samples are along another axis than `batch_axis`.
        """
        if samples is not None:
            self._check_axis(inputs, samples)
        return first_rows(inputs, 2, samples, self.batch_axis)

    def _check_axis(self, inputs: Any, samples: int) -> None:
        """Raises DataError if no input, but another axis of an input, has as many entries as the batch has samples."""
        # With one sample nothing is checked: any axis may have the length 1.
        if samples == 1 or samples in lengths(inputs, self.batch_axis):
            return
        for tensor in tensors_in(inputs):
            if samples in tensor.shape:
                axis = list(tensor.shape).index(samples)
                raise DataError(
                    f"the batch has {samples} samples, but no input has {samples} rows along axis {self.batch_axis}. "
                    f"An input of shape {tuple(tensor.shape)} has them along axis {axis}: give the task "
                    f"batch_axis={axis}, as in Classification(batch_axis={axis}), or override its method `example`."
                )

    def classes(self, outputs: Any, targets: Any) -> tuple[Tensor, int] | None:
        """Returns the class of each sample and the number of classes.

        Returns:
            (int64 (batch,), number of classes). If a sample has several classes, one of them is drawn at random. None,
            the default, if the task has no classes.
        """
        return None

    def other(self, targets: Any, own: Tensor, classes: int) -> Tensor:
        """Draws for each sample a class that is not in it, int64 (batch,).

        Args:
            targets: The targets of the batch. The default does not look at them.
            own: The class of each sample, as `classes` returned it.
            classes: Number of classes.
        """
        return (own + torch.randint_like(own, 1, classes)) % classes

    def class_scores(self, outputs: Any, targets: Any, own: Tensor) -> Tensor:
        """Returns the number that attributions explain for each sample: the log probability of its class, (batch,).

        Args:
            outputs: Logits (batch, classes).
            targets: The targets of the batch. The default does not look at them.
            own: The class of each sample, int64 (batch,).
        """
        return outputs.float().log_softmax(-1).gather(1, own[:, None])[:, 0]

    def one_vs_rest(self, outputs: Any, targets: Any, drawn: Tensor, gone: bool = False) -> Tensor:
        """Returns a loss that asks whether some units serve the drawn class and no other class. Mean over the samples.

        Let c be the drawn class of a sample, and p the softmax of its outputs. With `gone=False` the model kept the
        units of c only. The loss of a sample is -log p_c if c is its own class, else -log(1 - p_c).

        With `gone=True` the units of c were removed. The loss of a sample of class c is -log(1 - p_c), which is small
        if the model misses c. The loss of other samples is the cross-entropy: they should not change.

        Args:
            outputs: Logits (batch, classes). A task with other outputs overrides the method.
            targets: The targets of the batch.
            drawn: The drawn class of each sample, int64 (batch,).
            gone: True if the units of the drawn class were removed. False if only these were kept.

        Raises:
            DataError: The task has no classes.
        """
        found = self.classes(outputs, targets)
        if found is None:
            raise DataError(f"{type(self).__name__} has no classes to tell from the rest: implement Task.classes.")
        return one_vs_rest(outputs, found[0], drawn, gone)

    def rows(self, site: Site, inputs: Tensor, samples: int, given: Given) -> Tensor | None:
        """Returns the sample that each row of a layer's input belongs to. Gates for each sample need it.

        Args:
            site: The site whose consumer the layer is.
            inputs: Input of the layer. A row is one index along the sample axis, `site.batch`.
            samples: Number of samples in the batch.
            given: The arguments that the model was called with for this batch.

        Returns:
            int64 (rows,). None, the default, if the rows of each sample are next to each other, rows / samples rows for
            each sample. That is right for plain batches and for windows that are folded into the batch.
        """
        return None

    def distillation(self, outputs: Any, teacher: Any, temperature: float) -> Tensor:
        """Returns how far the outputs are from the teacher's: the mean over samples of KL(teacher || outputs).

        KL is the divergence of the two softmaxes. It is multiplied by temperature squared, as in Hinton et al.,
        Distilling the Knowledge in a Neural Network, 2015.

        Args:
            outputs: Logits (batch, classes) of the model that is trained.
            teacher: Logits (batch, classes) of the dense model.
            temperature: Both logits are divided by it.
        """
        student, target = (F.log_softmax(values / temperature, dim=-1) for values in (outputs, teacher))
        return F.kl_div(student, target, log_target=True, reduction="batchmean") * temperature**2


def with_batch_axis(task: Task, model: nn.Module, inputs: Any, targets: Any) -> Task:
    """Returns a task that knows the sample axis of the inputs, found on the model if the task does not know it.

    The shapes of the inputs are not always enough: a batch may have as many tokens as samples. Then the model shows
    which axis holds samples, see `find_samples`.

    Args:
        task: The task. It is not changed.
        model: The model. It is not changed.
        inputs: The inputs of a batch.
        targets: The targets of the same batch. They say how many samples it has.

    Returns:
        The task itself if samples come first, if the task has an axis already, or if the axis cannot be found. Else a
        copy with the axis.
    """
    first, samples = next(iter(tensors_in(inputs)), None), task.size(targets)
    knows = task.batch_axis != 0 or type(task).example is not Task.example
    if knows or first is None or first.dim() < 2 or samples < 2:
        return task
    # Only the first axis is as long as the batch: the model need not be run.
    if first.shape[0] == samples != first.shape[1]:
        return task
    found = find_samples(model, inputs)
    if found is None or found.axis == 0 or first.shape[found.axis] != samples:
        return task
    copied = copy.copy(task)
    # Past the class's own __setattr__: a task may be a frozen dataclass.
    object.__setattr__(copied, "batch_axis", found.axis)
    return copied


def batch_axis_of(task: Task) -> int | None:
    """Returns the sample axis if the task sets one, else None.

    0, the default of a task, gives None too. The caller may then find the axis on the model: along the first axis of a
    graph there are nodes, for example, and not samples.
    """
    return task.batch_axis or None


def example_of(task: Task, inputs: Any, targets: Any) -> Any:
    """Returns `task.example` of a batch. A task whose `example` takes the inputs alone is served too."""
    return task.example(inputs, task.size(targets)) if takes(task.example, 2) else task.example(inputs)


def checked_batch_axis(batch_axis: int) -> int:
    """Returns the axis if it is a whole number from 0. Raises DataError if it is not."""
    if type(batch_axis) is not int or batch_axis < 0:
        raise DataError(
            f"batch_axis={batch_axis!r}, wanted a whole number: axes are counted from 0. Give 0 if samples come first, "
            "1 if tokens do."
        )
    return batch_axis


def _place(task: type[Task], name: str) -> int:
    """Returns how far up in its base classes a task finds the name. 0 if the class defines it."""
    return next(place for place, kind in enumerate(task.__mro__) if name in vars(kind))


def unpacked(batch: Any) -> tuple[Any, Any]:
    """Splits a batch into inputs and labels. A batch is a pair, or a mapping with the key "labels".

    Returns:
        (inputs, labels). From a mapping, the inputs are a dict of everything but the labels.

    Raises:
        DataError: The batch has another form.

    Example:
        >>> unpacked({"input_ids": [5, 7], "labels": [1, 0]})
        ({'input_ids': [5, 7]}, [1, 0])
    """
    if isinstance(batch, Mapping) and "labels" in batch:
        return {name: value for name, value in batch.items() if name != "labels"}, batch["labels"]
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        inputs, labels = batch
        # torch's default collation turns tuples into lists. If both the batch and its inputs are lists, the inputs were
        # a tuple of arguments, and a list would be taken for one argument.
        return tuple(inputs) if isinstance(batch, list) and isinstance(inputs, list) else inputs, labels
    what = type(batch).__name__
    if isinstance(batch, Mapping):
        what += f" of {', '.join(map(str, batch))}"
    elif isinstance(batch, (tuple, list)):
        what += f" of {len(batch)}"
    raise DataError(
        f"a batch is a {what}, wanted (inputs, labels) or a mapping with 'labels'; for anything else give a "
        "task=xprune.Task."
    )


def one_vs_rest(logits: Tensor, labels: Tensor, drawn: Tensor, gone: bool) -> Tensor:
    """Computes the loss of `Task.one_vs_rest` from logits.

    Args:
        logits: (points, classes). A point is a sample, or a pixel or node of one.
        labels: The class of each point, int64 (points,).
        drawn: The drawn class of each point, int64 (points,).
        gone: See `Task.one_vs_rest`.
    """
    logs, chosen = logits.float().log_softmax(-1), drawn[:, None]
    of_drawn = logs.gather(1, chosen)[:, 0]
    # log(1 - p_c) as the log of the sum of all other probabilities: it is exact where p_c is almost 1.
    of_others = logs.scatter(1, chosen, -torch.inf).logsumexp(-1)
    if gone:
        if_own, if_other = of_others, logs.gather(1, labels[:, None])[:, 0]
    else:
        if_own, if_other = of_drawn, of_others
    return -torch.where(drawn == labels, if_own, if_other).mean()

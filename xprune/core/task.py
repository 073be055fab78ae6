"""The class `Task`, which says how a batch is read, what the loss is, and what is measured."""

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xprune.core.late_check import LateCheck
from xprune.core.site import Site
from xprune.errors import DataError
from xprune.modules.calls import (
    Given,
    call,
    first_rows,
    lengths,
    logits,
    map_tensors,
    pick_samples,
    shareable,
    takes,
    tensors_in,
)
from xprune.modules.copies import reference_device, shared_copy
from xprune.modules.samples import find_samples

# The import of torchmetrics takes a second. So it happens only when a metric is made.
if TYPE_CHECKING:
    from torchmetrics import Metric


class Task(ABC):
    """Base class of tasks. A task says how a batch is read, what the loss is, and what is measured.

    xprune uses the same task for scoring, fine-tuning and evaluation. A subclass implements `unpack`, `loss`, and one
    of `metric` and `new_metric`. `metric` returns a number for each sample. `new_metric` returns a metric of
    torchmetrics for the whole data set.

    Args:
        batch_axis: The sample axis of the model's inputs: 0, or 1 for models whose inputs are
            (tokens, batch, features).
        class_names: The names of the classes, in the order of the class indices. Tables, pictures and reports use them.
            None means that the names are "class 0", "class 1" and so on.

    Attributes:
        name: The name of the task in `xprune.TASKS` and on the command line. "" for a task that is not in this table.
        metric_name: The name of the metric in tables and results.
        higher_is_better: True if a larger metric is better, as with the accuracy. False if a smaller metric is better,
            as with an error.
        percent: True if tables and pictures of comparisons show the metric in %, as is usual for the accuracy. False if
            they show the number itself, as is usual for an error.

    Example:
        >>> class Distance(Task):
        ...     metric_name, higher_is_better, percent = "squared error", False, False
        ...
        ...     def unpack(self, batch):
        ...         inputs, numbers = batch
        ...         return inputs, numbers
        ...
        ...     def loss(self, outputs, targets, label_smoothing=0.0):
        ...         return F.mse_loss(outputs[:, 0], targets)
        ...
        ...     def metric(self, outputs, targets):
        ...         return (outputs[:, 0] - targets) ** 2
        >>> inputs, targets = Distance().unpack((torch.zeros(4, 8), torch.ones(4)))
        >>> Distance().loss(torch.zeros(4, 1), targets).item()
        1.0
    """

    name: ClassVar[str] = ""
    metric_name: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    percent: ClassVar[bool] = True
    batch_axis: int = 0
    class_names: Sequence[str] | None = None

    def __init__(self, *, batch_axis: int = 0, class_names: Sequence[str] | None = None) -> None:
        self.batch_axis = checked_batch_axis(batch_axis)
        # A subclass may set the names on the class. So the attribute is set only if names are given.
        if class_names is not None:
            self.class_names = checked_class_names(class_names)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Makes sure that `metric` and `new_metric` of a subclass measure the same.

        If a subclass overrides only one of the two, it would inherit the other from its base class, which measures
        something else. So the inherited method is replaced by the one of `Task`. The method also warns about the old
        method `summarise`.
        """
        super().__init_subclass__(**kwargs)
        places = {name: _place(cls, name) for name in ("metric", "new_metric", "update")}
        if places["metric"] < places["new_metric"]:
            cls.new_metric = Task.new_metric  # type: ignore[method-assign]
            # The inherited `update` was written for the inherited `new_metric`, so it is replaced too.
            if places["metric"] < places["update"]:
                cls.update = Task.update  # type: ignore[method-assign]
        elif places["new_metric"] < places["metric"]:
            cls.metric = Task.metric  # type: ignore[method-assign]
        if "summarise" in vars(cls):
            # The warning shows the line of the subclass. Level 2 would show a line of the metaclass, which calls this
            # method.
            warnings.warn(
                f"{cls.__name__}.summarise will be removed after this release: give `new_metric`, which returns a "
                "metric of torchmetrics.",
                DeprecationWarning,
                stacklevel=3,
            )

    @abstractmethod
    def unpack(self, batch: Any) -> tuple[Any, Any]:
        """Splits a batch of the loader into the inputs of the model and the targets.

        Returns:
            (inputs, targets). The model is called with the inputs. They are a tensor, a tuple of positional arguments,
            or a dict of keyword arguments. A list is one argument, which holds a tensor for each sample. The targets
            may have any type that `loss` and the other methods of this task can read.

        Raises:
            DataError: The batch does not have the form that this task expects.
        """

    @abstractmethod
    def loss(self, outputs: Any, targets: Any, label_smoothing: float = 0.0) -> Tensor:
        """Returns the mean loss over the samples of a batch, as a tensor with one number.

        Args:
            outputs: The result of `forward` for the batch.
            targets: The targets of the batch, as `unpack` returned them.
            label_smoothing: The label smoothing, as in `torch.nn.functional.cross_entropy`. A task without classes may
                ignore it.
        """

    def metric(self, outputs: Any, targets: Any) -> Tensor | None:
        """Returns the value of the metric for each sample of a batch, a float tensor (batch,).

        Metrics by class and the measurement of faithfulness need this method. It returns None if the metric is only
        defined for a whole data set. This implementation returns None.

        Args:
            outputs: The result of `forward` for the batch.
            targets: The targets of the batch, as `unpack` returned them.
        """
        return None

    def new_metric(self, outputs: Any) -> "Metric":
        """Returns a new metric of torchmetrics. Evaluation adds all batches to it with `update`.

        This implementation returns a metric that computes the mean of the numbers from `metric`.

        Args:
            outputs: The outputs of the model for the first batch. A metric may need to know, for example, the number of
                classes.

        Raises:
            DataError: The subclass has neither `metric` nor `new_metric`.
        """
        from xprune.core.metric import MeanOfSamples, in_double

        if type(self).metric is Task.metric:
            raise DataError(
                f"{type(self).__name__} has no metric: implement `metric` or `new_metric`. The page docs/tasks.md "
                "shows both."
            )
        return in_double(MeanOfSamples(getattr(self, "summarise", None)), outputs)

    def update(self, metric: "Metric", outputs: Any, targets: Any) -> None:
        """Adds a batch to the metric that `new_metric` returned.

        Args:
            metric: The metric. It is changed.
            outputs: The result of `forward` for the batch.
            targets: The targets of the batch, as `unpack` returned them.
        """
        if type(self).new_metric is Task.new_metric:
            metric.update(self.metric(outputs, targets))
        else:
            metric.update(outputs, targets)

    def forward(self, model: nn.Module, inputs: Any) -> Any:
        """Calls the model and returns its outputs. If the outputs have an entry or attribute `logits`, returns that.

        Args:
            model: The model.
            inputs: The inputs, as `unpack` returned them.
        """
        return logits(call(model, inputs))

    def check(self, outputs: Any, targets: Any) -> None:
        """Raises DataError if the targets do not fit the outputs. It is called for every batch before the loss.

        This implementation makes the check of `late_check` at once.
        """
        check = self.late_check(outputs, targets)
        if check is not None:
            check.now()

    def late_check(self, outputs: Any, targets: Any) -> LateCheck | None:
        """Returns the check of a batch in a form that can be read later. Training then rarely waits for the device.

        A task that implements this method need not implement `check`. What can be told without reading numbers from the
        device, such as shapes, is checked at once. The loss and the other methods of the task run before the check is
        read, so they have to bear wrong labels: some devices stop for good at an index out of range. Training uses this
        method only if the class of the task implements it itself. For a subclass that does not, it calls `check` for
        every batch.

        Args:
            outputs: The result of `forward` for the batch.
            targets: The targets of the batch, as `unpack` returned them.

        Returns:
            The check, or None if nothing is left to check, as in this implementation.

        Raises:
            DataError: The targets do not fit the outputs, and this is known already.
        """
        return None

    def size(self, targets: Any) -> int:
        """Returns the number of samples in a batch. `targets` are the targets of this batch."""
        return len(targets)

    def counted(self, targets: Any) -> int:
        """Returns the number of samples of a batch that the mean of `loss` is taken over.

        It differs from `size` if the loss skips samples, such as samples without a label. This implementation returns
        `size`.
        """
        return self.size(targets)

    def with_dense(self, dense: nn.Module) -> "Task":
        """Returns a task that knows the dense model of a run. Each run calls this method before it reads its data.

        A task overrides it if its loss compares outputs with those of the dense model, as `Embeddings` does. This
        implementation returns the task itself.

        Args:
            dense: The dense model. It is not changed.
        """
        return self

    def probe_loss(self, outputs: Any, targets: Any) -> Tensor | None:
        """Returns a loss whose gradients at the dense model show which units matter, as a tensor with one number.

        The criterion `taylor` needs such a loss if `loss` has its minimum at the dense model, because the gradients of
        `loss` are 0 there. The loss may use random numbers, and the mean of its squared gradients is used. It is a mean
        over the samples that `counted` counts.

        This implementation returns None, which means that `loss` itself can be used.

        Args:
            outputs: The outputs of the dense model for the batch.
            targets: The targets of the batch.
        """
        return None

    def example(self, inputs: Any, samples: int | None = None) -> Any:
        """Returns the inputs of a few samples of a batch. xprune runs the model on them to find, prove and count units.

        This implementation returns the first two samples.

        Args:
            inputs: The inputs of the batch, as `unpack` returned them.
            samples: The number of samples in the batch. None means that the number is read from the first input.

        Raises:
            DataError: The inputs have their samples along another axis than `batch_axis`.
        """
        if samples is not None:
            self._check_axis(inputs, samples)
        return first_rows(inputs, 2, samples, self.batch_axis)

    def _check_axis(self, inputs: Any, samples: int) -> None:
        """Raises DataError if the samples of the inputs seem to lie along another axis than `batch_axis`.

        That is so if no input has `samples` entries along `batch_axis`, but an input has them along another axis.
        """
        # With one sample, nothing can be checked, because many axes have the length 1.
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
        """Returns the class of each sample of a batch, and the number of classes.

        Criteria with class-wise scores call this method. A task with classes overrides it.

        Args:
            outputs: The result of `forward` for this batch, or for another batch. They may be used for the number of
                classes.
            targets: The targets of the batch.

        Returns:
            A tuple (classes, number of classes). The classes are int64 (batch,). If a sample contains several classes,
            the method chooses one of them at random. None if the task has no classes, as in this implementation.
        """
        return None

    def other(self, targets: Any, own: Tensor, classes: int) -> Tensor:
        """Chooses at random, for each sample of a batch, a class that is not in the sample. Returns int64 (batch,).

        Args:
            targets: The targets of the batch. This implementation does not use them.
            own: The class of each sample, as `classes` returned it.
            classes: The number of classes.
        """
        return (own + torch.randint_like(own, 1, classes)) % classes

    def class_scores(self, outputs: Any, targets: Any, own: Tensor) -> Tensor:
        """Returns the log probability of one class for each sample of a batch, (batch,).

        The criteria from Captum compute how much each unit adds to this number.

        Args:
            outputs: Logits (batch, classes).
            targets: The targets of the batch. This implementation does not use them.
            own: The class of each sample, int64 (batch,).
        """
        return outputs.float().log_softmax(-1).gather(1, own[:, None])[:, 0]

    def sample_scores(self, outputs: Any, targets: Any, dense: Any) -> Tensor | None:
        """Returns a number for each sample that is high if the outputs are good, (batch,).

        If a task has no classes, the criteria from Captum compute how much each unit adds to this number. Usually it is
        the negative loss of the sample. This implementation returns None, and the criteria from Captum then refuse the
        task.

        Args:
            outputs: The outputs of the gated model.
            targets: The targets of the batch.
            dense: The outputs of the dense model for the same samples, for tasks that compare outputs with them.
        """
        return None

    def one_vs_rest(self, outputs: Any, targets: Any, drawn: Tensor, gone: bool = False) -> Tensor:
        """Returns a loss that is small if units are needed for the chosen class of a sample and for no other class.

        The criterion `xpruner` trains its masks with this loss. Its gates either remove the units of a class or keep
        only these units. The loss is a mean over the samples. For a sample, let c be the chosen class, and p the
        softmax of the model's outputs.

        If `gone` is False, the model had only the units of c. If c is the sample's own class, the loss is `-log(p_c)`.
        Otherwise it is `-log(1 - p_c)`.

        If `gone` is True, the model had all units but those of c. If c is the sample's own class, the loss is
        `-log(1 - p_c)`, which is small if the model no longer recognises c. Otherwise the loss is the cross-entropy,
        because the outputs for other classes should not change.

        Args:
            outputs: Logits (batch, classes). A task with outputs of another form overrides this method.
            targets: The targets of the batch.
            drawn: The chosen class of each sample, int64 (batch,).
            gone: True if the units of the chosen class were removed. False if only these units were kept.

        Raises:
            DataError: The task has no classes.
        """
        found = self.classes(outputs, targets)
        if found is None:
            raise DataError(
                f"{type(self).__name__} has no classes, which the one-vs-rest loss needs: implement Task.classes."
            )
        return one_vs_rest(outputs, found[0], drawn, gone)

    def rows(self, site: Site, inputs: Tensor, samples: int, given: Given) -> Tensor | None:
        """Returns the sample that each row of a layer's input belongs to. A row is one index along the sample axis.

        Some criteria use other gates for each sample. They need to know which row belongs to which sample, because a
        layer may have several rows for a sample, such as one row for each window of an image.

        Args:
            site: The site. The layer is one of its consumers.
            inputs: The input of the layer. Its sample axis is `site.batch`.
            samples: The number of samples in the batch.
            given: The arguments that the model was called with for this batch.

        Returns:
            The index of the sample of each row, int64 (rows,). None if every sample has the same number of rows and the
            rows of each sample are next to each other, as with windows that are folded into the batch. This
            implementation returns None.
        """
        return None

    def distillation(self, outputs: Any, teacher: Any, temperature: float) -> Tensor:
        """Returns how much the outputs of a model differ from those of its teacher. Fine-tuning adds it to the loss.

        The result is a mean over the samples. It is 0 if the outputs are equal. This implementation raises an error,
        because outputs of different tasks differ in different ways. `softmax_divergence` is right for logits of
        classes.

        Args:
            outputs: The outputs of the student, which is the model that is trained.
            teacher: The outputs of the teacher, which is the dense model.
            temperature: The temperature of `Finetune`. A task without probabilities may ignore it.

        Raises:
            DataError: The task does not define this method.
        """
        raise _no_distillation(self)


def softmax_divergence(outputs: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Returns the mean over rows of KL(teacher || student), the Kullback-Leibler divergence of the two softmaxes.

    It is multiplied by temperature squared, as in Hinton et al., Distilling the Knowledge in a Neural Network, 2015.

    Args:
        outputs: Logits (rows, classes) of the student, which is the model that is trained.
        teacher: Logits (rows, classes) of the teacher, which is the dense model.
        temperature: Both logits are divided by it before the softmax.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, 1.0]])
        >>> softmax_divergence(logits, logits, temperature=2.0).item()
        0.0
    """
    student, target = (F.log_softmax(values / temperature, dim=-1) for values in (outputs.float(), teacher.float()))
    return F.kl_div(student, target, log_target=True, reduction="batchmean") * temperature**2


def check_distillation(task: Task) -> None:
    """Raises DataError if a task has no distillation. It is called before the work of a run starts."""
    if type(task).distillation is Task.distillation:
        raise _no_distillation(task)


def _no_distillation(task: Task) -> DataError:
    """Returns the error for a task that does not define `distillation`."""
    return DataError(
        f"{type(task).__name__} has no distillation, which Finetune(distill=...) needs: implement Task.distillation, "
        "or use distill=0. For logits of classes, return xprune.core.task.softmax_divergence(outputs, teacher, "
        "temperature)."
    )


def with_batch_axis(task: Task, model: nn.Module, inputs: Any, targets: Any) -> Task:
    """Returns a task that knows the sample axis of the inputs. The axis is found with the model if necessary.

    The shapes of the inputs do not always show the axis, because a batch may have as many tokens as samples. Then the
    model is run to find the axis, see `find_samples`.

    Args:
        task: The task. It is not changed.
        model: The model. It is not changed.
        inputs: The inputs of a batch.
        targets: The targets of the same batch. The task reads the number of samples from them.

    Returns:
        A copy of the task with the axis that was found. The task itself if samples come first, if the task has an axis
        other than 0 or overrides `example`, or if the axis cannot be found.
    """
    first, samples = next(iter(tensors_in(inputs)), None), task.size(targets)
    knows = task.batch_axis != 0 or type(task).example is not Task.example
    if knows or first is None or first.dim() < 2 or samples < 2:
        return task
    # Of the first two axes, only the first one is as long as the batch. So samples come first.
    if first.shape[0] == samples != first.shape[1]:
        return task
    found = find_samples(model, inputs)
    if found is None or found.axis == 0 or first.shape[found.axis] != samples:
        return task
    copied = copy.copy(task)
    # A task may be a frozen dataclass, which refuses plain assignment.
    object.__setattr__(copied, "batch_axis", found.axis)
    return copied


def batch_axis_of(task: Task) -> int | None:
    """Returns the sample axis of the inputs if the task sets one, else None.

    It returns None for axis 0, which is the default of a task, because 0 may mean that nobody has set the axis. The
    caller can then find the axis with the model. For example, the first axis of the inputs of a graph model holds
    nodes, not samples.
    """
    return task.batch_axis or None


def example_of(task: Task, inputs: Any, targets: Any) -> Any:
    """Returns `task.example(inputs, samples)` for a batch.

    If the task was written for an older release, its `example` accepts only the inputs, and is called with them alone.
    """
    return task.example(inputs, task.size(targets)) if takes(task.example, 2) else task.example(inputs)


def fitting_example_of(task: Task, model: nn.Module, inputs: Any, targets: Any) -> Any:
    """Returns `example_of` for a batch, after a check that the model can be called with it.

    If there are as many tokens as samples, a mask (tokens, tokens) that all samples share has the shape of a mask for
    each sample. A part of such a mask does not fit the model. Then the mask is left whole.

    Args:
        task: The task. If it overrides `example`, nothing is checked.
        model: The model. It is not changed.
        inputs: The inputs of a batch.
        targets: The targets of the same batch.
    """
    example = example_of(task, inputs, targets)
    samples, axis = task.size(targets), task.batch_axis
    choices = shareable(inputs, samples, axis) if type(task).example is Task.example else []
    if not choices or _runs(task, model, example):
        return example
    for shared in choices:
        other = pick_samples(inputs, range(min(2, samples)), samples, axis, shared)
        if _runs(task, model, other):
            return other
    return example


@torch.no_grad()
def _runs(task: Task, model: nn.Module, inputs: Any) -> bool:
    """Returns True if the forward of a copy of the model runs on the inputs, else False."""
    try:
        task.forward(shared_copy(model), map_tensors(inputs, lambda tensor: tensor.to(reference_device(model))))
    # Any error means that the inputs do not fit. If no choice fits, a later stage reports the error.
    except Exception:
        return False
    return True


def checked_batch_axis(batch_axis: int) -> int:
    """Returns the sample axis. Raises DataError if it is not a whole number of at least 0."""
    if type(batch_axis) is not int or batch_axis < 0:
        raise DataError(
            f"batch_axis={batch_axis!r}, wanted a whole number: axes are counted from 0. Give 0 if samples come first, "
            "1 if tokens do."
        )
    return batch_axis


def checked_class_names(names: Any) -> tuple[str, ...]:
    """Returns the names of the classes as a tuple. Raises DataError if they are not several texts.

    Example:
        >>> checked_class_names(["cat", "dog"])
        ('cat', 'dog')
    """
    # A single text is a sequence of texts too. Without this check, each letter would be the name of a class.
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise DataError(f"class_names={names!r}, wanted a list of texts with a name for each class.")
    return tuple(names)


def check_class_count(task: Task, classes: int) -> None:
    """Raises DataError if the task names another number of classes than the model has."""
    names = task.class_names
    if names is not None and len(names) != classes:
        raise DataError(
            f"class_names has {len(names)} names, but the model has {classes} classes. Give a name for each class, in "
            "the order of the class indices."
        )


def _place(task: type[Task], name: str) -> int:
    """Returns the position of the first class in a task's method resolution order that defines a name.

    The position is 0 if the task's class defines the name.
    """
    return next(place for place, kind in enumerate(task.__mro__) if name in vars(kind))


def unpacked(batch: Any) -> tuple[Any, Any]:
    """Splits a batch into inputs and labels. The batch is a pair (inputs, labels), or a mapping with the key "labels".

    Returns:
        (inputs, labels). If the batch is a mapping, the inputs are a dict of all entries except "labels".

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
        # torch's default collation turns tuples into lists. If both the batch and its inputs are lists, the data set
        # returned a tuple of inputs. The inputs become a tuple again, because a list would be passed to the model as
        # one argument.
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
    """Computes the loss of `Task.one_vs_rest` from logits. Tasks with a class for each pixel or node call it too.

    Args:
        logits: Logits (points, classes). A point is a sample, a pixel of an image, or a node of a graph.
        labels: The class of each point, int64 (points,).
        drawn: The chosen class of each point, int64 (points,).
        gone: True if the units of the chosen class were removed. False if only these units were kept.
    """
    logs, chosen = logits.float().log_softmax(-1), drawn[:, None]
    of_drawn = logs.gather(1, chosen)[:, 0]
    # log(1 - p_c) is computed as the log of the sum of all other probabilities. This is exact even if p_c is almost 1.
    of_others = logs.scatter(1, chosen, -torch.inf).logsumexp(-1)
    if gone:
        if_own, if_other = of_others, logs.gather(1, labels[:, None])[:, 0]
    else:
        if_own, if_other = of_drawn, of_others
    return -torch.where(drawn == labels, if_own, if_other).mean()

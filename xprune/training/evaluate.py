"""evaluate: measures the loss and the metric of a model on a loader."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn import functional as F

from xprune.core.record import Metrics
from xprune.core.task import Task
from xprune.errors import DataError
from xprune.modules.copies import shared_copy, unwrap
from xprune.modules.forward import error_text
from xprune.modules.refused import RUN, refuse
from xprune.tasks.classification import Classification
from xprune.training.runtime import accelerator, batches, check_loader, prepared, reduced, stage

if TYPE_CHECKING:
    from torchmetrics import Metric


@stage()
@torch.no_grad()
def evaluate(model: nn.Module, loader: Iterable[Any], *, task: Task | None = None, data: str = "validation") -> Metrics:
    """Measures the loss and the metric of a model on all batches of a loader.

    The model runs in eval mode, on the device that Accelerate chooses. With several processes, the batches of a
    DataLoader are split over the processes, and each process returns the result for all samples.

    Args:
        model: The model. It is not changed.
        loader: The batches: a DataLoader, or a list of batches.
        task: The task. It says how a batch is read, and what the loss and the metric are. If None, it is
            `Classification()`, with batches (inputs, labels).
        data: The name of the data, for reports and the progress bar.

    Returns:
        The value of the metric, the mean loss and the number of samples. If the task has classes and a metric for each
        sample, also the mean metric of each class, in `Metrics.by_class`.

    Raises:
        DataError: The loader is empty, can be read only once, or does not fit the task.
        ModelError: Weights of the model have no values, for example because they are on the meta device.

    Example:
        >>> loader = [(torch.randn(8, 4), torch.arange(8) % 3)]
        >>> metrics = evaluate(nn.Linear(4, 3), loader)
        >>> metrics.metric_name, metrics.samples
        ('accuracy', 8)
    """
    task = task or Classification()
    check_loader(loader)
    model = unwrap(model)
    refuse(model, RUN)
    runner = accelerator()
    copy = shared_copy(model).to(runner.device)
    metric: Metric | None = None
    # The first sum is the loss over all samples that count in it, the second one is their number. The third one is the
    # number of all samples.
    sums, tally = torch.zeros(3, dtype=torch.float64), _ByClass()
    for inputs, targets in batches(runner, prepared(runner, loader), task, f"evaluating ({data})"):
        outputs = task.forward(copy, inputs)
        task.check(outputs, targets)
        metric = task.new_metric(outputs).to(runner.device) if metric is None else metric
        task.update(metric, outputs, targets)
        of_samples = task.metric(outputs, targets)
        if of_samples is not None:
            tally.add(task.classes(outputs, targets), of_samples)
        # The loss is a mean over the samples that count. So the mean over all batches weights each batch by their
        # number.
        counted = task.counted(targets)
        loss_of_batch = float(task.loss(outputs, targets)) * counted
        sums += torch.tensor([loss_of_batch, counted, task.size(targets)], dtype=torch.float64)
    # The sums are added up over the processes in float32, since some accelerators have no float64.
    sums = reduced(runner, sums.float().to(runner.device)).cpu() if runner.num_processes > 1 else sums
    if not sums[1]:
        raise DataError(
            f"no sample has a label that counts, among {int(sums[2])} {data} samples. Check the labels, and the value "
            "that marks what does not count."
        )
    loss, samples = float(sums[0]) / int(sums[1]), int(sums[2])
    value = _value_over_processes(task, metric, runner)
    return Metrics(
        value,
        loss,
        samples,
        task.metric_name,
        data,
        by_class=tally.rows(runner),
        higher_is_better=task.higher_is_better,
    )


def _value_over_processes(task: Task, metric: "Metric | None", runner: Accelerator) -> float:
    """Returns the value of a metric over the batches of all processes. Each process gets the same value.

    Args:
        task: The task. An error message names its class.
        metric: The metric of this process. None if this process got no batch.
        runner: The Accelerator.
    """
    if runner.num_processes == 1:
        return _value(task, metric)
    # torchmetrics combines the states of all processes in a group. A process without a metric cannot be in the group,
    # so it gets the value from another process.
    with_batches = [rank for rank, has in enumerate(gather_object([metric is not None])) if has]
    group = torch.distributed.new_group(with_batches) if len(with_batches) < runner.num_processes else None
    if metric is not None:
        metric.process_group = group
    values = gather_object([_value(task, metric) if metric is not None else None])
    if group is not None and metric is not None:
        torch.distributed.destroy_process_group(group)
    return values[with_batches[0]]


def _value(task: Task, metric: "Metric | None") -> float:
    """Returns the value of a metric as a float.

    Raises DataError if the metric cannot be computed, or if its value is not a single number.
    """
    # `batches` raises an error for an empty loader, so there is a metric.
    assert metric is not None
    try:
        value = metric.compute()
    except ValueError as error:
        # For example, R2 needs at least two samples.
        raise DataError(
            f"the metric {type(metric).__name__} of {type(task).__name__} cannot be computed: {error_text(error)}."
        ) from error
    if not isinstance(value, (int, float)) and not (isinstance(value, Tensor) and value.numel() == 1):
        what = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise DataError(
            f"the metric {type(metric).__name__} of {type(task).__name__} gives {what}, wanted one number. "
            'Choose how it averages, for example with average="macro".'
        )
    return float(value)


class _ByClass:
    """Collects, for each class, the sum of the metric and the number of samples, batch by batch."""

    def __init__(self) -> None:
        # (2, classes): the sum of the metric, and the number of samples.
        self.sums = torch.zeros(2, 0, dtype=torch.float64)

    def add(self, found: tuple[Tensor, int] | None, metric: Tensor) -> None:
        """Adds the samples of a batch.

        Args:
            found: (class of each sample, number of classes), as `Task.classes` returns them. If None, nothing is added.
            metric: The metric of each sample, (batch,). If it has any other shape, nothing is added.
        """
        if found is None or metric.shape != found[0].shape:
            return
        labels, metric = found[0].cpu(), metric.detach().cpu().double()
        sums = torch.stack([torch.bincount(labels, w, minlength=found[1]) for w in (metric, torch.ones_like(metric))])
        self.sums = self.sums + sums if self.sums.numel() else sums

    def rows(self, runner: Accelerator) -> tuple[tuple[float, int], ...]:
        """Returns (mean metric, number of samples) of each class, over the batches of all processes.

        It is (0, 0) for a class without samples.
        """
        if runner.num_processes > 1:
            # A process without a batch does not know the number of classes. But the sums of all processes have to be of
            # one shape.
            classes = runner.gather(torch.tensor([self.sums.shape[1]], device=runner.device))
            padded = F.pad(self.sums, (0, int(classes.max()) - self.sums.shape[1]))
            self.sums = reduced(runner, padded.float().to(runner.device)).cpu()
        means = self.sums[0] / self.sums[1].clamp_min(1)
        return tuple(zip(means.tolist(), map(int, self.sums[1].tolist()), strict=True))

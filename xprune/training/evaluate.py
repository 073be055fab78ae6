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
from xprune.tasks.classification import Classification
from xprune.training.runtime import accelerator, batches, check_loader, prepared, reduced, stage

if TYPE_CHECKING:
    from torchmetrics import Metric


@stage()
@torch.no_grad()
def evaluate(model: nn.Module, loader: Iterable[Any], *, task: Task | None = None, data: str = "validation") -> Metrics:
    """Measures the loss and the metric of a model, in eval mode, on the device that Accelerate picks.

    With several processes, the batches of a DataLoader are split over them, and the result is that of all samples.

    Args:
        model: The model. It is not changed.
        loader: Batches: a DataLoader, or a list of batches.
        task: How to read a batch, and the loss and the metric. None for classification of (inputs, labels).
        data: The name of the data, for reports and the progress bar.

    Returns:
        The metrics: metric, mean loss and number of samples, and the metric of each class if the task has classes.

    Raises:
        DataError: The loader is empty, can be read only once, or does not fit the task.

    Example:
        >>> loader = [(torch.randn(8, 4), torch.arange(8) % 3)]
        >>> metrics = evaluate(nn.Linear(4, 3), loader)
        >>> metrics.metric_name, metrics.samples
        ('accuracy', 8)
    """
    task = task or Classification()
    check_loader(loader)
    runner = accelerator()
    copy = shared_copy(unwrap(model)).to(runner.device)
    metric: Metric | None = None
    sums, tally = torch.zeros(2, dtype=torch.float64), _ByClass()  # sums: of the loss over samples, and the samples
    for inputs, targets in batches(runner, prepared(runner, loader), task, f"evaluating ({data})"):
        outputs = task.forward(copy, inputs)
        task.check(outputs, targets)
        metric = task.new_metric(outputs).to(runner.device) if metric is None else metric
        task.update(metric, outputs, targets)
        of_samples = task.metric(outputs, targets)
        if of_samples is not None:
            tally.add(task.classes(outputs, targets), of_samples)
        samples = task.size(targets)
        sums += torch.tensor([float(task.loss(outputs, targets)) * samples, samples], dtype=torch.float64)
    # Sums are reduced in float32, since some accelerators have no float64.
    sums = reduced(runner, sums.float().to(runner.device)).cpu() if runner.num_processes > 1 else sums
    loss, samples = float(sums[0]) / int(sums[1]), int(sums[1])
    value = _value_over_processes(task, metric, runner)
    return Metrics(value, loss, samples, task.metric_name, data, by_class=tally.rows(runner))


def _value_over_processes(task: Task, metric: "Metric | None", runner: Accelerator) -> float:
    """Returns the value of a metric over the batches of all processes.

    Args:
        task: The task, for the error.
        metric: The metric of this process. None if this process got no batch.
        runner: The Accelerator.
    """
    if runner.num_processes == 1:
        return _value(task, metric)
    # torchmetrics sums up the states of all processes of a group. A process without a metric cannot take part, so it
    # gets the value from another one.
    with_batches = [rank for rank, has in enumerate(gather_object([metric is not None])) if has]
    group = torch.distributed.new_group(with_batches) if len(with_batches) < runner.num_processes else None
    if metric is not None:
        metric.process_group = group
    values = gather_object([_value(task, metric) if metric is not None else None])
    if group is not None and metric is not None:
        torch.distributed.destroy_process_group(group)
    return values[with_batches[0]]


def _value(task: Task, metric: "Metric | None") -> float:
    """Returns the value of a metric. Raises DataError if it is not one number."""
    assert metric is not None  # the loader was checked
    value = metric.compute()
    if not isinstance(value, (int, float)) and not (isinstance(value, Tensor) and value.numel() == 1):
        what = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise DataError(
            f"the metric {type(metric).__name__} of {type(task).__name__} gives {what}, wanted one number: "
            'choose how it averages, e.g. average="macro".'
        )
    return float(value)


class _ByClass:
    """The sum of the metric and the number of samples for each class, collected batch by batch."""

    def __init__(self) -> None:
        self.sums = torch.zeros(2, 0, dtype=torch.float64)  # metric, samples

    def add(self, found: tuple[Tensor, int] | None, metric: Tensor) -> None:
        """Adds a batch.

        Args:
            found: The class of each sample and the number of classes, see `Task.classes`. None if there are none.
            metric: The metric of each sample, (batch,). In any other shape, the batch is ignored.
        """
        if found is None or metric.shape != found[0].shape:
            return
        labels, metric = found[0].cpu(), metric.detach().cpu().double()
        sums = torch.stack([torch.bincount(labels, w, minlength=found[1]) for w in (metric, torch.ones_like(metric))])
        self.sums = self.sums + sums if self.sums.numel() else sums

    def rows(self, runner: Accelerator) -> tuple[tuple[float, int], ...]:
        """Returns (mean metric, samples) of each class, over all processes. (0, 0) for a class without samples."""
        if runner.num_processes > 1:
            # A process without a batch does not know the number of classes, but all have to reduce the same shape.
            classes = runner.gather(torch.tensor([self.sums.shape[1]], device=runner.device))
            padded = F.pad(self.sums, (0, int(classes.max()) - self.sums.shape[1]))
            self.sums = reduced(runner, padded.float().to(runner.device)).cpu()
        means = self.sums[0] / self.sums[1].clamp_min(1)
        return tuple(zip(means.tolist(), map(int, self.sums[1].tolist()), strict=True))

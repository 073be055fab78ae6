"""evaluate: loss and metric of a model on a loader."""

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
    """Loss and metric over a loader, eval mode, on the device that Accelerate picks; the model is not changed.

    Raises DataError for a loader that is empty or does not fit the task.
    """
    task = task or Classification()
    check_loader(loader)
    runner = accelerator()
    copy = shared_copy(unwrap(model)).to(runner.device)
    metric: Metric | None = None
    sums, tally = torch.zeros(2, dtype=torch.float64), _ByClass()  # sums: loss, samples
    for inputs, targets in batches(runner, prepared(runner, loader), task, f"evaluating ({data})"):
        outputs = task.forward(copy, inputs)
        task.check(outputs, targets)
        metric = task.new_metric(outputs).to(runner.device) if metric is None else metric
        task.update(metric, outputs, targets)
        figures = task.metric(outputs, targets)
        if figures is not None:
            tally.add(task.classes(outputs, targets), figures)
        samples = task.size(targets)
        sums += torch.tensor([float(task.loss(outputs, targets)) * samples, samples], dtype=torch.float64)
    sums = reduced(runner, sums.float().to(runner.device)).cpu() if runner.num_processes > 1 else sums
    loss, samples = float(sums[0]) / int(sums[1]), int(sums[1])
    value = _computed(task, metric, runner)
    return Metrics(value, loss, samples, task.metric_name, data, by_class=tally.rows(runner))


def _computed(task: Task, metric: "Metric | None", runner: Accelerator) -> float:
    """The metric over all processes. torchmetrics adds up the states of those that saw a batch, the rest is told."""
    if runner.num_processes == 1:
        return _number(task, metric)
    saw = [rank for rank, has in enumerate(gather_object([metric is not None])) if has]
    group = torch.distributed.new_group(saw) if len(saw) < runner.num_processes else None
    if metric is not None:
        metric.process_group = group
    values = gather_object([_number(task, metric) if metric is not None else None])
    if group is not None and metric is not None:
        torch.distributed.destroy_process_group(group)
    return values[saw[0]]


def _number(task: Task, metric: "Metric | None") -> float:
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
    """Metric and samples of each class, summed up along the way."""

    def __init__(self) -> None:
        self.sums = torch.zeros(2, 0, dtype=torch.float64)  # metric, samples

    def add(self, found: tuple[Tensor, int] | None, metric: Tensor) -> None:
        """A batch: (class of each sample, number of classes), or None; the metric of each sample, (batch,)."""
        if found is None or metric.shape != found[0].shape:
            return
        labels, metric = found[0].cpu(), metric.detach().cpu().double()
        sums = torch.stack([torch.bincount(labels, w, minlength=found[1]) for w in (metric, torch.ones_like(metric))])
        self.sums = self.sums + sums if self.sums.numel() else sums

    def rows(self, runner: Accelerator) -> tuple[tuple[float, int], ...]:
        """(mean metric, samples) of each class, over all processes; (0, 0) for one without samples."""
        if runner.num_processes > 1:
            widths = runner.gather(torch.tensor([self.sums.shape[1]], device=runner.device))
            padded = F.pad(self.sums, (0, int(widths.max()) - self.sums.shape[1]))  # one may have seen no batch
            self.sums = reduced(runner, padded.float().to(runner.device)).cpu()
        means = self.sums[0] / self.sums[1].clamp_min(1)
        return tuple(zip(means.tolist(), map(int, self.sums[1].tolist()), strict=True))

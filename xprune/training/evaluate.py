"""evaluate: loss and metric of a model on a loader."""

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from xprune.core.record import Metrics
from xprune.core.task import Task
from xprune.modules.copies import alias, unwrap
from xprune.tasks.classification import Classification
from xprune.training.runtime import accelerator, batches, check_loader, prepared, reduced, stage


@stage()
@torch.no_grad()
def evaluate(model: nn.Module, loader: Iterable[Any], *, task: Task | None = None, data: str = "validation") -> Metrics:
    """Loss and metric over a loader, eval mode, on the device that Accelerate picks; the model is not changed.

    Raises DataError for a loader that is empty or does not fit the task.
    """
    task = task or Classification()
    check_loader(loader)
    runner = accelerator()
    copy = alias(unwrap(model)).to(runner.device)
    sums: torch.Tensor | None = None  # loss, samples, and what the metric sums up
    shape, tally = torch.Size(), _ByClass()
    for inputs, targets in batches(runner, prepared(runner, loader), task, f"evaluating ({data})"):
        outputs = task.forward(copy, inputs)
        task.check(outputs, targets)
        figures = task.metric(outputs, targets)
        samples, shape = len(figures), figures.shape[1:]
        tally.add(task.classes(outputs, targets), figures)
        loss = torch.tensor([float(task.loss(outputs, targets)) * samples, samples], dtype=torch.float64)
        batch = torch.cat([loss, figures.sum(0).flatten().cpu().double()])
        sums = batch if sums is None else sums + batch
    assert sums is not None  # the loader was checked
    sums = reduced(runner, sums.float().to(runner.device)).cpu() if runner.num_processes > 1 else sums
    samples = int(sums[1])
    metric = task.summarise(sums[2:].view(shape), samples)
    return Metrics(metric, float(sums[0]) / samples, samples, task.metric_name, data, by_class=tally.rows(runner))


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

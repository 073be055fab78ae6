"""evaluate: loss and metric of a model on a loader."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xprune.runtime import accelerator, batches, check_loader, prepared, reduced
from xprune.structure import alias, unwrap
from xprune.task import Classification, Task


@dataclass(frozen=True)
class Metrics:
    """Figures of one model.

    metric, metric_name   the task's, for classification the accuracy in [0, 1]
    loss                  mean over the samples
    data                  what metric and loss were measured on: "validation" or "training"
    samples               how many
    macs                  per sample
    params                parameters
    latency_ms            median of a forward pass on the example inputs, and their number of rows
    by_class              (mean metric, samples) of each class, by index; a class without samples is (0, 0); empty
                          where the task has no classes or nobody asked
    """

    metric: float
    loss: float
    samples: int
    metric_name: str = "accuracy"
    data: str = "validation"
    macs: int | None = None
    params: int | None = None
    latency_ms: float | None = None
    latency_rows: int | None = None
    by_class: tuple[tuple[float, int], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_class", tuple((float(metric), int(n)) for metric, n in self.by_class))

    @property
    def accuracy(self) -> float:
        """The metric, where it is the accuracy; AttributeError otherwise."""
        if self.metric_name != "accuracy":
            raise AttributeError(f"the metric of this task is {self.metric_name}: read .metric")
        return self.metric

    def with_costs(self, *, macs: int, params: int, latency_ms: float, latency_rows: int) -> "Metrics":
        """The same figures with what the model costs."""
        return replace(self, macs=macs, params=params, latency_ms=latency_ms, latency_rows=latency_rows)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    task: Task | None = None,
    data: str = "validation",
    by_class: bool = False,
) -> Metrics:
    """Loss and metric over a loader, eval mode, on the device that Accelerate picks; the model is not changed.

    by_class   the metric of each class too

    Raises DataError for a loader that is empty or does not fit the task.
    """
    task = task or Classification()
    check_loader(loader, task)
    runner = accelerator()
    copy = alias(unwrap(model)).to(runner.device)
    sums = torch.zeros(3, dtype=torch.float64)  # loss, metric, samples
    classes = torch.zeros(2, 0, dtype=torch.float64)  # metric, samples
    for inputs, targets in batches(runner, prepared(runner, loader), task, f"evaluating ({data})"):
        outputs = task.forward(copy, inputs)
        task.check(outputs, targets)
        metric = task.metric(outputs, targets)
        samples = len(metric)
        sums += torch.tensor(
            [float(task.loss(outputs, targets)) * samples, float(metric.sum()), samples], dtype=torch.float64
        )
        if by_class:
            found = _by_class(task.classes(outputs, targets), metric)
            classes = classes + found if classes.numel() else found
    if runner.num_processes > 1:
        most = int(runner.gather(torch.tensor([classes.shape[1]], device=runner.device)).max())  # 0: saw no batch
        both = torch.cat([sums, F.pad(classes, (0, most - classes.shape[1])).flatten()])
        both = reduced(runner, both.float().to(runner.device)).cpu()
        sums, classes = both[:3], both[3:].view(2, most)
    loss, total, count = sums.tolist()
    rows = tuple(zip((classes[0] / classes[1].clamp_min(1)).tolist(), classes[1].tolist(), strict=True))
    return Metrics(total / count, loss / count, int(count), task.metric_name, data, by_class=rows)


def _by_class(found: tuple[Tensor, int] | None, metric: Tensor) -> Tensor:
    """(sum of the metric, samples) of each class, float64 (2, classes); (2, 0) where there are none."""
    if found is None:
        return torch.zeros(2, 0, dtype=torch.float64)
    labels, metric = found[0].cpu(), metric.cpu().double()
    return torch.stack([torch.bincount(labels, w, minlength=found[1]) for w in (metric, torch.ones_like(metric))])

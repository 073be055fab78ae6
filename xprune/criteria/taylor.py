"""Taylor: the first-order change of the loss when a unit's gate closes."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from xprune.core.interfaces import Context, Criterion
from xprune.core.scores import Scores
from xprune.core.site import Site
from xprune.errors import PluginError, TrainingError
from xprune.modules.undisturbed import seeded
from xprune.surgery.gates import Gates
from xprune.training.runtime import accelerator, batches, prepared, reduced

KINDS = ("squared", "abs")


@dataclass(frozen=True)
class Taylor(Criterion):
    """First-order Taylor expansion of the loss in the gates, at gates of 1 (Molchanov et al., CVPR 2019, section 3.1).

    With g the gradient of one sample's loss by a unit's gate:

    kind         "squared": mean of g^2 over samples, the empirical Fisher information (their equation 8, on gates);
                 "abs": |mean of g|, the sign kept within the mean
    batches      batches of the loader that are looked at, None: all
    classwise    scores per class too, the same statistic over the samples of the class; a table of classes x units
    """

    kind: str = "squared"
    batches: int | None = None
    classwise: bool = True
    name: ClassVar[str] = "taylor"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise PluginError(f"taylor: kind={self.kind!r}, allowed are {', '.join(KINDS)}.")
        if self.batches is not None and self.batches < 1:
            raise PluginError(f"taylor: batches={self.batches} has to be at least 1, or None for all.")

    def score(self, context: Context, sites: Sequence[Site]) -> Scores:
        """A statistic of gate gradients per unit, over all samples and processes."""
        start = time.perf_counter()
        runner = accelerator()
        sizes = [site.size for site in sites]
        gates = Gates(sites, rows=context.task.rows)
        totals = torch.zeros(sum(sizes) + 1, device=runner.device)  # the statistic of each unit, and the samples
        table: Tensor | None = None
        loader = prepared(runner, context.data(self.name))
        with seeded(context.seed), gates.attached(context.model):
            for inputs, targets in batches(runner, loader, context.task, "scoring (taylor)", self.batches):
                gradient, classes, count = self._gradients(context, gates, inputs, targets)
                statistic = gradient.square() if self.kind == "squared" else gradient
                statistic = torch.cat([statistic, torch.ones_like(statistic[:, :1])], dim=1)
                totals += statistic.sum(0)
                if self.classwise and count:
                    table = torch.zeros(count, len(totals), device=runner.device) if table is None else table
                    table.index_add_(0, classes, statistic)
        values, samples = self._mean(reduced(runner, totals))
        classwise = None if table is None else self._mean(reduced(runner, table))[0].split(sizes, dim=1)
        info = {"kind": self.kind, "samples": int(samples), "seconds": time.perf_counter() - start}
        return Scores(tuple(sites), tuple(values.split(sizes)), self.name, classwise and tuple(classwise), info, "loss")

    def _mean(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """(|mean| per unit, samples) from sums whose last column counts samples; 0 / 0 is NaN: not seen."""
        return (sums[..., :-1] / sums[..., -1:]).abs().cpu(), sums[..., -1].cpu()

    def _gradients(self, context: Context, gates: Gates, inputs: object, targets: object) -> tuple[Tensor, Tensor, int]:
        """(gradient of each sample's loss by each gate (samples, units), class of each sample, number of classes)."""
        task, samples = context.task, context.task.size(targets)
        device = next(context.model.parameters()).device
        values = [torch.ones(samples, site.size, device=device, requires_grad=True) for site in gates.sites]
        gates.values = values
        with torch.enable_grad():
            outputs = task.forward(context.model, inputs)
            task.check(outputs, targets)
            loss = task.loss(outputs, targets)
            if not bool(torch.isfinite(loss)):
                raise TrainingError(
                    f"taylor: the loss is {loss.item()} on a scoring batch; check the model's weights and the inputs."
                )
            gradients = torch.autograd.grad(loss * samples, values)
        found = task.classes(outputs, targets)
        classes, count = found if found else (torch.zeros(samples, dtype=torch.long, device=device), 0)
        return torch.cat([g.float() for g in gradients], dim=1), classes, count

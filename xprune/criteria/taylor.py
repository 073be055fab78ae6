"""Taylor: the first-order change of the loss when a unit's gate closes."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

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

    Sites that the loss does not depend on have scores of 0, and their names stand in `Scores.info["no gradient"]`.

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
        fed = torch.zeros(len(sites), device=runner.device)  # batches in which the loss depends on each site
        table: Tensor | None = None
        loader = prepared(runner, context.data(self.name))
        with seeded(context.seed), gates.attached(context.model):
            for inputs, targets in batches(runner, loader, context.task, "scoring (taylor)", self.batches):
                gradients, classes, count = self._gradients(context, gates, inputs, targets)
                fed += torch.tensor([float(each is not None) for each in gradients], device=runner.device)
                none = (torch.zeros_like(value) for value in gates.values)
                parts = (zero if each is None else each for each, zero in zip(gradients, none, strict=True))
                gradient = torch.cat([each.float() for each in parts], dim=1)  # (samples, units)
                statistic = gradient.square() if self.kind == "squared" else gradient
                statistic = torch.cat([statistic, torch.ones_like(statistic[:, :1])], dim=1)
                totals += statistic.sum(0)
                if self.classwise and count:
                    table = torch.zeros(count, len(totals), device=runner.device) if table is None else table
                    table.index_add_(0, classes, statistic)
        values, samples = self._mean(reduced(runner, totals))
        classwise = None if table is None else self._mean(reduced(runner, table))[0].split(sizes, dim=1)
        info: dict[str, Any] = {"kind": self.kind, "samples": int(samples), "seconds": time.perf_counter() - start}
        unfed = [site.name for site, times in zip(sites, reduced(runner, fed).tolist(), strict=True) if not times]
        if len(unfed) == len(sites):
            raise TrainingError(
                f"{self.name}: the loss does not depend on the units of any site, {unfed[0]} among them. Check that "
                "the forward runs with gradients, and that the task's loss is of the outputs that the sites lead to."
            )
        if unfed:
            info["no gradient"] = unfed
        return Scores(tuple(sites), tuple(values.split(sizes)), self.name, classwise and tuple(classwise), info, "loss")

    def _mean(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """(|mean| per unit, samples) from sums whose last column counts samples; 0 / 0 is NaN: not seen."""
        return (sums[..., :-1] / sums[..., -1:]).abs().cpu(), sums[..., -1].cpu()

    def _gradients(
        self, context: Context, gates: Gates, inputs: object, targets: object
    ) -> tuple[Sequence[Tensor | None], Tensor, int]:
        """(per site, gradient of each sample's loss by each gate (samples, units); class of each sample; classes).

        None in place of a site's gradient where the loss does not depend on it.
        """
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
            gradients: Sequence[Tensor | None] = [None] * len(values)
            if loss.requires_grad:
                gradients = torch.autograd.grad(loss * samples, values, allow_unused=True)
        found = task.classes(outputs, targets)
        classes, count = found if found else (torch.zeros(samples, dtype=torch.long, device=device), 0)
        return gradients, classes, count

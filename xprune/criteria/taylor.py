"""Taylor: a unit's score estimates how much the loss changes if the unit is removed, from gradients of its gate."""

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
    """A criterion: the estimated change of the loss if a unit is removed, by a first-order Taylor expansion.

    Every unit gets a gate of 1. Let g be the gradient of one sample's loss by a unit's gate. To first order, the loss
    of this sample changes by -g if the gate falls from 1 to 0. The score combines the g of all samples. It needs one
    forward and one backward pass for each batch.

    If the loss does not depend on a site, the scores of this site are 0. Its name is then in
    `Scores.info["no gradient"]`.

    Source: Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, section 3.1.

    Args:
        kind: "squared": the mean of g^2 over the samples, which is the empirical Fisher information (equation 8 of the
            paper, on gates). "abs": |mean of g|, where positive and negative g cancel each other.
        batches: The number of batches of the loader to use. None: all.
        classwise: True: also computes the same statistic over the samples of each class, as a table of classes and
            units. False: does not.

    Raises:
        PluginError: A setting is out of range.

    Example:
        >>> import torch, xprune
        >>> from torch import nn
        >>> block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = nn.Sequential(block, nn.Flatten(), nn.Linear(4 * 8, 3))
        >>> batches = [(torch.randn(6, 4, 8), torch.tensor([0, 1, 2, 0, 1, 2]))]
        >>> sites = xprune.find_sites(model, batches[0][0])
        >>> scores = xprune.score(model, sites, batches, "taylor,kind=abs")
        >>> scores.classwise[1].shape  # 3 classes, 16 neurons
        torch.Size([3, 16])
    """

    kind: str = "squared"
    batches: int | None = None
    classwise: bool = True
    name: ClassVar[str] = "taylor"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise PluginError(f"taylor: kind={self.kind!r}, allowed are {', '.join(KINDS)}.")
        if self.batches is not None and self.batches < 1:
            raise PluginError(
                f"taylor: batches={self.batches}, allowed is a number of at least 1, or None for all batches."
            )

    def score(self, context: Context, sites: Sequence[Site]) -> Scores:
        """Computes the score of each unit, over all samples and processes.

        Args:
            context: The model, the loader, the task and the seed are used.
            sites: The sites to score.

        Returns:
            The scores, on the scale "loss". `info` holds the kind, the number of samples and the seconds. If the task
            has classes and `classwise` is True, also class-wise scores. A class without samples has NaN there.

        Raises:
            DataError: There is no loader, or it does not fit the task.
            TrainingError: The loss is not finite, or does not depend on the units of any site.
        """
        start = time.perf_counter()
        runner = accelerator()
        sizes = [site.size for site in sites]
        gates = Gates(sites, rows=context.task.rows)
        # Sums of the statistic of each unit. The last entry counts the samples, and one reduction adds up both.
        totals = torch.zeros(sum(sizes) + 1, device=runner.device)
        # For each site, the number of batches in which the loss depends on it.
        dependent = torch.zeros(len(sites), device=runner.device)
        # Sums like `totals`, with a row for each class. The number of classes is known after the first batch.
        table: Tensor | None = None
        loader = prepared(runner, context.data(self.name))
        with seeded(context.seed), gates.attached(context.model):
            for inputs, targets in batches(runner, loader, context.task, "scoring (taylor)", self.batches):
                gradients, classes, count = self._gradients(context, gates, inputs, targets)
                dependent += torch.tensor([float(each is not None) for each in gradients], device=runner.device)
                # A site that the loss does not depend on has a gradient of 0.
                zeros = (torch.zeros_like(value) for value in gates.values)
                by_site = (zero if each is None else each for each, zero in zip(gradients, zeros, strict=True))
                gradient = torch.cat([each.float() for each in by_site], dim=1)  # (samples, units)
                statistic = gradient.square() if self.kind == "squared" else gradient
                statistic = torch.cat([statistic, torch.ones_like(statistic[:, :1])], dim=1)
                totals += statistic.sum(0)
                if self.classwise and count:
                    table = torch.zeros(count, len(totals), device=runner.device) if table is None else table
                    table.index_add_(0, classes, statistic)
        values, samples = self._mean(reduced(runner, totals))
        classwise = None if table is None else self._mean(reduced(runner, table))[0].split(sizes, dim=1)
        info: dict[str, Any] = {"kind": self.kind, "samples": int(samples), "seconds": time.perf_counter() - start}
        times = reduced(runner, dependent).tolist()
        independent = [site.name for site, count in zip(sites, times, strict=True) if not count]
        if len(independent) == len(sites):
            raise TrainingError(
                f"{self.name}: the loss does not depend on the units of any site, for example {independent[0]}. Check "
                "that the forward does not switch gradients off, and that the task's loss uses the model's outputs."
            )
        if independent:
            info["no gradient"] = independent
        return Scores(tuple(sites), tuple(values.split(sizes)), self.name, classwise and tuple(classwise), info, "loss")

    def _mean(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Divides sums by the number of samples, which is their last column.

        Returns:
            The absolute mean of each unit, NaN where there was no sample (0 / 0), and the number of samples.
        """
        return (sums[..., :-1] / sums[..., -1:]).abs().cpu(), sums[..., -1].cpu()

    def _gradients(
        self, context: Context, gates: Gates, inputs: object, targets: object
    ) -> tuple[Sequence[Tensor | None], Tensor, int]:
        """Computes the gradients of one batch.

        Returns:
            Three values. For each site, the gradient of each sample's loss by each gate (samples, units), or None if
            the loss does not depend on the site. The class of each sample. The number of classes, 0 if the task has
            none.
        """
        task, samples = context.task, context.task.size(targets)
        device = next(context.model.parameters()).device
        # Each sample has separate gates. So one backward pass gives the gradient of each sample, not only their sum.
        values = [torch.ones(samples, site.size, device=device, requires_grad=True) for site in gates.sites]
        gates.values = values
        with torch.enable_grad():
            outputs = task.forward(context.model, inputs)
            task.check(outputs, targets)
            loss = task.loss(outputs, targets)
            if not bool(torch.isfinite(loss)):
                raise TrainingError(
                    f"taylor: the loss is {loss.item()} on a scoring batch. Check the model's weights and the inputs."
                )
            gradients: Sequence[Tensor | None] = [None] * len(values)
            # A forward under torch.no_grad gives a loss without a graph, for which torch.autograd.grad would raise.
            if loss.requires_grad:
                # The task's loss is the mean over the samples, and we want the loss of each sample: hence the factor.
                gradients = torch.autograd.grad(loss * samples, values, allow_unused=True)
        found = task.classes(outputs, targets)
        classes, count = found if found else (torch.zeros(samples, dtype=torch.long, device=device), 0)
        return gradients, classes, count

"""The criterion Taylor: estimates from gradients how much the loss changes if a unit is removed."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from xprune.core.interfaces import Context, Criterion
from xprune.core.scores import Scores
from xprune.core.site import Site
from xprune.core.task import Task
from xprune.errors import PluginError, TrainingError
from xprune.modules.calls import pick_samples
from xprune.modules.paths import layer_path
from xprune.modules.undisturbed import seeded
from xprune.surgery.gates import Gates
from xprune.training.runtime import accelerator, batches, prepared, reduced
from xprune.training.sharding import in_step, shard

KINDS = ("squared", "abs")


@dataclass(frozen=True)
class Taylor(Criterion):
    """A criterion that estimates how much the loss changes if a unit is removed, by a first-order Taylor expansion.

    Every unit gets a gate of 1. For each sample, let g be the gradient of the sample's loss with respect to this gate.
    If the gate is reduced from 1 to 0, the sample's loss changes by about -g. The score of the unit combines the g of
    all samples. Scoring needs one forward and one backward pass for each batch.

    If the loss does not depend on any unit of a site, the scores of this site are 0. `Scores.info["no gradient"]` lists
    the names of such sites.

    Some tasks have a loss with its minimum at the dense model, for example the distance to the outputs of the dense
    model. All gradients of such a loss are 0. For these tasks, g is the gradient of `Task.probe_loss`.

    Source: Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, section 3.1.

    Args:
        kind: "squared": the score is the mean of g^2 over the samples. This is the empirical Fisher information
            (equation 8 of the paper, applied to gates). "abs": the score is |mean of g|, in which positive and negative
            g cancel each other.
        batches: The number of batches of the loader to use. None means all batches.
        classwise: If True, the same statistic is also computed over the samples of each class. This gives class-wise
            scores. If False, there are no class-wise scores.

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
        """Computes the score of each unit. With several processes, the samples of all processes are used.

        Args:
            context: The inputs of a criterion. The model, the loader, the task and the seed are used.
            sites: The sites to score.

        Returns:
            The scores, with the scale "loss". `info` holds the kind, the number of samples and the seconds. If the task
            has classes and `classwise` is True, there are also class-wise scores. They are NaN for a class without
            samples.

        Raises:
            DataError: There is no loader, or it does not fit the task.
            TrainingError: The loss is not finite, or does not depend on the units of any site.
        """
        start = time.perf_counter()
        runner = accelerator()
        sizes = [site.size for site in sites]
        gates = Gates(sites, rows=context.task.rows)
        # The sum of the statistic of each unit over all samples. The last entry counts the samples, so that a single
        # reduction over processes adds up both.
        totals = torch.zeros(sum(sizes) + 1, device=runner.device)
        # For each site, the number of batches in which the loss depends on it.
        dependent = torch.zeros(len(sites), device=runner.device)
        # The same sums for each class, with one row for a class. The number of classes is known after the first batch.
        table: Tensor | None = None
        loader = prepared(runner, context.data(self.name))
        shard(runner, context.model, sites)
        with seeded(context.seed), gates.attached(context.model):
            stream = batches(runner, loader, context.task, "scoring (taylor)", self.batches)
            for (inputs, targets), counts in in_step(runner, stream):
                gradients, classes, count = self._gradients(context, gates, inputs, targets)
                if not counts:
                    continue
                dependent += torch.tensor([float(each is not None) for each in gradients], device=runner.device)
                # If the loss does not depend on a site, autograd returns None for it. The line below replaces None by
                # 0.
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

    def _loss(self, task: Task, outputs: object, targets: object) -> Tensor:
        """Returns the loss whose gradients give the scores: that of `Task.probe_loss` if there is one.

        Raises:
            PluginError: There is such a loss, and `kind` is "abs".
        """
        probe = task.probe_loss(outputs, targets)
        if probe is None:
            return task.loss(outputs, targets)
        if self.kind == "abs":
            raise PluginError(
                f"taylor,kind=abs cannot score with {type(task).__name__} and these batches: their loss has its "
                "minimum at the dense model, so its gradients are 0. Use taylor,kind=squared."
            )
        return probe

    def _mean(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Divides sums by the number of samples, which is the last column of the sums.

        Returns:
            Two tensors. The absolute value of the mean for each unit, which is NaN if there was no sample (0 / 0). And
            the number of samples.
        """
        return (sums[..., :-1] / sums[..., -1:]).abs().cpu(), sums[..., -1].cpu()

    def _one_by_one(
        self, context: Context, gates: Gates, inputs: object, targets: object, samples: int
    ) -> tuple[Sequence[Tensor | None], Tensor, int]:
        """Returns what `_gradients` returns, from a forward and a backward pass for each sample.

        The units of some sites are read by a parameter and not by a layer. All samples share this parameter, so its
        gates cannot differ between the samples of a batch.
        """
        axis = max(context.task.batch_axis or 0, 0)
        parts = [
            self._gradients(
                context, gates, pick_samples(inputs, [i], samples, axis), pick_samples(targets, [i], samples)
            )
            for i in range(samples)
        ]
        values = [torch.zeros(1, site.size, device=parts[0][1].device) for site in gates.sites]
        gradients: list[Tensor | None] = []
        for index, zero in enumerate(values):
            rows = [part[0][index] for part in parts]
            known = any(row is not None for row in rows)
            gradients.append(torch.cat([zero if row is None else row for row in rows]) if known else None)
        # The caller needs gates with a row for each sample.
        gates.values = [zero.expand(samples, -1) for zero in values]
        return gradients, torch.cat([part[1] for part in parts]), parts[0][2]

    def _gradients(
        self, context: Context, gates: Gates, inputs: object, targets: object
    ) -> tuple[Sequence[Tensor | None], Tensor, int]:
        """Computes the gradients of the loss with respect to the gates, for one batch.

        Returns:
            A tuple (gradients, classes, number of classes). The gradients are a list with one entry for each site: a
            tensor (samples, units) with the gradients of each sample's loss, or None if the loss does not depend on the
            site. The classes are the class of each sample, int64 (samples,). The number of classes is 0 if the task has
            none.
        """
        task, samples = context.task, context.task.size(targets)
        if samples > 1 and any(layer_path(context.model, path) != path for s in gates.sites for path in s.consumers):
            return self._one_by_one(context, gates, inputs, targets, samples)
        device = next(context.model.parameters()).device
        # Each sample has separate gates. So one backward pass gives a separate gradient for each sample, and not only
        # the sum.
        values = [torch.ones(samples, site.size, device=device, requires_grad=True) for site in gates.sites]
        gates.values = values
        with torch.enable_grad():
            outputs = task.forward(context.model, inputs)
            task.check(outputs, targets)
            loss = self._loss(task, outputs, targets)
            if not bool(torch.isfinite(loss)):
                raise TrainingError(
                    f"taylor: the loss is {loss.item()} on a scoring batch. Check the model's weights and the inputs."
                )
            gradients: Sequence[Tensor | None] = [None] * len(values)
            # A forward under torch.no_grad gives a loss without a graph, for which torch.autograd.grad would raise.
            if loss.requires_grad:
                # The task's loss is a mean over the samples that count. The factor makes it a sum, so each gradient is
                # that of one sample's loss.
                gradients = torch.autograd.grad(loss * task.counted(targets), values, allow_unused=True)
        found = task.classes(outputs, targets)
        classes, count = found if found else (torch.zeros(samples, dtype=torch.long, device=device), 0)
        return gradients, classes, count

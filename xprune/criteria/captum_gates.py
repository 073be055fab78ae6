"""Captum's attributions over gates: the gates are the input of a function whose output is the score of the class."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from captum.attr import IntegratedGradients as CaptumIntegratedGradients
from torch import Tensor

from xprune.errors import DataError, PluginError, TrainingError
from xprune.gates import Gates
from xprune.interfaces import Context, Criterion
from xprune.runtime import accelerator, batches, prepared, reduced, seeded
from xprune.scores import Scores
from xprune.site import Site
from xprune.structure import reference_device


@dataclass(frozen=True)
class IntegratedGradients(Criterion):
    """Integrated gradients (Sundararajan et al., ICML 2017) of the class's log probability over gates, by Captum.

    The path goes from gates of `baseline` (0: units gone) to 1 (units there); an attribution says what a unit adds to
    the log probability of a sample's own class, and the attributions of a sample sum to what all units add. A unit's
    score is its mean over samples, below 0 where the unit does harm; class-wise, its mean over the class's samples.

    n_steps    points on the path, a forward and backward pass each. The path is strongly curved: `info` has the
               completeness error, |sum of attributions - difference| over |difference|, mean over samples
    baseline   where the path starts, in [0, 1)
    batches    batches of the loader that are looked at, None: all
    """

    n_steps: int = 16
    baseline: float = 0.0
    batches: int | None = None
    name: ClassVar[str] = "captum:IntegratedGradients"

    def __post_init__(self) -> None:
        if self.n_steps < 1 or not 0 <= self.baseline < 1 or (self.batches is not None and self.batches < 1):
            raise PluginError(f"{self}: n_steps and batches are at least 1, baseline lies in [0, 1).")

    def score(self, context: Context, sites: Sequence[Site]) -> Scores:
        """Mean attribution per unit, over all samples and processes; class-wise by the samples' classes."""
        start, runner = time.perf_counter(), accelerator()
        sizes = [site.size for site in sites]
        table: Tensor | None = None  # (classes, units + 2): sums of attributions and of the error, samples
        loader = prepared(runner, context.data(self.name))
        path = _Path(context, sites)
        with seeded(context.seed), path.gates.attached(context.model):
            for inputs, targets in batches(runner, loader, context.task, f"scoring ({self.name})", self.batches):
                attributions, error, (own, classes) = self._attributions(path, inputs, targets)
                columns = torch.cat([attributions, error[:, None], torch.ones_like(error[:, None])], dim=1)
                table = torch.zeros(classes, columns.shape[1], device=runner.device) if table is None else table
                table.index_add_(0, own, columns)
        assert table is not None  # the loader was checked
        table = reduced(runner, table).cpu()
        total = table.sum(0)
        values = total[:-2] / total[-1]
        classwise = (table[:, :-2] / table[:, -1:]).split(sizes, dim=1)
        info = {"n_steps": self.n_steps, "baseline": self.baseline, "samples": int(total[-1])}
        info |= {"completeness_error": float(total[-2] / total[-1]), "seconds": time.perf_counter() - start}
        return Scores(tuple(sites), tuple(values.split(sizes)), self.name, tuple(classwise), info, "loss")

    def _attributions(self, path: "_Path", inputs: Any, targets: Any) -> tuple[Tensor, Tensor, tuple[Tensor, int]]:
        """(attributions (samples, units), completeness error (samples,), classes as the task tells them)."""
        ones = torch.ones(path.task.size(targets), sum(site.size for site in path.gates.sites), device=path.device)
        path.inputs, path.targets = inputs, targets
        with torch.no_grad():
            difference = path(ones) - path(self.baseline * ones)
        if not bool(torch.isfinite(difference).all()):
            raise TrainingError(
                f"{self.name}: the model's outputs are not finite on a batch; check weights and inputs."
            )
        # One point of the path at a time: Captum calls the function with as many rows as the batch has samples.
        attributed = CaptumIntegratedGradients(path).attribute(
            ones, self.baseline * ones, n_steps=self.n_steps, internal_batch_size=len(ones)
        )
        error = (attributed.sum(1) - difference).abs() / difference.abs().clamp_min(math.ulp(1.0))
        assert path.classes is not None
        return attributed.float(), error.float(), path.classes


class _Path:
    """Gates (samples, units) of the batch at hand -> log probability of each sample's own class (samples,)."""

    inputs: Any
    targets: Any
    classes: tuple[Tensor, int] | None = None

    def __init__(self, context: Context, sites: Sequence[Site]) -> None:
        self.model, self.task = context.model, context.task
        self.gates = Gates(sites, rows=context.task.rows)
        self.device = reference_device(context.model)

    def __call__(self, gates: Tensor) -> Tensor:
        self.gates.values = gates.split([site.size for site in self.gates.sites], dim=1)
        outputs = self.task.forward(self.model, self.inputs)
        self.task.check(outputs, self.targets)
        self.classes = self.task.classes(outputs, self.targets)
        if self.classes is None:
            raise DataError(f"{type(self.task).__name__} has no classes to attribute to: implement Task.classes.")
        return outputs.float().log_softmax(-1).gather(1, self.classes[0][:, None])[:, 0]

"""Captum's attributions over gates: the gates are the input of a function whose output is the score of the class."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import accumulate
from typing import Any

import captum.attr
import torch
from torch import Tensor

from xprune.core.site import Site
from xprune.criteria.captum.base import Batch, CaptumMethod, incompleteness
from xprune.errors import PluginError, TrainingError
from xprune.surgery.gates import Gates

FORWARDS: Mapping[str, Callable[[int, Any], int]] = {
    "FeatureAblation": lambda features, own: features + 1,
    "ShapleyValueSampling": lambda features, own: own.n_samples * features + 1,
    "ShapleyValues": lambda features, own: math.factorial(min(features, 20)) * features + 1,
    "KernelShap": lambda features, own: own.n_samples,
    "Lime": lambda features, own: own.n_samples,
}
"""Forward passes over a batch that a perturbation method takes, by the number of features."""
MOST = 100_000


@dataclass(frozen=True)
class GateMethod(CaptumMethod):
    """Attributions to gates of 1, from gates of `baseline` (0: unit gone), of the log probability of the own class.

    groups   features of a site at most, of a method that needs a forward pass for each: where a site has more units,
             units that the gradient ranks alike are one feature. A unit's attribution is then its share of the
             feature's, plus what the gradient says it differs by from the feature's mean; None: a feature a unit
    """

    def passes(self, sites: Sequence[Site]) -> int:
        """Of a perturbation method; PluginError for more than can be waited for, or fewer than can be solved."""
        features = sum(self._counts([site.size for site in sites]))
        passes = FORWARDS.get(self.attribution.__name__, lambda features, own: 0)(features, self)
        few = self.attribution is captum.attr.KernelShap and passes < features + 2
        if few or passes > MOST:
            why = f"cannot tell {features} features apart" if few else f"a batch for {features} features are too many"
            raise PluginError(
                f"{self.name}: {passes} forward passes {why}. Score heads alone (find_sites(..., units=('head',))), "
                f"or change groups{' (fewer) or n_samples (twice the features)' if few else ' or n_samples (fewer)'}."
            )
        return passes

    def _counts(self, sizes: Sequence[int]) -> list[int]:
        """Features of each site."""
        return [min(getattr(self, "groups", None) or size, size) for size in sizes]

    def attributions(self, batch: Batch, sites: Sequence[Site]) -> tuple[Tensor, Tensor]:
        """Captum's attributions to the gates of all sites, (samples, units)."""
        gates, sizes = Gates(sites, rows=batch.task.rows), [site.size for site in sites]
        low = getattr(self, "baseline", 0.0)
        ones = torch.ones(len(batch.index), sum(sizes), device=batch.index.device)

        def scored(values: Tensor, index: Tensor) -> Tensor:
            gates.values = values.split(sizes, dim=1)
            return batch.scores(index)

        with gates.attached(batch.context.model):
            with torch.no_grad():
                difference = scored(ones, batch.index) - scored(low * ones, batch.index)
            if not bool(torch.isfinite(difference).all()):
                raise TrainingError(
                    f"{self.name}: the model's outputs are not finite on a batch; check weights and inputs."
                )
            given: dict[str, Any] = {"additional_forward_args": batch.index, **self.given(self.attribution.attribute)}
            names = signature(self.attribution.attribute).parameters
            if "baselines" in names:
                given["baselines"] = low * ones[:1] if self.attribution is captum.attr.GradientShap else low
            if "internal_batch_size" in names:  # one point of the path at a time
                given["internal_batch_size"] = len(ones)
            tool = self.attribution(scored, **self.given(self.attribution.__init__))
            if "feature_mask" not in names:
                found = tool.attribute(ones, **given)
            else:
                slope = self._slope(scored, ones, batch.index) * (1 - low)
                mask = self._mask(slope, sizes)
                found = tool.attribute(ones, feature_mask=mask[None], **given)
                found = _shared(found.float(), slope, mask)
        return found.detach(), incompleteness(found.detach(), difference)

    def _slope(self, scored: Callable[..., Tensor], ones: Tensor, index: Tensor) -> Tensor:
        ones = ones.clone().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(scored(ones, index).sum(), ones)[0]

    def _mask(self, slope: Tensor, sizes: list[int]) -> Tensor:
        """The feature of each unit, int64 (units,)."""
        counts = self._counts(sizes)
        parts = zip(slope.mean(0).split(sizes), sizes, counts, accumulate(counts, initial=0), strict=False)
        return torch.cat([at + part.argsort().argsort() * n // size for part, size, n, at in parts])


def _shared(found: Tensor, slope: Tensor, mask: Tensor) -> Tensor:
    """Attributions (samples, units) that repeat each feature's for its units, shared out: their sum stays."""
    units = mask.bincount()
    mean = torch.zeros(len(slope), len(units), device=slope.device).index_add_(1, mask, slope) / units
    return found / units[mask] + slope - mean[:, mask]

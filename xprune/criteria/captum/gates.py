"""Captum's attributions over gates.

To Captum, the gates are the input of a function. Its output is the log probability of a sample's own class.
"""

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
"""Name of a perturbation method -> the number of forward passes for a batch, from the number of features."""
MOST = 100_000
"""The largest number of forward passes for a batch that is not refused."""


@dataclass(frozen=True)
class GateMethod(CaptumMethod):
    """Attributions of the log probability of the own class to gates of 1, compared with gates of `baseline`.

    A method with baselines has a field `baseline`. Its default 0 means that the unit is removed.

    A method that needs a forward pass for each feature has a field `groups`: the largest number of features of a site.
    If a site has more units, units with similar gradients form one feature. A unit's attribution is then an equal part
    of its feature's attribution, plus the difference between the unit's gradient and the mean gradient of the feature.
    None: each unit is a feature.
    """

    def passes(self, sites: Sequence[Site]) -> int:
        """Returns the number of forward passes for one batch of a perturbation method. 0 for other methods.

        Raises:
            PluginError: The number is above `MOST`, or too small for KernelShap, which solves for all features at once.
        """
        features = sum(self._counts([site.size for site in sites]))
        passes = FORWARDS.get(self.attribution.__name__, lambda features, own: 0)(features, self)
        # KernelShap fits a linear model with a coefficient for each feature, so it needs more samples than features.
        few = self.attribution is captum.attr.KernelShap and passes < features + 2
        if few or passes > MOST:
            why = f"cannot tell {features} features apart" if few else f"a batch for {features} features are too many"
            advice = " (fewer) or n_samples (twice the features)" if few else " or n_samples (fewer)"
            raise PluginError(
                f"{self.name}: {passes} forward passes {why}. Score heads alone (find_sites(..., units=('head',))), "
                f"or change groups{advice}."
            )
        return passes

    def _counts(self, sizes: Sequence[int]) -> list[int]:
        """Returns the number of features of each site."""
        return [min(getattr(self, "groups", None) or size, size) for size in sizes]

    def attributions(self, batch: Batch, sites: Sequence[Site]) -> tuple[Tensor, Tensor]:
        """Computes the attributions to the gates of all sites. See `CaptumMethod.attributions`."""
        gates, sizes = Gates(sites, rows=batch.task.rows), [site.size for site in sites]
        low = getattr(self, "baseline", 0.0)
        ones = torch.ones(len(batch.index), sum(sizes), device=batch.index.device)

        def scored(values: Tensor, index: Tensor) -> Tensor:
            """Returns the log probabilities of samples with the gates that Captum chooses, one row of gates each."""
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
                # GradientShap draws from a distribution of baselines, and wants a tensor with a row for each of them.
                given["baselines"] = low * ones[:1] if self.attribution is captum.attr.GradientShap else low
            if "internal_batch_size" in names:
                # By default, Captum takes all points of the integration path as one huge batch.
                given["internal_batch_size"] = len(ones)
            tool = self.attribution(scored, **self.given(self.attribution.__init__))
            if "feature_mask" not in names:
                found = tool.attribute(ones, **given)
            else:
                # A gate moves from `low` to 1, so a linear model would change by the gradient times 1 - low.
                slope = self._slope(scored, ones, batch.index) * (1 - low)
                mask = self._mask(slope, sizes)
                found = tool.attribute(ones, feature_mask=mask[None], **given)
                found = _shared_out(found.float(), slope, mask)
        return found.detach(), incompleteness(found.detach(), difference)

    def _slope(self, scored: Callable[..., Tensor], ones: Tensor, index: Tensor) -> Tensor:
        """Returns the gradient of each sample's log probability by its gates, at gates of 1, (samples, units)."""
        ones = ones.clone().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(scored(ones, index).sum(), ones)[0]

    def _mask(self, slope: Tensor, sizes: list[int]) -> Tensor:
        """Groups units with similar gradients into features.

        Args:
            slope: Gradients (samples, units).
            sizes: The number of units of each site.

        Returns:
            The feature of each unit, int64 (units,). Features are numbered through all sites.
        """
        counts = self._counts(sizes)
        # `accumulate` gives the first feature of each site, and one number more at the end: hence not strict.
        parts = zip(slope.mean(0).split(sizes), sizes, counts, accumulate(counts, initial=0), strict=False)
        # The second argsort turns the order into the rank of each unit, 0 to size - 1.
        return torch.cat([first + part.argsort().argsort() * n // size for part, size, n, first in parts])


def _shared_out(found: Tensor, slope: Tensor, mask: Tensor) -> Tensor:
    """Divides the attribution of each feature among its units.

    Args:
        found: Attributions (samples, units), where each unit has the whole attribution of its feature.
        slope: Gradients (samples, units).
        mask: The feature of each unit, int64 (units,).

    Returns:
        Attributions (samples, units). Those of the units of a feature add up to the attribution of the feature.
    """
    units = mask.bincount()
    mean = torch.zeros(len(slope), len(units), device=slope.device).index_add_(1, mask, slope) / units
    return found / units[mask] + slope - mean[:, mask]

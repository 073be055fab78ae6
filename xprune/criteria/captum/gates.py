"""Criteria that attribute the log probability of a sample's own class to gates.

Captum explains a function of its inputs. Here, the inputs are the gates, and the function returns the log probability.
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
"""For each perturbation method, a function that returns the number of forward passes for a batch.

The arguments of the function are the number of features and the criterion.
"""
MOST = 100_000
"""The largest allowed number of forward passes for a batch. Settings that need more are refused."""


@dataclass(frozen=True)
class GateMethod(CaptumMethod):
    """Attributions of the log probability of a sample's own class to the gates of the units.

    The attributions explain the difference between a model with gates of 1 and a model with gates of `baseline`.
    Methods that need a baseline have a field `baseline`. Its default is 0, which is the same as removed units.

    Methods that need a forward pass for each feature have a field `groups`, the largest number of features of a site.
    If a site has more units than that, units with similar gradients form one feature together. The attribution of a
    unit is then an equal part of the attribution of its feature, plus the difference between the unit's gradient and
    the mean gradient of the feature. If `groups` is None, each unit is a feature.
    """

    def passes(self, sites: Sequence[Site]) -> int:
        """Returns the number of forward passes for one batch, of a perturbation method or of a method with `n_steps`.

        It is 0 for other methods.

        Raises:
            PluginError: The number is larger than `MOST`. Or the method is KernelShap, and the number is too small for
                its linear model.
        """
        features = sum(self._counts([site.size for site in sites]))
        # Each step of a path is a forward and a backward pass, which takes as long as two forward passes.
        of_path = 3 * getattr(self, "n_steps", 0)
        passes = FORWARDS.get(self.attribution.__name__, lambda features, own: of_path)(features, self)
        # KernelShap fits a linear model with a coefficient for each feature, so it needs more samples than features.
        few = self.attribution is captum.attr.KernelShap and passes < features + 2
        if few or passes > MOST:
            why = f"are too few for {features} features" if few else f"a batch for {features} features are too many"
            advice = " (fewer) or n_samples (twice the features)" if few else " or n_samples (fewer)"
            raise PluginError(
                f"{self.name}: {passes} forward passes {why}. Score heads only (find_sites(..., units=('head',))), "
                f"or change groups{advice}."
            )
        return passes

    def _counts(self, sizes: Sequence[int]) -> list[int]:
        """Returns the number of features of each site. A feature is a unit or a group of units, see `GateMethod`.

        Args:
            sizes: The number of units of each site.
        """
        return [min(getattr(self, "groups", None) or size, size) for size in sizes]

    def attributions(self, batch: Batch, sites: Sequence[Site]) -> tuple[Tensor, Tensor]:
        """Computes the attributions to the gates of all sites. See `CaptumMethod.attributions`."""
        gates, sizes = Gates(sites, rows=batch.task.rows), [site.size for site in sites]
        low = getattr(self, "baseline", 0.0)
        ones = torch.ones(len(batch.index), sum(sizes), device=batch.index.device)

        def scored(values: Tensor, index: Tensor) -> Tensor:
            """Returns the log probabilities of samples with the gates that Captum chooses, one row for a sample."""
            gates.values = values.split(sizes, dim=1)
            return batch.scores(index)

        with gates.attached(batch.context.model):
            with torch.no_grad():
                difference = scored(ones, batch.index) - scored(low * ones, batch.index)
            if not bool(torch.isfinite(difference).all()):
                raise TrainingError(
                    f"{self.name}: the model's outputs for a batch are not finite. Check the weights and the inputs."
                )
            given: dict[str, Any] = {"additional_forward_args": batch.index, **self.given(self.attribution.attribute)}
            names = signature(self.attribution.attribute).parameters
            if "baselines" in names:
                # GradientShap chooses at random from several baselines. It expects a tensor with one row for each of
                # them.
                given["baselines"] = low * ones[:1] if self.attribution is captum.attr.GradientShap else low
            if "internal_batch_size" in names:
                # Without this argument, Captum runs all points of the integration path as one large batch.
                given["internal_batch_size"] = len(ones)
            tool = self.attribution(scored, **self.given(self.attribution.__init__))
            if "feature_mask" not in names:
                found = tool.attribute(ones, **given)
            else:
                # A gate changes from `low` to 1. To first order, the log probability then changes by the gradient times
                # 1 - low.
                slope = self._slope(scored, ones, batch.index) * (1 - low)
                mask = self._mask(slope, sizes)
                found = tool.attribute(ones, feature_mask=mask[None], **given)
                found = _shared_out(found.float(), slope, mask)
        return found.detach(), incompleteness(found.detach(), difference)

    def _slope(self, scored: Callable[..., Tensor], ones: Tensor, index: Tensor) -> Tensor:
        """Returns the gradient of each sample's log probability with respect to gates of 1, (samples, units)."""
        ones = ones.clone().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(scored(ones, index).sum(), ones)[0]

    def _mask(self, slope: Tensor, sizes: list[int]) -> Tensor:
        """Groups units with similar gradients into features.

        Args:
            slope: The gradients, (samples, units).
            sizes: The number of units of each site.

        Returns:
            The index of the feature of each unit, int64 (units,). No two sites share a feature.
        """
        counts = self._counts(sizes)
        # `accumulate` returns the first feature of each site, and one more number at the end. So `strict` is False.
        parts = zip(slope.mean(0).split(sizes), sizes, counts, accumulate(counts, initial=0), strict=False)
        # Two calls of argsort give the rank of each unit in its site, from 0 to size - 1.
        return torch.cat([first + part.argsort().argsort() * n // size for part, size, n, first in parts])


def _shared_out(found: Tensor, slope: Tensor, mask: Tensor) -> Tensor:
    """Distributes the attribution of each feature over its units.

    Args:
        found: The attributions, (samples, units). Each unit has the whole attribution of its feature.
        slope: The gradients, (samples, units).
        mask: The index of the feature of each unit, int64 (units,).

    Returns:
        The attributions of the units, (samples, units). The attributions of the units of one feature add up to the
        attribution of the feature.
    """
    units = mask.bincount()
    mean = torch.zeros(len(slope), len(units), device=slope.device).index_add_(1, mask, slope) / units
    return found / units[mask] + slope - mean[:, mask]

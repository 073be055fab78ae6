"""Criteria that attribute the log probability of a sample's own class to the inputs of consumers."""

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from xprune.core.interfaces import Context
from xprune.core.site import Site
from xprune.criteria.captum.base import Batch, CaptumMethod
from xprune.errors import DataError
from xprune.surgery.gates import Gates


@dataclass(frozen=True)
class LayerMethod(CaptumMethod):
    """Attributions of the log probability of a sample's own class to the input of each consumer.

    The attribution of a unit is the sum over its features and over all tokens. Methods that need a baseline have a
    field `baseline`. The baseline is an input of the model in which every entry has this value.

    The attributions of all layers do not add up to the log probability, because a part of the information passes by a
    layer, in the residual stream. So these methods have no completeness error.
    """

    def passes(self, sites: Sequence[Site]) -> int:
        """Returns the number of forward passes for one batch: the steps of the method times the number of consumers.

        It is 0 if the method has no steps.
        """
        return getattr(self, "n_steps", 0) * sum(len(site.consumers) for site in sites)

    def attributions(self, batch: Batch, sites: Sequence[Site]) -> tuple[Tensor, Tensor]:
        """Computes the attributions to the inputs of the consumers of all sites. See `CaptumMethod.attributions`.

        Raises:
            DataError: An input of the model is not a float tensor. Captum needs gradients with respect to the inputs.
        """
        if not batch.has_classes:
            raise DataError(
                f"{self.name} explains the logits of classes, and {type(batch.task).__name__} has no classes. Use a "
                "criterion that explains gates, such as captum:IntegratedGradients."
            )
        inputs = batch.inputs if isinstance(batch.inputs, tuple) else (batch.inputs,)
        if not all(isinstance(each, Tensor) and each.is_floating_point() for each in inputs):
            raise DataError(
                f"{self.name} needs float tensors as inputs of the model. Use a criterion that explains gates, such as "
                "captum:IntegratedGradients."
            )
        scored = _ClassScores(batch.context, len(inputs) > 1)
        names = signature(self.attribution.attribute).parameters
        given: dict[str, Any] = {"attribute_to_layer_input": True, **self.given(self.attribution.attribute)}
        if "target" in names:
            given["target"] = batch.classes
        if "baselines" in names:
            given["baselines"] = tuple(torch.full_like(each, self.baseline) for each in inputs)  # type: ignore[attr-defined]
        if "internal_batch_size" in names:
            given["internal_batch_size"] = len(batch.index)
        gates, columns = Gates(sites, rows=batch.task.rows), []
        # The gates keep the value 1. They are attached because some modules, such as torch's attention, compute their
        # output projection without calling it as a module. While gates are attached, such a module has a forward that
        # calls it.
        with gates.attached(batch.context.model):
            for site in sites:
                total = torch.zeros(len(batch.index), site.size, device=batch.index.device)
                for path, axis in zip(site.consumers, site.axes, strict=True):
                    layer = batch.context.model.get_submodule(path)
                    tool = self.attribution(scored, layer, **self.given(self.attribution.__init__))
                    found = tool.attribute(inputs, **given)
                    # The input of a layer may be a tuple. The first entry of the tuple holds the units.
                    found = found[0] if isinstance(found, tuple) else found
                    total += _by_unit(site, axis, found.detach().float(), gates, len(batch.index))
                columns.append(total)
        # The second tensor is the completeness error, which does not exist for these methods.
        return torch.cat(columns, dim=1), torch.zeros(len(batch.index), device=batch.index.device)


class _ClassScores(nn.Module):
    """A module that returns the log probabilities of all classes, (samples, classes).

    Some methods of Captum need a module and do not accept a function.
    """

    def __init__(self, context: Context, several: bool) -> None:
        super().__init__()
        self.model, self.task, self.several = context.model, context.task, several

    def forward(self, *inputs: Tensor) -> Tensor:
        """Runs the model on its inputs, which Captum passes as separate arguments. Returns the log probabilities."""
        logs: Tensor = self.task.forward(self.model, inputs if self.several else inputs[0]).float().log_softmax(-1)
        return logs


def _by_unit(site: Site, axis: int, found: Tensor, gates: Gates, samples: int) -> Tensor:
    """Sums the attributions to a layer's input over the tokens and over the features of each unit.

    Args:
        site: The site of the units.
        axis: The feature axis of the layer's input.
        found: The attributions, in the shape of the layer's input.
        gates: The gates of all sites. They know which sample each row of the input belongs to.
        samples: The number of samples.

    Returns:
        The attributions of the units, (samples, units).
    """
    # There may be more rows than samples. For example, each window of an image is a row in a Swin attention.
    rows = gates._rows(site, found, samples)
    flat = found.movedim(axis, -1).reshape(len(found), -1, site.size * site.width).sum(1)  # (rows, features)
    unit_major = site.layout == "unit-major"
    flat = flat.view(len(flat), *((site.size, site.width) if unit_major else (site.width, site.size)))
    return torch.zeros(samples, site.size, device=found.device).index_add_(0, rows, flat.sum(2 if unit_major else 1))

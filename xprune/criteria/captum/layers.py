"""Captum's attributions to a layer's input, summed over the features and tokens of a unit."""

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
    """Attributions to the input of the layers that units feed, of the log probability of the own class.

    Baselines, where the method has them, are model inputs of `baseline` everywhere. Attributions of different layers
    do not add up to anything: what flows past a layer is not in its share.
    """

    def passes(self, sites: Sequence[Site]) -> int:
        """Of a method that takes steps, at one layer after the other."""
        return getattr(self, "n_steps", 0) * sum(len(site.consumers) for site in sites)

    def attributions(self, batch: Batch, sites: Sequence[Site]) -> tuple[Tensor, Tensor]:
        """Captum's attributions to the layers of all sites, (samples, units)."""
        inputs = batch.inputs if isinstance(batch.inputs, tuple) else (batch.inputs,)
        if not all(isinstance(each, Tensor) and each.is_floating_point() for each in inputs):
            raise DataError(f"{self.name} wants float tensors as inputs of the model; use a method over gates instead.")
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
        with gates.attached(batch.context.model):  # gives modules the forward that calls the layer
            for site in sites:
                total = torch.zeros(len(batch.index), site.size, device=batch.index.device)
                for path, axis in zip(site.consumers, site.axes, strict=True):
                    layer = batch.context.model.get_submodule(path)
                    tool = self.attribution(scored, layer, **self.given(self.attribution.__init__))
                    found = tool.attribute(inputs, **given)
                    found = found[0] if isinstance(found, tuple) else found
                    total += _by_unit(site, axis, found.detach().float(), gates, len(batch.index))
                columns.append(total)
        return torch.cat(columns, dim=1), torch.zeros(len(batch.index), device=batch.index.device)


class _ClassScores(nn.Module):
    """Inputs -> log probabilities (samples, classes): some of Captum's methods want a module."""

    def __init__(self, context: Context, several: bool) -> None:
        super().__init__()
        self.model, self.task, self.several = context.model, context.task, several

    def forward(self, *inputs: Tensor) -> Tensor:
        logs: Tensor = self.task.forward(self.model, inputs if self.several else inputs[0]).float().log_softmax(-1)
        return logs


def _by_unit(site: Site, axis: int, found: Tensor, gates: Gates, samples: int) -> Tensor:
    """Attributions as the layer's input has them -> (samples, units)."""
    rows = gates._rows(site, found, samples)
    flat = found.movedim(axis, -1).reshape(len(found), -1, site.size * site.width).sum(1)  # (rows, features)
    unit_major = site.layout == "unit-major"
    flat = flat.view(len(flat), *((site.size, site.width) if unit_major else (site.width, site.size)))
    return torch.zeros(samples, site.size, device=found.device).index_add_(0, rows, flat.sum(2 if unit_major else 1))

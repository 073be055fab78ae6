"""The resource "macs": multiply-accumulates, counted on the real forward."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from xprune.core.resource import Resource
from xprune.costs.count import macs_by_module


class Macs(Resource):
    """Multiply-accumulates of a forward pass of one sample, attention products included.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
        >>> Macs().by_module(model, torch.randn(3, 4), samples=3)
        {'': 36.0, '0': 24.0, '1': 12.0}
    """

    name = "macs"
    label = "MACs"

    def by_module(self, model: nn.Module, example_inputs: Any, samples: int) -> Mapping[str, float]:
        """Counts the MACs of one sample. See Resource.by_module."""
        return macs_by_module(model, example_inputs, samples)

    def of_tensor(self, by_module: Mapping[str, float], path: str, tensor: Tensor | None) -> float:
        """Returns the MACs of the tensor's layer: all of them are products with this tensor. See Resource.of_tensor."""
        return by_module.get(path.rpartition(".")[0], 0.0)

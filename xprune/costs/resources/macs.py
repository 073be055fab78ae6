"""The resource "macs": the multiply-accumulate operations of a forward pass."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from xprune.core.resource import Resource
from xprune.costs.count import macs_by_module


class Macs(Resource):
    """The multiply-accumulate operations of a forward pass of one sample. The products inside attentions count too.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
        >>> Macs().by_module(model, torch.randn(3, 4), samples=3)
        {'': 36.0, '0': 24.0, '1': 12.0}
    """

    name = "macs"
    label = "MACs"

    def by_module(self, model: nn.Module, example_inputs: Any, samples: int) -> Mapping[str, float]:
        """Returns path of a module -> its MACs for one sample. See Resource.by_module."""
        return macs_by_module(model, example_inputs, samples)

    def of_tensor(self, by_module: Mapping[str, float], path: str, tensor: Tensor | None) -> float:
        """Returns the MACs of the layer that the tensor belongs to. See Resource.of_tensor.

        All MACs of such a layer are products with this tensor.
        """
        return by_module.get(path.rpartition(".")[0], 0.0)

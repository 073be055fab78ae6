"""MACs: multiply-accumulates, counted on the real forward."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from xprune.core.resource import Resource
from xprune.costs.count import macs_by_module


class Macs(Resource):
    """Multiply-accumulates of a forward pass of one sample, attention products included."""

    name = "macs"
    label = "MACs"

    def by_module(self, model: nn.Module, example_inputs: Any, samples: int) -> Mapping[str, float]:
        """See Resource.by_module."""
        return macs_by_module(model, example_inputs, samples)

    def of_tensor(self, by_module: Mapping[str, float], path: str, tensor: Tensor | None) -> float:
        """All that the layer of the tensor costs: it multiplies with the tensor and does nothing else."""
        return by_module.get(path.rpartition(".")[0], 0.0)

"""Parameters: what is stored and loaded."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from xprune.core.resource import Resource
from xprune.costs.count import count_params


class Params(Resource):
    """Parameters of the model; what is tied counts once."""

    name = "params"
    label = "parameters"

    def by_module(self, model: nn.Module, example_inputs: Any, samples: int) -> Mapping[str, float]:
        """See Resource.by_module."""
        return {path: count_params(module) for path, module in model.named_modules()}

    def of_tensor(self, by_module: Mapping[str, float], path: str, tensor: Tensor | None) -> float:
        """The entries of the tensor."""
        return 0.0 if tensor is None else tensor.numel()

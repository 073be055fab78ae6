"""The resource "params": the parameters of a model, which are stored and loaded."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from xprune.core.resource import Resource
from xprune.costs.count import count_params
from xprune.modules.part import Part


class Params(Resource):
    """The number of parameters of the model. A tied parameter counts once.

    Example:
        >>> Params().by_module(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)), None, samples=1)
        {'': 44, '0': 30, '1': 14}
    """

    name = "params"
    label = "parameters"

    def by_module(self, model: nn.Module, example_inputs: Any, samples: int) -> Mapping[str, float]:
        """Returns path of a module -> its number of parameters. Inputs and samples are ignored.

        See Resource.by_module.
        """
        return {path: count_params(module) for path, module in model.named_modules()}

    def of_part(self, by_module: Mapping[str, float], model: nn.Module, part: Part) -> float:
        """Returns the number of parameters of a part of a model. See Resource.of_part.

        Two modules of the part may hold the same parameter, which counts once.
        """
        return count_params(nn.ModuleList(model.get_submodule(path) for path in part.outer))

    def of_tensor(self, by_module: Mapping[str, float], path: str, tensor: Tensor | None) -> float:
        """Returns the number of entries of the tensor, or 0 if the tensor was removed. See Resource.of_tensor."""
        return 0.0 if tensor is None else tensor.numel()

"""Removed: what is left of an attention or MLP whose units have all gone."""

from typing import Any

from torch import Tensor, nn


class Removed(nn.Module):
    """What is left of an attention or MLP whose units all went: the bias of its last layer, for every token."""

    bias: nn.Parameter | None

    def __init__(self, layer: Any, module: nn.Module | None = None) -> None:
        super().__init__()
        self.out_features = int(layer.weight.shape[0]) if layer.bias is None else len(layer.bias)
        self.axis = -1 if layer.weight.dim() == 2 else 1  # a linear layer, or a convolution
        self.register_parameter("bias", layer.bias)

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """(batch, ..., features) to (batch, ..., out_features); whatever else an attention takes is ignored."""
        shape = list(x.shape)
        shape[self.axis] = self.out_features
        if self.bias is None:
            return x.new_zeros(shape)
        return (self.bias if self.axis == -1 else self.bias[:, None, None]).to(x.dtype).expand(shape)

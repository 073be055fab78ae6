"""The module that replaces an attention or MLP that lost all its units."""

from typing import Any

from torch import Tensor, nn


class Removed(nn.Module):
    """Replaces an attention or MLP that lost all its units. Returns the bias of its last layer for every token.

    Without units the input of the last layer is all zeros, so its output is the bias.

    Args:
        layer: The last layer of the module, the consumer of the units: linear, or a convolution.
        module: The module that is replaced. It is not used. Replacement classes of adapters take it too.

    Example:
        >>> import torch
        >>> Removed(nn.Linear(16, 8))(torch.zeros(2, 5, 12)).shape
        torch.Size([2, 5, 8])
    """

    bias: nn.Parameter | None

    def __init__(self, layer: Any, module: nn.Module | None = None) -> None:
        super().__init__()
        # The bias comes first: the weight of transformers' Conv1D is (in, out), so its first axis is not the output.
        self.out_features = int(layer.weight.shape[0]) if layer.bias is None else len(layer.bias)
        # Features come last for a linear layer, and second for a convolution.
        self.axis = -1 if layer.weight.dim() == 2 else 1
        self.register_parameter("bias", layer.bias)

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Maps (batch, ..., features) to (batch, ..., out_features), or (batch, features, height, width) accordingly.

        Further arguments, such as a mask, are ignored.
        """
        shape = list(x.shape)
        shape[self.axis] = self.out_features
        if self.bias is None:
            return x.new_zeros(shape)
        return (self.bias if self.axis == -1 else self.bias[:, None, None]).to(x.dtype).expand(shape)

"""The module that replaces an attention or MLP of which all units were removed."""

from typing import Any

from torch import Tensor, nn


class Removed(nn.Module):
    """Replaces an attention or MLP of which all units were removed. Returns the bias of its last layer for every token.

    Without units, the input of the last layer would be all zeros. So the output of the last layer would be its bias.

    Args:
        layer: The last layer of the replaced module, which is the consumer of its units: a linear layer or a
            convolution.
        module: The replaced module. This class does not use it. An adapter's own replacement class may need it, and
            gets the same arguments.

    Example:
        >>> import torch
        >>> Removed(nn.Linear(16, 8))(torch.zeros(2, 5, 12)).shape
        torch.Size([2, 5, 8])
    """

    bias: nn.Parameter | None

    def __init__(self, layer: Any, module: nn.Module | None = None) -> None:
        super().__init__()
        # The length of the bias is preferred to the shape of the weight. The weight of transformers' Conv1D is
        # (in, out), so its first axis is not the number of outputs.
        self.out_features = int(layer.weight.shape[0]) if layer.bias is None else len(layer.bias)
        # The features are the last axis for a linear layer, and axis 1 for a convolution.
        self.axis = -1 if layer.weight.dim() == 2 else 1
        # In the output of a convolution, the axes of the positions follow that of the features.
        self.positions = layer.weight.dim() - 2
        self.register_parameter("bias", layer.bias)

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Returns the bias for every token or position of `x`.

        Args:
            x: The input of the replaced module: (batch, ..., features) if its last layer is linear,
                (batch, features, height, width) if it is a convolution.
            *args: Further arguments of the replaced module, such as a mask. They are ignored.
            **kwargs: Further keyword arguments. They are ignored.

        Returns:
            A tensor of the same shape, except that the feature axis has `out_features` entries. It is all zeros if the
            layer has no bias.
        """
        shape = list(x.shape)
        shape[self.axis] = self.out_features
        if self.bias is None:
            return x.new_zeros(shape)
        return self.bias.view(-1, *[1] * self.positions).to(x.dtype).expand(shape)

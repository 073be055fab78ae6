"""Says which operations between layers do not mix features, by the names of their autograd nodes.

Hidden features can only be cut exactly if each feature is treated separately until the next layer reads it. An
activation does that. A softmax over the features mixes them. torch-pruning takes every operation that it does not know
for an elementwise one, so xprune has a list of its own. Any operation that is not on the list is taken to mix features.
"""

import re
from typing import Any

from xprune.modules.torch_private import saved_dim, saved_input, saved_sizes

_NUMBERS = """
Abs Acos Add Addcdiv Addcmul Asin Atan Celu Clamp ClampMax ClampMin Clone Cos Cosh Div Elu Erf Erfc Exp Exp2 Expm1 Fmod
Gelu Hardshrink Hardsigmoid Hardswish Hardtanh LeakyRelu Lerp Log Log10 Log1P Log2 LogSigmoid LogSigmoidForward
MaskedFill Maximum Minimum Mish Mul NanToNum NativeDropout Neg Pow Prelu PreluKernel Reciprocal Relu RreluWithNoise
Rsqrt Rsub Sigmoid Sign Silu Sin Sinh Softplus Softshrink Sqrt Sub Tan Tanh Threshold ToCopy Where Xlogy
"""
"""Elementwise operations: each number of the result depends on one number of each input."""

_POOLS = frozenset(("AdaptiveAvgPool2D", "AdaptiveMaxPool2D", "AvgPool2D", "MaxPool2DWithIndices"))
"""Pooling over feature maps. It does not mix features if they are the channels, along axis 1."""

_MAPS = """
CudnnBatchNorm NativeBatchNorm UpsampleBicubic2D UpsampleBicubic2DAa UpsampleBilinear2D UpsampleBilinear2DAa
UpsampleNearest2D UpsampleNearestExact2D
"""
"""Operations that treat the feature map of each channel separately."""

_ROWS = "IndexAdd IndexSelect ScatterAdd"
"""Operations that select or add up rows, which are tokens, or nodes of a graph."""

_MOVES = "Alias MovedimInt Permute ReshapeAlias Squeeze T Transpose UnsafeView Unsqueeze View"
"""Operations that move numbers in a tensor without changing the numbers."""

KEEP_APART = frozenset(f"{_NUMBERS} {_MAPS} {_ROWS} {_MOVES}".split())
"""Names of operations that do not mix features. Some of them can still mix features, such as a view that splits them.

So a site is proved before it is used.
"""

PRODUCTS = frozenset(("Addmm", "Mm"))
"""The matrix products inside linear layers. Outside of a linear layer, such a product mixes features."""

_ENDS = ("Bmm", "ScaledDotProduct", "Softmax", "Mean", "Sum")
"""Beginnings of the names of operations in attentions and pooling. A hidden layer ends at such an operation."""


def name_of(node: Any) -> str:
    """Returns the name of the operation that an autograd node computes the gradient of.

    Args:
        node: The node, such as the `grad_fn` of a tensor.

    Returns:
        The name without "Backward" and its number: "Gelu" for GeluBackward0. For a torch.autograd.Function, the name of
        its class.

    Example:
        >>> import torch
        >>> name_of(torch.ones(2, requires_grad=True).exp().grad_fn)
        'Exp'
    """
    name = node.name() if hasattr(node, "name") else type(node).__name__
    # The names of functions written in C++ begin with a namespace: "torch::autograd::CopySlices".
    return re.sub(r"Backward\w*$", "", str(name).rpartition("::")[2])


def keeps_apart(node: Any, features: int) -> bool:
    """Returns True if an operation is known not to mix features, else False.

    Args:
        node: The autograd node of the operation.
        features: The number of features. In operations over feature maps, it has to be the number of channels.

    Example:
        >>> import torch
        >>> x = torch.ones(3, 4, requires_grad=True)
        >>> keeps_apart(x.relu().grad_fn, 4), keeps_apart(x.softmax(-1).grad_fn, 4)
        (True, False)
    """
    name = name_of(node)
    if name in _POOLS:
        return _map_shape(node)[1:2] == [features]
    return name in KEEP_APART or _is_mean_over_map(node, features)


def ends(node: Any) -> bool:
    """Returns True for operations of attentions and pooling. After them, the features are other ones than before."""
    return name_of(node).startswith(_ENDS) and not _is_mean_over_map(node, None)


def _is_mean_over_map(node: Any, features: int | None) -> bool:
    """Returns True for a mean over height and width, which does not mix channels. Else False.

    Args:
        node: The autograd node of the operation.
        features: The number of channels that the feature map has to have. If None, any number is allowed.
    """
    dims, shape = saved_dim(node), _map_shape(node)
    if type(node).__name__ != "MeanBackward1" or dims is None or len(shape) != 4 or features not in (None, shape[1]):
        return False
    # Autograd stores a negative axis as an unsigned 64-bit number: -1 is 2**64 - 1.
    return {dim - 2**64 if dim >= 2**63 else dim for dim in dims} <= {2, 3, -1, -2}


def _map_shape(node: Any) -> list[int]:
    """Returns the input shape of an operation, or [] if its autograd node does not hold the shape."""
    # Some autograd nodes save the shape only, others save the whole input.
    sizes = saved_sizes(node)
    sizes = getattr(saved_input(node), "shape", ()) if sizes is None else sizes
    return [int(size) for size in sizes]

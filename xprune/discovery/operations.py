"""Says which operations between layers keep features apart, by the names of their autograd nodes.

A cut of hidden features is exact only if each feature is treated without regard to the others until the next layer
reads it. An activation does that, a softmax over the features does not. torch-pruning takes every operation that it
does not know for an elementwise one, so xprune has a list. Any operation that is not on it counts as mixing.
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
"""Pooling over maps. It keeps features apart only if they lie along the channel axis."""

_MAPS = """
CudnnBatchNorm NativeBatchNorm UpsampleBicubic2D UpsampleBicubic2DAa UpsampleBilinear2D UpsampleBilinear2DAa
UpsampleNearest2D UpsampleNearestExact2D
"""
"""Operations that work on the map of each channel."""

_ROWS = "IndexAdd IndexSelect ScatterAdd"
"""Operations that choose or add rows, which are tokens or nodes of a graph."""

_MOVES = "Alias MovedimInt Permute ReshapeAlias Squeeze T Transpose UnsafeView Unsqueeze View"
"""Operations that move numbers without changing them."""

KEEP_APART = frozenset(f"{_NUMBERS} {_MAPS} {_ROWS} {_MOVES}".split())
"""Names of operations that keep features apart. Some can still mix them, such as a view that splits features.

A site is therefore proved before it is used.
"""

PRODUCTS = frozenset(("Addmm", "Mm"))
"""The matrix products that linear layers run. Outside of a linear layer, they mix features."""

_ENDS = ("Bmm", "ScaledDotProduct", "Softmax", "Mean", "Sum")
"""Beginnings of the names of attention and pooling operations, at which a hidden layer ends."""


def name_of(node: Any) -> str:
    """Returns the name of the operation that an autograd node belongs to.

    Args:
        node: The node, such as the `grad_fn` of a tensor.

    Returns:
        "Gelu" for GeluBackward0. For a torch.autograd.Function, the name of its class.

    Example:
        >>> import torch
        >>> name_of(torch.ones(2, requires_grad=True).exp().grad_fn)
        'Exp'
    """
    name = node.name() if hasattr(node, "name") else type(node).__name__
    # Functions written in C++ have a namespace in front: "torch::autograd::CopySlices".
    return re.sub(r"Backward\w*$", "", str(name).rpartition("::")[2])


def keeps_apart(node: Any, features: int) -> bool:
    """Returns True if an operation is known to treat each feature without regard to the others.

    Args:
        node: The autograd node of the operation.
        features: The number of features. For operations over maps, the features have to be the channels.

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
    """Returns True for attention and pooling: the features behind them are others than before."""
    return name_of(node).startswith(_ENDS) and not _is_mean_over_map(node, None)


def _is_mean_over_map(node: Any, features: int | None) -> bool:
    """Returns True for a mean over height and width, which keeps channels apart.

    Args:
        node: The autograd node of the operation.
        features: The number of channels that the map has to have. None allows any number.
    """
    dims, shape = saved_dim(node), _map_shape(node)
    if type(node).__name__ != "MeanBackward1" or dims is None or len(shape) != 4 or features not in (None, shape[1]):
        return False
    # Autograd stores a negative axis as an unsigned 64-bit number: -1 is 2**64 - 1.
    return {dim - 2**64 if dim >= 2**63 else dim for dim in dims} <= {2, 3, -1, -2}


def _map_shape(node: Any) -> list[int]:
    """Returns the input shape of an operation, or [] if its autograd node does not hold it."""
    # Some nodes save the shape alone, others the whole input.
    sizes = saved_sizes(node)
    sizes = getattr(saved_input(node), "shape", ()) if sizes is None else sizes
    return [int(size) for size in sizes]

"""Operations between layers: which of them treat each feature by itself, by the names of their autograd nodes."""

import re
from typing import Any

from xprune.modules.torch_private import saved_dim, saved_input, saved_sizes

_NUMBERS = """
Abs Acos Add Addcdiv Addcmul Asin Atan Celu Clamp ClampMax ClampMin Clone Cos Cosh Div Elu Erf Erfc Exp Exp2 Expm1 Fmod
Gelu Hardshrink Hardsigmoid Hardswish Hardtanh LeakyRelu Lerp Log Log10 Log1P Log2 LogSigmoid LogSigmoidForward
MaskedFill Maximum Minimum Mish Mul NanToNum NativeDropout Neg Pow Prelu PreluKernel Reciprocal Relu RreluWithNoise
Rsqrt Rsub Sigmoid Sign Silu Sin Sinh Softplus Softshrink Sqrt Sub Tan Tanh Threshold ToCopy Where Xlogy
"""
_POOLS = frozenset(("AdaptiveAvgPool2D", "AdaptiveMaxPool2D", "AvgPool2D", "MaxPool2DWithIndices"))
_MAPS = """
CudnnBatchNorm NativeBatchNorm UpsampleBicubic2D UpsampleBicubic2DAa UpsampleBilinear2D UpsampleBilinear2DAa
UpsampleNearest2D UpsampleNearestExact2D
"""  # of one channel each
_ROWS = "IndexAdd IndexSelect ScatterAdd"  # of tokens, of nodes
_MOVES = "Alias MovedimInt Permute ReshapeAlias Squeeze T Transpose UnsafeView Unsqueeze View"

APART = frozenset(f"{_NUMBERS} {_MAPS} {_ROWS} {_MOVES}".split())
"""Known to keep features apart. What is not in this list counts as mixing them."""

PRODUCTS = frozenset(("Addmm", "Mm"))
"""What linear layers are made of."""

_ENDS = ("Bmm", "ScaledDotProduct", "Softmax", "Mean", "Sum")
"""Attention and pooling, which stand at the ends of hidden layers."""


def name_of(node: Any) -> str:
    """What an autograd node does: "Gelu" of GeluBackward0; a function's own name, where it is somebody's own."""
    name = node.name() if hasattr(node, "name") else type(node).__name__
    return re.sub(r"Backward\w*$", "", str(name).rpartition("::")[2])


def keeps_apart(node: Any, features: int) -> bool:
    """True for an operation that is known to treat each feature by itself.

    Args:
        node: The autograd node of the operation.
        features: Number of features, which have to be the channels of what runs over maps.
    """
    name = name_of(node)
    if name in _POOLS:
        return _map_of(node)[1:2] == [features]
    return name in APART or _mean_over_map(node, features)


def ends(node: Any) -> bool:
    """True for attention and pooling, beyond which there are other features."""
    return name_of(node).startswith(_ENDS) and not _mean_over_map(node, None)


def _mean_over_map(node: Any, features: int | None) -> bool:
    """True for a mean over height and width, which leaves each channel to itself."""
    dims, shape = saved_dim(node), _map_of(node)
    if type(node).__name__ != "MeanBackward1" or dims is None or len(shape) != 4 or features not in (None, shape[1]):
        return False
    return {dim - 2**64 if dim >= 2**63 else dim for dim in dims} <= {2, 3, -1, -2}


def _map_of(node: Any) -> list[int]:
    """The shape of what an operation over maps is given; [] where its node does not tell."""
    sizes = saved_sizes(node)
    sizes = getattr(saved_input(node), "shape", ()) if sizes is None else sizes
    return [int(size) for size in sizes]

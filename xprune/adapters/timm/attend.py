"""Functions that several replacement forwards for timm's attentions share.

timm's forwards work only if heads x head size = hidden size, which is wrong after heads were removed. These functions
read the number of heads from the module and compute the head size from the tensors.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def split(x: Tensor, heads: int, groups: int = 1) -> Any:
    """Splits the output of a projection layer into heads.

    Args:
        x: Tensor (..., tokens, groups * heads * width). The last axis has this order. width is the head size.
        heads: Number of heads.
        groups: Number of tensors that the projection makes: 3 for a fused q, k and v.

    Returns:
        A tuple of `groups` tensors (..., heads, tokens, width).

    Example:
        >>> q, k, v = split(torch.zeros(1, 5, 3 * 2 * 4), heads=2, groups=3)
        >>> q.shape
        torch.Size([1, 2, 5, 4])
    """
    # (..., tokens, groups, heads, width) -> (groups, ..., tokens, heads, width) -> (groups, ..., heads, tokens, width)
    return x.unflatten(-1, (groups, heads, -1)).movedim(-3, 0).transpose(-3, -2).unbind(0)


def merge(x: Tensor) -> Tensor:
    """Concatenates the heads: (..., heads, tokens, width) to (..., tokens, heads * width)."""
    return x.transpose(-3, -2).flatten(-2)


def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, *, causal: bool = False) -> Tensor:
    """Computes attention from q, k and v, with torch's fused function if the module allows it.

    Args:
        module: The attention of timm. Its attributes `attn_drop`, `fused_attn` and `scale` are used if it has them.
        q: Queries (..., heads, targets, width).
        k: Keys (..., heads, sources, width).
        v: Values (..., heads, sources, width).
        bias: Either a boolean mask, True where a target may attend to a source, or a tensor that is added to the
            scores. It broadcasts to (..., heads, targets, sources). None if there is neither.
        causal: True if a target must not attend to later sources, else False. If it is True, `bias` has to be None, as
            in timm.

    Returns:
        The outputs of the heads (..., heads, targets, width).
    """
    drop = getattr(module, "attn_drop", None)  # DaViT has none
    if getattr(module, "fused_attn", True):
        p = drop.p if drop is not None and module.training else 0.0
        # torch scales by 1 / sqrt(width) of the tensors. This width is the head size, as in timm.
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=p, is_causal=causal)
    scores = (q * module.scale) @ k.transpose(-2, -1)
    if causal:  # the lower triangle: each target attends to itself and to earlier sources
        bias = scores.new_ones(scores.shape[-2:]).tril().bool()
    if bias is not None:
        scores = scores + bias if bias.is_floating_point() else scores.masked_fill(~bias, float("-inf"))
    weights = scores.softmax(dim=-1)
    return (weights if drop is None else drop(weights)) @ v


def project(module: Any, x: Tensor) -> Tensor:
    """Applies the layer `proj` to concatenated heads (..., heads * width), and the dropout after it if there is one."""
    out: Tensor = module.proj(x)
    drop = getattr(module, "proj_drop", None)
    return out if drop is None else drop(out)


def keep_heads(x: Tensor | None, index: Sequence[int] | None, axis: int) -> Any:
    """Selects the entries of the remaining heads from a tensor that has entries for all heads of the dense model.

    Args:
        x: A tensor that the model passes to the module, such as a position bias for all blocks. If it is None, the
            function returns None.
        index: Indices of the remaining heads, see `Forwards.built`. None if no head was removed. Then the function
            returns `x`.
        axis: Axis of the heads in `x`.
    """
    return x if x is None or index is None else x.index_select(axis, torch.tensor(index, device=x.device))

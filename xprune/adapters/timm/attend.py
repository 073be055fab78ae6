"""The steps that timm's attentions share, for as many heads as a module has left; nothing assumes the model's width."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def split(x: Tensor, heads: int, groups: int = 1) -> Any:
    """(..., tokens, groups * heads * width) as `groups` tensors (..., heads, tokens, width)."""
    return x.unflatten(-1, (groups, heads, -1)).movedim(-3, 0).transpose(-3, -2).unbind(0)


def merge(x: Tensor) -> Tensor:
    """(..., heads, tokens, width) as (..., tokens, heads * width)."""
    return x.transpose(-3, -2).flatten(-2)


def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, *, causal: bool = False) -> Tensor:
    """Attention (..., heads, tokens, width), fused where `module` has it so; `bias`: mask or addend of scores."""
    drop = getattr(module, "attn_drop", None)
    if getattr(module, "fused_attn", True):
        p = drop.p if drop is not None and module.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=p, is_causal=causal)
    scores = (q * module.scale) @ k.transpose(-2, -1)
    if causal:
        bias = scores.new_ones(scores.shape[-2:]).tril().bool()
    if bias is not None:
        scores = scores + bias if bias.is_floating_point() else scores.masked_fill(~bias, float("-inf"))
    weights = scores.softmax(dim=-1)
    return (weights if drop is None else drop(weights)) @ v


def project(module: Any, x: Tensor) -> Tensor:
    """The consumer and its dropout, on heads side by side."""
    out: Tensor = module.proj(x)
    drop = getattr(module, "proj_drop", None)
    return out if drop is None else drop(out)


def keep_heads(x: Tensor | None, index: Sequence[int] | None, axis: int) -> Any:
    """Of something made for every head that was built, along `axis`, the part of those that are left."""
    return x if x is None or index is None else x.index_select(axis, torch.tensor(index, device=x.device))

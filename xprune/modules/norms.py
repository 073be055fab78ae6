"""Norms over units: which statistics they take, and the same norm with units that count less or not at all."""

from typing import Any

import torch
from torch import Tensor, nn

from xprune.errors import GateError

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
"""The norms with statistics for each channel, so that a channel is cut without a change to the others."""


def over_features(norm: nn.Module) -> bool:
    """True for a norm with one statistic over all features: a LayerNorm, an RMSNorm, or a GroupNorm of one group."""
    one_group = isinstance(norm, nn.GroupNorm) and norm.num_groups == 1
    return isinstance(norm, nn.LayerNorm) or one_group or "rmsnorm" in type(norm).__name__.lower()


def feature_axis(norm: nn.Module) -> int:
    """1 for norms of feature maps, -1 for the others."""
    if type(norm).__name__ == "GlobalResponseNorm":
        return int(norm.channel_dim)  # type: ignore[arg-type]
    return 1 if isinstance(norm, nn.GroupNorm) or "2d" in type(norm).__name__.lower() else -1


def weighted_norm(norm: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """The norm's output with statistics in which feature i counts weight[i] times; float32.

    weight of all ones: the norm itself. weight of 0 and 1: the norm of the features kept, as after their removal.
    """
    if type(norm).__name__ == "GlobalResponseNorm":
        return _weighted_response(norm, x.float(), weight)
    if not over_features(norm):
        raise GateError(
            f"a {type(norm).__name__} runs over the units: only LayerNorm, RMSNorm, GroupNorm of one group and "
            "GlobalResponseNorm are known."
        )
    if not isinstance(norm, (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)):
        return _weighted_scale(norm, x.float(), weight)
    axis, maps = feature_axis(norm), isinstance(norm, nn.GroupNorm)
    x, weight = x.float().movedim(axis, -1), weight.movedim(axis, -1)  # features last
    over = tuple(range(1, x.dim())) if maps else (-1,)  # a GroupNorm's statistics are of all positions too
    weight = weight.expand(len(weight), *x.shape[1:]) if maps else weight
    total = weight.sum(over, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    if isinstance(norm, (nn.LayerNorm, nn.GroupNorm)):
        x = x - (x * weight).sum(over, keepdim=True) / total
    eps = norm.eps if norm.eps is not None else torch.finfo(torch.float32).eps
    x = x * torch.rsqrt((x * x * weight).sum(over, keepdim=True) / total + eps)
    if getattr(norm, "weight", None) is not None:
        x = x * norm.weight
    x = x + norm.bias if getattr(norm, "bias", None) is not None else x  # type: ignore[operator]
    return x.movedim(-1, axis)


def _weighted_scale(norm: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """An RMSNorm of any library, whatever it calls its eps and however it applies its weight.

    norm(s x) / s is the norm of x with s times its root mean square, so that s sets the statistic.
    """
    axis, tiny = feature_axis(norm), 1e-12
    mean = (x * x * weight).sum(axis, keepdim=True) / weight.sum(axis, keepdim=True).clamp_min(tiny)
    scale = ((mean + tiny) / (x.square().mean(axis, keepdim=True) + tiny)).sqrt()
    made: Tensor = norm.forward(x * scale) / scale  # not its hooks, which led here
    return made


def _weighted_response(norm: Any, x: Tensor, weight: Tensor) -> Tensor:
    """Global response normalisation (ConvNeXt V2, Woo et al., CVPR 2023) its mean weighted by channel."""
    axis, total = norm.channel_dim, weight.sum(norm.channel_dim, keepdim=True)
    size = x.norm(p=2, dim=norm.spatial_dim, keepdim=True)  # of each channel over the map
    mean = (size * weight).sum(axis, keepdim=True) / total.clamp_min(torch.finfo(torch.float32).tiny)
    scale, shift = norm.weight.view(norm.wb_shape), norm.bias.view(norm.wb_shape)
    return x + torch.addcmul(shift, scale, x * (size / (mean + norm.eps)))

"""Computes norm layers as if some of their input features were removed. Gates use it for norm layers over units."""

from typing import Any

import torch
from torch import Tensor, nn

from xprune.errors import GateError

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
"""The classes of norms that have statistics for each channel. Cutting a channel does not change the other channels."""


def is_feature_norm(norm: nn.Module) -> bool:
    """Returns True if a norm layer computes one statistic over all features, else False.

    That is the case for LayerNorm, RMSNorm, and GroupNorm with one group.
    """
    one_group = isinstance(norm, nn.GroupNorm) and norm.num_groups == 1
    # The RMSNorm classes of different libraries have no common base class. So they are recognised by name.
    return isinstance(norm, nn.LayerNorm) or one_group or "rmsnorm" in type(norm).__name__.lower()


def feature_axis(norm: nn.Module) -> int:
    """Returns the axis of the features in the input of a norm layer: 1 for norm layers of feature maps, else -1."""
    if type(norm).__name__ == "GlobalResponseNorm":
        return int(norm.channel_dim)  # type: ignore[arg-type]
    return 1 if isinstance(norm, nn.GroupNorm) or "2d" in type(norm).__name__.lower() else -1


def weighted_norm(norm: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """Computes a norm layer with statistics in which feature i counts weight[i] times.

    If all weights are 1, the result is that of the norm layer itself. If some weights are 0 and the rest are 1, the
    statistics are those of the norm layer after the features with weight 0 were removed. Weights between 0 and 1 are
    gates that are being learned.

    Args:
        norm: The norm layer.
        x: The input of the norm layer.
        weight: The weights. The tensor has as many axes as `x`. The feature axis has one entry for each feature. The
            sample axis has one entry, or one entry for each row. All other axes have the length 1.

    Returns:
        The output of the norm layer, float32, in the shape of `x`.

    Raises:
        GateError: The class of the norm layer is not known.
    """
    if type(norm).__name__ == "GlobalResponseNorm":
        return _weighted_response(norm, x.float(), weight)
    if not is_feature_norm(norm):
        raise GateError(
            f"a {type(norm).__name__} normalises over the units, and gates do not know this class. They know "
            "LayerNorm, RMSNorm, GroupNorm with one group, and GlobalResponseNorm. Leave the site out: "
            "find_sites(..., exclude=[...])."
        )
    if not isinstance(norm, (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)):
        return _weighted_scale(norm, x.float(), weight)
    axis, maps = feature_axis(norm), isinstance(norm, nn.GroupNorm)
    # From here on, the last axis holds the features.
    x, weight = x.float().movedim(axis, -1), weight.movedim(axis, -1)
    # A GroupNorm computes its statistics over all features and all positions of a sample.
    over = tuple(range(1, x.dim())) if maps else (-1,)
    weight = weight.expand(len(weight), *x.shape[1:]) if maps else weight
    # If no feature is kept, the divisor must not be 0. Then the result is 0 and not NaN.
    total = weight.sum(over, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    # RMSNorm does not subtract the mean.
    if isinstance(norm, (nn.LayerNorm, nn.GroupNorm)):
        x = x - (x * weight).sum(over, keepdim=True) / total
    # In torch's RMSNorm, eps=None means the machine epsilon of the dtype.
    eps = norm.eps if norm.eps is not None else torch.finfo(torch.float32).eps
    x = x * torch.rsqrt((x * x * weight).sum(over, keepdim=True) / total + eps)
    if getattr(norm, "weight", None) is not None:
        x = x * norm.weight
    x = x + norm.bias if getattr(norm, "bias", None) is not None else x  # type: ignore[operator]
    return x.movedim(-1, axis)


def _weighted_scale(norm: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """Computes a weighted RMSNorm of any library. It does not need to know the attribute that holds eps.

    If the input of an RMSNorm is multiplied by s and the output is divided by s, the result is x / (s * RMS(x)), where
    RMS is the root mean square. We choose s = weighted RMS / RMS. The result is then x / weighted RMS.
    """
    axis, tiny = feature_axis(norm), 1e-12
    mean = (x * x * weight).sum(axis, keepdim=True) / weight.sum(axis, keepdim=True).clamp_min(tiny)
    scale = ((mean + tiny) / (x.square().mean(axis, keepdim=True) + tiny)).sqrt()
    # `forward` is called directly because a call of `norm` would run its hooks, and one of these hooks calls this
    # function.
    output: Tensor = norm.forward(x * scale) / scale
    return output


def _weighted_response(norm: Any, x: Tensor, weight: Tensor) -> Tensor:
    """Computes timm's GlobalResponseNorm with a weighted mean over the channels.

    Global response normalisation is from Woo et al., ConvNeXt V2, CVPR 2023.
    """
    axis, total = norm.channel_dim, weight.sum(norm.channel_dim, keepdim=True)
    # The L2 norm of each channel over the feature map.
    size = x.norm(p=2, dim=norm.spatial_dim, keepdim=True)
    mean = (size * weight).sum(axis, keepdim=True) / total.clamp_min(torch.finfo(torch.float32).tiny)
    scale, shift = norm.weight.view(norm.wb_shape), norm.bias.view(norm.wb_shape)
    return x + torch.addcmul(shift, scale, x * (size / (mean + norm.eps)))

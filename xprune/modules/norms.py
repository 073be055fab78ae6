"""Norms that run over units: which statistics they take, and how they are computed when some features count less."""

from typing import Any

import torch
from torch import Tensor, nn

from xprune.errors import GateError

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
"""The classes of norms that have statistics for each channel. Cutting a channel does not change the other channels."""


def is_feature_norm(norm: nn.Module) -> bool:
    """Returns True for a norm with one statistic over all features: LayerNorm, RMSNorm, or GroupNorm with one group."""
    one_group = isinstance(norm, nn.GroupNorm) and norm.num_groups == 1
    # Libraries have RMSNorm classes without a common base class, so the name decides.
    return isinstance(norm, nn.LayerNorm) or one_group or "rmsnorm" in type(norm).__name__.lower()


def feature_axis(norm: nn.Module) -> int:
    """Returns the axis of the features in the norm's input: 1 for norms of feature maps, -1 for the others."""
    if type(norm).__name__ == "GlobalResponseNorm":
        return int(norm.channel_dim)  # type: ignore[arg-type]
    return 1 if isinstance(norm, nn.GroupNorm) or "2d" in type(norm).__name__.lower() else -1


def weighted_norm(norm: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """Computes a norm whose statistics count feature i weight[i] times.

    With all weights 1 it is the norm itself. With weights 0 and 1 it is the norm over the kept features, as after the
    removal of the others. Weights in between are gates that are being learned.

    Args:
        norm: The norm.
        x: Its input.
        weight: The weight of each feature, with as many axes as `x`. Along the feature axis there is one entry for each
            feature. Along the sample axis there is one entry, or one for each row. All other axes have the length 1.

    Returns:
        The output of the norm, float32, in the shape of `x`.

    Raises:
        GateError: The norm is of a class that is not known.
    """
    if type(norm).__name__ == "GlobalResponseNorm":
        return _weighted_response(norm, x.float(), weight)
    if not is_feature_norm(norm):
        raise GateError(
            f"a {type(norm).__name__} runs over the units: only LayerNorm, RMSNorm, GroupNorm of one group and "
            "GlobalResponseNorm are known. Leave the site out: find_sites(..., exclude=[...])."
        )
    if not isinstance(norm, (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)):
        return _weighted_scale(norm, x.float(), weight)
    axis, maps = feature_axis(norm), isinstance(norm, nn.GroupNorm)
    # From here on the features are last.
    x, weight = x.float().movedim(axis, -1), weight.movedim(axis, -1)
    # A GroupNorm takes its statistics over all positions of a sample too.
    over = tuple(range(1, x.dim())) if maps else (-1,)
    weight = weight.expand(len(weight), *x.shape[1:]) if maps else weight
    # Without any kept feature the sums are 0 and not NaN.
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
    """Computes a weighted RMSNorm of any library, without knowing the name of its eps.

    The input is multiplied by a number s and the output is divided by s. The result is x divided by s times its root
    mean square. So s = weighted root mean square / root mean square gives the norm with the weighted statistic.
    """
    axis, tiny = feature_axis(norm), 1e-12
    mean = (x * x * weight).sum(axis, keepdim=True) / weight.sum(axis, keepdim=True).clamp_min(tiny)
    scale = ((mean + tiny) / (x.square().mean(axis, keepdim=True) + tiny)).sqrt()
    # `forward` and not a call: a call runs the hooks of the norm, and this function is called by one of them.
    output: Tensor = norm.forward(x * scale) / scale
    return output


def _weighted_response(norm: Any, x: Tensor, weight: Tensor) -> Tensor:
    """Computes timm's GlobalResponseNorm with a mean over channels that is weighted.

    Global response normalisation is from Woo et al., ConvNeXt V2, CVPR 2023.
    """
    axis, total = norm.channel_dim, weight.sum(norm.channel_dim, keepdim=True)
    # The L2 norm of each channel over the feature map.
    size = x.norm(p=2, dim=norm.spatial_dim, keepdim=True)
    mean = (size * weight).sum(axis, keepdim=True) / total.clamp_min(torch.finfo(torch.float32).tiny)
    scale, shift = norm.weight.view(norm.wb_shape), norm.bias.view(norm.wb_shape)
    return x + torch.addcmul(shift, scale, x * (size / (mean + norm.eps)))

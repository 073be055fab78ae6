"""Forwards of torchvision's window attentions for any number of heads.

The adapters that name these classes are in `xprune.adapters.torchvision`.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2


def _windows(self: Any, x: Tensor) -> Tensor:
    """Computes torchvision's `shifted_window_attention` with any number of heads, and calls `qkv` and `proj`.

    torchvision's function takes the head size as channels // num_heads, so it assumes that the heads fill the channels.
    It is also given the weights of `qkv` and `proj`, so hooks on these layers never run. This forward calls the layers,
    and takes the head size from the output of `qkv`. It is the forward of both Swin classes: Liu et al., Swin
    Transformer, ICCV 2021, and Swin Transformer V2, CVPR 2022.

    Args:
        self: The attention.
        x: Maps (batch, height, width, channels).

    Returns:
        Maps of the same shape.
    """
    (height, width), (rows, columns) = x.shape[1:3], self.window_size
    # Whole windows: zeros at the right and the bottom.
    x = F.pad(x, (0, 0, 0, -width % columns, 0, -height % rows))
    batch, padded_height, padded_width, _ = x.shape
    # A map of one window is not shifted.
    shift = (
        0 if rows >= padded_height else self.shift_size[0],
        0 if columns >= padded_width else self.shift_size[1],
    )
    x = x.roll((-shift[0], -shift[1]), (1, 2))
    # (batch, window rows, rows, window columns, columns, channels)
    x = x.unflatten(1, (-1, rows)).unflatten(3, (-1, columns))
    x = x.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # (batch, windows, rows * columns, channels)
    x = x.flatten(0, 1)  # (batch * windows, rows * columns, channels)
    out = self.proj(_attention(self, x, _mask(x, (padded_height, padded_width), (rows, columns), shift)))
    out = F.dropout(out, self.dropout, self.training)
    # (batch, window rows, window columns, rows, columns, channels)
    out = out.view(batch, padded_height // rows, padded_width // columns, rows, columns, -1)
    out = out.transpose(2, 3).reshape(batch, padded_height, padded_width, -1)
    return out.roll(shift, (1, 2))[:, :height, :width].contiguous()


def _attention(self: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    """Returns the heads' outputs side by side, before `proj`.

    Args:
        self: The attention, of Swin or of SwinV2. Only SwinV2 has a `logit_scale` and cosine scores.
        x: Windows (batch * windows, tokens, channels).
        mask: Addend of the scores (windows, tokens, tokens), or None.

    Returns:
        Tensor (batch * windows, tokens, heads * head size).
    """
    cosine = getattr(self, "logit_scale", None)
    qkv = self.qkv(x)
    # torchvision takes the bias of SwinV2's keys as 0, also if the layer holds other values there. The layer has to be
    # called as it is, so the bias of the keys is subtracted from its output.
    if cosine is not None and self.qkv.bias is not None:
        zero, one = torch.zeros_like(self.qkv.bias), torch.ones_like(self.qkv.bias)
        keys = torch.cat([zero.chunk(3)[0], one.chunk(3)[1], zero.chunk(3)[2]])  # 1 at the keys, 0 elsewhere
        qkv = qkv - self.qkv.bias * keys
    # each (batch * windows, heads, tokens, head size)
    q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    if cosine is None:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (batch * windows, heads, tokens, tokens)
    else:
        scale = cosine.clamp(max=math.log(100.0)).exp()
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * scale
    scores = scores + self.get_relative_position_bias()  # (1, heads, tokens, tokens)
    if mask is not None:
        # One mask for each window of a map, the same for all maps and heads.
        scores = (scores.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
    weights = F.dropout(scores.softmax(-1), self.attention_dropout, self.training)
    return (weights @ v).transpose(1, 2).flatten(2)


def _mask(x: Tensor, size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]) -> Tensor | None:
    """Returns the mask of a shifted map, or None if the map is not shifted.

    The shift is cyclic: it brings tokens from opposite borders of the map into one window. These tokens must not attend
    to each other.

    Args:
        x: A tensor with the dtype and device of the mask.
        size: Height and width of the padded map.
        window: Height and width of a window.
        shift: Shift along height and width.

    Returns:
        Addend of the scores (windows, tokens, tokens): -100 between such tokens, 0 elsewhere.
    """
    if not any(shift):
        return None
    # As in torchvision: number the regions that belong together, then compare the numbers of two tokens. If the shift
    # along one axis is 0, the last slice of that axis is the whole axis, and only the other axis separates regions.
    region = x.new_zeros(size)
    bounds = [((0, -w), (-w, -s), (-s, None)) for w, s in zip(window, shift, strict=True)]
    for row, (top, bottom) in enumerate(bounds[0]):
        for column, (left, right) in enumerate(bounds[1]):
            region[top:bottom, left:right] = 3 * row + column
    region = region.unflatten(0, (-1, window[0])).unflatten(2, (-1, window[1]))
    region = region.transpose(1, 2).flatten(2).flatten(0, 1)  # (windows, tokens)
    return torch.where(region[:, None] == region[:, :, None], 0.0, -100.0).to(x.dtype)


class WindowAttention(ShiftedWindowAttention):
    """Swin's window attention with any number of heads.

    The forward does not assume that the heads fill the channels, and calls `qkv` and `proj`. See `_windows`.
    """

    forward = _windows


class WindowAttentionV2(ShiftedWindowAttentionV2):
    """SwinV2's window attention with any number of heads.

    The forward does not assume that the heads fill the channels, and calls `qkv` and `proj`. See `_windows`.
    """

    forward = _windows


class PartitionAttention(RelativePositionalMultiHeadAttention):
    """MaxViT's attention with any number of heads.

    torchvision's forward reshapes its output to the shape of its input, so it assumes that the heads fill the channels.
    This forward joins the heads that are left. The scale stays that of the dense model: 1 / sqrt(channels), not
    1 / sqrt(head size) as in other attentions.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Takes windows or grids (batch, groups, tokens, channels) and returns the same shape."""
        # each (batch, groups, heads, tokens, head size)
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.n_heads, self.head_dim)).permute(3, 0, 1, 4, 2, 5).unbind(0)
        scores = q @ (k * self.scale_factor).transpose(-2, -1) + self.get_relative_positional_bias()
        return self.merge((scores.softmax(-1) @ v).transpose(2, 3).flatten(3))

"""Replacement forwards for the window attentions of torchvision, which work with any number of heads.

The adapters in `xprune.adapters.torchvision` name these classes.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2


def _windows(self: Any, x: Tensor) -> Tensor:
    """Computes the `shifted_window_attention` of torchvision with any number of heads, and calls `qkv` and `proj`.

    The function of torchvision computes the head size as channels // num_heads, which is wrong after heads were
    removed. It gets the weights of `qkv` and `proj` and does not call these layers, so hooks on them never run. This
    function calls the layers, and computes the head size from the output of `qkv`. It is the forward of
    `WindowAttention` (Liu et al., Swin Transformer, ICCV 2021) and of `WindowAttentionV2` (Liu et al., Swin Transformer
    V2, CVPR 2022).

    Args:
        self: The attention.
        x: Feature maps (batch, height, width, channels).

    Returns:
        Feature maps of the same shape.
    """
    (height, width), (rows, columns) = x.shape[1:3], self.window_size
    # Zeros are added at the right and at the bottom, so that height and width are multiples of the window size.
    x = F.pad(x, (0, 0, 0, -width % columns, 0, -height % rows))
    batch, padded_height, padded_width, _ = x.shape
    # If one window covers the whole height or width, the feature map is not shifted along it.
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
    """Computes attention within windows. Returns the concatenated outputs of the heads, the input of `proj`.

    Args:
        self: The attention of Swin or of SwinV2. Only SwinV2 has a `logit_scale` and computes cosine scores.
        x: Windows (batch * windows, tokens, channels).
        mask: Mask (windows, tokens, tokens) that is added to the scores, or None.

    Returns:
        Tensor (batch * windows, tokens, heads * head size).
    """
    cosine = getattr(self, "logit_scale", None)
    qkv = self.qkv(x)
    # In SwinV2, torchvision uses 0 as the bias of the keys, whatever values the layer holds. Here the layer is called
    # with its values, so the bias of the keys is subtracted from its output.
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
        # There is one mask for each window of a feature map. It is the same for all samples and heads.
        scores = (scores.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
    weights = F.dropout(scores.softmax(-1), self.attention_dropout, self.training)
    return (weights @ v).transpose(1, 2).flatten(2)


def _mask(x: Tensor, size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]) -> Tensor | None:
    """Returns the attention mask for a shifted feature map, or None if the feature map is not shifted.

    The shift is cyclic, so tokens from opposite borders of the feature map come into one window. The mask keeps these
    tokens from attending to each other.

    Args:
        x: A tensor with the dtype and device of the mask.
        size: (height, width) of the padded feature map.
        window: (height, width) of a window.
        shift: (shift along the height, shift along the width).

    Returns:
        Mask (windows, tokens, tokens) that is added to the scores: -100 for tokens from different regions, else 0.
    """
    if not any(shift):
        return None
    # As in torchvision: each region of the feature map gets a number, and two tokens may attend to each other if their
    # numbers are equal. If the shift along an axis is 0, the last slice is the whole axis, so only the other axis
    # separates regions.
    region = x.new_zeros(size)
    bounds = [((0, -w), (-w, -s), (-s, None)) for w, s in zip(window, shift, strict=True)]
    for row, (top, bottom) in enumerate(bounds[0]):
        for column, (left, right) in enumerate(bounds[1]):
            region[top:bottom, left:right] = 3 * row + column
    region = region.unflatten(0, (-1, window[0])).unflatten(2, (-1, window[1]))
    region = region.transpose(1, 2).flatten(2).flatten(0, 1)  # (windows, tokens)
    return torch.where(region[:, None] == region[:, :, None], 0.0, -100.0).to(x.dtype)


class WindowAttention(ShiftedWindowAttention):
    """The window attention of torchvision's Swin, for any number of heads.

    `_windows` describes how this forward differs from the forward of torchvision.
    """

    forward = _windows


class WindowAttentionV2(ShiftedWindowAttentionV2):
    """The window attention of torchvision's SwinV2, for any number of heads.

    `_windows` describes how this forward differs from the forward of torchvision.
    """

    forward = _windows


class PartitionAttention(RelativePositionalMultiHeadAttention):
    """The attention of torchvision's MaxViT, for any number of heads.

    The forward of torchvision reshapes the concatenated heads to the shape of the input, which is wrong after heads
    were removed. This forward concatenates the remaining heads. The scale of the scores stays that of the dense model.
    In MaxViT it is 1 / sqrt(channels), and not 1 / sqrt(head size) as in other attentions.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Computes attention in windows or grids (batch, groups, tokens, channels). The output has the same shape."""
        # each (batch, groups, heads, tokens, head size)
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.n_heads, self.head_dim)).permute(3, 0, 1, 4, 2, 5).unbind(0)
        scores = q @ (k * self.scale_factor).transpose(-2, -1) + self.get_relative_positional_bias()
        return self.merge((scores.softmax(-1) @ v).transpose(2, 3).flatten(3))

"""Forwards of torchvision's window attentions for any number of heads. The entries are in `torchvision.py`."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2


def _windows(self: Any, x: Tensor) -> Tensor:
    """shifted_window_attention of torchvision, for heads that need not fill the width; calls `qkv` and `proj`.

    x (batch, height, width, channels), the same out; Liu et al., Swin Transformer, ICCV 2021, and V2, CVPR 2022.
    """
    (height, width), (rows, columns) = x.shape[1:3], self.window_size
    x = F.pad(x, (0, 0, 0, -width % columns, 0, -height % rows))
    batch, high, wide, _ = x.shape
    shift = (0 if rows >= high else self.shift_size[0], 0 if columns >= wide else self.shift_size[1])
    x = x.roll((-shift[0], -shift[1]), (1, 2))
    x = x.unflatten(1, (-1, rows)).unflatten(3, (-1, columns)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    x = x.flatten(0, 1)  # (batch * windows, rows * columns, channels)
    out = self.proj(_attention(self, x, _mask(x, (high, wide), (rows, columns), shift)))
    out = F.dropout(out, self.dropout, self.training)
    out = (
        out.view(batch, high // rows, wide // columns, rows, columns, -1).transpose(2, 3).reshape(batch, high, wide, -1)
    )
    return out.roll(shift, (1, 2))[:, :height, :width].contiguous()


def _attention(self: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    cosine = getattr(self, "logit_scale", None)
    qkv = self.qkv(x)
    if cosine is not None and self.qkv.bias is not None:  # V2's keys have no bias, whatever the layer holds
        zero, one = torch.zeros_like(self.qkv.bias), torch.ones_like(self.qkv.bias)
        keys = torch.cat([zero.chunk(3)[0], one.chunk(3)[1], zero.chunk(3)[2]])
        qkv = qkv - self.qkv.bias * keys
    q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    if cosine is None:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (batch * windows, heads, tokens, tokens)
    else:
        scale = cosine.clamp(max=math.log(100.0)).exp()
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * scale
    scores = scores + self.get_relative_position_bias()
    if mask is not None:
        scores = (scores.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
    weights = F.dropout(scores.softmax(-1), self.attention_dropout, self.training)
    return (weights @ v).transpose(1, 2).flatten(2)


def _mask(x: Tensor, size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]) -> Tensor | None:
    """-100 between tokens that only the shift has brought into one window, (windows, tokens, tokens)."""
    if not any(shift):
        return None
    part = x.new_zeros(size)
    bounds = [((0, -w), (-w, -s), (-s, None)) for w, s in zip(window, shift, strict=True)]
    for index, (top, bottom) in enumerate(bounds[0]):
        for other, (left, right) in enumerate(bounds[1]):
            part[top:bottom, left:right] = 3 * index + other
    part = part.unflatten(0, (-1, window[0])).unflatten(2, (-1, window[1])).transpose(1, 2).flatten(2).flatten(0, 1)
    return torch.where(part[:, None] == part[:, :, None], 0.0, -100.0).to(x.dtype)


class WindowAttention(ShiftedWindowAttention):
    """Swin's attention, any number of heads."""

    forward = _windows


class WindowAttentionV2(ShiftedWindowAttentionV2):
    """SwinV2's, any number of heads."""

    forward = _windows


class PartitionAttention(RelativePositionalMultiHeadAttention):
    """MaxViT's, any number of heads. Its scale is of the whole width, not of a head's."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, groups, tokens, channels), the same out."""
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.n_heads, self.head_dim)).permute(3, 0, 1, 4, 2, 5).unbind(0)
        scores = q @ (k * self.scale_factor).transpose(-2, -1) + self.get_relative_positional_bias()
        return self.merge((scores.softmax(-1) @ v).transpose(2, 3).flatten(3))

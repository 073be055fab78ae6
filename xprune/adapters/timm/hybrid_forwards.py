"""Forwards of timm's hybrid attentions whose heads need not fill the model's width, where timm's own assume that."""

import torch
from timm.models.edgenext import CrossCovarianceAttn
from timm.models.efficientformer_v2 import Attention2d as TalkingAttention2d
from timm.models.fastvit import Attention as FastVitAttention
from timm.models.metaformer import Attention as MetaFormerAttention
from timm.models.nextvit import EfficientAttention
from torch import Tensor
from torch.nn import functional as F


class PrunedCrossCovarianceAttn(CrossCovarianceAttn):
    """EdgeNeXt's attention between channels (XCA), with any number of heads."""

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, tokens, dim)."""
        rows, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(rows, tokens, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 4, 1).unbind(0)  # (rows, heads, width, tokens)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature
        out = self.attn_drop(scores.softmax(dim=-1)) @ v  # (rows, heads, width, tokens)
        return self.proj_drop(self.proj(out.permute(0, 3, 1, 2).reshape(rows, tokens, -1)))


class PrunedFastVitAttention(FastVitAttention):
    """FastViT's attention over a map, with any number of heads."""

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, channels, height, width)."""
        rows, _, *place = x.shape
        x = x.flatten(2).transpose(-2, -1)  # (rows, tokens, channels)
        x = _heads(self, x)
        return x.transpose(-2, -1).reshape(rows, -1, *place)


class PrunedConvFormerAttention(MetaFormerAttention):
    """CAFormer's attention, with any number of heads."""

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, tokens, dim)."""
        return _heads(self, x)


class PrunedNextVitAttention(EfficientAttention):
    """NextViT's attention with pooled keys and values, with any number of heads."""

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, tokens, dim)."""
        rows, tokens, _ = x.shape
        pooled = x if self.sr is None else self.norm(self.sr(x.transpose(1, 2))).transpose(1, 2)
        q, k, v = (_split(layer(t), self.num_heads) for layer, t in ((self.q, x), (self.k, pooled), (self.v, pooled)))
        out = _attend(self, q, k, v)  # (rows, heads, tokens, width)
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(rows, tokens, -1)))


class PrunedTalkingAttention2d(TalkingAttention2d):
    """EfficientFormerV2's attention, whose scores are of all heads and whose values are of the heads that are left.

    A mix over heads (talking heads) before the softmax needs every head's scores; the mix after it gives the scores
    of those heads alone that have values.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, channels, height, width)."""
        rows, heads = len(x), self.talking_head1.in_channels
        if self.stride_conv is not None:
            x = self.stride_conv(x)
        q = self.q(x).reshape(rows, heads, -1, self.N).transpose(2, 3)  # (rows, heads, tokens, width)
        k = self.k(x).reshape(rows, heads, -1, self.N)
        v = self.v(x)
        local = self.v_local(v)
        v = v.reshape(rows, self.num_heads, -1, self.N).transpose(2, 3)  # (rows, heads left, tokens, width)
        scores = self.talking_head1(q @ k * self.scale + self.get_attention_biases(x.device))
        scores = self.talking_head2(scores.softmax(dim=-1))  # (rows, heads left, tokens, tokens)
        out = (scores @ v).transpose(2, 3).reshape_as(local) + local
        if self.upsample is not None:
            out = self.upsample(out)
        return self.proj(self.act(out))


def _heads(self: FastVitAttention | MetaFormerAttention, x: Tensor) -> Tensor:
    """Attention over tokens (rows, tokens, dim) with a fused qkv and as many heads as there are."""
    rows, tokens, _ = x.shape
    qkv = self.qkv(x).reshape(rows, tokens, 3, self.num_heads, -1)
    out = _attend(self, *qkv.permute(2, 0, 3, 1, 4).unbind(0))  # (rows, heads, tokens, width)
    return self.proj_drop(self.proj(out.transpose(1, 2).reshape(rows, tokens, -1)))


def _split(x: Tensor, heads: int) -> Tensor:
    """(rows, tokens, heads * width) to (rows, heads, tokens, width)."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def _attend(
    self: FastVitAttention | MetaFormerAttention | EfficientAttention, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    dropout = self.attn_drop.p if self.training else 0.0
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout)

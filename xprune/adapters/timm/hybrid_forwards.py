"""The replacement forwards of timm's hybrid attentions, for any number of heads.

timm's own forwards reshape the joined heads to C, the size of the input, so they assume that the heads fill the hidden
size. These forwards take the size of the joined heads from the tensor.
"""

import torch
from timm.models.edgenext import CrossCovarianceAttn
from timm.models.efficientformer_v2 import Attention2d as TalkingAttention2d
from timm.models.fastvit import Attention as FastVitAttention
from timm.models.metaformer import Attention as MetaFormerAttention
from timm.models.nextvit import EfficientAttention
from torch import Tensor
from torch.nn import functional as F


class PrunedCrossCovarianceAttn(CrossCovarianceAttn):
    """EdgeNeXt's attention between channels (XCA) with any number of heads.

    timm's forward reshapes the joined heads to the hidden size. This forward takes their size from the tensor.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Takes tokens (batch, tokens, dim) and returns the same shape."""
        rows, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(rows, tokens, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 4, 1).unbind(0)  # (rows, heads, width, tokens)
        # (rows, heads, width, width): channels attend to channels
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature
        out = self.attn_drop(scores.softmax(dim=-1)) @ v  # (rows, heads, width, tokens)
        return self.proj_drop(self.proj(out.permute(0, 3, 1, 2).reshape(rows, tokens, -1)))


class PrunedFastVitAttention(FastVitAttention):
    """FastViT's attention over a map with any number of heads.

    timm's forward reshapes the joined heads to the hidden size. This forward takes their size from the tensor.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Takes maps (batch, channels, height, width) and returns the same shape."""
        rows, _, *map_size = x.shape
        x = x.flatten(2).transpose(-2, -1)  # (rows, tokens, channels)
        x = _attention(self, x)
        return x.transpose(-2, -1).reshape(rows, -1, *map_size)


class PrunedConvFormerAttention(MetaFormerAttention):
    """CAFormer's attention with any number of heads.

    timm's forward reshapes the joined heads to the hidden size. This forward takes their size from the tensor.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Takes tokens (batch, tokens, dim) and returns the same shape."""
        return _attention(self, x)


class PrunedNextVitAttention(EfficientAttention):
    """NextViT's attention with keys and values from fewer tokens, with any number of heads.

    timm's forward reshapes the joined heads to the hidden size. This forward takes their size from the tensor.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Takes tokens (batch, tokens, dim) and returns the same shape."""
        rows, tokens, _ = x.shape
        # `sr` averages neighbouring tokens. It and the batch norm take (rows, dim, tokens).
        pooled = x if self.sr is None else self.norm(self.sr(x.transpose(1, 2))).transpose(1, 2)
        q, k, v = (_split(layer(t), self.num_heads) for layer, t in ((self.q, x), (self.k, pooled), (self.v, pooled)))
        out = _attend(self, q, k, v)  # (rows, heads, tokens, width)
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(rows, tokens, -1)))


class PrunedTalkingAttention2d(TalkingAttention2d):
    """EfficientFormerV2's talking-heads attention, with the values of the heads that are left.

    timm's forward takes one number of heads for everything. The first mix of the heads needs the scores of all heads,
    so queries and keys stay. The second mix makes scores only for the heads that have values. So this forward takes the
    number of scores from the first mix, and the number of values from `num_heads`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Takes maps (batch, channels, height, width) and returns the same shape."""
        rows, heads = len(x), self.talking_head1.in_channels  # heads of the dense model
        if self.stride_conv is not None:
            x = self.stride_conv(x)
        q = self.q(x).reshape(rows, heads, -1, self.N).transpose(2, 3)  # (rows, heads, tokens, width)
        k = self.k(x).reshape(rows, heads, -1, self.N)  # (rows, heads, width, tokens)
        v = self.v(x)
        # A depthwise convolution on the values as a map, which is added to the heads' output.
        local = self.v_local(v)
        v = v.reshape(rows, self.num_heads, -1, self.N).transpose(2, 3)  # (rows, heads left, tokens, width)
        scores = self.talking_head1(q @ k * self.scale + self.get_attention_biases(x.device))
        scores = self.talking_head2(scores.softmax(dim=-1))  # (rows, heads left, tokens, tokens)
        out = (scores @ v).transpose(2, 3).reshape_as(local) + local
        if self.upsample is not None:
            out = self.upsample(out)
        return self.proj(self.act(out))


def _attention(self: FastVitAttention | MetaFormerAttention, x: Tensor) -> Tensor:
    """Returns the attention over tokens (rows, tokens, dim), with a fused qkv and `num_heads` heads."""
    rows, tokens, _ = x.shape
    qkv = self.qkv(x).reshape(rows, tokens, 3, self.num_heads, -1)
    out = _attend(self, *qkv.permute(2, 0, 3, 1, 4).unbind(0))  # (rows, heads, tokens, width)
    return self.proj_drop(self.proj(out.transpose(1, 2).reshape(rows, tokens, -1)))


def _split(x: Tensor, heads: int) -> Tensor:
    """Splits (rows, tokens, heads * width) into heads (rows, heads, tokens, width)."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def _attend(
    self: FastVitAttention | MetaFormerAttention | EfficientAttention, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """Returns the heads' outputs (rows, heads, tokens, width) with torch's fused function.

    timm has a second way, without the fused function, that computes the same.
    """
    dropout = self.attn_drop.p if self.training else 0.0
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout)

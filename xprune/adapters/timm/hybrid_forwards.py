"""Replacement forwards for the attentions of timm's hybrid models, which work with any number of heads.

A hybrid model combines convolutions and attention. timm's forwards reshape the concatenated heads to the hidden size,
which is wrong after heads were removed. These forwards read the size of the concatenated heads from the tensor.
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
    """EdgeNeXt's attention between channels (XCA), for any number of heads.

    timm's forward reshapes the concatenated heads to the hidden size, which is wrong after heads were removed. This
    forward reads the size of the concatenated heads from the tensor.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Computes attention for tokens (batch, tokens, dim). The output has the same shape."""
        rows, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(rows, tokens, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 4, 1).unbind(0)  # (rows, heads, width, tokens)
        # Channels attend to channels: (rows, heads, width, width).
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature
        out = self.attn_drop(scores.softmax(dim=-1)) @ v  # (rows, heads, width, tokens)
        return self.proj_drop(self.proj(out.permute(0, 3, 1, 2).reshape(rows, tokens, -1)))


class PrunedFastVitAttention(FastVitAttention):
    """FastViT's attention over a feature map, for any number of heads.

    timm's forward reshapes the concatenated heads to the hidden size, which is wrong after heads were removed. This
    forward reads the size of the concatenated heads from the tensor.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Computes attention for feature maps (batch, channels, height, width). The output has the same shape."""
        rows, _, *map_size = x.shape
        x = x.flatten(2).transpose(-2, -1)  # (rows, tokens, channels)
        x = _attention(self, x)
        return x.transpose(-2, -1).reshape(rows, -1, *map_size)


class PrunedConvFormerAttention(MetaFormerAttention):
    """CAFormer's attention, for any number of heads.

    timm's forward reshapes the concatenated heads to the hidden size, which is wrong after heads were removed. This
    forward reads the size of the concatenated heads from the tensor.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Computes attention for tokens (batch, tokens, dim). The output has the same shape."""
        return _attention(self, x)


class PrunedNextVitAttention(EfficientAttention):
    """NextViT's attention, which makes keys and values from fewer tokens, for any number of heads.

    timm's forward reshapes the concatenated heads to the hidden size, which is wrong after heads were removed. This
    forward reads the size of the concatenated heads from the tensor.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Computes attention for tokens (batch, tokens, dim). The output has the same shape."""
        rows, tokens, _ = x.shape
        # `sr` averages neighbouring tokens. The inputs of `sr` and of the batch norm have the shape (rows, dim,
        # tokens).
        pooled = x if self.sr is None else self.norm(self.sr(x.transpose(1, 2))).transpose(1, 2)
        q, k, v = (_split(layer(t), self.num_heads) for layer, t in ((self.q, x), (self.k, pooled), (self.v, pooled)))
        out = _attend(self, q, k, v)  # (rows, heads, tokens, width)
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(rows, tokens, -1)))


class PrunedTalkingAttention2d(TalkingAttention2d):
    """EfficientFormerV2's talking-heads attention, for any number of heads.

    Two layers mix the heads. The first mixing layer needs the scores of all heads of the dense model, so all queries
    and keys stay. The second mixing layer makes scores only for the remaining heads. timm's forward uses one number of
    heads for both. This forward reads the number of heads for queries and keys from the first mixing layer, and the
    number of heads for values from `num_heads`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Computes attention for feature maps (batch, channels, height, width). The output has the same shape."""
        rows, heads = len(x), self.talking_head1.in_channels  # the number of heads of the dense model
        if self.stride_conv is not None:
            x = self.stride_conv(x)
        q = self.q(x).reshape(rows, heads, -1, self.N).transpose(2, 3)  # (rows, heads, tokens, width)
        k = self.k(x).reshape(rows, heads, -1, self.N)  # (rows, heads, width, tokens)
        v = self.v(x)
        # `v_local` is a depthwise convolution over the values. Its output is added to the output of the heads.
        local = self.v_local(v)
        v = v.reshape(rows, self.num_heads, -1, self.N).transpose(2, 3)  # (rows, remaining heads, tokens, width)
        scores = self.talking_head1(q @ k * self.scale + self.get_attention_biases(x.device))
        scores = self.talking_head2(scores.softmax(dim=-1))  # (rows, remaining heads, tokens, tokens)
        out = (scores @ v).transpose(2, 3).reshape_as(local) + local
        if self.upsample is not None:
            out = self.upsample(out)
        return self.proj(self.act(out))


def _attention(self: FastVitAttention | MetaFormerAttention, x: Tensor) -> Tensor:
    """Computes attention for tokens (rows, tokens, dim) with a fused qkv. The output has the same shape."""
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
    """Computes the outputs of the heads (rows, heads, tokens, width) with torch's fused function.

    timm can also compute the same without the fused function.
    """
    dropout = self.attn_drop.p if self.training else 0.0
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout)

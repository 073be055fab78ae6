"""Forwards of timm's ViT-like attentions whose heads need not fill the model's width, where timm's own assume it.

Each computes what its base class computes; `xprune.adapters.timm.attend` has the steps they share.
"""

from typing import Any

import torch
from timm.layers.attention import AttentionRope
from timm.layers.diff_attention import DiffAttention
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.beit import Attention as BeitAttention
from timm.models.cait import ClassAttn
from timm.models.convit import GPSA, MHSA
from timm.models.crossvit import CrossAttention
from timm.models.eva import EvaAttention
from timm.models.vision_transformer_relpos import RelPosAttention
from timm.models.xcit import XCA
from torch import Tensor, nn
from torch.nn import functional as F

from xprune.adapters.timm.attend import attend, left, merge, project, split
from xprune.modules.removed import Removed


class RemovedClassAttention(Removed):
    """What is left of an attention of the class token, which comes first and is all that it gives."""

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """x (batch, tokens, features) to (batch, 1, out_features)."""
        return super().forward(x[:, :1])


class PrunedAttentionRope(AttentionRope):
    """Attention whose rotary embedding may be made outside, one for each of the heads (mixed RoPE)."""

    built: tuple[int, ...] | None = None

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """x (batch, tokens, dim), rope (tokens, width) or (heads built, tokens, width)."""
        groups = self.num_kv_groups
        heads = self.built and [groups * i + j for i in self.built for j in range(groups)]
        per_head = rope is not None and rope.dim() > 2
        out: Tensor = super().forward(x, left(rope, heads, -3) if per_head else rope, attn_mask, is_causal)
        return out


class PrunedEvaAttention(EvaAttention):
    """EVA attention, with rotary embeddings that may be made outside, one for each of the heads."""

    built: tuple[int, ...] | None = None

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """x (batch, tokens, dim), rope (tokens, width) or (heads built, tokens, width)."""
        parts: Any = self
        if self.qkv is not None:
            bias = None if self.q_bias is None else torch.cat((parts.q_bias, parts.k_bias, parts.v_bias))
            q, k, v = split(F.linear(x, parts.qkv.weight, bias), self.num_heads, 3)
        else:
            q, k, v = (split(layer(x), self.num_heads)[0] for layer in (parts.q_proj, parts.k_proj, parts.v_proj))
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            turn: Any = left(rope, self.built, -3) if rope.dim() > 2 else rope
            first, half = self.num_prefix_tokens, getattr(self, "rotate_half", False)
            turned = [apply_rot_embed_cat(t[:, :, first:], turn, half=half) for t in (q, k)]
            q, k = (
                torch.cat([t[:, :, :first], after], dim=2).type_as(v) for t, after in zip((q, k), turned, strict=True)
            )
        out = self.norm(merge(attend(self, q, k, v, attn_mask, causal=is_causal)))
        return project(self, out if self.gate is None else out * self.gate(x).sigmoid())


class PrunedDiffAttention(DiffAttention):
    """Differential attention: two maps a head, one subtracted from the other (Ye et al., arXiv 2410.05258)."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x (batch, tokens, dim)."""
        q, k, v = split(self.qkv(x), self.num_heads, 3)  # (batch, heads, tokens, 2 * width)
        halves = (self._halves(t, norm) for t, norm in ((q, self.q_norm), (k, self.k_norm)))
        one, two = (attend(self, a, b, v, attn_mask, causal=is_causal) for a, b in zip(*halves, strict=True))
        out = self.sub_norm(one - self.subtracted().type_as(v) * two) * (1 - self.lambda_init)
        return project(self, self.norm(merge(out)))

    def subtracted(self) -> Tensor:
        """Returns the weight of the second map, float32 (), which is learned."""
        parts: Any = self
        if self.lambda_a is not None:
            one, two = parts.lambda_a, parts.lambda_b
        else:
            one = (parts.lambda_q1 * parts.lambda_k1).sum(-1).float()
            two = (parts.lambda_q2 * parts.lambda_k2).sum(-1).float()
        return torch.exp(one) - torch.exp(two) + self.lambda_init

    def _halves(self, x: Tensor, norm: nn.Module) -> Any:
        return norm(x.unflatten(-1, (2, -1))).unbind(-2)


class PrunedBeitAttention(BeitAttention):
    """BEiT attention, with a position bias of its own, one made outside for the heads of all blocks, or both."""

    built: tuple[int, ...] | None = None

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """x (batch, tokens, dim), shared_rel_pos_bias (heads built, tokens, tokens)."""
        parts: Any = self
        bias = None if self.q_bias is None else torch.cat((parts.q_bias, parts.k_bias, parts.v_bias))
        q, k, v = split(F.linear(x, self.qkv.weight, bias), self.num_heads, 3)
        position = left(shared_rel_pos_bias, self.built, -3)
        if self.relative_position_bias_table is not None:
            position = self.position_bias() + (0 if position is None else position)
        return project(self, merge(attend(self, q, k, v, position)))

    def position_bias(self) -> Tensor:
        """Returns the block's own position bias, (1, heads, tokens, tokens)."""
        parts: Any = self
        index = parts.relative_position_index  # (tokens, tokens)
        return parts.relative_position_bias_table[index].permute(2, 0, 1)[None]


class PrunedRelPosAttention(RelPosAttention):
    """Attention with a relative position bias of its own, or else one made outside for the heads of all blocks."""

    built: tuple[int, ...] | None = None

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """x (batch, tokens, dim), shared_rel_pos (1, heads built, tokens, tokens)."""
        q, k, v = split(self.qkv(x), self.num_heads, 3)
        q, k = self.q_norm(q), self.k_norm(k)
        own: Any = self.rel_pos
        bias = left(shared_rel_pos, self.built, -3) if own is None else own.get_bias()
        return project(self, merge(attend(self, q, k, v, bias)))


class PrunedClassAttn(ClassAttn):
    """CaiT's attention of the class token to all tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, tokens, dim) to (batch, 1, dim)."""
        q, k, v = (split(t, self.num_heads)[0] for t in (self.q(x[:, :1]), self.k(x), self.v(x)))
        return project(self, merge(attend(self, q, k, v)))


class PrunedXCA(XCA):
    """Cross-covariance attention: channels attend to channels (El-Nouby et al., arXiv 2106.09681, section 3.2)."""

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, tokens, dim)."""
        q, k, v = (t.transpose(-2, -1) for t in split(self.qkv(x), self.num_heads, 3))  # (..., heads, width, tokens)
        q, k = F.normalize(q, dim=-1) * self.temperature, F.normalize(k, dim=-1)
        if self.fused_attn:
            out = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        else:
            out = self.attn_drop((q @ k.transpose(-2, -1)).softmax(dim=-1)) @ v
        return project(self, merge(out.transpose(-2, -1)))


class PrunedCrossAttention(CrossAttention):
    """CrossViT's attention of one branch's class token to the other branch's tokens."""

    fused_attn = False  # as in timm

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, tokens, dim) to (batch, 1, dim)."""
        q, k, v = (split(t, self.num_heads)[0] for t in (self.wq(x[:, :1]), self.wk(x), self.wv(x)))
        return project(self, merge(attend(self, q, k, v)))


class PrunedMHSA(MHSA):
    """ConViT's plain attention."""

    fused_attn = False  # as in timm

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, tokens, dim)."""
        return project(self, merge(attend(self, *split(self.qkv(x), self.num_heads, 3))))


class PrunedGPSA(GPSA):
    """ConViT's attention gated between content and position (d'Ascoli et al., ICML 2021, equation 5)."""

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, tokens, dim)."""
        if self.rel_indices is None or self.rel_indices.shape[1] != x.shape[1]:
            self.rel_indices = self.get_rel_indices(x.shape[1])
        return project(self, merge(self.get_attention(x) @ split(self.v(x), self.num_heads)[0]))

    def get_attention(self, x: Tensor) -> Tensor:
        """The map (batch, heads, tokens, tokens)."""
        q, k = split(self.qk(x), self.num_heads, 2)
        content = ((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1)
        position = self.pos_proj(self.rel_indices).permute(0, 3, 1, 2).softmax(dim=-1)  # (1, heads, tokens, tokens)
        gate = self.gating_param.sigmoid().view(1, -1, 1, 1)
        mixed = (1.0 - gate) * content + gate * position
        return self.attn_drop(mixed / mixed.sum(dim=-1, keepdim=True))

"""Replacement forwards for the attentions of timm's ViT-like models, which work with any number of heads.

timm's forwards reshape to C or C // num_heads, where C is the hidden size. This is wrong after heads were removed.
These forwards compute the head size from the tensors. As long as no head was removed, each of them computes the same as
the forward of its base class. `xprune.adapters.timm.attend` has the functions that they share.
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

from xprune.adapters.timm.attend import attend, keep_heads, merge, project, split
from xprune.modules.removed import Removed


class RemovedClassAttention(Removed):
    """Replaces an attention of the class token that lost all its heads.

    The class token is the first token. This attention returns only the class token, so its replacement does so too.
    """

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Maps tokens (batch, tokens, features) to the bias (batch, 1, out_features) for the class token."""
        return super().forward(x[:, :1])


class PrunedAttentionRope(AttentionRope):
    """timm's attention with rotary position embeddings (RoPE), for any number of heads.

    timm's forward works with any number of heads, except with mixed RoPE. With mixed RoPE, the model passes a rotary
    embedding for each head of the dense model. This forward selects the rotary embeddings of the remaining heads and
    then calls timm's forward.
    """

    built: tuple[int, ...] | None = None
    """Indices of the remaining units, see `Forwards.built`. None if no unit was removed."""

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Computes attention.

        Args:
            x: Tokens (batch, tokens, dim).
            rope: Rotary embedding (tokens, width) that all heads share, or one for each query head of the dense model,
                (query heads, tokens, width). None if there is none.
            attn_mask: Boolean mask, or a tensor that is added to the scores, or None.
            is_causal: True if a token must not attend to later tokens.

        Returns:
            Tensor (batch, tokens, dim).
        """
        # A unit is a head of keys and values. `rope` has an entry for each query head. Each unit has `groups` query
        # heads.
        groups = self.num_kv_groups
        heads = self.built and [groups * i + j for i in self.built for j in range(groups)]
        per_head = rope is not None and rope.dim() > 2
        out: Tensor = super().forward(x, keep_heads(rope, heads, -3) if per_head else rope, attn_mask, is_causal)
        return out


class PrunedEvaAttention(EvaAttention):
    """EVA's attention, for any number of heads.

    timm's forward reshapes the concatenated heads to the hidden size. It also expects one rotary embedding for each of
    its heads, but the model may pass one for each head of the dense model. Both are wrong after heads were removed.
    This forward reads the size of the concatenated heads from the tensor, and selects the rotary embeddings of the
    remaining heads.
    """

    built: tuple[int, ...] | None = None
    """Indices of the remaining heads, see `Forwards.built`. None if no head was removed."""

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Computes attention.

        Args:
            x: Tokens (batch, tokens, dim).
            rope: Rotary embedding (tokens, width) that all heads share, or one for each head of the dense model,
                (heads, tokens, width). None if there is none.
            attn_mask: Boolean mask, or a tensor that is added to the scores, or None.
            is_causal: True if a token must not attend to later tokens.

        Returns:
            Tensor (batch, tokens, dim).
        """
        parts: Any = self  # typed as Any, because mypy takes each layer of timm for a tensor or a module
        if self.qkv is not None:
            bias = None if self.q_bias is None else torch.cat((parts.q_bias, parts.k_bias, parts.v_bias))
            q, k, v = split(F.linear(x, parts.qkv.weight, bias), self.num_heads, 3)
        else:
            q, k, v = (split(layer(x), self.num_heads)[0] for layer in (parts.q_proj, parts.k_proj, parts.v_proj))
        # each (batch, heads, tokens, width)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            rotation: Any = keep_heads(rope, self.built, -3) if rope.dim() > 2 else rope
            # Class tokens and register tokens come first. They have no position.
            prefix, half = self.num_prefix_tokens, getattr(self, "rotate_half", False)
            rotated = [apply_rot_embed_cat(t[:, :, prefix:], rotation, half=half) for t in (q, k)]
            q, k = (
                torch.cat([t[:, :, :prefix], after], dim=2).type_as(v) for t, after in zip((q, k), rotated, strict=True)
            )
        out = self.norm(merge(attend(self, q, k, v, attn_mask, causal=is_causal)))
        return project(self, out if self.gate is None else out * self.gate(x).sigmoid())


class PrunedDiffAttention(DiffAttention):
    """Differential attention (Ye et al., arXiv 2410.05258), for any number of heads.

    Each head subtracts one attention map from another. timm's forward splits the output of `qkv` and concatenates the
    heads with the hidden size, which is wrong after heads were removed. This forward splits by the number of heads.
    """

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Computes attention for tokens (batch, tokens, dim). The output has the same shape."""
        q, k, v = split(self.qkv(x), self.num_heads, 3)  # each (batch, heads, tokens, 2 * width)
        # First the pair (first half of the queries, first half of the keys), then the pair of the second halves.
        halves = (self._halves(t, norm) for t, norm in ((q, self.q_norm), (k, self.k_norm)))
        one, two = (attend(self, a, b, v, attn_mask, causal=is_causal) for a, b in zip(*halves, strict=True))
        out = self.sub_norm(one - self.subtracted().type_as(v) * two) * (1 - self.lambda_init)
        return project(self, self.norm(merge(out)))

    def subtracted(self) -> Tensor:
        """Returns the learned factor of the second attention map, which is subtracted: a float32 scalar."""
        parts: Any = self  # typed as Any, because mypy takes each layer of timm for a tensor or a module
        # timm has two forms of it: two learned numbers, or four learned vectors.
        if self.lambda_a is not None:
            one, two = parts.lambda_a, parts.lambda_b
        else:
            one = (parts.lambda_q1 * parts.lambda_k1).sum(-1).float()
            two = (parts.lambda_q2 * parts.lambda_k2).sum(-1).float()
        return torch.exp(one) - torch.exp(two) + self.lambda_init

    def _halves(self, x: Tensor, norm: nn.Module) -> Any:
        """Splits (batch, heads, tokens, 2 * width) into two halves along the last axis, and normalises each half."""
        return norm(x.unflatten(-1, (2, -1))).unbind(-2)


class PrunedBeitAttention(BeitAttention):
    """BEiT's attention, for any number of heads.

    The position bias comes from a table of the attention, or from the model, or from both. The bias from the model has
    an entry for each head of the dense model. timm's forward adds this bias as it is, and reshapes the concatenated
    heads to the hidden size. Both are wrong after heads were removed. This forward selects the bias of the remaining
    heads, and reads the size of the concatenated heads from the tensor.
    """

    built: tuple[int, ...] | None = None
    """Indices of the remaining heads, see `Forwards.built`. None if no head was removed."""

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """Computes attention.

        Args:
            x: Tokens (batch, tokens, dim).
            shared_rel_pos_bias: Position bias from the model (heads of the dense model, tokens, tokens), or None.

        Returns:
            Tensor (batch, tokens, dim).
        """
        parts: Any = self
        bias = None if self.q_bias is None else torch.cat((parts.q_bias, parts.k_bias, parts.v_bias))
        q, k, v = split(F.linear(x, self.qkv.weight, bias), self.num_heads, 3)
        position = keep_heads(shared_rel_pos_bias, self.built, -3)
        if self.relative_position_bias_table is not None:
            # The table has already lost the columns of the removed heads.
            position = self.position_bias() + (0 if position is None else position)
        return project(self, merge(attend(self, q, k, v, position)))

    def position_bias(self) -> Tensor:
        """Returns the position bias of this block, (1, heads, tokens, tokens)."""
        parts: Any = self  # typed as Any, because mypy takes each layer of timm for a tensor or a module
        index = parts.relative_position_index  # (tokens, tokens)
        return parts.relative_position_bias_table[index].permute(2, 0, 1)[None]


class PrunedRelPosAttention(RelPosAttention):
    """timm's attention with relative positions, for any number of heads.

    The position bias comes from the attention or from the model. A bias from the model has an entry for each head of
    the dense model. timm's forward adds this bias as it is, and reshapes the concatenated heads to the hidden size.
    Both are wrong after heads were removed. This forward selects the bias of the remaining heads, and reads the size of
    the concatenated heads from the tensor.
    """

    built: tuple[int, ...] | None = None
    """Indices of the remaining heads, see `Forwards.built`. None if no head was removed."""

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """Computes attention.

        Args:
            x: Tokens (batch, tokens, dim).
            shared_rel_pos: Position bias from the model (1, heads of the dense model, tokens, tokens), or None. It is
                not used if the attention itself has a position bias.

        Returns:
            Tensor (batch, tokens, dim).
        """
        q, k, v = split(self.qkv(x), self.num_heads, 3)
        q, k = self.q_norm(q), self.k_norm(k)
        own: Any = self.rel_pos
        bias = keep_heads(shared_rel_pos, self.built, -3) if own is None else own.get_bias()
        return project(self, merge(attend(self, q, k, v, bias)))


class PrunedClassAttn(ClassAttn):
    """CaiT's attention of the class token to all tokens, for any number of heads.

    timm's forward computes the head size as hidden size / num_heads and reshapes the concatenated heads to the hidden
    size. Both are wrong after heads were removed. This forward computes both sizes from the tensors.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Returns the new class token (batch, 1, dim) for tokens (batch, tokens, dim). The class token is the first."""
        # q (batch, heads, 1, width), k and v (batch, heads, tokens, width)
        q, k, v = (split(t, self.num_heads)[0] for t in (self.q(x[:, :1]), self.k(x), self.v(x)))
        return project(self, merge(attend(self, q, k, v)))


class PrunedXCA(XCA):
    """Cross-covariance attention (El-Nouby et al., arXiv 2106.09681, section 3.2), for any number of heads.

    In this attention, channels attend to channels. timm's forward computes the head size as hidden size / num_heads and
    reshapes the concatenated heads to the hidden size. Both are wrong after heads were removed. This forward computes
    both sizes from the tensors.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Computes attention for tokens (batch, tokens, dim). The output has the same shape."""
        # Channels attend in place of tokens. q, k and v have the shape (batch, heads, width, tokens).
        q, k, v = (t.transpose(-2, -1) for t in split(self.qkv(x), self.num_heads, 3))
        q, k = F.normalize(q, dim=-1) * self.temperature, F.normalize(k, dim=-1)
        if self.fused_attn:
            # The scale is 1.0, because the temperature replaces 1 / sqrt(width). As in timm, there is no dropout here.
            out = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        else:
            out = self.attn_drop((q @ k.transpose(-2, -1)).softmax(dim=-1)) @ v
        return project(self, merge(out.transpose(-2, -1)))


class PrunedCrossAttention(CrossAttention):
    """CrossViT's attention of the class token of one branch to the tokens of the other, for any number of heads.

    timm's forward computes the head size as hidden size / num_heads and reshapes the concatenated heads to the hidden
    size. Both are wrong after heads were removed. This forward computes both sizes from the tensors.
    """

    # As in timm, this attention does not use torch's fused function. `attend` reads this class attribute.
    fused_attn = False

    def forward(self, x: Tensor) -> Tensor:
        """Returns the new class token (batch, 1, dim).

        Args:
            x: The class token of one branch, followed by the tokens of the other branch, (batch, tokens, dim).
        """
        # q (batch, heads, 1, width), k and v (batch, heads, tokens, width)
        q, k, v = (split(t, self.num_heads)[0] for t in (self.wq(x[:, :1]), self.wk(x), self.wv(x)))
        return project(self, merge(attend(self, q, k, v)))


class PrunedMHSA(MHSA):
    """ConViT's plain attention, for any number of heads.

    timm's forward computes the head size as hidden size / num_heads and reshapes the concatenated heads to the hidden
    size. Both are wrong after heads were removed. This forward computes both sizes from the tensors.
    """

    # As in timm, this attention does not use torch's fused function. `attend` reads this class attribute.
    fused_attn = False

    def forward(self, x: Tensor) -> Tensor:
        """Computes attention for tokens (batch, tokens, dim). The output has the same shape."""
        return project(self, merge(attend(self, *split(self.qkv(x), self.num_heads, 3))))


class PrunedGPSA(GPSA):
    """ConViT's gated positional attention (d'Ascoli et al., ICML 2021, equation 5), for any number of heads.

    Each head has a learned gate that weighs content against position. timm's forward computes the head size as hidden
    size / num_heads and reshapes the concatenated heads to the hidden size. Both are wrong after heads were removed.
    This forward computes both sizes from the tensors.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Computes attention for tokens (batch, tokens, dim). The output has the same shape."""
        # As in timm, the relative positions are computed again when the number of tokens changes.
        if self.rel_indices is None or self.rel_indices.shape[1] != x.shape[1]:
            self.rel_indices = self.get_rel_indices(x.shape[1])
        return project(self, merge(self.get_attention(x) @ split(self.v(x), self.num_heads)[0]))

    def get_attention(self, x: Tensor) -> Tensor:
        """Computes the attention map (batch, heads, tokens, tokens)."""
        q, k = split(self.qk(x), self.num_heads, 2)
        content = ((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1)
        position = self.pos_proj(self.rel_indices).permute(0, 3, 1, 2).softmax(dim=-1)  # (1, heads, tokens, tokens)
        gate = self.gating_param.sigmoid().view(1, -1, 1, 1)
        mixed = (1.0 - gate) * content + gate * position
        return self.attn_drop(mixed / mixed.sum(dim=-1, keepdim=True))

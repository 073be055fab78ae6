"""The replacement forwards of timm's ViT-like attentions, for any number of heads.

timm's own forwards assume that the heads fill the hidden size: they reshape to C or C // num_heads, where C is the size
of the input. These forwards take the head size from the tensors. Each computes the same as its base class as long as no
head was removed. `xprune.adapters.timm.attend` has the steps that they share.
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

    The class token is the first token. Such an attention returns that token only.
    """

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Takes tokens (batch, tokens, features) and returns the bias of the consumer (batch, 1, out_features)."""
        return super().forward(x[:, :1])


class PrunedAttentionRope(AttentionRope):
    """timm's rotary attention with any number of heads.

    timm's forward works with any number of heads, except for mixed RoPE. There the model makes rotary embeddings for
    each block, one for each head that the block was built with. This forward selects those of the heads that are left,
    and leaves the rest to timm.
    """

    built: tuple[int, ...] | None = None
    """Indices of the units that are left, see `Forwards.built`. None if no unit was removed."""

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Computes attention.

        Args:
            x: Tokens (batch, tokens, dim).
            rope: Rotary embedding (tokens, width) for all heads, or (query heads of the dense model, tokens, width).
            attn_mask: Mask or addend of the scores, or None.
            is_causal: True if no token attends to later ones.

        Returns:
            Tensor (batch, tokens, dim).
        """
        # A unit is a head of keys and values. `rope` has an entry for each query head: `groups` of them per unit.
        groups = self.num_kv_groups
        heads = self.built and [groups * i + j for i in self.built for j in range(groups)]
        per_head = rope is not None and rope.dim() > 2
        out: Tensor = super().forward(x, keep_heads(rope, heads, -3) if per_head else rope, attn_mask, is_causal)
        return out


class PrunedEvaAttention(EvaAttention):
    """EVA's attention with any number of heads.

    timm's forward reshapes the joined heads to the hidden size. It also expects as many rotary embeddings as it has
    heads, where the model may pass one for each head that it was built with. This forward takes the size of the joined
    heads from the tensor, and selects the embeddings of the heads that are left.
    """

    built: tuple[int, ...] | None = None
    """Indices of the heads that are left, see `Forwards.built`. None if no head was removed."""

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Computes attention.

        Args:
            x: Tokens (batch, tokens, dim).
            rope: Rotary embedding (tokens, width) for all heads, or (heads of the dense model, tokens, width).
            attn_mask: Mask or addend of the scores, or None.
            is_causal: True if no token attends to later ones.

        Returns:
            Tensor (batch, tokens, dim).
        """
        parts: Any = self  # for mypy, to which timm's layers are tensors or modules
        if self.qkv is not None:
            bias = None if self.q_bias is None else torch.cat((parts.q_bias, parts.k_bias, parts.v_bias))
            q, k, v = split(F.linear(x, parts.qkv.weight, bias), self.num_heads, 3)
        else:
            q, k, v = (split(layer(x), self.num_heads)[0] for layer in (parts.q_proj, parts.k_proj, parts.v_proj))
        # each (batch, heads, tokens, width)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            rotation: Any = keep_heads(rope, self.built, -3) if rope.dim() > 2 else rope
            # Class and register tokens come first and have no position.
            prefix, half = self.num_prefix_tokens, getattr(self, "rotate_half", False)
            rotated = [apply_rot_embed_cat(t[:, :, prefix:], rotation, half=half) for t in (q, k)]
            q, k = (
                torch.cat([t[:, :, :prefix], after], dim=2).type_as(v) for t, after in zip((q, k), rotated, strict=True)
            )
        out = self.norm(merge(attend(self, q, k, v, attn_mask, causal=is_causal)))
        return project(self, out if self.gate is None else out * self.gate(x).sigmoid())


class PrunedDiffAttention(DiffAttention):
    """Differential attention with any number of heads (Ye et al., arXiv 2410.05258).

    Each head has two attention maps, and subtracts one from the other. timm's forward splits the output of `qkv` and
    joins the heads by the hidden size. This forward uses the number of heads.
    """

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Takes tokens (batch, tokens, dim) and returns the same shape."""
        q, k, v = split(self.qkv(x), self.num_heads, 3)  # each (batch, heads, tokens, 2 * width)
        # Pairs (first half of the queries, first half of the keys), then the same of the second halves.
        halves = (self._halves(t, norm) for t, norm in ((q, self.q_norm), (k, self.k_norm)))
        one, two = (attend(self, a, b, v, attn_mask, causal=is_causal) for a, b in zip(*halves, strict=True))
        out = self.sub_norm(one - self.subtracted().type_as(v) * two) * (1 - self.lambda_init)
        return project(self, self.norm(merge(out)))

    def subtracted(self) -> Tensor:
        """Returns the learned factor of the second map, which is subtracted: a float32 scalar."""
        parts: Any = self  # for mypy, to which timm's layers are tensors or modules
        # timm has two forms of it: two learned numbers, or four learned vectors.
        if self.lambda_a is not None:
            one, two = parts.lambda_a, parts.lambda_b
        else:
            one = (parts.lambda_q1 * parts.lambda_k1).sum(-1).float()
            two = (parts.lambda_q2 * parts.lambda_k2).sum(-1).float()
        return torch.exp(one) - torch.exp(two) + self.lambda_init

    def _halves(self, x: Tensor, norm: nn.Module) -> Any:
        """Splits (batch, heads, tokens, 2 * width) into two normalised tensors (batch, heads, tokens, width)."""
        return norm(x.unflatten(-1, (2, -1))).unbind(-2)


class PrunedBeitAttention(BeitAttention):
    """BEiT's attention with any number of heads.

    timm's forward reshapes the joined heads to the hidden size. The position bias is the attention's own, or comes from
    the model for the heads that the model was built with, or both. This forward takes the size of the joined heads from
    the tensor, and selects the model's bias for the heads that are left.
    """

    built: tuple[int, ...] | None = None
    """Indices of the heads that are left, see `Forwards.built`. None if no head was removed."""

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """Computes attention.

        Args:
            x: Tokens (batch, tokens, dim).
            shared_rel_pos_bias: Position bias (heads of the dense model, tokens, tokens), or None.

        Returns:
            Tensor (batch, tokens, dim).
        """
        parts: Any = self
        bias = None if self.q_bias is None else torch.cat((parts.q_bias, parts.k_bias, parts.v_bias))
        q, k, v = split(F.linear(x, self.qkv.weight, bias), self.num_heads, 3)
        position = keep_heads(shared_rel_pos_bias, self.built, -3)
        if self.relative_position_bias_table is not None:
            # The table lost the columns of the removed heads already.
            position = self.position_bias() + (0 if position is None else position)
        return project(self, merge(attend(self, q, k, v, position)))

    def position_bias(self) -> Tensor:
        """Returns the position bias of this block, (1, heads, tokens, tokens)."""
        parts: Any = self  # for mypy, to which timm's layers are tensors or modules
        index = parts.relative_position_index  # (tokens, tokens)
        return parts.relative_position_bias_table[index].permute(2, 0, 1)[None]


class PrunedRelPosAttention(RelPosAttention):
    """timm's attention with relative positions, with any number of heads.

    timm's forward reshapes the joined heads to the hidden size. The position bias is the attention's own, or else comes
    from the model for the heads that the model was built with. This forward takes the size of the joined heads from the
    tensor, and selects the model's bias for the heads that are left.
    """

    built: tuple[int, ...] | None = None
    """Indices of the heads that are left, see `Forwards.built`. None if no head was removed."""

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """Computes attention.

        Args:
            x: Tokens (batch, tokens, dim).
            shared_rel_pos: Position bias (1, heads of the dense model, tokens, tokens), or None. It is not used if the
                attention has a bias itself.

        Returns:
            Tensor (batch, tokens, dim).
        """
        q, k, v = split(self.qkv(x), self.num_heads, 3)
        q, k = self.q_norm(q), self.k_norm(k)
        own: Any = self.rel_pos
        bias = keep_heads(shared_rel_pos, self.built, -3) if own is None else own.get_bias()
        return project(self, merge(attend(self, q, k, v, bias)))


class PrunedClassAttn(ClassAttn):
    """CaiT's attention of the class token to all tokens, with any number of heads.

    timm's forward takes the head size as hidden size / num_heads and reshapes the joined heads to the hidden size. This
    forward takes both from the tensors.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Takes tokens (batch, tokens, dim) and returns the class token (batch, 1, dim)."""
        # q (batch, heads, 1, width), k and v (batch, heads, tokens, width)
        q, k, v = (split(t, self.num_heads)[0] for t in (self.q(x[:, :1]), self.k(x), self.v(x)))
        return project(self, merge(attend(self, q, k, v)))


class PrunedXCA(XCA):
    """Cross-covariance attention with any number of heads (El-Nouby et al., arXiv 2106.09681, section 3.2).

    Channels attend to channels. timm's forward takes the head size as hidden size / num_heads and reshapes the joined
    heads to the hidden size. This forward takes both from the tensors.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Takes tokens (batch, tokens, dim) and returns the same shape."""
        # Channels take the place of tokens: each (batch, heads, width, tokens).
        q, k, v = (t.transpose(-2, -1) for t in split(self.qkv(x), self.num_heads, 3))
        q, k = F.normalize(q, dim=-1) * self.temperature, F.normalize(k, dim=-1)
        if self.fused_attn:
            # scale=1.0: the temperature replaces 1 / sqrt(width). As in timm, there is no dropout here.
            out = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        else:
            out = self.attn_drop((q @ k.transpose(-2, -1)).softmax(dim=-1)) @ v
        return project(self, merge(out.transpose(-2, -1)))


class PrunedCrossAttention(CrossAttention):
    """CrossViT's attention of one branch's class token to the other branch's tokens, with any number of heads.

    timm's forward takes the head size as hidden size / num_heads and reshapes the joined heads to the hidden size. This
    forward takes both from the tensors.
    """

    # As in timm, which computes the map itself here. The class attribute is read by `attend`.
    fused_attn = False

    def forward(self, x: Tensor) -> Tensor:
        """Takes the class token and the other branch's tokens (batch, tokens, dim), and returns (batch, 1, dim)."""
        # q (batch, heads, 1, width), k and v (batch, heads, tokens, width)
        q, k, v = (split(t, self.num_heads)[0] for t in (self.wq(x[:, :1]), self.wk(x), self.wv(x)))
        return project(self, merge(attend(self, q, k, v)))


class PrunedMHSA(MHSA):
    """ConViT's plain attention with any number of heads.

    timm's forward takes the head size as hidden size / num_heads and reshapes the joined heads to the hidden size. This
    forward takes both from the tensors.
    """

    # As in timm, which computes the map itself here. The class attribute is read by `attend`.
    fused_attn = False

    def forward(self, x: Tensor) -> Tensor:
        """Takes tokens (batch, tokens, dim) and returns the same shape."""
        return project(self, merge(attend(self, *split(self.qkv(x), self.num_heads, 3))))


class PrunedGPSA(GPSA):
    """ConViT's gated positional attention with any number of heads (d'Ascoli et al., ICML 2021, equation 5).

    A gate of each head weighs content against position. timm's forward takes the head size as hidden size / num_heads
    and reshapes the joined heads to the hidden size. This forward takes both from the tensors.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Takes tokens (batch, tokens, dim) and returns the same shape."""
        # As in timm: relative positions are made again when the number of tokens changes.
        if self.rel_indices is None or self.rel_indices.shape[1] != x.shape[1]:
            self.rel_indices = self.get_rel_indices(x.shape[1])
        return project(self, merge(self.get_attention(x) @ split(self.v(x), self.num_heads)[0]))

    def get_attention(self, x: Tensor) -> Tensor:
        """Returns the attention map (batch, heads, tokens, tokens)."""
        q, k = split(self.qk(x), self.num_heads, 2)
        content = ((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1)
        position = self.pos_proj(self.rel_indices).permute(0, 3, 1, 2).softmax(dim=-1)  # (1, heads, tokens, tokens)
        gate = self.gating_param.sigmoid().view(1, -1, 1, 1)
        mixed = (1.0 - gate) * content + gate * position
        return self.attn_drop(mixed / mixed.sum(dim=-1, keepdim=True))

"""torch.nn.MultiheadAttention, which nn.Transformer and its layers, torchvision's ViT and many others are built of."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xprune.adapters.declarative import Units
from xprune.adapters.parts import Also, Forwards, Stream
from xprune.modules.torch_private import NoFastPath


class HeadedAttention(NoFastPath, nn.MultiheadAttention):
    """nn.MultiheadAttention of any number of heads, 0 too, which need not fill `embed_dim`; it calls its `out_proj`.

    torch's own passes the weight of `out_proj` to a function, so that no hook on that layer ever fires.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See torch.nn.MultiheadAttention. Weights are averaged over the heads that are there."""
        if query.is_nested:
            return self._nested(query), None
        swap, alone = query.dim() == 3 and not self.batch_first, query.dim() == 2
        if swap or alone:  # from here on (batch, tokens, features)
            query, key, value = (x.transpose(0, 1) if swap else x[None] for x in (query, key, value))
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask: give attn_mask too.")
        causal = is_causal and key_padding_mask is None and not need_weights
        q, k, v = self._project(query, key, value)
        mask = None if causal else self._mask(query, key, attn_mask, key_padding_mask)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if not self.num_heads:
            out = v.new_zeros(*q.shape[:3], 0)
        elif need_weights:
            scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5  # (batch, heads, targets, sources)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout, self.training)
            out = weights @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal)
        out = self.out_proj(out.transpose(1, 2).flatten(2))  # (batch, targets, embed_dim)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if alone:
            return out[0], None if weights is None else weights[0]
        return out.transpose(0, 1) if swap else out, weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """q, k and v, each (batch, heads, tokens, head_dim), with the tokens that bias_k and add_zero_attn add."""
        packed: Any = self.in_proj_weight  # annotated as never None, which is wrong
        apart = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        matrices = apart if packed is None else packed.chunk(3)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        made = [F.linear(x, w, b) for x, w, b in zip((query, key, value), matrices, biases, strict=True)]
        for index, added in ((1, self.bias_k), (2, self.bias_v)):
            if added is not None:
                made[index] = torch.cat([made[index], added.expand(len(key), 1, -1)], 1)
        if self.add_zero_attn:
            made[1:] = (F.pad(x, (0, 0, 0, 1)) for x in made[1:])
        return [x.view(len(x), x.shape[1], self.num_heads, self.head_dim).transpose(1, 2) for x in made]

    def _mask(self, query: Tensor, key: Tensor, attn: Tensor | None, padding: Tensor | None) -> Tensor | None:
        """What is added to the scores, from both masks: broadcastable to (batch, heads, targets, sources)."""
        (batch, targets, _), sources = query.shape, key.shape[1]
        if attn is not None and attn.dim() == 3:
            if len(attn) != batch * self.num_heads:
                raise RuntimeError(
                    f"attn_mask of shape {tuple(attn.shape)} has a mask for each head, and {self.num_heads} heads are "
                    f"left: wanted {(batch * self.num_heads, targets, sources)}, or one mask for all, "
                    f"{(targets, sources)}."
                )
            attn = attn.view(batch, self.num_heads, targets, sources)
        if padding is not None:
            padding = padding.view(batch, 1, 1, sources)
        made = [_added(mask, query.dtype) for mask in (attn, padding) if mask is not None]
        if not made:
            return None
        extra = (self.bias_k is not None) + bool(self.add_zero_attn)  # tokens that anything may attend to
        return F.pad(made[0] if len(made) == 1 else made[0] + made[1], (0, extra))

    def _nested(self, x: Tensor) -> Tensor:
        """Self-attention over the nested tensor that nn.TransformerEncoder makes of a padded batch, in inference."""
        counts = [len(row) for row in x.unbind()]
        lengths = torch.tensor(counts, device=x.device)
        padded = x.to_padded_tensor(0.0)  # (batch, tokens, features)
        there = torch.arange(padded.shape[1], device=x.device) < lengths[:, None]
        out, _ = self(padded, padded, padded, key_padding_mask=~there, need_weights=False)
        return torch.nested.as_nested_tensor([row[:count] for row, count in zip(out, counts, strict=True)])


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to add to scores: a boolean one is -inf where it is True."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask


TORCH_NN = (
    Units(
        "torch-attention",
        ("torch.nn.modules.activation.MultiheadAttention",),
        (("in_proj_weight", 3), ("q_proj_weight", 1), ("k_proj_weight", 1), ("v_proj_weight", 1), ("in_proj_bias", 3)),
        writer="out_proj",
        also=Also(tensors=(("bias_k", 2), ("bias_v", 2))),
        forwards=Forwards(gated=HeadedAttention, pruned=HeadedAttention, removed=HeadedAttention),
        stream=Stream(counts=("embed_dim", "kdim", "vdim")),
    ),
)

"""The adapter for torch.nn.MultiheadAttention, which the layers of nn.Transformer and torchvision's ViT contain."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xprune.adapters.declarative import Units
from xprune.adapters.parts import Also, Forwards, Stream
from xprune.modules.torch_private import NoFastPath


class HeadedAttention(NoFastPath, nn.MultiheadAttention):
    """A form of nn.MultiheadAttention for any number of heads, also 0, that calls `out_proj` as a layer.

    The forward of torch works only if num_heads x head_dim = embed_dim, which is wrong after heads were removed. It
    also passes the weight of `out_proj` to a function and does not call `out_proj`. So a hook on `out_proj` never runs,
    and its input cannot be gated. This forward reads the number of heads from `num_heads` and calls `out_proj`. As long
    as no head was removed, it returns the same as the forward of torch.

    Example:
        >>> attention, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(1, 3, 8)
        >>> before, _ = attention(x, x, x)
        >>> attention.__class__ = HeadedAttention
        >>> after, _ = attention(x, x, x)
        >>> torch.allclose(before, after, atol=1e-6)
        True
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
        """Computes attention. The arguments are those of torch.nn.MultiheadAttention.

        Returns:
            (output, attention weights). The attention weights are the mean over the remaining heads, or those of each
            remaining head if `average_attn_weights` is False. They are None if `need_weights` is False or if no heads
            remain.

        Raises:
            RuntimeError: `is_causal` is True and there is no `attn_mask`. Or `attn_mask` has a mask for each head, but
                their number is not the number of remaining heads.
        """
        if query.is_nested:
            return self._nested(query), None
        tokens_first = query.dim() == 3 and not self.batch_first
        one_sample = query.dim() == 2
        if tokens_first or one_sample:  # from here on (batch, tokens, features)
            query, key, value = (x.transpose(0, 1) if tokens_first else x[None] for x in (query, key, value))
        if is_causal and attn_mask is None:  # as in torch
            raise RuntimeError(
                "is_causal=True says that attn_mask is causal, but attn_mask is None. Give attn_mask too."
            )
        # The function of torch makes the causal mask itself. This works only without another mask and without weights.
        causal = is_causal and key_padding_mask is None and not need_weights
        q, k, v = self._project(query, key, value)  # each (batch, heads, tokens, head_dim)
        mask = None if causal else self._mask(query, key, attn_mask, key_padding_mask)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if not self.num_heads:
            # q has the shape (batch, 0, targets, head_dim). `out` has no features, so out_proj returns its bias.
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
        if one_sample:
            return out[0], None if weights is None else weights[0]
        return out.transpose(0, 1) if tokens_first else out, weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Returns q, k and v, each (batch, heads, tokens, head_dim).

        If the module has `bias_k` and `bias_v`, k and v have one additional token. With `add_zero_attn` they have one
        more.
        """
        # torch stores one weight if query, key and value have the same size, else three. Then in_proj_weight is None,
        # although its type in torch does not say so.
        packed: Any = self.in_proj_weight
        separate = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        matrices = separate if packed is None else packed.chunk(3)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        projected = [F.linear(x, w, b) for x, w, b in zip((query, key, value), matrices, biases, strict=True)]
        for index, token in ((1, self.bias_k), (2, self.bias_v)):
            if token is not None:
                projected[index] = torch.cat([projected[index], token.expand(len(key), 1, -1)], 1)
        if self.add_zero_attn:
            projected[1:] = (F.pad(x, (0, 0, 0, 1)) for x in projected[1:])
        # Both sizes are given. torch cannot compute a size of -1 if there are 0 heads, because the tensor has no
        # entries.
        return [x.view(len(x), x.shape[1], self.num_heads, self.head_dim).transpose(1, 2) for x in projected]

    def _mask(self, query: Tensor, key: Tensor, attn: Tensor | None, padding: Tensor | None) -> Tensor | None:
        """Returns both masks as one tensor that is added to the scores, or None if there is no mask.

        The tensor broadcasts to (batch, heads, targets, sources).
        """
        (batch, targets, _), sources = query.shape, key.shape[1]
        if attn is not None and attn.dim() == 3:
            if len(attn) != batch * self.num_heads:
                raise RuntimeError(
                    f"attn_mask of shape {tuple(attn.shape)} holds a mask for each head, but {self.num_heads} heads "
                    f"remain. Give masks for these heads, of shape {(batch * self.num_heads, targets, sources)}, or "
                    f"one mask for all heads, of shape {(targets, sources)}."
                )
            attn = attn.view(batch, self.num_heads, targets, sources)
        if padding is not None:
            padding = padding.view(batch, 1, 1, sources)
        masks = [_as_addend(mask, query.dtype) for mask in (attn, padding) if mask is not None]
        if not masks:
            return None
        # The masks have no entries for the tokens that _project appends. All targets may attend to these tokens.
        extra = (self.bias_k is not None) + bool(self.add_zero_attn)
        return F.pad(masks[0] if len(masks) == 1 else masks[0] + masks[1], (0, extra))

    def _nested(self, x: Tensor) -> Tensor:
        """Computes self-attention over a nested tensor, which holds samples with different numbers of tokens.

        nn.TransformerEncoder makes a nested tensor from a padded batch, in eval mode and without gradients.
        """
        counts = [len(row) for row in x.unbind()]
        lengths = torch.tensor(counts, device=x.device)
        padded = x.to_padded_tensor(0.0)  # (batch, tokens, features)
        there = torch.arange(padded.shape[1], device=x.device) < lengths[:, None]
        out, _ = self(padded, padded, padded, key_padding_mask=~there, need_weights=False)
        return torch.nested.as_nested_tensor([row[:count] for row, count in zip(out, counts, strict=True)])


def _as_addend(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a mask that can be added to scores. In a boolean mask, True becomes -inf and False becomes 0."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask


TORCH_NN = (
    Units(
        "torch-attention",
        ("torch.nn.modules.activation.MultiheadAttention",),
        # These parameters belong to no layer. A module has either in_proj_weight, or the three separate weights. The
        # others are None.
        (("in_proj_weight", 3), ("q_proj_weight", 1), ("k_proj_weight", 1), ("v_proj_weight", 1), ("in_proj_bias", 3)),
        consumer="out_proj",
        also=Also(tensors=(("bias_k", 2), ("bias_v", 2))),  # each has the shape (1, 1, embed_dim)
        # HeadedAttention also runs with 0 heads and returns a tuple. `Removed` returns no tuple, so it cannot replace
        # it.
        forwards=Forwards(gated=HeadedAttention, pruned=HeadedAttention, removed=HeadedAttention),
        stream=Stream(attributes=("embed_dim", "kdim", "vdim")),
    ),
)

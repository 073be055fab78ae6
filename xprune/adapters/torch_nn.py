"""The adapter of torch.nn.MultiheadAttention, which nn.Transformer's layers and torchvision's ViT contain."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xprune.adapters.declarative import Units
from xprune.adapters.parts import Also, Forwards, Stream
from xprune.modules.torch_private import NoFastPath


class HeadedAttention(NoFastPath, nn.MultiheadAttention):
    """nn.MultiheadAttention with any number of heads, which may be 0, and with a call of `out_proj`.

    torch's forward assumes that the heads fill the hidden size: num_heads x head_dim = embed_dim. It also hands the
    weight of `out_proj` to a function, so a hook on that layer never runs and its input cannot be gated. This forward
    reads the number of heads from `num_heads` and calls `out_proj` as a layer. It returns the same as torch's.

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
        """Computes attention. Arguments are those of torch.nn.MultiheadAttention.

        Returns:
            The output, and the attention weights. Weights are averaged over the heads that are left, unless
            `average_attn_weights` is False. They are None if `need_weights` is False, and if no heads are left.

        Raises:
            RuntimeError: `is_causal` is True without an `attn_mask`, or `attn_mask` has another number of heads than
                are left.
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
        # The function below makes the causal mask itself, but only if no other mask is needed and no weights are.
        causal = is_causal and key_padding_mask is None and not need_weights
        q, k, v = self._project(query, key, value)  # each (batch, heads, tokens, head_dim)
        mask = None if causal else self._mask(query, key, attn_mask, key_padding_mask)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if not self.num_heads:
            # q is (batch, 0, targets, head_dim). Zero features for each target, so that out_proj gives its bias.
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

        k and v have one token more for `bias_k` and `bias_v`, and one more for `add_zero_attn`.
        """
        # torch keeps one packed weight if query, key and value have the same size, otherwise three. torch annotates
        # in_proj_weight as never None, which is wrong.
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
        # Both sizes are given, not -1: with no heads left there are no entries from which to infer one.
        return [x.view(len(x), x.shape[1], self.num_heads, self.head_dim).transpose(1, 2) for x in projected]

    def _mask(self, query: Tensor, key: Tensor, attn: Tensor | None, padding: Tensor | None) -> Tensor | None:
        """Returns both masks as one tensor to add to the scores, or None if there is no mask.

        The tensor broadcasts to (batch, heads, targets, sources).
        """
        (batch, targets, _), sources = query.shape, key.shape[1]
        if attn is not None and attn.dim() == 3:
            if len(attn) != batch * self.num_heads:
                raise RuntimeError(
                    f"attn_mask of shape {tuple(attn.shape)} has a mask for each head, and {self.num_heads} heads are "
                    f"left. Give a mask for each of these, of shape {(batch * self.num_heads, targets, sources)}, or "
                    f"one mask for all heads, of shape {(targets, sources)}."
                )
            attn = attn.view(batch, self.num_heads, targets, sources)
        if padding is not None:
            padding = padding.view(batch, 1, 1, sources)
        masks = [_as_addend(mask, query.dtype) for mask in (attn, padding) if mask is not None]
        if not masks:
            return None
        # The tokens that _project appends are in no mask. All targets may attend to them.
        extra = (self.bias_k is not None) + bool(self.add_zero_attn)
        return F.pad(masks[0] if len(masks) == 1 else masks[0] + masks[1], (0, extra))

    def _nested(self, x: Tensor) -> Tensor:
        """Returns self-attention over a nested tensor, to which nn.TransformerEncoder packs a padded batch.

        It does so in eval mode without gradients. This is the nested form of a batch: samples of several lengths.
        """
        counts = [len(row) for row in x.unbind()]
        lengths = torch.tensor(counts, device=x.device)
        padded = x.to_padded_tensor(0.0)  # (batch, tokens, features)
        there = torch.arange(padded.shape[1], device=x.device) < lengths[:, None]
        out, _ = self(padded, padded, padded, key_padding_mask=~there, need_weights=False)
        return torch.nested.as_nested_tensor([row[:count] for row, count in zip(out, counts, strict=True)])


def _as_addend(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a mask that can be added to scores. A boolean mask becomes -inf where it is True, and 0 elsewhere."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask


TORCH_NN = (
    Units(
        "torch-attention",
        ("torch.nn.modules.activation.MultiheadAttention",),
        # Bare parameters. A module has either the packed weight or the three others, the rest are None.
        (("in_proj_weight", 3), ("q_proj_weight", 1), ("k_proj_weight", 1), ("v_proj_weight", 1), ("in_proj_bias", 3)),
        consumer="out_proj",
        also=Also(tensors=(("bias_k", 2), ("bias_v", 2))),  # each (1, 1, embed_dim)
        # HeadedAttention runs with 0 heads. It stays then, because it returns a tuple that `Removed` does not return.
        forwards=Forwards(gated=HeadedAttention, pruned=HeadedAttention, removed=HeadedAttention),
        stream=Stream(attributes=("embed_dim", "kdim", "vdim")),
    ),
)

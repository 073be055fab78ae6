"""The replacement forward for the attention of timm's SwinV2, which works with any number of heads."""

import math
from typing import Any

import torch
from timm.models.swin_transformer_v2 import WindowAttention
from torch import Tensor
from torch.nn import functional as F


class PrunedWindowAttentionV2(WindowAttention):
    """The window attention of timm's SwinV2, for any number of heads.

    timm's forward reshapes the concatenated heads to (rows, tokens, hidden size), which is wrong after heads were
    removed. This forward reads the size of the concatenated heads from the tensor.

    Source: Liu et al., Swin Transformer V2, CVPR 2022, section 3 (cosine attention with a log-spaced continuous
    position bias).
    """

    relative_coords_table: Tensor
    relative_position_index: Tensor

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Computes attention within windows.

        Args:
            x: Windows (batch * windows, tokens, dim).
            mask: Mask (windows, tokens, tokens) for a shifted feature map, which is added to the scores. Or None.

        Returns:
            Tensor (batch * windows, tokens, dim).
        """
        rows, tokens, _ = x.shape
        # k_bias is a buffer of zeros. If the model was built without a bias, all three are None.
        biases: Any = (self.q_bias, self.k_bias, self.v_bias)
        bias = None if self.q_bias is None else torch.cat(biases)
        qkv = F.linear(x, self.qkv.weight, bias).reshape(rows, tokens, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (rows, heads, tokens, width)
        scale = self.logit_scale.clamp(max=math.log(100.0)).exp()  # (heads, 1, 1)
        scores = (
            F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * scale
        )  # (rows, heads, tokens, tokens)
        scores = scores + self._position_bias()
        if mask is not None:
            # All windows of the first sample come first, then all windows of the second sample, and so on.
            windows = mask.shape[0]
            scores = scores.view(-1, windows, self.num_heads, tokens, tokens) + mask[:, None]
            scores = scores.view(-1, self.num_heads, tokens, tokens)
        out = self.attn_drop(scores.softmax(dim=-1)) @ v  # (rows, heads, tokens, width)
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(rows, tokens, -1)))

    def _position_bias(self) -> Tensor:
        """Computes the position bias (heads, tokens, tokens) with the MLP, from log-spaced coordinates."""
        area = self.window_size[0] * self.window_size[1]
        table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)  # (positions, heads)
        bias = table[self.relative_position_index.view(-1)].view(area, area, -1)
        return 16 * bias.permute(2, 0, 1).sigmoid()  # (heads, tokens, tokens)

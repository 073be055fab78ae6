"""Forwards of timm's attentions over windows, maps and pyramids whose heads need not fill the model's width.

Each computes what its base class computes; `xprune.adapters.timm.attend` has the steps they share.
"""

import math
from typing import Any

from timm.models.davit import ChannelAttention, ChannelAttentionV2, WindowAttention
from timm.models.gcvit import WindowAttentionGlobal
from timm.models.nest import Attention as NestAttention
from timm.models.pvt_v2 import Attention as PvtAttention
from timm.models.swin_transformer_v2_cr import WindowMultiHeadAttention
from timm.models.twins import GlobalSubSampleAttn, LocallyGroupedAttn
from timm.models.volo import Attention as VoloAttention
from timm.models.volo import OutlookAttention
from torch import Tensor
from torch.nn import functional as F

from xprune.adapters.timm.attend import attend, left, merge, project, split
from xprune.modules.removed import Removed


class RemovedHieraAttention(Removed):
    """What is left of an attention that pools its queries, `q_stride` to one."""

    def __init__(self, layer: Any, module: Any) -> None:
        super().__init__(layer)
        self.q_stride = module.q_stride

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """x (batch, tokens, features) to (batch, tokens / q_stride, out_features)."""
        return super().forward(x[:, : x.shape[1] // self.q_stride])


class RemovedHieraDetAttention(Removed):
    """What is left of an attention on maps that pools its queries."""

    def __init__(self, layer: Any, module: Any) -> None:
        super().__init__(layer)
        self.q_pool = module.q_pool

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """x (batch, height, width, features) to the pooled height and width, out_features."""
        if self.q_pool is not None:
            x = self.q_pool(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return super().forward(x)


class PrunedPvtAttention(PvtAttention):
    """PVT v2 attention, whose keys and values come from a smaller map."""

    def forward(self, x: Tensor, feat_size: Any) -> Tensor:
        """x (batch, tokens, dim), feat_size (height, width)."""
        (q,) = split(self.q(x), self.num_heads)
        if self.sr is not None:
            image = x.transpose(1, 2).unflatten(2, tuple(feat_size))  # (batch, dim, height, width)
            x = self.sr(image if self.pool is None else self.pool(image)).flatten(2).transpose(1, 2)
            x = self.norm(x)
            x = x if self.act is None else self.act(x)
        return project(self, merge(attend(self, q, *split(self.kv(x), self.num_heads, 2))))


class PrunedGlobalSubSampleAttn(GlobalSubSampleAttn):
    """Twins' attention to a smaller map."""

    def forward(self, x: Tensor, size: Any) -> Tensor:
        """x (batch, tokens, dim), size (height, width)."""
        (q,) = split(self.q(x), self.num_heads)
        if self.sr is not None:
            x = self.sr(x.transpose(1, 2).unflatten(2, tuple(size))).flatten(2).transpose(1, 2)
            x = self.norm(x)
        return project(self, merge(attend(self, q, *split(self.kv(x), self.num_heads, 2))))


class PrunedLocallyGroupedAttn(LocallyGroupedAttn):
    """Twins' attention within windows of ws x ws."""

    def forward(self, x: Tensor, size: Any) -> Tensor:
        """x (batch, tokens, dim), size (height, width)."""
        (height, width), side = size, self.ws
        x = x.unflatten(1, (height, width))
        x = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))
        rows, columns = x.shape[1] // side, x.shape[2] // side
        x = x.unflatten(1, (rows, side)).unflatten(3, (columns, side)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        x = merge(attend(self, *split(self.qkv(x), self.num_heads, 3)))  # (batch, windows, ws * ws, heads * width)
        x = x.unflatten(2, (side, side)).unflatten(1, (rows, columns)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return project(self, x[:, :height, :width].flatten(1, 2))


class PrunedVoloAttention(VoloAttention):
    """VOLO's attention over a map."""

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, height, width, dim)."""
        out = merge(attend(self, *split(self.qkv(x.flatten(1, 2)), self.num_heads, 3)))
        return project(self, out.unflatten(1, x.shape[1:3]))


class PrunedOutlookAttention(OutlookAttention):
    """Outlook attention: a token says how its neighbours attend to each other (Yuan et al., arXiv 2106.13112)."""

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, height, width, dim)."""
        size, heads, kernel = x.shape[1:3], self.num_heads, self.kernel_size**2
        channels_first = x.permute(0, 3, 1, 2)
        v = self.unfold(self.v(x).permute(0, 3, 1, 2))  # (batch, heads * width * kernel, places)
        v = v.unflatten(1, (heads, -1, kernel)).permute(0, 1, 4, 3, 2)  # (batch, heads, places, kernel, width)
        maps = self.attn(self.pool(channels_first).permute(0, 2, 3, 1)).flatten(1, 2)
        maps = maps.unflatten(2, (heads, kernel, kernel)).transpose(1, 2)  # (batch, heads, places, kernel, kernel)
        maps = self.attn_drop((maps * self.scale).softmax(dim=-1))
        out = (maps @ v).permute(0, 1, 4, 3, 2).flatten(1, 3)
        out = F.fold(out, size, kernel_size=self.kernel_size, padding=self.padding, stride=self.stride)
        return project(self, out.permute(0, 2, 3, 1))


class PrunedNestAttention(NestAttention):
    """Attention within image blocks, whose heads are interleaved in what it hands on."""

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, blocks, tokens, dim)."""
        q, k, v = (t.transpose(1, 2) for t in split(self.qkv(x), self.num_heads, 3))  # (batch, heads, blocks, ...)
        return project(self, attend(self, q, k, v).permute(0, 2, 3, 4, 1).flatten(3))


class PrunedDavitWindowAttention(WindowAttention):
    """DaViT's attention within windows."""

    def forward(self, x: Tensor) -> Tensor:
        """x (windows * batch, tokens, dim)."""
        return project(self, merge(attend(self, *split(self.qkv(x), self.num_heads, 3))))


class PrunedChannelAttention(ChannelAttention):
    """DaViT's attention of channels to channels."""

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, tokens, dim)."""
        q, k, v = split(self.qkv(x), self.num_heads, 3)
        weights = ((k * self.scale).transpose(-2, -1) @ v).softmax(dim=-1)  # (batch, heads, width, width)
        return project(self, merge(q @ weights.transpose(-2, -1)))


class PrunedChannelAttentionV2(ChannelAttentionV2):
    """The channel attention of later DaViTs, whose scale may depend on the number of tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, tokens, dim)."""
        q, k, v = split(self.qkv(x), self.groups, 3)
        scale = (x.shape[1] if self.dynamic_scale else self.head_dim) ** -0.5
        weights = ((q * scale).transpose(-2, -1) @ k).softmax(dim=-1)  # (batch, heads, width, width)
        return project(self, merge(v @ weights.transpose(-2, -1)))


class PrunedWindowAttentionCr(WindowMultiHeadAttention):
    """SwinV2's cosine attention within windows, as timm's `swinv2_cr` has it."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (batch * windows, tokens, dim), mask (windows, tokens, tokens) or None."""
        q, k, v = split(self.qkv(x), self.num_heads, 3)
        scale = self.logit_scale.view(-1, 1, 1).clamp(max=math.log(100.0)).exp()
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * scale
        scores = scores + self.position_bias()
        if mask is not None:
            scores = (scores.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
        return project(self, merge(self.attn_drop(scores.softmax(dim=-1)) @ v))

    def position_bias(self) -> Tensor:
        """Returns the bias of positions to each other, (1, heads, tokens, tokens)."""
        parts: Any = self
        tokens = self.window_size[0] * self.window_size[1]
        return parts.meta_mlp(parts.relative_coordinates_log).T.reshape(1, self.num_heads, tokens, tokens)


class PrunedWindowAttentionGlobal(WindowAttentionGlobal):
    """GCViT's attention within windows, whose queries may come from outside, for the heads of all blocks of a stage."""

    fused_attn = False  # as in timm
    built: tuple[int, ...] | None = None

    def forward(self, x: Tensor, q_global: Tensor | None = None) -> Tensor:
        """x (batch * windows, tokens, dim), q_global (batch, height, width, heads built * head_dim)."""
        if self.use_global and q_global is not None:
            k, v = split(self.qkv(x), self.num_heads, 2)
            q: Any = (
                q_global.flatten(1, -2).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            )  # (batch, heads built, tokens, width)
            q = left(q, self.built, 1).repeat_interleave(len(x) // len(q), dim=0)
        else:
            q, k, v = split(self.qkv(x), self.num_heads, 3)
        return project(self, merge(attend(self, q, k, v, self.rel_pos.get_bias())))

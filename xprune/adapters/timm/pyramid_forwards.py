"""Replacement forwards for timm's attentions over windows and feature maps, which work with any number of heads.

timm's forwards reshape to C or C // num_heads, where C is the hidden size. This is wrong after heads were removed.
These forwards compute the head size from the tensors. As long as no head was removed, each of them computes the same as
the forward of its base class. `xprune.adapters.timm.attend` has the functions that they share.
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

from xprune.adapters.timm.attend import attend, keep_heads, merge, project, split
from xprune.modules.removed import Removed


class RemovedHieraAttention(Removed):
    """Replaces an attention of Hiera that lost all its heads. It returns one token for each `q_stride` input tokens."""

    def __init__(self, layer: Any, module: Any) -> None:
        super().__init__(layer)
        self.q_stride = module.q_stride

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Maps tokens (batch, tokens, features) to the bias (batch, tokens / q_stride, out_features)."""
        # Each token of the output is the same bias. So only the number of tokens in the input matters.
        return super().forward(x[:, : x.shape[1] // self.q_stride])


class RemovedHieraDetAttention(Removed):
    """Replaces an attention of SAM 2's Hiera that lost all its heads. If it has a `q_pool`, its output is smaller."""

    def __init__(self, layer: Any, module: Any) -> None:
        super().__init__(layer)
        self.q_pool = module.q_pool

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Maps features (batch, height, width, features) to the bias (batch, new height, new width, out_features)."""
        if self.q_pool is not None:
            x = self.q_pool(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return super().forward(x)


class PrunedPvtAttention(PvtAttention):
    """PVT v2's attention, whose keys and values come from a smaller feature map, for any number of heads.

    timm's forward reshapes the concatenated heads to the hidden size, which is wrong after heads were removed. This
    forward reads the size of the concatenated heads from the tensor.
    """

    def forward(self, x: Tensor, feat_size: Any) -> Tensor:
        """Computes attention for tokens (batch, tokens, dim) of a feature map of `feat_size` (height, width)."""
        (q,) = split(self.q(x), self.num_heads)
        if self.sr is not None:
            image = x.transpose(1, 2).unflatten(2, tuple(feat_size))  # (batch, dim, height, width)
            x = self.sr(image if self.pool is None else self.pool(image)).flatten(2).transpose(1, 2)
            x = self.norm(x)
            x = x if self.act is None else self.act(x)
        return project(self, merge(attend(self, q, *split(self.kv(x), self.num_heads, 2))))


class PrunedGlobalSubSampleAttn(GlobalSubSampleAttn):
    """Twins' attention to a smaller feature map, for any number of heads.

    timm's forward computes the head size as hidden size / num_heads and reshapes the concatenated heads to the hidden
    size. Both are wrong after heads were removed. This forward computes both sizes from the tensors.
    """

    def forward(self, x: Tensor, size: Any) -> Tensor:
        """Computes attention for tokens (batch, tokens, dim) of a feature map of `size` (height, width)."""
        (q,) = split(self.q(x), self.num_heads)
        if self.sr is not None:
            x = self.sr(x.transpose(1, 2).unflatten(2, tuple(size))).flatten(2).transpose(1, 2)
            x = self.norm(x)
        return project(self, merge(attend(self, q, *split(self.kv(x), self.num_heads, 2))))


class PrunedLocallyGroupedAttn(LocallyGroupedAttn):
    """Twins' attention within windows of ws x ws tokens, for any number of heads.

    timm's forward computes the head size as hidden size / num_heads and reshapes the concatenated heads to the hidden
    size. Both are wrong after heads were removed. This forward computes both sizes from the tensors.
    """

    def forward(self, x: Tensor, size: Any) -> Tensor:
        """Computes attention for tokens (batch, tokens, dim) of a feature map of `size` (height, width)."""
        (height, width), side = size, self.ws
        x = x.unflatten(1, (height, width))
        # Zeros are added at the right and at the bottom, so that height and width are multiples of the window size.
        x = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))
        rows, columns = x.shape[1] // side, x.shape[2] // side
        # (batch, rows, side, columns, side, dim) -> (batch, windows, tokens, dim)
        x = x.unflatten(1, (rows, side)).unflatten(3, (columns, side)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        x = merge(attend(self, *split(self.qkv(x), self.num_heads, 3)))  # (batch, windows, ws * ws, heads * width)
        # (batch, rows, columns, side, side, heads * width) -> (batch, height, width, heads * width)
        x = x.unflatten(2, (side, side)).unflatten(1, (rows, columns)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return project(self, x[:, :height, :width].flatten(1, 2))


class PrunedVoloAttention(VoloAttention):
    """VOLO's attention over a feature map, for any number of heads.

    timm's forward computes the head size as hidden size / num_heads and reshapes the concatenated heads to the hidden
    size. Both are wrong after heads were removed. This forward computes both sizes from the tensors.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Computes attention for feature maps (batch, height, width, dim). The output has the same shape."""
        out = merge(attend(self, *split(self.qkv(x.flatten(1, 2)), self.num_heads, 3)))
        return project(self, out.unflatten(1, x.shape[1:3]))


class PrunedOutlookAttention(OutlookAttention):
    """VOLO's outlook attention (Yuan et al., arXiv 2106.13112), for any number of heads.

    In outlook attention, a linear layer computes the attention map of each neighbourhood from the features of its
    central token. timm's forward computes the head size as hidden size / num_heads and reshapes the concatenated heads
    to the hidden size. Both are wrong after heads were removed. This forward computes both sizes from the tensors.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Computes attention for feature maps (batch, height, width, dim). The output has the same shape."""
        # `kernel` is the number of tokens in a neighbourhood. `places` is the number of neighbourhoods. If there is a
        # stride, there are fewer neighbourhoods than tokens.
        size, heads, kernel = x.shape[1:3], self.num_heads, self.kernel_size**2
        channels_first = x.permute(0, 3, 1, 2)
        v = self.unfold(self.v(x).permute(0, 3, 1, 2))  # (batch, heads * width * kernel, places)
        v = v.unflatten(1, (heads, -1, kernel)).permute(0, 1, 4, 3, 2)  # (batch, heads, places, kernel, width)
        # (batch, places, heads * kernel * kernel)
        maps = self.attn(self.pool(channels_first).permute(0, 2, 3, 1)).flatten(1, 2)
        maps = maps.unflatten(2, (heads, kernel, kernel)).transpose(1, 2)  # (batch, heads, places, kernel, kernel)
        maps = self.attn_drop((maps * self.scale).softmax(dim=-1))
        out = (maps @ v).permute(0, 1, 4, 3, 2).flatten(1, 3)  # (batch, heads * width * kernel, places)
        # A token belongs to several neighbourhoods. `fold` adds up their outputs: (batch, heads * width, height,
        # width).
        out = F.fold(out, size, kernel_size=self.kernel_size, padding=self.padding, stride=self.stride)
        return project(self, out.permute(0, 2, 3, 1))


class PrunedNestAttention(NestAttention):
    """NesT's attention within blocks of an image, for any number of heads.

    timm's forward computes the head size as hidden size / num_heads and reshapes the concatenated heads to the hidden
    size. Both are wrong after heads were removed. This forward computes both sizes from the tensors. As in timm, the
    heads are concatenated feature by feature ("width-major").
    """

    def forward(self, x: Tensor) -> Tensor:
        """Computes attention for tokens (batch, blocks, tokens, dim). The output has the same shape."""
        # each (batch, heads, blocks, tokens, width)
        q, k, v = (t.transpose(1, 2) for t in split(self.qkv(x), self.num_heads, 3))
        # (batch, blocks, tokens, width, heads) -> (batch, blocks, tokens, width * heads)
        return project(self, attend(self, q, k, v).permute(0, 2, 3, 4, 1).flatten(3))


class PrunedDavitWindowAttention(WindowAttention):
    """DaViT's attention within windows, for any number of heads.

    timm's forward computes the head size as hidden size / num_heads and reshapes the concatenated heads to the hidden
    size. Both are wrong after heads were removed. This forward computes both sizes from the tensors.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Computes attention for windows (batch * windows, tokens, dim). The output has the same shape."""
        return project(self, merge(attend(self, *split(self.qkv(x), self.num_heads, 3))))


class PrunedChannelAttention(ChannelAttention):
    """DaViT's attention of channels to channels, for any number of heads.

    timm's forward computes the head size as hidden size / num_heads and reshapes the concatenated heads to the hidden
    size. Both are wrong after heads were removed. This forward computes both sizes from the tensors.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Computes attention for tokens (batch, tokens, dim). The output has the same shape."""
        q, k, v = split(self.qkv(x), self.num_heads, 3)  # each (batch, heads, tokens, width)
        # As in timm, keys and values make the attention map, and the map mixes the queries.
        weights = ((k * self.scale).transpose(-2, -1) @ v).softmax(dim=-1)  # (batch, heads, width, width)
        return project(self, merge(q @ weights.transpose(-2, -1)))


class PrunedChannelAttentionV2(ChannelAttentionV2):
    """The channel attention of DaViT's second version, for any number of heads.

    timm's forward computes the head size as hidden size / groups and reshapes the concatenated heads to the hidden
    size. Both are wrong after heads were removed. This forward computes both sizes from the tensors. If `dynamic_scale`
    is True, the scale depends on the number of tokens.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Computes attention for tokens (batch, tokens, dim). The output has the same shape."""
        q, k, v = split(self.qkv(x), self.groups, 3)  # each (batch, heads, tokens, width)
        scale = (x.shape[1] if self.dynamic_scale else self.head_dim) ** -0.5
        weights = ((q * scale).transpose(-2, -1) @ k).softmax(dim=-1)  # (batch, heads, width, width)
        return project(self, merge(v @ weights.transpose(-2, -1)))


class PrunedWindowAttentionCr(WindowMultiHeadAttention):
    """The cosine attention within windows of timm's `swinv2_cr`, for any number of heads.

    timm's forward computes the head size as hidden size / num_heads, which is wrong after heads were removed. This
    forward computes the head size from the tensor.
    """

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Computes attention within windows.

        Args:
            x: Windows (batch * windows, tokens, dim).
            mask: Mask (windows, tokens, tokens) for a shifted feature map, which is added to the scores. Or None.

        Returns:
            Tensor (batch * windows, tokens, dim).
        """
        q, k, v = split(self.qkv(x), self.num_heads, 3)  # each (batch * windows, heads, tokens, width)
        scale = self.logit_scale.view(-1, 1, 1).clamp(max=math.log(100.0)).exp()  # (heads, 1, 1)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * scale
        scores = scores + self.position_bias()
        if mask is not None:
            # There is one mask for each window of a feature map. It is the same for all samples and heads.
            scores = (scores.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
        return project(self, merge(self.attn_drop(scores.softmax(dim=-1)) @ v))

    def position_bias(self) -> Tensor:
        """Returns what a small MLP adds to the scores for the distance of two tokens, (1, heads, tokens, tokens)."""
        parts: Any = self  # for mypy, to which timm's layers are tensors or modules
        tokens = self.window_size[0] * self.window_size[1]
        return parts.meta_mlp(parts.relative_coordinates_log).T.reshape(1, self.num_heads, tokens, tokens)


class PrunedWindowAttentionGlobal(WindowAttentionGlobal):
    """GCViT's attention within windows, for any number of heads.

    In every second block, the queries come from outside of the block: the stage makes queries for all heads of the
    dense model, and passes them to its blocks. timm's forward reshapes these queries to `num_heads` heads, and the
    concatenated heads to the hidden size. Both are wrong after heads were removed. This forward selects the queries of
    the remaining heads, and reads the size of the concatenated heads from the tensor.
    """

    # As in timm, this attention does not use torch's fused function. `attend` reads this class attribute.
    fused_attn = False
    built: tuple[int, ...] | None = None
    """Indices of the remaining heads, see `Forwards.built`. None if no head was removed."""

    def forward(self, x: Tensor, q_global: Tensor | None = None) -> Tensor:
        """Computes attention within windows.

        Args:
            x: Windows (batch * windows, tokens, dim).
            q_global: Queries of one window (batch, height, width, heads of the dense model * head_dim), or None.

        Returns:
            Tensor (batch * windows, tokens, dim).
        """
        if self.use_global and q_global is not None:
            k, v = split(self.qkv(x), self.num_heads, 2)
            # (batch, heads of the dense model, tokens, width)
            q: Any = q_global.flatten(1, -2).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            # All windows of a sample use the same queries. The windows of one sample are next to each other.
            q = keep_heads(q, self.built, 1).repeat_interleave(len(x) // len(q), dim=0)
        else:
            q, k, v = split(self.qkv(x), self.num_heads, 3)
        return project(self, merge(attend(self, q, k, v, self.rel_pos.get_bias())))

"""Adapters for timm modules that have no prunable units, but have to change when channels of the stream are removed.

Some of these modules store the hidden size as an attribute. Others compute their head size from the hidden size of
their input.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from xprune.adapters.declarative import Sized
from xprune.core.interfaces import Adapter
from xprune.core.site import Site, StreamParts


class NarrowTalkingHeadAttn(nn.Module):
    """CaiT's talking-heads attention after channels of the residual stream were removed.

    timm's forward computes the head size as channels of the input / num_heads. If channels are removed and all heads
    stay, this number is too small. This forward computes the head size from the output of `qkv`.
    """

    def forward(self: Any, x: Tensor) -> Tensor:
        """Computes attention for tokens (batch, tokens, channels). The output has the same shape."""
        # each (batch, heads, tokens, head size)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attn = (q * self.scale) @ k.transpose(-2, -1)  # (batch, heads, targets, sources)
        # proj_l and proj_w are linear layers over the heads, so the axis of the heads has to be the last one.
        attn = self.proj_l(attn.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).softmax(-1)
        attn = self.attn_drop(self.proj_w(attn.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        return self.proj_drop(self.proj((attn @ v).transpose(1, 2).flatten(2)))


class NarrowFactorAttn(nn.Module):
    """CoaT's factorised attention after channels of the residual stream were removed.

    timm's forward computes the head size as channels of the input / num_heads. If channels are removed and all heads
    stay, this number is too small. This forward computes the head size from the output of `qkv`.
    """

    def forward(self: Any, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Computes attention for the tokens (batch, tokens, channels) of feature maps of this (height, width)."""
        # each (batch, heads, tokens, head size)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        # The product of keys and values comes first, so no (tokens, tokens) attention map is needed. crpe adds the
        # position.
        mixed = self.scale * (q @ (k.softmax(2).transpose(-1, -2) @ v)) + self.crpe(q, v, size=size)
        return self.proj_drop(self.proj(mixed.transpose(1, 2).flatten(2)))


@dataclass(frozen=True)
class Narrow(Adapter):
    """Describes an attention whose heads cannot be removed, so that channels of the stream can be removed.

    When a channel is removed, `qkv` loses a column and `proj` loses a row. All heads stay. The forward of the original
    class computes the head size from its input, so the class changes to `pruned`.

    Args:
        name: Name of the adapter.
        classes: Full names of the classes that the adapter describes.
        pruned: Class of the module after channels were removed. Its forward computes the head size from the weights.

    Example:
        >>> attention = nn.ModuleDict({"qkv": nn.Linear(8, 24), "proj": nn.Linear(8, 8)})
        >>> narrow = Narrow("mine", ("my_package.Attention",), NarrowTalkingHeadAttn)
        >>> narrow.stream_parts("attn", attention).reads
        (('attn.qkv.weight', 1),)
    """

    name: str
    classes: tuple[str, ...]
    pruned: type[nn.Module]

    def site(self, path: str, module: nn.Module) -> Site | None:
        """Returns None, because no head can be removed without the others."""
        return None

    def stream_parts(self, path: str, module: Any) -> StreamParts:
        """Returns the columns of `qkv`, which read the stream, and the rows and bias of `proj`, which write to it."""
        bias = ((f"{path}.proj.bias", 0),) if module.proj.bias is not None else ()
        return StreamParts(((f"{path}.qkv.weight", 1),), ((f"{path}.proj.weight", 0), *bias), ((path, -1),))


STREAMS = (
    # MetaFormer's Scale calls view(self.shape), where shape is (channels,) or (channels, 1, 1).
    Sized("timm-scale", ("timm.models.metaformer.Scale",), ("shape.0",)),
    # InceptionNeXt splits its input into 4 parts. The attribute holds their lengths.
    Sized(
        "timm-inception",
        ("timm.models.inception_next.InceptionDWConv2d",),
        tuple(f"split_indexes.{part}" for part in range(4)),
    ),
    Narrow("timm-talking-heads", ("timm.models.cait.TalkingHeadAttn",), NarrowTalkingHeadAttn),
    Narrow("timm-factor", ("timm.models.coat.FactorAttnConvRelPosEnc",), NarrowFactorAttn),
)

"""Modules of timm that have no units but keep something beside their tensors that shrinks with a residual stream."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from xprune.adapters.declarative import Sized
from xprune.core.interfaces import Adapter
from xprune.core.site import Site, StreamParts


class NarrowTalkingHeadAttn(nn.Module):
    """CaiT's attention between layers of fewer channels than its heads have features; heads talk to each other."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """(batch, tokens, channels), twice."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attn = (q * self.scale) @ k.transpose(-2, -1)  # (batch, heads, targets, sources)
        attn = self.proj_l(attn.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).softmax(-1)
        attn = self.attn_drop(self.proj_w(attn.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        return self.proj_drop(self.proj((attn @ v).transpose(1, 2).flatten(2)))


class NarrowFactorAttn(nn.Module):
    """CoaT's factorised attention between layers of fewer channels than its heads have features."""

    def forward(self: Any, x: Tensor, size: tuple[int, int]) -> Tensor:
        """(batch, tokens, channels), twice."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = self.scale * (q @ (k.softmax(2).transpose(-1, -2) @ v)) + self.crpe(q, v, size=size)
        return self.proj_drop(self.proj(mixed.transpose(1, 2).flatten(2)))


@dataclass(frozen=True)
class Narrow(Adapter):
    """An attention whose heads stay, with a fused `qkv` and a `proj`, whose forward takes its width from its input.

    pruned   the class whose forward takes it from the weights
    """

    name: str
    classes: tuple[str, ...]
    pruned: type[nn.Module]

    def site(self, path: str, module: nn.Module) -> Site | None:
        """None: no head stands alone there."""
        return None

    def stream_parts(self, path: str, module: Any) -> StreamParts:
        """See Adapter.stream_parts."""
        bias = ((f"{path}.proj.bias", 0),) if module.proj.bias is not None else ()
        return StreamParts(((f"{path}.qkv.weight", 1),), ((f"{path}.proj.weight", 0), *bias), ((path, -1),))


STREAMS = (
    Sized("timm-scale", ("timm.models.metaformer.Scale",), ("shape.0",)),
    Sized(
        "timm-inception",
        ("timm.models.inception_next.InceptionDWConv2d",),
        tuple(f"split_indexes.{part}" for part in range(4)),
    ),
    Narrow("timm-talking-heads", ("timm.models.cait.TalkingHeadAttn",), NarrowTalkingHeadAttn),
    Narrow("timm-factor", ("timm.models.coat.FactorAttnConvRelPosEnc",), NarrowFactorAttn),
)

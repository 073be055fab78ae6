"""Modules of timm without prunable units that need an adapter when channels of the residual stream are removed.

Some store the hidden size beside their tensors. Others take their head size from the hidden size of their input.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from xprune.adapters.declarative import Sized
from xprune.core.interfaces import Adapter
from xprune.core.site import Site, StreamParts


class NarrowTalkingHeadAttn(nn.Module):
    """CaiT's talking-heads attention after channels of the residual stream were removed.

    timm's forward takes the head size as channels of the input / num_heads. All heads stay here while channels are
    removed, so that is too small. This forward takes the head size from the output of `qkv`.
    """

    def forward(self: Any, x: Tensor) -> Tensor:
        """Takes tokens (batch, tokens, channels) and returns the same shape."""
        # each (batch, heads, tokens, head size)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attn = (q * self.scale) @ k.transpose(-2, -1)  # (batch, heads, targets, sources)
        # proj_l and proj_w mix the heads, so the heads are put last for them.
        attn = self.proj_l(attn.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).softmax(-1)
        attn = self.attn_drop(self.proj_w(attn.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        return self.proj_drop(self.proj((attn @ v).transpose(1, 2).flatten(2)))


class NarrowFactorAttn(nn.Module):
    """CoaT's factorised attention after channels of the residual stream were removed.

    timm's forward takes the head size as channels of the input / num_heads, see `NarrowTalkingHeadAttn`. This forward
    takes the head size from the output of `qkv`.
    """

    def forward(self: Any, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Takes tokens (batch, tokens, channels) of maps of that size and returns the same shape."""
        # each (batch, heads, tokens, head size)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        # Keys attend over the tokens first, so no (tokens, tokens) map is made. crpe adds the position.
        mixed = self.scale * (q @ (k.softmax(2).transpose(-1, -2) @ v)) + self.crpe(q, v, size=size)
        return self.proj_drop(self.proj(mixed.transpose(1, 2).flatten(2)))


@dataclass(frozen=True)
class Narrow(Adapter):
    """Describes an attention whose heads all stay, and whose forward takes the head size from its input.

    Its heads cannot be removed one by one. Channels of the residual stream can: the columns of `qkv` and the rows of
    `proj`.

    Args:
        name: Name of the adapter.
        classes: Qualified names of the classes that are served.
        pruned: Class of the module after channels were removed, whose forward takes the head size from the weights.

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
        """Returns None: no head can be removed without the others."""
        return None

    def stream_parts(self, path: str, module: Any) -> StreamParts:
        """Returns the columns of `qkv`, which read the stream, and the rows and bias of `proj`, which write to it."""
        bias = ((f"{path}.proj.bias", 0),) if module.proj.bias is not None else ()
        return StreamParts(((f"{path}.qkv.weight", 1),), ((f"{path}.proj.weight", 0), *bias), ((path, -1),))


STREAMS = (
    # MetaFormer's scale calls view(self.shape), which is (channels,) or (channels, 1, 1).
    Sized("timm-scale", ("timm.models.metaformer.Scale",), ("shape.0",)),
    # InceptionNeXt splits its input into 4 parts of these lengths.
    Sized(
        "timm-inception",
        ("timm.models.inception_next.InceptionDWConv2d",),
        tuple(f"split_indexes.{part}" for part in range(4)),
    ),
    Narrow("timm-talking-heads", ("timm.models.cait.TalkingHeadAttn",), NarrowTalkingHeadAttn),
    Narrow("timm-factor", ("timm.models.coat.FactorAttnConvRelPosEnc",), NarrowFactorAttn),
)
